"""What the policy answers before and after training, beside its margins."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from bfpo.config.loading import check_recipe
from bfpo.config.recipes import ProbeSection, TrainRecipe
from bfpo.core.conversation import user_says
from bfpo.core.files import write_jsonl
from bfpo.core.pairs import PreferencePair, SafetyLabels, TemplateInputs
from bfpo.core.tools import FrozenJson
from bfpo.generation.in_process import likeliest_answers
from bfpo.training.probe import Probe, show_probe
from bfpo.training.run import run_training

SAFE, UNSAFE = SafetyLabels(True, True), SafetyLabels(False, True)


def pairs(count):
    return [
        PreferencePair(user_says(f"red box {number}"), "yes", "no", SAFE if number % 2 else UNSAFE)
        for number in range(count)
    ]


@pytest.fixture
def policy(make_model):
    return make_model()


def scripted(*answers):
    """Return a function that answers every prompt with the next of the answers each time it is called."""
    remaining = list(answers)

    def answer(model, tokenizer, prompts, max_new_tokens):
        text = remaining.pop(0)
        return {prompt.prompt_id: text(prompt) if callable(text) else text for prompt in prompts}

    return answer


def probe(policy, tokenizer, *answers, prompts=6, held_out=20):
    asked = Probe(pairs(held_out), ProbeSection(prompts=prompts), scripted(*answers), policy, tokenizer)
    return asked.finish(policy)


def refuse_harmful(prompt):
    return "I'm sorry, no." if prompt.kind == "harmful" else "Take it."


def test_half_of_the_prompts_have_an_unsafe_answer_and_refusals_are_counted(policy, tokenizer):
    result = probe(policy, tokenizer, "Take it.", refuse_harmful)
    assert [prompt.kind for prompt in result.prompts] == ["harmful"] * 3 + ["benign"] * 3
    counts = result.to_json()
    assert counts["harmful"] == {"prompts": 3, "refused_before": 0, "refused_after": 3}
    assert counts["benign"] == {"prompts": 3, "refused_before": 0, "refused_after": 0}
    assert counts["changed_answers"] == 3


def test_a_prompt_with_an_unsafe_answer_in_any_pair_is_harmful_and_asked_once(policy, tokenizer):
    held_out = [
        PreferencePair(user_says("red box"), "yes", f"no {n}", labels) for n, labels in enumerate((SAFE, UNSAFE))
    ]
    tools = TemplateInputs(tools=FrozenJson.freeze([{"type": "function", "function": {"name": "lift"}}]))
    held_out.append(replace(held_out[0], inputs=tools))
    asked = Probe(held_out, ProbeSection(prompts=4), scripted("a", "a"), policy, tokenizer).finish(policy)
    assert [(prompt.kind, prompt.tools is None) for prompt in asked.prompts] == [("harmful", True), ("benign", False)]


def test_the_prompts_are_always_the_same(policy, tokenizer):
    first, second = (probe(policy, tokenizer, "a", "a", held_out=count) for count in (20, 20))
    assert first.prompts == second.prompts


@pytest.mark.parametrize(
    ("after", "agreement", "is_noted"),
    [("Take it.", 0.9, True), (refuse_harmful, 0.9, False), ("Take it.", 0.5, False), ("Take it.", None, False)],
)
def test_margins_that_moved_without_answers_are_noted(policy, tokenizer, capsys, after, agreement, is_noted):
    show_probe(probe(policy, tokenizer, "Take it.", after), agreement)
    output = " ".join(capsys.readouterr().out.split())
    assert ("the policy's own answers did not" in output) is is_noted
    assert "refused before" in output


def test_prompts_that_cannot_be_asked_are_left_out(policy, tokenizer):
    asked = Probe(pairs(4), ProbeSection(), lambda *arguments: {}, policy, tokenizer)
    assert asked.finish(policy).to_json()["harmful"]["prompts"] == 0


def test_the_mode_of_the_model_stays(policy, tokenizer):
    policy.train()
    asked = Probe(pairs(4), ProbeSection(max_new_tokens=2), likeliest_answers, policy, tokenizer)
    assert policy.training
    assert asked.finish(policy).changed == 0


def test_a_run_reports_the_probe_and_trains_as_without_it(tmp_path, main_pairs, capsys):
    rows = [replace(pair, provenance=replace(pair.provenance, stream=None)).to_row() for pair in main_pairs]
    write_jsonl(tmp_path / "pairs.jsonl", rows)
    weights = []
    for name, answers in (("with", likeliest_answers), ("without", None)):
        recipe = {
            "model": {"new": {"shape": "nano", "vocab_size": 300}},
            "data": [{"path": str(tmp_path / "pairs.jsonl")}],
            "holdout": 0.4,
            "loss": {"name": "bfpo", "beta": 0.5},
            "probe": {"prompts": 4, "max_new_tokens": 3},
            "trainer": {
                "output_dir": str(tmp_path / name),
                "max_steps": 2,
                "per_device_train_batch_size": 2,
                "save_strategy": "no",
                "use_cpu": True,
            },
        }
        run = run_training(check_recipe(recipe, TrainRecipe, "toy"), answers=answers)
        assert ("probe" in run) is (name == "with")
        weights.append(load_file(tmp_path / name / "model.safetensors"))
    assert all(torch.equal(tensor, weights[1][key]) for key, tensor in weights[0].items())
    assert "decoded in whole batches" not in capsys.readouterr().out
    written = json.loads((tmp_path / "with/run.json").read_text())["probe"]
    assert written["harmful"]["prompts"] + written["benign"]["prompts"] > 0
