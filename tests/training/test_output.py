"""The output folder of a run: one run at a time, earlier runs moved aside, links to other disks."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

from bfpo.config.loading import check_recipe
from bfpo.config.recipes import SftRecipe, TrainRecipe
from bfpo.core.files import write_jsonl
from bfpo.errors import RecipeError, TrainingError
from bfpo.training.output import exclusive_output, prepare_output
from bfpo.training.run import run_training
from bfpo.training.run_sft import run_sft

CONTENT = {
    "model": {"new": {"shape": "nano", "vocab_size": 300}},
    "data": [{"path": "pairs.jsonl"}],
    "trainer": {
        "output_dir": "runs/toy",
        "max_steps": 1,
        "per_device_train_batch_size": 2,
        "save_strategy": "no",
        "use_cpu": True,
    },
}
HOLD = """
import sys, time
from pathlib import Path
from bfpo.training.output import exclusive_output
with exclusive_output(Path("runs/toy")):
    print("locked", flush=True)
    time.sleep(60)
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch, main_pairs):
    """Work in a folder with toy data."""
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "pairs.jsonl", (pair.to_row() for pair in main_pairs))
    return tmp_path


def train():
    return run_training(check_recipe(CONTENT, TrainRecipe, "toy"))


def fine_tune():
    return run_sft(check_recipe(CONTENT, SftRecipe, "toy"))


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Return content and time of change of every file."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {str(file.relative_to(folder)): (file.read_bytes(), file.stat().st_mtime_ns) for file in files}


@pytest.mark.parametrize("command", [train, fine_tune])
def test_a_second_run_in_a_folder_is_refused_and_touches_nothing(command):
    earlier = Path("runs/toy")
    earlier.mkdir(parents=True)
    (earlier / "metrics.jsonl").write_text('{"step": 1}\n')
    (earlier / "model.safetensors").write_bytes(b"weights")
    with exclusive_output(earlier):
        before = snapshot(Path())
        with pytest.raises(RecipeError, match=r"trainer\.output_dir: another run is training in runs/toy"):
            command()
        assert snapshot(Path()) == before
    # The lock ends with its block, and leaves no file.
    assert sorted(path.name for path in Path("runs").iterdir()) == ["toy"]
    command()
    assert (Path("runs/toy.earlier-1") / "model.safetensors").read_bytes() == b"weights"
    assert not list(Path("runs").glob(".*.lock"))


@pytest.mark.parametrize("command", [train, fine_tune])
@pytest.mark.parametrize(
    "name", ["config.json", "model-00001-of-00002.safetensors", "checkpoint-7/trainer_state.json"]
)
def test_models_of_other_programs_are_not_replaced(command, name):
    file = Path("runs/toy") / name
    file.parent.mkdir(parents=True)
    file.write_text("{}")
    before = snapshot(Path())
    with pytest.raises(RecipeError, match=r"runs/toy/\S+ isn't of an earlier run of bfpo, and"):
        command()
    assert snapshot(Path()) == before


def test_the_start_model_is_not_replaced():
    train()
    content = CONTENT | {"model": {"path": "runs/toy/../toy"}}
    before = snapshot(Path("runs/toy"))
    for recipe, run in ((TrainRecipe, run_training), (SftRecipe, run_sft)):
        for dry_run in (True, False):
            with pytest.raises(RecipeError, match=r"runs/toy is the start model, model\.path"):
                run(check_recipe(content, recipe, "toy"), dry_run=dry_run)
    assert snapshot(Path("runs/toy")) == before


def resuming(resume, **changes):
    trainer = CONTENT["trainer"] | {"resume_from_checkpoint": resume} | changes
    return run_training(check_recipe(CONTENT | {"trainer": trainer}, TrainRecipe, "toy"))


def test_a_finished_run_without_checkpoints_is_moved_aside_and_a_killed_one_starts_again_in_place():
    train()
    weights = Path("runs/toy/model.safetensors").read_bytes()
    resuming(True)
    assert Path("runs/toy.earlier-1/model.safetensors").read_bytes() == weights
    # A run that was killed has no record.
    Path("runs/toy/run.json").unlink()
    resuming(True)
    assert not Path("runs/toy.earlier-2").exists()


def test_a_run_from_another_run_s_checkpoint_moves_the_run_in_its_folder_aside():
    resuming(None, output_dir="runs/other", save_strategy="steps", save_steps=1)
    train()
    resuming("runs/other/checkpoint-1", max_steps=2)
    assert Path("runs/toy.earlier-1/run.json").is_file()
    assert [json.loads(line)["step"] for line in Path("runs/toy/metrics.jsonl").read_text().splitlines()] == [2]


