"""The guard `factor`: exact on a token tree, and in the engine equal to plain forward passes over each candidate."""

import itertools
from functools import partial

import numpy as np
import pytest
import torch

from bfpo.core.conversation import user_says
from bfpo.core.samples import Prompt, Sampling, sample_seed
from bfpo.errors import DataError, ModelError
from bfpo.generation.decoding import Decoder
from bfpo.generation.guards.factor import FactorGuard
from bfpo.generation.in_process import TransformersEngine
from bfpo.generation.noise import TokenNoise
from bfpo.generation.slots import UnsupportedModel
from bfpo.model.cost_head import CostHead, load_cost_head

TOKENS, LENGTH = 3, 5
PROMPTS = [Prompt(f"p{number}", user_says(f"small box {'red ' * number}")) for number in range(4)]
REQUESTS = [(prompt, sample) for prompt in PROMPTS for sample in range(2)]


def tree(seed):
    """Return the model's next-token probabilities by prefix, the unsafe answers, and P(unsafe) by prefix."""
    draw = np.random.default_rng(seed)
    prefixes = [prefix for size in range(LENGTH) for prefix in itertools.product(range(TOKENS), repeat=size)]
    policy = {prefix: draw.dirichlet(np.ones(TOKENS)) for prefix in prefixes}
    value = {answer: float(draw.random() < 0.4) for answer in itertools.product(range(TOKENS), repeat=LENGTH)}
    unsafe = dict(value)
    for prefix in reversed(prefixes):
        value[prefix] = sum(policy[prefix][token] * value[*prefix, token] for token in range(TOKENS))
    return policy, unsafe, value


def guarded(policy, value, kappa):
    """Return the next-token probabilities of the guard by prefix, whose head looks P(unsafe) up."""
    guard = FactorGuard(torch.logit, (1,), "exact", kappa, TOKENS)

    def peek(prefix, candidates, layers):
        return torch.tensor([[value[*prefix, token] for token in row] for row in candidates.tolist()]).double()

    return {
        prefix: guard.adjust(torch.tensor(probabilities)[None].log(), partial(peek, prefix)).softmax(-1)[0].numpy()
        for prefix, probabilities in policy.items()
    }


def answer_probabilities(policy, answers):
    return {
        answer: np.prod([policy[answer[:size]][token] for size, token in enumerate(answer)]) for answer in answers
    }


@pytest.mark.parametrize("kappa", [0.3, 1.0, 3.0, 60.0])
def test_with_an_exact_head_it_is_the_closest_policy_with_its_share_of_unsafe_answers(kappa):
    policy, unsafe, value = tree(3)
    model = answer_probabilities(policy, unsafe)
    optimum = {answer: model[answer] * np.exp(-kappa * cost) for answer, cost in unsafe.items()}
    total = sum(optimum.values())
    assert total == pytest.approx(1 - value[()] * -np.expm1(-kappa), abs=1e-12)
    for answer, probability in answer_probabilities(guarded(policy, value, kappa), unsafe).items():
        assert abs(probability - optimum[answer] / total) < 1e-12


def test_subtracting_from_the_logits_is_another_policy():
    policy, unsafe, value = tree(3)
    naive = {
        prefix: probabilities * np.exp(-3.0 * np.array([value[*prefix, token] for token in range(TOKENS)]))
        for prefix, probabilities in policy.items()
    }
    naive = {prefix: weights / weights.sum() for prefix, weights in naive.items()}
    guard = answer_probabilities(guarded(policy, value, 3.0), unsafe)
    assert max(abs(answer_probabilities(naive, unsafe)[answer] - guard[answer]) for answer in unsafe) > 1e-3


@pytest.fixture(scope="module")
def model(make_model):
    return make_model().double().eval()


def make_head(model, *layers, units=0):
    draw = torch.Generator().manual_seed(0)
    width = len(layers) * model.config.hidden_size
    normal = partial(torch.randn, generator=draw)
    if units:
        return CostHead(layers, normal(1, units), normal(1), normal(units, width), normal(units))
    return CostHead(layers, 4 * normal(1, width), normal(1))


def engine_of(model, tokenizer, max_batch_tokens=4096, **sampling):
    settings = Sampling(**{"max_new_tokens": 6, "temperature": 1.0} | sampling)
    return TransformersEngine(model, tokenizer, settings, name="m", identity="i", max_batch_tokens=max_batch_tokens)


def texts(engine, requests=REQUESTS):
    return {completion.key: completion.text for batch in engine.generate(requests) for completion in batch}


def expected_tokens(engine, head, prompt, sample, *, kappa, top_k):
    """Return the tokens of an answer by a forward pass without a cache over each candidate."""
    ids = engine._prompt_ids(prompt)
    settings, tokens = engine.sampling, []
    noise = TokenNoise(engine.model.config.vocab_size, torch.device("cpu"))
    seed = sample_seed(settings.seed, prompt.prompt_id, sample)
    while len(tokens) < settings.max_new_tokens and not set(tokens[-1:]) & set(engine._end_ids):
        scores = engine.model(torch.tensor([[*ids, *tokens]])).logits[0, -1] / (settings.temperature or 1.0)
        guarded_scores = torch.full_like(scores, -torch.inf)
        for token in scores.topk(top_k).indices.tolist():
            output = engine.model(torch.tensor([[*ids, *tokens, token]]), output_hidden_states=True)
            states = torch.cat([output.hidden_states[layer][0, -1] for layer in head.layers])
            unsafe = head(states).sigmoid()
            guarded_scores[token] = scores[token] + torch.log(1 - unsafe * (1 - np.exp(-kappa)))
        if settings.temperature > 0:
            guarded_scores = noise.add(guarded_scores[None], [seed], [len(tokens)])[0]
        tokens.append(int(guarded_scores.argmax()))
    return tokens


