"""Commands whose output folder is on a full disk: one message with the path, and nothing lost once there is room."""

import json
import os
import shutil
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parent))
import fuzz

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    with closing(fuzz.Toy(tmp_path_factory.mktemp("disk"))) as toy:
        os.chdir(toy.clean)
        yield toy


@pytest.fixture
def disk(tmp_path):
    """Return a function that mounts a small file system, and gives it room when it is called again."""
    folder = tmp_path / "full"
    folder.mkdir()
    mounted = []

    def mount(size):
        options = f"remount,size={size}" if mounted else f"size={size}"
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        if shutil.which("mount") is None or os.geteuid() != 0:
            pytest.skip("only root can mount a small file system")
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"a small file system can't be mounted: {done.stderr.strip()}")
        mounted.append(size)
        return folder

    yield mount
    if mounted:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fail_then_finish(command, disk, size):
    """Run a command on a full disk, and again after room is made; return the folder of the disk."""
    folder = disk(size)
    outcome = fuzz.run(command(folder))
    assert outcome.kind == "refused", outcome
    assert str(folder) in outcome.text
    # torch doesn't say why it can't write, so training shows torch's message.
    messages = ("No space left on device", "free some space", "PytorchStreamWriter failed writing", "unexpected pos")
    assert any(message in outcome.text for message in messages)
    assert "Traceback" not in outcome.text
    disk("64m")
    outcome = fuzz.run(command(folder))
    assert outcome.kind == "accepted", outcome
    # Nothing is left of the files that were being written.
    assert not [file for file in folder.rglob("*") if file.name.endswith((".tmp", ".unfinished"))]
    return folder


def rows_of(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_judging(toy, disk):
    rows = [row | {"sample": sample} for sample in range(8) for row in toy.completions]
    fuzz.write_jsonl(Path("many.jsonl"), rows)

    def command(folder):
        return ["judge", "run", "many.jsonl", "--judge", "oracle", "--out", str(folder / "v.jsonl")]

    verdicts = rows_of(fail_then_finish(command, disk, "16k") / "v.jsonl")
    assert [(row["prompt_id"], row["sample"]) for row in verdicts] == [(r["prompt_id"], r["sample"]) for r in rows]


def test_evaluating_saved_completions(toy, disk):
    def command(folder):
        Path("e.yaml").write_text(yaml.safe_dump(toy.eval | {"out": str(folder / "evaluation")}))
        return ["eval", "e.yaml"]

    folder = fail_then_finish(command, disk, "16k") / "evaluation"
    assert len(rows_of(folder / "completions.jsonl")) == len(toy.prompts)
    assert json.loads((folder / "results.json").read_text())["metrics"]


def test_labeling(toy, disk):
    def command(folder):
        return ["label", "pairs.jsonl", "--judge", "oracle", "--out", str(folder / "labels")]

    folder = fail_then_finish(command, disk, "8k") / "labels"
    (verdicts,) = folder.glob("verdicts-*.jsonl")
    keys = [(row["prompt_id"], row["sample"]) for row in rows_of(verdicts)]
    assert len(keys) == len(set(keys)) == 2 * len(toy.pairs)


@pytest.mark.parametrize("size", ["8k", "24k"])
def test_reporting(toy, disk, size):
    folder = fail_then_finish(lambda folder: ["report", "run", "--out", str(folder / "report")], disk, size)
    assert (folder / "report" / "report.html").stat().st_size > 10_000


def test_preparing(toy, disk):
    Path("d.yaml").write_text(yaml.safe_dump({"data": [{"path": "pairs.jsonl"}]}))

    def command(folder):
        return ["data", "prepare", "d.yaml", "--out", str(folder / "prepared")]

    assert len(rows_of(fail_then_finish(command, disk, "4k") / "prepared" / "pairs.jsonl")) == len(toy.pairs)


def test_fitting_a_judge(toy, disk):
    def command(folder):
        return ["judge", "fit", "fit.jsonl", "--out", str(folder / "judge.npz")]

    folder = fail_then_finish(command, disk, "4k")
    assert sorted(file.name for file in folder.iterdir()) == ["judge.card.json", "judge.npz"]


def test_generating(toy, disk):
    Path("p.txt").write_text("".join(f"which box {i} ?\n" for i in range(12)))

    def command(folder):
        options = ["--samples", "4", "--max-new-tokens", "8", "--out", str(folder / "c.jsonl")]
        return ["generate", "model", "p.txt", *options]

    rows = rows_of(fail_then_finish(command, disk, "8k") / "c.jsonl")
    assert len({(row["prompt_id"], row["sample"]) for row in rows}) == len(rows) == 48


@pytest.mark.parametrize("size", ["8k", "300k", "1m"])
def test_training(toy, disk, size):
    def command(folder):
        trainer = {"output_dir": str(folder / "out"), "max_steps": 4, "save_steps": 2, "use_cpu": True}
        recipe = {"model": {"path": "model"}, "data": [{"path": "pairs.jsonl"}], "max_dropped": 0.9}
        resume = {"resume_from_checkpoint": True}
        Path("t.yaml").write_text(yaml.safe_dump(recipe | {"trainer": trainer | resume}))
        return ["train", "t.yaml"]

    folder = fail_then_finish(command, disk, size) / "out"
    steps = [row["step"] for row in rows_of(folder / "metrics.jsonl")]
    assert steps == sorted(steps)
    assert json.loads((folder / "run.json").read_text())["steps"] == 4
