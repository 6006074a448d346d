"""Checkpoints that are complete, half written, damaged, or of another run."""

import contextlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import PartialState

from bfpo.config.loading import check_recipe
from bfpo.config.recipes import TrainRecipe
from bfpo.core.files import file_hash, write_jsonl
from bfpo.core.pairs import PairSignals, SafetyLabels
from bfpo.errors import RecipeError, TrainingError
from bfpo.losses.pairwise import BFPO
from bfpo.training.checkpoints import MARK, check_same_run, checkpoint_fault, newest_complete, write_mark
from bfpo.training.run import run_training
from bfpo.training.stream_trainer import StreamTrainer

OUT = Path("runs/toy")


def run(data="main.jsonl", model_seed=42, sections=(), **trainer):
    """Run a toy recipe in `runs/toy` that saves after every second step."""
    options = {
        "output_dir": str(OUT),
        "max_steps": 7,
        "save_steps": 2,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "use_cpu": True,
    }
    content = {
        "model": {"new": {"shape": "nano", "vocab_size": 300, "seed": model_seed}},
        "data": [{"path": data}],
        "buffer": [{"path": "buffer.jsonl"}],
        "loss": {"beta": 0.5},
        "trainer": options | trainer,
    }
    return run_training(check_recipe(content | dict(sections), TrainRecipe, "toy"))


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory, main_pairs, buffer_pairs):
    folder = tmp_path_factory.mktemp("data")
    relabeled = [replace(pair, labels=SafetyLabels(True, True)) for pair in main_pairs]
    files = {"main": main_pairs, "fewer": main_pairs[1:], "relabeled": relabeled, "buffer": buffer_pairs}
    for name, pairs in files.items():
        write_jsonl(folder / f"{name}.jsonl", (pair.to_row() for pair in pairs))
    return folder


@pytest.fixture(scope="module")
def unbroken_folder(tmp_path_factory, data_folder):
    """A folder with the data and a run without interruption."""
    folder = tmp_path_factory.mktemp("unbroken") / "folder"
    shutil.copytree(data_folder, folder)
    with contextlib.chdir(folder):
        run()
    return folder


@pytest.fixture
def unbroken(unbroken_folder, tmp_path, monkeypatch):
    """Work in a copy of the unbroken run's folder."""
    shutil.copytree(unbroken_folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)


def losses(out: Path = OUT) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]


@pytest.mark.usefixtures("unbroken")
def test_a_half_written_checkpoint_is_skipped_and_the_end_has_the_same_bits(capsys):
    unbroken_weights, unbroken_losses = file_hash(OUT / "model.safetensors"), losses()
    for incomplete in ("checkpoint-7", "checkpoint-6"):
        (OUT / incomplete / MARK).unlink()
    (OUT / "checkpoint-4" / "optimizer.pt").write_bytes(b"half")
    with (OUT / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "half')
    run(resume_from_checkpoint=True)
    output = capsys.readouterr().out
    assert "checkpoint-7 is skipped: it was not written completely" in output
    assert "checkpoint-4 is skipped: optimizer.pt has 4 bytes" in output
    assert "resuming from runs/toy/checkpoint-2" in output
    assert file_hash(OUT / "model.safetensors") == unbroken_weights
    assert losses() == unbroken_losses
    assert newest_complete(OUT) == OUT / "checkpoint-7"


def test_resuming_without_a_checkpoint_starts_at_the_beginning(data_folder, tmp_path, monkeypatch, capsys):
    shutil.copytree(data_folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    run(resume_from_checkpoint=True, max_steps=3)
    assert "no complete checkpoint in runs/toy: starting at step 0" in capsys.readouterr().out
    assert [step for step, _ in losses()] == [1, 2, 3]


@pytest.mark.usefixtures("unbroken")
def test_a_named_checkpoint_that_is_incomplete_is_refused():
    (OUT / "checkpoint-4" / "model.safetensors").unlink()
    with pytest.raises(TrainingError, match=r"checkpoint-4 can't be resumed from: model.safetensors is missing"):
        run(resume_from_checkpoint="runs/toy/checkpoint-4")
    assert checkpoint_fault(OUT / "checkpoint-2") is None


def remove_hashes(folder: Path) -> None:
    """Make a mark like that of an earlier version."""
    mark = json.loads((folder / MARK).read_text())
    (folder / MARK).write_text(json.dumps({key: mark[key] for key in ("step", "threads", "run", "files")}))


def flip_bit(file: Path, position: float) -> None:
    """Flip a bit of the byte at a position in [0, 1) of a file."""
    content = bytearray(file.read_bytes())
    content[int(position * len(content))] ^= 4
    file.write_bytes(content)


@pytest.mark.usefixtures("unbroken")
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("trainer_state.json", b'{"epoch": 1, "step_of_another_version": 2}'),
        ("trainer_state.json", b"[]"),
        ("trainer_state.json", b'{"epoch": 1, "stateful_callbacks": {}}'),
        ("trainer_state.json", b'{"epoch": "\xff"}'),
        ("config.json", b"[1]"),
        ("scheduler.pt", b"PK\x03\x04"),
    ],
)
def test_a_checkpoint_that_was_damaged_before_its_hashes_were_taken_is_reported(name, content):
    folder = OUT / "checkpoint-7"
    mark = json.loads((folder / MARK).read_text())
    (folder / name).write_bytes(content)
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != MARK]
    write_mark(folder, files, {key: mark[key] for key in ("step", "threads", "run")})
    with pytest.raises(TrainingError, match=r"checkpoint-7 can't be read .*delete it to resume from the previous"):
        run(resume_from_checkpoint=True, max_steps=8)


