"""Checkpoints that are whole, half written, damaged, or of another run."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from bfpo.config.loading import check_recipe
from bfpo.config.recipes import TrainRecipe
from bfpo.core.files import file_hash, write_jsonl
from bfpo.core.pairs import SafetyLabels
from bfpo.errors import RecipeError, TrainingError
from bfpo.training.checkpoints import MARK, checkpoint_fault, newest_complete
from bfpo.training.run import run_training


@pytest.fixture
def run(tmp_path, monkeypatch, main_pairs, buffer_pairs):
    """Return a function that runs a toy recipe in `runs/toy`, saving after every second step."""
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "main.jsonl", (p.to_row() for p in main_pairs))
    write_jsonl(tmp_path / "fewer.jsonl", (p.to_row() for p in main_pairs[1:]))
    write_jsonl(tmp_path / "buffer.jsonl", (p.to_row() for p in buffer_pairs))

    relabeled = [replace(p, labels=SafetyLabels(True, True)) for p in main_pairs]
    write_jsonl(tmp_path / "relabeled.jsonl", (p.to_row() for p in relabeled))

    def run(data="main.jsonl", model_seed=42, **trainer):
        options = {
            "output_dir": "runs/toy",
            "max_steps": 7,
            "save_steps": 2,
            "per_device_train_batch_size": 4,
            "logging_steps": 1,
            "learning_rate": 1e-3,
            "use_cpu": True,
        }
        content = {
            "model": {"new": {"vocab_size": 300, "seed": model_seed}},
            "data": [{"path": data}],
            "buffer": [{"path": "buffer.jsonl"}],
            "loss": {"beta": 0.5},
            "trainer": options | trainer,
        }
        return run_training(check_recipe(content, TrainRecipe, "toy"))

    return run


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    return tmp_path_factory.mktemp("kept") / "runs"


@pytest.fixture
def unbroken(run, kept):
    """Leave what a run without a break leaves; it is made once and copied."""
    if kept.exists():
        shutil.copytree(kept, "runs")
    else:
        run()
        shutil.copytree("runs", kept)


OUT = Path("runs/toy")


def losses() -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (OUT / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]


def test_a_half_written_checkpoint_is_skipped_and_the_end_has_the_same_bits(run, unbroken, capsys):
    weights, lossless = file_hash(OUT / "model.safetensors"), losses()
    for broken in ("checkpoint-7", "checkpoint-6"):
        (OUT / broken / MARK).unlink()
    (OUT / "checkpoint-4" / "optimizer.pt").write_bytes(b"half")
    with (OUT / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "half')
    run(resume_from_checkpoint=True)
    said = capsys.readouterr().out
    assert "checkpoint-7 is skipped: it was not written completely" in said
    assert "checkpoint-4 is skipped: optimizer.pt has 4 bytes" in said
    assert "going on from runs/toy/checkpoint-2" in said
    assert file_hash(OUT / "model.safetensors") == weights
    assert losses() == lossless
    assert newest_complete(OUT) == OUT / "checkpoint-7"


def test_resuming_where_there_is_nothing_starts_at_the_beginning(run, capsys):
    run(resume_from_checkpoint=True)
    assert "starting at step 0" in capsys.readouterr().out
    assert [step for step, _ in losses()] == [1, 2, 3, 4, 5, 6, 7]


def test_a_named_checkpoint_that_is_not_whole_is_refused(run, unbroken):
    (OUT / "checkpoint-4" / "model.safetensors").unlink()
    with pytest.raises(TrainingError, match=r"checkpoint-4 can't be resumed from: model.safetensors is missing"):
        run(resume_from_checkpoint="runs/toy/checkpoint-4")
    assert checkpoint_fault(OUT / "checkpoint-2") is None


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt"])
def test_damage_that_keeps_the_size_gives_a_message(run, unbroken, name):
    file = OUT / "checkpoint-7" / name
    file.write_bytes(b"\xff" * file.stat().st_size)
    with pytest.raises(TrainingError, match=r"checkpoint-7 can't be read .*delete it to go on from the one before"):
        run(resume_from_checkpoint=True, max_steps=9)
    shutil.rmtree(OUT / "checkpoint-7")
    assert run(resume_from_checkpoint=True, max_steps=9)["steps"] == 9


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 7}, "seed was 42, now it is 7"),
        ({"per_device_train_batch_size": 2}, "per_device_train_batch_size was 4, now it is 2"),
        ({"data": "fewer.jsonl"}, "data was "),
        ({"data": "relabeled.jsonl"}, "data was "),
        ({"model_seed": 1}, "start model was "),
    ],
)
def test_going_on_with_another_plan_is_refused(run, unbroken, change, named):
    with pytest.raises(RecipeError, match=f"can't be continued: {named}"):
        run(resume_from_checkpoint=True, **change)


def test_a_checkpoint_tells_what_it_belongs_to(unbroken):
    mark = json.loads((OUT / "checkpoint-4" / MARK).read_text())
    assert mark["step"] == 4
    assert mark["run"]["world_size"] == 1
    assert mark["files"]["model.safetensors"] == (OUT / "checkpoint-4" / "model.safetensors").stat().st_size


def test_going_on_into_another_folder_gives_the_same_bits(run, unbroken):
    weights = file_hash(OUT / "model.safetensors")
    run(output_dir="runs/other", resume_from_checkpoint="runs/toy/checkpoint-4")
    assert file_hash(Path("runs/other/model.safetensors")) == weights
    lines = [json.loads(line) for line in Path("runs/other/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [5, 6, 7]