@pytest.mark.parametrize("change", [{"seed": 7}, {"learning_rate": 0.1}, {"optim": "adafactor"}])
def test_a_resume_that_is_refused_touches_nothing(change):
    resuming(None, save_strategy="steps", save_steps=1)
    before = snapshot(Path("runs/toy"))
    with pytest.raises(RecipeError, match=r"checkpoint-1 can't be continued: .* was .*, now it is"):
        resuming(True, **change)
    assert snapshot(Path("runs/toy")) == before


@pytest.mark.parametrize("change", [{"alpha": 32}, {"target_modules": ["o_proj"]}])
def test_an_adapter_resumes_with_its_scale_and_on_its_layers(change):
    lora = {"r": 4, "alpha": 8, "target_modules": ["q_proj"]}
    trainer = CONTENT["trainer"] | {"save_strategy": "steps", "save_steps": 1, "resume_from_checkpoint": True}

    def run(lora):
        return run_training(check_recipe(CONTENT | {"trainer": trainer, "lora": lora}, TrainRecipe, "toy"))

    run(lora)
    with pytest.raises(RecipeError, match=r"can't be continued: (adapter scales|start model) was"):
        run(lora | change)


def test_a_checkpoint_without_the_optimizer_s_state_is_not_resumed_from():
    resuming(None, save_strategy="steps", save_steps=1, save_only_model=True)
    with pytest.raises(TrainingError, match=r"checkpoint-1 was saved with trainer\.save_only_model"):
        resuming(True, max_steps=2, save_only_model=True)


def test_a_folder_and_a_link_to_it_have_the_same_lock():
    Path("disk/toy").mkdir(parents=True)
    Path("link").symlink_to("disk/toy")
    with (
        exclusive_output(Path("disk/toy")),
        pytest.raises(RecipeError, match="another run is training in link"),
        exclusive_output(Path("link")),
    ):
        pass


def test_where_the_parent_cannot_be_written_to_the_lock_is_in_the_folder(monkeypatch, tmp_path):
    Path("mounted").mkdir()
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != tmp_path)
    with exclusive_output(Path("mounted")):
        assert [file.name for file in Path("mounted").iterdir()] == [".lock"]
        with pytest.raises(RecipeError), exclusive_output(Path("mounted")):
            pass
    assert list(Path("mounted").iterdir()) == []


def test_other_processes_of_a_distributed_run_share_the_lock_of_the_main_process(monkeypatch):
    with exclusive_output(Path("runs/toy")):
        monkeypatch.setattr("accelerate.PartialState.is_main_process", False)
        with exclusive_output(Path("runs/toy")):
            pass
        assert Path("runs/.toy.lock").exists()


@pytest.mark.slow
def test_a_lock_ends_with_its_process():
    with subprocess.Popen([sys.executable, "-c", HOLD], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "locked\n"
        with pytest.raises(RecipeError, match="another run"):
            train()
        process.send_signal(signal.SIGKILL)
    assert train()["steps"] == 1


def test_the_file_of_a_killed_process_does_not_lock():
    Path("runs").mkdir()
    lock = FileLock("runs/.toy.lock")
    lock.acquire()
    lock.release()
    assert Path("runs/.toy.lock").exists()
    with exclusive_output(Path("runs/toy")):
        pass


@pytest.mark.parametrize("exists", [True, False])
def test_a_linked_output_folder_is_used_and_stays_linked(exists, capsys):
    """A run with its output linked to a large disk must stay on that disk."""
    target = Path("disk/toy")
    if exists:
        target.mkdir(parents=True)
    Path("out").symlink_to("disk/toy")
    recipe = check_recipe(CONTENT, TrainRecipe, "toy")
    for number in range(3):
        assert prepare_output(Path("out"), recipe, resuming=False) == Path("out")
        assert (target / "recipe.resolved.yaml").is_file()
        (Path("out") / "run.json").write_text(str(number))
    assert Path("out").readlink() == Path("disk/toy")
    assert (target / "run.json").read_text() == "2"
    assert [(Path("disk") / f"toy.earlier-{index}/run.json").read_text() for index in (1, 2)] == ["0", "1"]
    assert sorted(path.name for path in Path().iterdir()) == ["disk", "out", "pairs.jsonl"]
    assert "disk/toy.earlier-2" in capsys.readouterr().out.replace("\n", "")
