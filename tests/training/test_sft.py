"""Supervised fine-tuning at full strength: chats and safer answers, packed, selected layers."""

import json
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
from bfpo.model.load import load_model, load_tokenizer
from bfpo.training.run_sft import run_sft

WORDS = ("red box", "green ball", "blue door", "round lamp", "small thing", "large place")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch, make_model, tokenizer):
    """Work in a folder with a tiny model, chats as the hub has them, and rows of PKU-SafeRLHF."""
    monkeypatch.chdir(tmp_path)
    make_model(shape="nano").save_pretrained("base")
    tokenizer.save_pretrained("base")
    chats = []
    for number in range(12):
        turns = []
        for turn in range(1 + number % 3):
            turns.append({"role": "user", "content": f"which {WORDS[turn]} {number}"})
            turns.append({"role": "assistant", "content": " ".join(WORDS[: 1 + (number + turn) % 5])})
        chats.append({"prompt": turns[0]["content"], "prompt_id": str(number), "messages": turns})
    parquet.write_table(pyarrow.Table.from_pylist(chats), "chats.parquet")
    write_jsonl(
        tmp_path / "pku.jsonl",
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
    return tmp_path


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
    for item in demonstrations:
        turns = [message._asdict() for message in item.prompt] + [{"role": "assistant", "content": item.completion}]
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
            for place in range(len(before), len(ids)):
                total -= float(logps[place - 1, ids[place]])
                tokens += 1
    return total / tokens


def test_the_loss_is_the_mean_over_the_tokens_of_every_answer():
    run_sft(recipe(trainer=recipe().trainer | {"max_steps": 1, "per_device_train_batch_size": 17}))
    first = json.loads(Path("runs/sft/metrics.jsonl").read_text().splitlines()[0])
    parts = prepare_demonstrations(recipe().data, holdout=0.0)
    items = [item for part in parts for item in part.train]
    assert len(items) == 12 + 5
    section = ModelSection(path="base")
    expected = nats_per_token(load_model(section).eval(), load_tokenizer(section), items)
    assert first["loss"] == pytest.approx(expected, rel=1e-5)


def test_only_the_selected_layers_change():
    run = run_sft(recipe())
    before, after = load_file("base/model.safetensors"), load_file("runs/sft/model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "down_proj" in name}
    assert run["trained"]["parameters"] == sum(before[name].numel() for name in changed)


@pytest.mark.parametrize("layout", [{"max_tokens_per_pack": 40}, {"kind": "padded"}])
def test_packs_and_padding_change_nothing(layout):
    run_sft(recipe())
    whole = load_file("runs/sft/model.safetensors")
    run_sft(recipe(layout=layout))
    other = load_file("runs/sft/model.safetensors")
    for name in whole:
        torch.testing.assert_close(other[name], whole[name], rtol=1e-4, atol=1e-5)


def test_what_was_read_is_counted_by_source():
    run = run_sft(recipe(holdout=0.3))
    chats, safer = run["data"]
    assert (chats["pairs_taken"], safer["pairs_read"], safer["pairs_taken"]) == (12, 10, 5)
    assert safer["license"] == "CC-BY-NC-4.0"
    assert run["evaluation"]["eval_loss"] > 0
