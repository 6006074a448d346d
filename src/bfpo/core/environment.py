"""Metadata needed to reproduce a run: versions, hardware, revision of the code. Only `hardware` loads torch."""

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import bfpo

PACKAGES = ("torch", "transformers", "accelerate", "datasets", "tokenizers", "numpy")


def versions() -> dict[str, str]:
    """Return the versions of Python, bfpo and the packages that results depend on."""
    packages = {package: installed_version(package) for package in PACKAGES}
    return {"python": platform.python_version(), "bfpo": bfpo.__version__, **packages}


def installed_version(package: str) -> str:
    """Return the version of a package, or "not installed"."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def hardware() -> dict[str, Any]:
    """Return processor, its instruction set, accelerators and numbers of cores, threads and processes."""
    import torch

    return {
        "machine": platform.machine(),
        "processor": processor_name(),
        # The instructions that torch's kernels use (AVX2, AVX512, ...): sums differ in the last bits between them.
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerators": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "world_size": int(os.environ.get("WORLD_SIZE", "1")),
    }


def processor_name() -> str:
    """Return the name of the processor; "" if the system doesn't report it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def git_revision() -> str | None:
    """Return the commit of the working directory, with `+changes` if there are any; None outside a checkout."""
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True, timeout=10)
        changes = subprocess.run(
            ["git", "status", "--porcelain"], capture_output=True, text=True, check=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return commit.stdout.strip() + ("+changes" if changes.stdout.strip() else "")