@pytest.mark.usefixtures("unbroken")
def test_an_error_in_a_later_step_is_not_blamed_on_the_checkpoint(monkeypatch):
    monkeypatch.setattr(StreamTrainer, "compute_loss", lambda *args, **options: {}["wrong"])
    with pytest.raises(KeyError, match="wrong"):
        run(resume_from_checkpoint=True, max_steps=8)


@pytest.mark.usefixtures("unbroken")
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt"])
def test_damage_of_a_checkpoint_without_hashes_is_reported_if_it_cannot_be_read(name, capsys):
    remove_hashes(OUT / "checkpoint-7")
    file = OUT / "checkpoint-7" / name
    file.write_bytes(b"\xff" * file.stat().st_size)
    with pytest.raises(
        TrainingError, match=r"checkpoint-7 can't be read .*delete it to resume from the previous checkpoint"
    ):
        run(resume_from_checkpoint=True, max_steps=8)
    assert "checkpoint-7 was written by an earlier version without hashes" in capsys.readouterr().out
    shutil.rmtree(OUT / "checkpoint-7")
    assert run(resume_from_checkpoint=True, max_steps=8)["steps"] == 8


@pytest.mark.usefixtures("unbroken")
def test_a_checkpoint_without_hashes_is_resumed_from_with_a_note(capsys):
    weights = file_hash(OUT / "model.safetensors")
    for step in (6, 7):
        shutil.rmtree(OUT / f"checkpoint-{step}")
    remove_hashes(OUT / "checkpoint-4")
    run(resume_from_checkpoint=True)
    output = capsys.readouterr().out
    assert "note: runs/toy/checkpoint-4 was written by an earlier version without hashes" in output
    assert "resuming from runs/toy/checkpoint-4" in output
    assert file_hash(OUT / "model.safetensors") == weights


@pytest.mark.usefixtures("unbroken")
def test_one_flipped_bit_anywhere_in_a_checkpoint_is_found():
    folder = OUT / "checkpoint-4"
    names = sorted(file.name for file in folder.iterdir())
    assert {"model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json", MARK} <= set(names)
    for name in names:
        content = (folder / name).read_bytes()
        for position in (0, 0.3, 0.6, 0.9, 1 - 1 / len(content)):
            flip_bit(folder / name, position)
            fault = checkpoint_fault(folder)
            (folder / name).write_bytes(content)
            if name == MARK:
                # The last bytes of the mark are its closing brace and line break.
                assert "mark" in fault
            else:
                assert fault == f"the content of {name} is not what was written"
        assert checkpoint_fault(folder) is None


@pytest.mark.usefixtures("unbroken")
def test_a_damaged_checkpoint_is_skipped_and_the_end_has_the_same_bits(capsys):
    weights = file_hash(OUT / "model.safetensors")
    shutil.rmtree(OUT / "checkpoint-7")
    flip_bit(OUT / "checkpoint-6/model.safetensors", 0.9)
    flip_bit(OUT / "checkpoint-4" / MARK, 0.5)
    run(resume_from_checkpoint=True)
    output = capsys.readouterr().out
    assert "checkpoint-6 is skipped: the content of model.safetensors is not what was written" in output
    assert "checkpoint-4 is skipped: its mark" in output
    assert "resuming from runs/toy/checkpoint-2" in output
    assert file_hash(OUT / "model.safetensors") == weights


@pytest.mark.usefixtures("unbroken")
def test_a_named_checkpoint_that_is_damaged_is_refused():
    flip_bit(OUT / "checkpoint-4/optimizer.pt", 0.5)
    with pytest.raises(TrainingError, match=r"can't be resumed from: the content of optimizer\.pt is not what was"):
        run(resume_from_checkpoint="runs/toy/checkpoint-4")


