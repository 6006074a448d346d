import getpass
import os
import platform
import subprocess
from importlib.metadata import version

import pytest
import torch

import bfpo
from bfpo.commands import environment as module
from bfpo.commands.environment import environment, show_environment, source_revision

NO_ANSWER = "unknown: PyTorch didn't answer within 0 seconds"
GPU = """
class cuda:
    device_count = staticmethod(lambda: 1)
    is_bf16_supported = staticmethod(lambda: True)
    @staticmethod
    def get_device_properties(index):
        return type("Device", (), {"name": "A GPU", "total_memory": 80 * 2**30, "major": 9, "minor": 0})
"""


@pytest.fixture
def pytorch(monkeypatch, tmp_path):
    """Return a function that puts a PyTorch for CUDA with the given code in front of the real one."""

    def install(code):
        (tmp_path / "torch.py").write_text(code)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        monkeypatch.setattr(module, "_pytorch_build", lambda: "CUDA 13.0")

    return install


def test_it_tells_the_versions_that_are_installed():
    found = environment()
    assert found["bfpo"] == bfpo.__version__
    assert found["python"] == platform.python_version()
    assert {name: found[name] for name in ("torch", "peft")} == {"torch": torch.__version__, "peft": version("peft")}


@pytest.mark.skipif(torch.version.cuda is not None, reason="PyTorch is built for CUDA")
def test_a_cpu_build_is_told_without_asking_pytorch(monkeypatch):
    monkeypatch.setattr(module, "_ask_pytorch", None)
    found = environment()
    assert found["PyTorch's build"] == "CPU"
    assert (found["accelerators that PyTorch sees"], found["bfloat16"]) == ("none", "on the CPU only")


def test_pytorch_tells_its_gpus(pytorch):
    pytorch(GPU)
    found = environment()
    assert found["accelerators that PyTorch sees"] == "A GPU (80 GiB, compute capability 9.0)"
    assert found["bfloat16"] == "yes"


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("raise ImportError('/home/somebody/libcudart.so is missing')", "PyTorch failed to load"),
        ("raise SystemExit", "PyTorch failed to load"),
        ("import time; time.sleep(60)", NO_ANSWER),
    ],
)
def test_a_broken_pytorch_is_reported(code, message, pytorch, monkeypatch, capsys):
    pytorch(code)
    monkeypatch.setattr(module, "SECONDS_FOR_DEVICES", 0.4 if message == NO_ANSWER else 20)
    show_environment()
    printed = capsys.readouterr().out
    assert message in printed
    assert "somebody" not in printed


def test_the_driver_is_told_whether_or_not_pytorch_can_use_it(monkeypatch, tmp_path):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho '580.95, NVIDIA H100'\necho '580.95, NVIDIA H100'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert environment()["driver"] == "580.95, NVIDIA H100; 580.95, NVIDIA H100"
    program.write_text("#!/bin/sh\nexit 9\n")
    assert environment()["driver"] == "no NVIDIA driver found"


def test_the_commit_is_that_of_this_package(monkeypatch, tmp_path):
    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        return subprocess.run(
            ["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True
        )

    (tmp_path / "bfpo").mkdir()
    (tmp_path / "bfpo" / "__init__.py").write_text("")
    monkeypatch.setattr(bfpo, "__file__", str(tmp_path / "bfpo" / "__init__.py"))
    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "empty")
    # An environment in a project's checkout: the commit there is not ours.
    assert source_revision() is None
    git("add", ".")
    git("commit", "-q", "-m", "with the package")
    assert source_revision() == git("rev-parse", "HEAD").stdout.strip()


def test_the_commit_that_pip_installed_is_told(monkeypatch):
    origin = '{"url": "https://example.org/bfpo", "vcs_info": {"vcs": "git", "commit_id": "abc123"}}'
    monkeypatch.setattr(
        module, "distribution", lambda name: type("D", (), {"read_text": lambda self, file: origin})()
    )
    assert source_revision() == "abc123"


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
