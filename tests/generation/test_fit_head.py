"""Fitting a cost head: it finds a probability that is known, and a file with it is a guard."""

from pathlib import Path

import pytest
import torch

from bfpo.core.conversation import user_says
from bfpo.core.samples import Prompt, Sampling, Verdict
from bfpo.errors import DataError, RecipeError
from bfpo.generation.guards import fit_head
from bfpo.generation.guards.fit_head import answer_states, fit_cost_head
from bfpo.generation.in_process import TransformersEngine
from bfpo.generation.scripted import ScriptedEngine
from bfpo.judging.guarded_engine import guard_engine, load_guard
from bfpo.model.cost_head import CostHead


@pytest.fixture
def engine(make_model, tokenizer):
    sampling = Sampling(temperature=1.0, max_new_tokens=6)
    return TransformersEngine(make_model(), tokenizer, sampling, name="m", identity="i")


@pytest.fixture
def completions(engine):
    prompts = [Prompt(f"p{number}", user_says(f"red box {number}")) for number in range(10)]
    requests = [(prompt, sample) for prompt in prompts for sample in range(4)]
    return [completion for batch in engine.generate(requests) for completion in batch]


def judged(completion, safe):
    return Verdict(completion.prompt_id, completion.sample, completion.text_hash, "j", "1", safe, reason="?")


def test_states_are_those_after_each_token_of_the_answer(engine, completions):
    for completion, states in zip(completions[:4], answer_states(engine, completions[:4], -1), strict=True):
        prompt_ids, answer_ids = engine.tokens_of(completion)
        assert states.shape == (len(answer_ids), engine.model.config.hidden_size)
        with torch.inference_mode():
            output = engine.model(torch.tensor([[*prompt_ids, *answer_ids[:2]]]), output_hidden_states=True)
        torch.testing.assert_close(states[1], output.hidden_states[-1][0, -1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("units", [0, 8])
def test_it_finds_the_probability_of_each_state(engine, completions, monkeypatch, units):
    # Two kinds of states whose answers are unsafe with probabilities 0.1 and 0.9.
    draw = torch.Generator().manual_seed(0)
    kinds = [number % 2 for number in range(len(completions))]
    width = engine.model.config.hidden_size
    centers = torch.randn(2, width, generator=draw) * 3 + 5
    unsafe = [float(torch.rand((), generator=draw)) < (0.9 if kind else 0.1) for kind in kinds]
    states = [centers[kind] + 0.1 * torch.randn(60, width, generator=draw) for kind in kinds]
    monkeypatch.setattr(fit_head, "answer_states", lambda *_: states)
    monkeypatch.setattr(fit_head, "_STEPS", 200)
    fitted = fit_cost_head(
        engine,
        completions,
        [judged(completion, not flag) for completion, flag in zip(completions, unsafe, strict=True)],
        units=units,
    )
    # The head is calibrated on the held-out answers, of which there are eight.
    held_out = fitted.held_out // 60
    assert (held_out, fitted.tokens) == (8, 32 * 60)
    assert fitted.loss < fitted.constant_loss
    for kind in (0, 1):
        share = sum(flag for flag, other in zip(unsafe, kinds, strict=True) if other == kind) / kinds.count(kind)
        assert abs(float(fitted.head(centers[kind]).sigmoid()) - share) < 0.25
    again = fit_cost_head(
        engine, completions, [judged(c, not f) for c, f in zip(completions, unsafe, strict=True)], units=units
    )
    assert again.head.identity == fitted.head.identity


def test_it_needs_safe_and_unsafe_answers(engine, completions):
    with pytest.raises(DataError, match=r"of 32 answers to other prompts 0 are unsafe; a head needs both"):
        fit_cost_head(engine, completions, [judged(completion, True) for completion in completions])


def test_a_file_with_a_head_is_a_guard(engine, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    width = engine.model.config.hidden_size
    CostHead(-1, torch.ones(1, width), torch.zeros(1)).save(Path("head.safetensors"))
    Path("guard.yaml").write_text("guard: {kind: factor, head: head.safetensors, kappa: 2, top_k: 5}")
    guard = load_guard(Path("guard.yaml"))
    guarded = guard_engine(engine, engine.sampling, guard)
    assert guarded.settings_hash != engine.settings_hash
    assert guarded.model is engine.model
    with pytest.raises(RecipeError, match=r"guard.kind is 'factor', which needs a model in this process"):
        guard_engine(ScriptedEngine(lambda *_: ""), Sampling(), guard)
    for head in (CostHead(-1, torch.ones(1, 3), torch.zeros(1)), CostHead(9, torch.ones(1, width), torch.zeros(1))):
        head.save(Path("head.safetensors"))
        with pytest.raises(
            DataError, match=r"guard.head: head.safetensors is for layer -?\d and states of width \d+; m has"
        ):
            guard_engine(engine, engine.sampling, guard)
    Path("guard.yaml").write_text("guard: {kind: factor, head: h, samples: 2}")
    with pytest.raises(RecipeError, match=r"guard.samples: unknown key of 'factor'"):
        load_guard(Path("guard.yaml"))
    Path("guard.yaml").write_text("guard: {kind: mask, head: h}")
    with pytest.raises(RecipeError, match=r"guard: .*'factor'"):
        load_guard(Path("guard.yaml"))
