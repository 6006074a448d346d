"""`bfpo env`: versions and devices for a bug report, and nothing else about the machine.

PyTorch isn't loaded in this process: a PyTorch that can't be loaded, or a driver that hangs, may be what the report
is about.
"""

import json
import os
import platform
import runpy
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path

import bfpo
from bfpo.core.environment import PACKAGES, installed_version, processor_name, versions
from bfpo.core.terminal import say

# Packages that one feature needs or uses; their versions decide how it behaves.
OPTIONAL = ("peft", "safetensors", "pydantic", "bitsandbytes", "deepspeed", "flash-attn", "liger-kernel", "trl")
# The first use of a GPU takes seconds; a driver that hangs takes for ever.
SECONDS_FOR_DEVICES = 60.0

_ASK_PYTORCH = """
import json, torch
found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
names = [f"{d.name} ({d.total_memory / 2**30:.0f} GiB, compute capability {d.major}.{d.minor})" for d in found]
print(json.dumps([", ".join(names) or "none", bool(found) and torch.cuda.is_bf16_supported()]))
"""


def show_environment() -> None:
    """Print versions and devices as lines to paste into a bug report.

    They contain no paths, host or user names, or environment variables.
    """
    for name, value in environment().items():
        say(f"- {name}: {value}")


def environment() -> dict[str, str]:
    """Return versions and devices by name."""
    installed = versions() | {package: installed_version(package) for package in OPTIONAL}
    build = _pytorch_build()
    accelerators, bfloat16 = _ask_pytorch() if build not in ("CPU", "unknown") else ("none", "on the CPU only")
    return {
        "bfpo": installed.pop("bfpo"),
        "commit": source_revision() or "unknown",
        "python": installed.pop("python"),
        **{package: installed.pop(package) for package in (*PACKAGES, *OPTIONAL)},
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor_name() or "unknown",
        "cores": _cores(),
        "PyTorch's build": build,
        "driver": _driver(),
        "accelerators that PyTorch sees": accelerators,
        "bfloat16": bfloat16,
    }


def source_revision() -> str | None:
    """Return the commit that this `bfpo` was installed from, or runs from; None if neither is known."""
    try:
        origin = json.loads(distribution("bfpo").read_text("direct_url.json") or "{}")
    except PackageNotFoundError:
        origin = {}
    # `pip install git+...` notes the commit.
    if commit := origin.get("vcs_info", {}).get("commit_id"):
        return str(commit)
    folder = Path(bfpo.__file__).parent
    # An installed package may lie inside the checkout of another project, which doesn't track it.
    if _output("git", "-C", str(folder), "ls-files", "__init__.py"):
        return _output("git", "-C", str(folder), "rev-parse", "HEAD")
    return None


def _cores() -> str:
    total = os.cpu_count() or 1
    # A container or a batch system may allow fewer. macOS and Windows can't tell.
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else total
    return str(total) if allowed == total else f"{total}, {allowed} of them usable"


def _pytorch_build() -> str:
    """Return what PyTorch was built for, read from its package."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return "unknown"
    build = runpy.run_path(str(Path(spec.origin).with_name("version.py")))
    kinds = {"CUDA": build.get("cuda"), "ROCm": build.get("hip"), "XPU": build.get("xpu")}
    return ", ".join(f"{kind} {version}" for kind, version in kinds.items() if version) or "CPU"


def _driver() -> str:
    """Return the driver's version and its GPUs, whether or not PyTorch can use them."""
    found = _output("nvidia-smi", "--query-gpu=driver_version,name", "--format=csv,noheader")
    return "no NVIDIA driver found" if not found else "; ".join(found.splitlines())


def _ask_pytorch() -> tuple[str, str]:
    """Return the accelerators that PyTorch sees, and where bfloat16 works, by asking a process of its own."""
    command = [sys.executable, "-P", "-W", "ignore", "-c", _ASK_PYTORCH]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS_FOR_DEVICES)
        accelerators, has_bfloat16 = json.loads(asked.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        return f"unknown: PyTorch didn't answer within {SECONDS_FOR_DEVICES:.0f} seconds", "unknown"
    except (ValueError, IndexError):
        return "unknown: PyTorch failed to load; `python -c 'import torch'` shows why", "unknown"
    return accelerators, "yes" if has_bfloat16 else "on the CPU only"


def _output(*command: str) -> str | None:
    """Return what a program prints; None if there is no such program or it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS_FOR_DEVICES)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
