"""No command writes onto a file that it reads, or over files of others."""

import json
from pathlib import Path

import pytest

from bfpo.core.files import write_jsonl

ROW = {"prompt": "What is it?", "is_chosen_safe": True, "is_rejected_safe": True}
PAIRS = [
    ROW | {"chosen": f"A lathe turns wood number {n} quickly.", "rejected": f"A saw, perhaps {n}."} for n in range(3)
]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_jsonl(Path("pairs.jsonl"), PAIRS)
    Path("r.yaml").write_text("data: [{path: pairs.jsonl}]\n")


def content():
    return {str(path): path.read_bytes() for path in sorted(Path().rglob("*")) if path.is_file()}


@pytest.mark.parametrize(
    "arguments",
    [
        ["judge", "agreement", "pairs.jsonl", "other.jsonl", "--out", "./pairs.jsonl"],
        ["judge", "eval", "pairs.jsonl", "--judge", "refusal-rule", "--out", "pairs.jsonl"],
        ["judge", "fit", "pairs.jsonl", "--out", "pairs.jsonl"],
        ["judge", "run", "other.jsonl", "--judge", "linear:pairs.jsonl", "--out", "pairs.jsonl"],
        ["generate", "model", "pairs.jsonl", "--out", "link.jsonl"],
    ],
)
def test_an_input_is_no_output(run, arguments):
    Path("link.jsonl").symlink_to("pairs.jsonl")
    Path("other.jsonl").write_text("{}\n")
    before = content()
    code, _, errors = run(*arguments)
    assert code == 2
    assert "which the command reads; name another file" in errors
    assert content() == before


@pytest.mark.parametrize("command", [["prepare", "r.yaml"], ["degrade", "pairs.jsonl"]])
def test_a_source_is_not_replaced(run, command):
    before = content()
    code, _, errors = run("data", *command, "--out", ".")
    assert code == 2
    assert "pairs.jsonl was not written by bfpo data" in errors
    # The folder is the command's own, and its file is the source all the same.
    run("data", *command, "--out", "own")
    Path("r.yaml").write_text("data: [{path: own/pairs.jsonl}]\n")
    if command[0] == "degrade":
        command = ["degrade", "own/pairs.jsonl"]
    owned = content()
    code, _, errors = run("data", *command, "--out", "own")
    assert code == 2
    assert "--out is own, whose pairs.jsonl is a source; name another folder" in errors
    assert content() == owned
    assert before["pairs.jsonl"] == owned["pairs.jsonl"]


def test_files_of_others_stay(run):
    Path("mine").mkdir()
    Path("mine/eval.jsonl").write_text("mine\n")
    code, _, errors = run("data", "prepare", "r.yaml", "--out", "mine")
    assert code == 2
    assert "mine/eval.jsonl was not written by bfpo data prepare; choose another folder or move the file" in errors
    assert Path("mine/eval.jsonl").read_text() == "mine\n"


def test_an_earlier_preparation_is_replaced(run):
    assert run("data", "prepare", "r.yaml", "--out", "own")[0] == 0
    assert run("data", "prepare", "r.yaml", "--out", "own", "--limit", "2")[0] == 0
    assert len(Path("own/pairs.jsonl").read_text().splitlines()) == 2
    assert json.loads(Path("own/data_manifest.json").read_text())["train"]["main"]["ss"] == 2
    # So is one that was stopped before its manifest was there.
    Path("own/data_manifest.json").unlink()
    Path("own/.unfinished").mkdir()
    assert run("data", "prepare", "r.yaml", "--out", "own")[0] == 0
    assert not Path("own/.unfinished").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "r.yaml", "--gpus", "4", "--dry-run"], "--gpus is for --plan; to use several processes"),
        (["chat", "m", "--seed", "-1"], "--seed"),
        (
            ["label", "pairs.jsonl", "--judge", "refusal-rule", "--beta", "0"],
            "--beta is 0.0; expected a number above",
        ),
        (["judge", "fit", "pairs.jsonl", "--doubt", "5"], "--doubt"),
        (["generate", "m", "pairs.jsonl", "--server", "http://a/v1", "--timeout", "0"], "--timeout is 0.0: "),
    ],
)
def test_options_out_of_range_are_refused(run, arguments, message):
    Path("r.yaml").write_text(
        "model: {path: m}\ndata: [{path: pairs.jsonl}]\nloss: {name: bfpo}\ntrainer: {output_dir: o}\n"
    )
    code, _, errors = run(*arguments)
    assert code == 2
    assert message in errors.replace("\n", " ")
    assert "Traceback" not in errors