@torch.inference_mode()
@pytest.mark.parametrize(
    ("layers", "units", "sampling"),
    [((-1,), 0, {}), ((1,), 5, {"seed": 3}), ((2,), 0, {"temperature": 0.0}), ((1, -1), 3, {})],
)
def test_candidates_are_read_as_plain_forward_passes_read_them(model, tokenizer, layers, units, sampling):
    head = make_head(model, *layers, units=units)
    guard = FactorGuard.by(head, kappa=3.0, top_k=4)
    bare = engine_of(model, tokenizer, **sampling)
    engine = bare.behind(guard)
    answers = {
        (answer.prompt.prompt_id, answer.sample): list(answer.token_ids)
        for batch in engine.continue_answers([_beginning(*request) for request in REQUESTS])
        for answer in batch
    }
    for prompt, sample in REQUESTS[::3]:
        expected = expected_tokens(engine, head, prompt, sample, kappa=3.0, top_k=4)
        assert answers[prompt.prompt_id, sample] == expected
    assert texts(engine) != texts(bare)


def _beginning(prompt, sample):
    from bfpo.generation.in_process import TokenAnswer

    return TokenAnswer(prompt, sample)


@pytest.mark.parametrize("sampling", [{}, {"top_p": 0.8}])
def test_answers_do_not_depend_on_the_batch(model, tokenizer, sampling):
    guard = FactorGuard.by(make_head(model, -1), kappa=2.0, top_k=8)
    together = texts(engine_of(model, tokenizer, **sampling).behind(guard))
    small = engine_of(model, tokenizer, max_batch_tokens=1, **sampling).behind(guard)
    assert texts(small, REQUESTS[::-1]) == together
    assert texts(engine_of(model, tokenizer, seed=1, **sampling).behind(guard)) != together


def test_at_kappa_0_nothing_changes_to_the_bit(model, tokenizer):
    guard = FactorGuard.by(make_head(model, -1), kappa=0.0, top_k=1)
    for sampling in ({}, {"top_p": 0.7}, {"temperature": 0.0}):
        bare = engine_of(model, tokenizer, **sampling)
        assert texts(bare.behind(guard)) == texts(bare)
    scores = torch.randn(2, 5)
    assert guard.adjust(scores, None) is scores


def test_every_setting_is_in_the_hash(model, tokenizer):
    bare = engine_of(model, tokenizer)
    head, other = make_head(model, -1), make_head(model, 1)
    guards = [
        FactorGuard.by(head, kappa=1.0, top_k=8),
        FactorGuard.by(head, kappa=2.0, top_k=8),
        FactorGuard.by(head, kappa=1.0, top_k=9),
        FactorGuard.by(other, kappa=1.0, top_k=8),
        FactorGuard.by(make_head(model, -1, units=5), kappa=1.0, top_k=8),
    ]
    hashes = {engine.settings_hash for engine in (bare, *(bare.behind(guard) for guard in guards))}
    assert len(hashes) == 6
    assert bare.behind(guards[0]).former_settings_hash not in hashes | {bare.former_settings_hash}


def test_a_model_whose_cache_cannot_be_edited_is_refused(model, tokenizer, monkeypatch, capsys):
    def refuse(self, token_ids):
        raise UnsupportedModel("a layer caches its state as a convolution")

    monkeypatch.setattr(Decoder, "check", refuse)
    engine = engine_of(model, tokenizer).behind(FactorGuard.by(make_head(model, -1), kappa=1.0, top_k=8))
    with pytest.raises(ModelError, match="m: the guard factor needs a cache in which candidates can be read"):
        texts(engine)
    assert "a layer caches its state as a convolution" in capsys.readouterr().out


def test_a_head_is_saved_and_read(model, tmp_path):
    for layers, units in (((-1,), 0), ((1, -1), 5)):
        states = torch.randn(3, 2, len(layers) * model.config.hidden_size).double()
        head = make_head(model, *layers, units=units)
        head.save(tmp_path / "head.safetensors")
        loaded = load_cost_head(tmp_path / "head.safetensors")
        assert torch.equal(loaded(states), head(states))
        assert (loaded.layers, loaded.identity, loaded.width) == (layers, head.identity, model.config.hidden_size)
        assert loaded.is_linear == (units == 0)
    with pytest.raises(DataError, match="no such file; expected a cost head"):
        load_cost_head(tmp_path / "none")
    (tmp_path / "text").write_text("a head")
    with pytest.raises(DataError, match="not a safetensors file"):
        load_cost_head(tmp_path / "text")
    CostHead((-1,), torch.zeros(1, 4), torch.zeros(2)).save(tmp_path / "head.safetensors")
    with pytest.raises(DataError, match=r"'bias': \(2,\).*expected the metadata `layers`, and weight \(1, n\)"):
        load_cost_head(tmp_path / "head.safetensors")
