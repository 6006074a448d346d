"""Supervised fine-tuning: chats and safer answers, packed rows, selected layers."""

import contextlib
import json
import shutil
from pathlib import Path

import pyarrow
import pytest
import torch
from pyarrow import parquet
from safetensors.torch import load_file

from bfpo.config.loading import check_recipe
from bfpo.config.recipes import ModelSection, SftRecipe
from bfpo.core.files import write_jsonl
from bfpo.data.demonstrations import prepare_demonstrations
from bfpo.errors import RecipeError
from bfpo.model.load import load_model, load_tokenizer
from bfpo.training.run_sft import run_sft

WORDS = ("red box", "green ball", "blue door", "round lamp", "small thing", "large place")


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory, make_model, tokenizer):
    """A run of the unchanged recipe: its folder and what `run_sft` returned."""
    folder = tmp_path_factory.mktemp("finished")
    make_model(shape="nano").save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    write_data(folder)
    with contextlib.chdir(folder):
        return folder, run_sft(recipe())


@pytest.fixture(autouse=True)
def baseline(finished_run, tmp_path, monkeypatch):
    """Work in a copy of the finished run's folder; returns what `run_sft` returned."""
    folder, run = finished_run
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return run


def write_data(folder):
    """Write chats in the hub's format, and rows of PKU-SafeRLHF."""
    chats = []
    for number in range(12):
        turns = []
        for turn in range(1 + number % 3):
            turns.append({"role": "user", "content": f"which {WORDS[turn]} {number}"})
            turns.append({"role": "assistant", "content": " ".join(WORDS[: 1 + (number + turn) % 5])})
        chats.append({"prompt": turns[0]["content"], "prompt_id": str(number), "messages": turns})
    parquet.write_table(pyarrow.Table.from_pylist(chats), folder / "chats.parquet")
    write_jsonl(
        folder / "pku.jsonl",
        (
            {
                "prompt": f"near which {number}",
                "response_0": WORDS[number % 6],
                "response_1": WORDS[(number + 1) % 6],
                "safer_response_id": number % 2,
            }
            for number in range(10)
        ),
    )


def recipe(**changes):
    content = {
        "model": {"path": "base"},
        "data": [
            {"adapter": "demonstrations", "path": "chats.parquet"},
            {"adapter": "pku_safer", "path": "pku.jsonl", "fraction": 0.5, "sample": "head"},
        ],
        "train_only": ["down_proj"],
        "trainer": {
            "output_dir": "runs/sft",
            "max_steps": 2,
            "per_device_train_batch_size": 8,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "save_strategy": "no",
            "use_cpu": True,
        },
    }
    return check_recipe(content | changes, SftRecipe, "sft")


def nats_per_token(model, tokenizer, demonstrations):
    """Return the mean over the tokens of all answers, from the plain logits of each conversation up to the answer."""
    total, tokens = 0.0, 0
    for demonstration in demonstrations:
        last_turn = {"role": "assistant", "content": demonstration.completion}
        turns = [*(message.to_row() for message in demonstration.prompt), last_turn]
        for number, turn in enumerate(turns):
            if turn["role"] != "assistant":
                continue
            prompt = tokenizer.apply_chat_template(turns[:number], tokenize=False, add_generation_prompt=True)
            answer = turn["content"] + tokenizer.eos_token
            before, ids = (
                tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, prompt + answer)
            )
            with torch.no_grad():
                logps = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
            for index in range(len(before), len(ids)):
                total -= float(logps[index - 1, ids[index]])
                tokens += 1
    return total / tokens


def test_the_loss_is_the_mean_over_the_tokens_of_every_answer():
    run_sft(recipe(trainer=recipe().trainer | {"max_steps": 1, "per_device_train_batch_size": 17}))
    first = json.loads(Path("runs/sft/metrics.jsonl").read_text().splitlines()[0])
    parts = prepare_demonstrations(recipe().data, holdout=0.0)
    demonstrations = [demonstration for part in parts for demonstration in part.train]
    assert len(demonstrations) == 12 + 5
    section = ModelSection(path="base")
    expected = nats_per_token(load_model(section).eval(), load_tokenizer(section), demonstrations)
    assert first["loss"] == pytest.approx(expected, rel=1e-5)


def test_only_the_selected_layers_change(baseline):
    before, after = load_file("base/model.safetensors"), load_file("runs/sft/model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "down_proj" in name}
    assert baseline["trained"]["parameters"] == sum(before[name].numel() for name in changed)


@pytest.mark.parametrize("layout", [{"max_tokens_per_pack": 40}, {"kind": "padded"}])
def test_packs_and_padding_do_not_change_the_weights(layout):
    expected = load_file("runs/sft/model.safetensors")
    run_sft(recipe(layout=layout))
    weights = load_file("runs/sft/model.safetensors")
    for name in expected:
        torch.testing.assert_close(weights[name], expected[name], rtol=1e-4, atol=1e-5)


def test_completions_are_counted_by_source():
    run = run_sft(recipe(holdout=0.3))
    chats, safer = run["data"]
    assert (chats["pairs_taken"], safer["pairs_read"], safer["pairs_taken"]) == (12, 10, 5)
    assert safer["license"] == "CC-BY-NC-4.0"
    assert run["evaluation"]["eval_loss"] > 0


def test_an_unknown_best_metric_is_refused_before_training():
    trainer = recipe().trainer | {"output_dir": "runs/best", "eval_strategy": "steps"}
    with pytest.raises(RecipeError, match="metric_for_best_model is 'accuracy'; expected eval_loss"):
        run_sft(recipe(trainer=trainer | {"metric_for_best_model": "accuracy"}, holdout=0.3), dry_run=True)
    run_sft(recipe(trainer=trainer | {"metric_for_best_model": "loss"}, holdout=0.3), dry_run=True)
