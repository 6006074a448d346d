"""The output folder of a run: one run at a time, earlier runs moved aside, links to other disks."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

from bfpo.config.loading import check_recipe
from bfpo.config.recipes import SftRecipe, TrainRecipe
from bfpo.core.files import write_jsonl
from bfpo.errors import RecipeError
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
