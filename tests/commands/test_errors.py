"""What the command line does with expected errors, and with names of commands."""

import pytest

from bfpo.commands.app import app
from bfpo.commands.errors import options_of, run_app, with_flags

# Names that later commands will have, and that nothing else may take.
RESERVED = {"score", "dual", "online", "certify", "serve", "export", "watch", "init"}


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
