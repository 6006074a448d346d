"""`bfpo --help` and shell completion."""

import os
import re
import subprocess
import sys

import typer

from bfpo.commands.app import app
from bfpo.commands.panels import PANELS

COMMANDS = typer.main.get_command(app).commands


def run(*arguments, **environment):
    environment = os.environ | {"COLUMNS": "100"} | environment
    return subprocess.run([sys.executable, "-m", "bfpo", *arguments], capture_output=True, text=True, env=environment)


def test_every_command_is_in_a_section():
    assert {name for name, command in COMMANDS.items() if command.rich_help_panel not in PANELS} == {
        "compare",
        "merge",
    }


def test_the_sections_come_in_the_order_of_the_work():
    page = run("--help").stdout
    assert re.findall(r"╭─ ([\w ]+) ─", page) == ["Options", *PANELS]
    listed = re.findall(r"^│ (\w+) {2,}\w", page, flags=re.MULTILINE)
    assert sorted(listed) == sorted(name for name, command in COMMANDS.items() if not command.hidden)


def test_bash_completes_commands_and_options():
    def complete(line):
        words = line.split(" ")
        environment = {"COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1), "_BFPO_COMPLETE": "complete_bash"}
        # The name of the program decides the name of the variable.
        script = "import sys; sys.argv = ['bfpo']\nfrom bfpo.commands.app import main; main()"
        return subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, env=os.environ | environment
        ).stdout.split()

    assert complete("bfpo tr") == ["train"]
    assert complete("bfpo judge a") == ["annotate", "agreement"]
    assert complete("bfpo train --dr") == ["--dry-run"]
