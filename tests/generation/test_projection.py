"""The guard `project`: the closed form, and the engine with it beside plain forward passes."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bfpo.core.conversation import user_says
from bfpo.core.samples import Prompt, Sampling, sample_seed
from bfpo.errors import ModelError, RecipeError
from bfpo.generation.decoding import Decoder
from bfpo.generation.guards.project import Projection
from bfpo.generation.in_process import TransformersEngine
from bfpo.generation.noise import TokenNoise
from bfpo.generation.scripted import ScriptedEngine
from bfpo.generation.slots import UnsupportedModel
from bfpo.judging.guarded_engine import ProjectSection, guard_engine
from bfpo.model.cost_head import CostHead

# All have their first tokens in common.
PROMPTS = [Prompt(f"p{number}", user_says(f"small red box near {'a ' * number}")) for number in range(5)]
REQUESTS = [(prompt, sample) for prompt in PROMPTS for sample in range(2)]


def linear_head(width, layer=-1, seed=0):
    draw = torch.Generator().manual_seed(seed)
    # Small, so that the way to the safe side is long, and answers change.
    weights = 0.05 * torch.randn(1, width, generator=draw, dtype=torch.float64)
    return CostHead((layer,), weights, torch.randn(1, generator=draw, dtype=torch.float64))


@given(st.integers(0, 10**6), st.floats(0.01, 0.99))
def test_states_are_moved_the_shortest_way_to_the_safe_side(seed, at_most):
    head, states = linear_head(6, seed=seed), torch.randn(20, 6, dtype=torch.float64)
    moved, bound = Projection(head, at_most).move(states), math.log(at_most / (1 - at_most))
    before, after = head(states), head(moved)
    torch.testing.assert_close(after, before.clamp_max(bound), rtol=0, atol=1e-9)
    # Those on the safe side don't move at all.
    assert torch.equal(moved[before <= bound], states[before <= bound])
    # The distance to a half-space is the excess over the norm.
    distance = (before - bound).clamp_min(0) / head.weight.norm()
    torch.testing.assert_close((moved - states).norm(dim=-1), distance, rtol=0, atol=1e-9)


@pytest.fixture(scope="module")
def model(make_model):
    return make_model().double().eval()


def engine_of(model, tokenizer, max_batch_tokens=4096, **sampling):
    settings = Sampling(**{"max_new_tokens": 6, "temperature": 1.0} | sampling)
    options = {"name": "m", "identity": "i", "max_batch_tokens": max_batch_tokens}
    return TransformersEngine(model, tokenizer, settings, **options)


def texts(engine, requests=REQUESTS):
    return {completion.key: completion.text for batch in engine.generate(requests) for completion in batch}


def expected_text(engine, guard, prompt, sample):
    """Return an answer by passes without a cache, in which all positions that predict a token of it are moved."""
    prompt_ids = engine._prompt_ids(prompt)
    first, tokens, model = len(prompt_ids) - 1, [], engine.model
    noise = TokenNoise(model.config.vocab_size, torch.device("cpu"))
    seed = sample_seed(engine.sampling.seed, prompt.prompt_id, sample)

    def move(module, inputs, output):
        return torch.cat([output[:, :first], guard.move(output[:, first:])], dim=1)

    while len(tokens) < engine.sampling.max_new_tokens and not set(tokens[-1:]) & set(engine._end_ids):
        decoder = model.get_decoder()
        (layer,) = guard.head.layers
        module = decoder.norm if layer == -1 else decoder.layers[layer - 1]
        handle = module.register_forward_hook(move)
        logits = model(torch.tensor([[*prompt_ids, *tokens]]), use_cache=False).logits[:, -1]
        handle.remove()
        tokens.append(int(noise.add(logits.clone(), [seed], [len(tokens)]).argmax()))
    return engine.tokenizer.decode([token for token in tokens if token not in engine._end_ids])


@torch.inference_mode()
@pytest.mark.parametrize("layer", [-1, 1])
def test_the_engine_moves_the_states_that_tokens_are_predicted_from(model, tokenizer, layer):
    guard = Projection(linear_head(model.config.hidden_size, layer), 1e-6)
    bare = engine_of(model, tokenizer)
    answers = texts(bare.behind(guard))
    for prompt, sample in REQUESTS[::3]:
        assert answers[prompt.prompt_id, sample] == expected_text(bare, guard, prompt, sample)
    assert answers != texts(bare)


@pytest.mark.parametrize("layer", [-1, 1])
def test_answers_do_not_depend_on_the_batch_or_the_way_of_decoding(model, tokenizer, layer, monkeypatch, capsys):
    guard = Projection(linear_head(model.config.hidden_size, layer), 1e-6)
    together = texts(engine_of(model, tokenizer).behind(guard))
    assert texts(engine_of(model, tokenizer, max_batch_tokens=1).behind(guard), REQUESTS[::-1]) == together
    assert texts(engine_of(model, tokenizer, seed=1).behind(guard)) != together

    def refuse(self, token_ids):
        raise UnsupportedModel("a layer caches its state as a convolution")

    monkeypatch.setattr(Decoder, "check", refuse)
    assert texts(engine_of(model, tokenizer).behind(guard)) == together


def test_the_model_is_as_before_between_batches_and_after(model, tokenizer):
    bare = engine_of(model, tokenizer, max_batch_tokens=60)
    guarded = bare.behind(Projection(linear_head(model.config.hidden_size), 1e-6))
    expected = texts(bare)
    for _ in guarded.generate(REQUESTS):
        assert texts(bare, REQUESTS[:1]) == {("p0", 0): expected["p0", 0]}
    assert texts(bare) == expected


def test_a_bound_that_no_state_exceeds_changes_nothing_to_the_bit(model, tokenizer):
    head = linear_head(model.config.hidden_size)
    # Far on the safe side.
    safe = CostHead((-1,), head.weight, torch.tensor([-1e6], dtype=torch.float64))
    bare = engine_of(model, tokenizer)
    assert texts(bare.behind(Projection(safe, 0.5))) == texts(bare)


def test_every_setting_is_in_the_hash_and_the_head_must_be_linear(model, tokenizer, tmp_path):
    width, bare = model.config.hidden_size, engine_of(model, tokenizer)
    guards = [
        Projection(linear_head(width), 0.5),
        Projection(linear_head(width), 0.4),
        Projection(linear_head(width, seed=1), 0.5),
        Projection(linear_head(width, layer=1), 0.5),
    ]
    assert len({bare.settings_hash, *(bare.behind(guard).settings_hash for guard in guards)}) == 5
    path = tmp_path / "head.safetensors"
    CostHead((-1,), torch.ones(1, 2), torch.ones(1), torch.ones(2, width), torch.ones(2)).save(path)
    section = ProjectSection(kind="project", head=str(path))
    with pytest.raises(
        ModelError, match=r"project needs a linear head on one layer, and this one has a hidden layer; .*units: 0 "
    ):
        guard_engine(bare, bare.sampling, section)
    with pytest.raises(RecipeError, match=r"guard.kind is 'project', which needs a model in this process"):
        guard_engine(ScriptedEngine(lambda *_: ""), Sampling(), section)
    linear_head(width).save(path)
    assert guard_engine(bare, bare.sampling, section).settings_hash == bare.behind(guards[0]).settings_hash
