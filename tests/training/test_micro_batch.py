"""`per_device_train_batch_size: auto`: the largest micro-batch that fits, and the same steps."""

import mmap
import shutil
import time

import pytest
import torch
from safetensors.torch import load_file
from tests.training.test_run import TRAINER, recipe

from bfpo.core.files import write_jsonl
from bfpo.errors import RecipeError
from bfpo.training import micro_batch
from bfpo.training.run import run_training

GIB = 2**30
AUTO = {**TRAINER, "per_device_train_batch_size": "auto", "gradient_accumulation_steps": 6}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch, main_pairs, buffer_pairs):
    for name, pairs in {"main": main_pairs, "buffer": buffer_pairs}.items():
        write_jsonl(tmp_path / f"{name}.jsonl", ({**pair.to_row(), "stream": None} for pair in pairs))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def needs(monkeypatch):
    """Let a pass need 1 GiB for each row of the micro-batch, and return the sizes that were tried."""
    tried = []

    def measure(trainer, size, tokens):
        tried.append(size)
        return size * GIB

    monkeypatch.setattr(micro_batch, "_measure", measure)
    monkeypatch.setattr(micro_batch, "memory_limit", lambda device: 4 * GIB)
    return tried


def weights_of(run):
    return load_file(f"{run}/model.safetensors")


def equal(first, second) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


def test_largest_divisor_of_the_step_that_fits_is_taken(needs):
    run = run_training(recipe(trainer=AUTO))
    # Nine tenths of 4 GiB; 6 would need 6.
    assert run["micro_batch"]["size"] == 3
    assert run["micro_batch"]["accumulation"] == 2
    assert needs[:2] == [1, 2]


def test_trained_weights_are_those_of_the_same_numbers_in_the_recipe(needs):
    run_training(recipe(trainer=AUTO))
    numbers = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "output_dir": "runs/numbers"}
    run_training(recipe(trainer=AUTO | numbers))
    assert equal(weights_of("runs/toy"), weights_of("runs/numbers"))


def test_real_measurements_find_room_for_a_tiny_model(capsys):
    run = run_training(recipe(trainer=AUTO))
    assert run["micro_batch"]["size"] == 6
    assert 0 < run["micro_batch"]["peak"] <= run["micro_batch"]["limit"]
    assert "micro-batch: 6 x 1 rows of each stream; a step needs" in capsys.readouterr().out


def test_measuring_changes_no_weight(monkeypatch):
    monkeypatch.setattr(micro_batch, "memory_limit", lambda device: 10**15)
    measured = run_training(recipe(trainer=AUTO | {"output_dir": "runs/measured"}))
    size = measured["micro_batch"]["size"]
    numbers = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 6 // size}
    run_training(recipe(trainer=AUTO | numbers))
    assert equal(weights_of("runs/toy"), weights_of("runs/measured"))


def test_resumed_run_keeps_the_micro_batch_of_its_checkpoint(needs, monkeypatch):
    saving = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    run_training(recipe(trainer=AUTO | saving))
    expected = weights_of("runs/toy")
    shutil.rmtree("runs/toy/checkpoint-2")
    monkeypatch.setattr(micro_batch, "memory_limit", lambda device: 1000 * GIB)
    run = run_training(recipe(trainer=AUTO | saving | {"resume_from_checkpoint": True}))
    assert run["micro_batch"] == {"size": 3, "accumulation": 2, "peak": None, "limit": 900 * GIB}
    assert equal(weights_of("runs/toy"), expected)


def test_nothing_fits_says_what_to_lower(monkeypatch):
    monkeypatch.setattr(micro_batch, "memory_limit", lambda device: 1000)
    with pytest.raises(
        RecipeError, match=r"not even one row of each stream fits into .* GiB: lower layout.max_tokens"
    ):
        run_training(recipe(trainer=AUTO))


def test_without_accumulation_a_step_has_the_rows_of_the_default(needs):
    options = {name: value for name, value in AUTO.items() if name != "gradient_accumulation_steps"}
    run = run_training(recipe(trainer=options))
    assert run["micro_batch"]["size"] * run["micro_batch"]["accumulation"] == 8


def test_peak_memory_sees_what_was_freed_again():
    device = torch.device("cpu")
    before = micro_batch._memory(device)
    with micro_batch.peak_memory(device) as peak:
        # Mapped by hand: a tensor may lie in memory that earlier tests freed and the allocator still holds.
        with mmap.mmap(-1, 64 * 2**20) as held:
            held.write(bytes([1]) * len(held))
            time.sleep(0.1)
        time.sleep(0.1)
        assert micro_batch._memory(device) < before + 32 * 2**20
        assert peak() >= before + 48 * 2**20


def test_memory_limit_is_that_of_the_container(tmp_path, monkeypatch):
    file = tmp_path / "memory.max"
    file.write_text("1048576\n")
    monkeypatch.setattr(micro_batch, "_LIMITS", (file, tmp_path / "absent"))
    assert micro_batch.memory_limit(torch.device("cpu")) == 1048576
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert micro_batch.memory_limit(torch.device("cpu")) == 524288
    file.write_text("max\n")
    assert micro_batch.memory_limit(torch.device("cpu")) > 1048576


def test_sharded_weights_are_refused(needs, monkeypatch):
    monkeypatch.setattr("bfpo.training.stream_trainer.StreamTrainer.shards_weights", True)
    with pytest.raises(RecipeError, match="FSDP or DeepSpeed shards them; set the number that"):
        run_training(recipe(trainer=AUTO))
