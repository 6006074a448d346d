import getpass
import os
import platform
from importlib.metadata import version

import torch

import bfpo
from bfpo.commands.environment import environment, show_environment


def test_it_tells_the_versions_that_are_installed():
    found = environment()
    assert found["bfpo"] == bfpo.__version__
    assert found["python"] == platform.python_version()
    assert {name: found[name] for name in ("torch", "peft")} == {"torch": torch.__version__, "peft": version("peft")}


def test_what_is_absent_is_said_to_be(monkeypatch):
    monkeypatch.setattr("bfpo.commands.environment.OPTIONAL", ("no-such-package",))
    assert environment()["no-such-package"] == "not installed"


def test_it_tells_nothing_about_the_owner(monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    show_environment()
    printed = capsys.readouterr().out
    # A user's name may be a word such as "root" that stands in a name of a package; it would stand as a path.
    private = ("hf_secret", platform.node(), os.path.expanduser("~"), os.getcwd(), f"/{getpass.getuser()}")
    for word in filter(None, private):
        assert word not in printed