def test_every_process_gets_the_fault_that_the_main_process_found(monkeypatch, tmp_path):
    def broadcast(values):
        values[0] = "found by the main process"

    monkeypatch.setattr(PartialState(), "num_processes", 2)
    monkeypatch.setattr("accelerate.PartialState.is_main_process", False)
    monkeypatch.setattr("bfpo.training.checkpoints.broadcast_object_list", broadcast)
    assert checkpoint_fault(tmp_path) == "found by the main process"


@pytest.mark.usefixtures("unbroken")
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
def test_resuming_with_other_settings_is_refused(change, named):
    with pytest.raises(RecipeError, match=f"can't be continued: {named}"):
        run(resume_from_checkpoint=True, **change)


@pytest.mark.usefixtures("unbroken")
def test_a_finished_run_that_is_resumed_takes_no_further_step():
    weights, count = (OUT / "model.safetensors").read_bytes(), len(losses())
    assert run(resume_from_checkpoint=True)["steps"] == 7
    assert (OUT / "model.safetensors").read_bytes() == weights
    assert len(losses()) == count


def test_resuming_with_other_win_rates_is_refused(main_pairs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sections = {"loss": {"name": "bfpo_soft", "beta": 0.5}, "buffer": []}
    for name, rate in (("main", 0.75), ("other", 0.5)):
        rates = PairSignals(chosen_win_rate=rate, rejected_win_rate=0.25)
        write_jsonl(Path(f"{name}.jsonl"), [replace(pair, signals=rates).to_row() for pair in main_pairs])
    run(sections=sections, max_steps=2)
    run(sections=sections, max_steps=2, resume_from_checkpoint=True)
    with pytest.raises(RecipeError, match="can't be continued: signals was"):
        run("other.jsonl", sections=sections, max_steps=2, resume_from_checkpoint=True)
    # Earlier versions recorded none.
    folder = OUT / "checkpoint-2"
    mark = json.loads((folder / MARK).read_text())
    del mark["run"]["signals"]
    (folder / MARK).write_text(json.dumps(mark))
    run("other.jsonl", sections=sections, max_steps=2, resume_from_checkpoint=True)


@pytest.mark.parametrize("later", ["", ", safety_weight=0.0"])
def test_a_checkpoint_from_before_later_options_of_the_loss_belongs_to_the_same_run(tmp_path, later):
    mark = {
        "run": {"loss": f"BFPO(beta=0.5, b1=3.0, b2=0.0, alpha=0.5, table=None{later})"},
        "threads": torch.get_num_threads(),
    }
    (tmp_path / MARK).write_text(json.dumps(mark))
    check_same_run(tmp_path, {"loss": repr(BFPO(beta=0.5))})
    for other in (BFPO(beta=0.5, safety_weight=1.0), BFPO(beta=0.4), BFPO(beta=0.5, sft_weight=1.0)):
        with pytest.raises(RecipeError, match="can't be continued: loss was"):
            check_same_run(tmp_path, {"loss": repr(other)})


def test_whole_numbers_and_settings_that_are_gone(tmp_path):
    loss = repr(BFPO(beta=1, alpha=0))
    mark = {"run": {"loss": loss, "router_aux_loss_coef": 0.01}, "threads": torch.get_num_threads()}
    (tmp_path / MARK).write_text(json.dumps(mark))
    check_same_run(tmp_path, {"loss": loss, "router_aux_loss_coef": 0.01})
    with pytest.raises(RecipeError, match=r"router_aux_loss_coef was 0\.01, now it is not set"):
        check_same_run(tmp_path, {"loss": loss})


@pytest.mark.usefixtures("unbroken")
def test_the_mark_contains_step_settings_file_sizes_and_hashes():
    mark = json.loads((OUT / "checkpoint-4" / MARK).read_text())
    assert mark["step"] == 4
    assert mark["run"]["world_size"] == 1
    assert mark["files"]["model.safetensors"] == (OUT / "checkpoint-4" / "model.safetensors").stat().st_size
    assert mark["sha256"]["model.safetensors"] == file_hash(OUT / "checkpoint-4" / "model.safetensors")
    assert set(mark["sha256"]) == {file.name for file in (OUT / "checkpoint-4").iterdir()} - {MARK}


@pytest.mark.usefixtures("unbroken")
def test_resuming_into_another_folder_gives_the_same_bits():
    run(output_dir="runs/other", resume_from_checkpoint="runs/toy/checkpoint-4")
    assert file_hash(Path("runs/other/model.safetensors")) == file_hash(OUT / "model.safetensors")
    assert [step for step, _ in losses(Path("runs/other"))] == [5, 6, 7]
