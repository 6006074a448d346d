"""What the command line does with expected errors, and with names of commands."""

import errno
from pathlib import Path

import pytest
import torch

import bfpo
from bfpo.commands.app import app
from bfpo.commands.errors import options_of, run_app, with_flags
from bfpo.core.files import append_jsonl

# Names that later commands will have, and that nothing else may take.
RESERVED = {"watch"}
FULL = "No space left on device"


@pytest.mark.parametrize(
    ("arguments", "parameter", "flag"),
    [
        (["generate", "model", "prompts.txt"], "max_unanswered", "--max-unanswered"),
        (["judge", "eval", "labels.csv"], "false_safe", "--false-safe"),
        (["--debug", "train"], "limit", None),
        (["quickstart"], "open_page", "--open"),
        (["no-such-command"], "out", None),
    ],
)
def test_options_are_those_of_the_named_command(arguments, parameter, flag):
    assert options_of(app, arguments).get(parameter) == flag


def test_parameters_in_backticks_become_flags():
    flags = {"out": "--out"}
    assert with_flags("choose another `out`, or remove it", flags) == "choose another --out, or remove it"
    assert with_flags("`limit` is 0", flags) == "limit is 0"
    assert with_flags("run `bfpo judge fit` first", flags) == "run `bfpo judge fit` first"


def test_a_library_error_names_the_flag(tmp_path, capsys):
    (tmp_path / "pairs.jsonl").write_text("{}\n")
    with pytest.raises(SystemExit) as ended:
        run_app(app, ["label", str(tmp_path / "pairs.jsonl"), "--judge", "oracle", "--conflicts", "dropp"])
    assert ended.value.code == 2
    assert "error: --conflicts is 'dropp'; did you mean 'drop'?" in capsys.readouterr().err


def test_the_former_name_of_an_experiment_works_with_a_warning(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        run_app(app, ["compare", str(tmp_path / "missing.yaml")])
    assert ended.value.code == 2
    warning, error = capsys.readouterr().err.splitlines()
    assert warning == "warning: `bfpo compare RECIPE` is now `bfpo experiment RECIPE`"
    assert error.startswith("error: recipe ")


def test_names_of_later_commands_are_free():
    groups = [app, *(group.typer_instance for group in app.registered_groups)]
    names = {command.name or command.callback.__name__ for group in groups for command in group.registered_commands}
    names |= {group.name for group in app.registered_groups}
    assert {"train", "eval", "experiment", "judge"} <= names
    assert not names & RESERVED


def run_with(error, tmp_path, monkeypatch, capsys, *options):
    """Run a command whose work ends with an error; return its exit code and what it prints."""

    def fail(*arguments, **keywords):
        raise error

    monkeypatch.setattr("bfpo.report.card.card_section", fail)
    with pytest.raises(SystemExit) as ended:
        run_app(app, ["card", str(tmp_path), *options])
    return ended.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "runs/a.json"),
            "runs/a.json: No space left on device; what",
        ),
        (
            OSError(errno.ENOSPC, "No space left on device"),
            "error: No space left on device; what was finished is kept",
        ),
        (RuntimeError("I/O error: No space left on device (os error 28)\nat"), "(os error 28); what was finished"),
        (PermissionError(errno.EACCES, "Permission denied", "x"), "error: x: Permission denied\n"),
        (RuntimeError("gloo: connection closed"), "the connection to another process was lost"),
        (MemoryError(), "error: out of memory; less is needed with a smaller per_device_train_batch_size"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), "CUDA out of memory. Tried; less is needed"),
        (KeyError("name"), "error: unexpected KeyError: 'name'; this is a bug in bfpo, please report it"),
    ],
)
def test_no_error_ends_in_a_traceback(error, message, tmp_path, monkeypatch, capsys):
    code, printed = run_with(error, tmp_path, monkeypatch, capsys)
    assert code == 1
    assert message in printed
    assert "Traceback" not in printed


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("file", "file is a file, expected a folder; name another path"),
        ("file/x/y", "leads through a file, expected a folder"),
    ],
)
def test_a_path_of_the_wrong_kind_is_bad_input(tmp_path, capsys, path, message):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as ended:
        run_app(app, ["quickstart", "--out", str(tmp_path / path)])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_a_folder_for_a_file_is_bad_input(tmp_path, monkeypatch, capsys):
    error = IsADirectoryError(errno.EISDIR, "Is a directory", ".")
    code, printed = run_with(error, tmp_path, monkeypatch, capsys)
    assert (code, printed) == (2, "error: . is a folder, expected a file; name another path\n")


def test_debug_shows_the_traceback(tmp_path, monkeypatch):
    monkeypatch.setattr("bfpo.report.card.card_section", lambda folder: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_app(app, ["--debug", "card", str(tmp_path)])


def test_a_nul_in_an_argument_is_refused(capsys):
    with pytest.raises(SystemExit) as ended:
        run_app(app, ["judge", "run", "a\0b", "--judge", "oracle"])
    assert ended.value.code == 2
    assert "contains a NUL character" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_a_full_disk_is_reported_with_the_path():
    with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
        append_jsonl(Path("/dev/full"), [{"text": "x" * 100_000}])


def test_the_version_needs_no_command(capsys):
    with pytest.raises(SystemExit) as ended:
        run_app(app, ["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"bfpo {bfpo.__version__}\n"
