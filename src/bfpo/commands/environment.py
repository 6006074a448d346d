"""`bfpo env`: what a bug report needs to say about a machine, and nothing else about it."""

import platform

import torch

from bfpo.core.terminal import say
from bfpo.training.manifest import PACKAGES, hardware, installed_version, versions

# Not needed to run, or needed for one feature only; which version there is decides how that feature behaves.
OPTIONAL = ("peft", "safetensors", "pydantic", "bitsandbytes", "deepspeed", "flash-attn", "liger-kernel", "trl")


def show_environment() -> None:
    """Print versions and devices as lines that can be pasted into a bug report.

    No paths, names of hosts or users, or environment variables are among them.
    """
    for name, value in environment().items():
        say(f"- {name}: {value}")


def environment() -> dict[str, str]:
    """Return what `show_environment` prints, by name."""
    found = versions() | {package: installed_version(package) for package in OPTIONAL}
    machine = hardware()
    return {
        "bfpo": found.pop("bfpo"),
        "python": found.pop("python"),
        **{package: found.pop(package) for package in (*PACKAGES, *OPTIONAL)},
        "system": f"{platform.system()} {machine['machine']}",
        "processor": machine["processor"] or "unknown",
        "cores": f"{machine['cores']}, PyTorch uses {machine['threads']} threads",
        "PyTorch's CUDA": torch.version.cuda or "none, a build for CPUs",
        "accelerators": ", ".join(map(_accelerator, range(torch.cuda.device_count()))) or "none",
        "bfloat16": "yes" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "on the CPU only",
    }


def _accelerator(index: int) -> str:
    device = torch.cuda.get_device_properties(index)
    return f"{device.name} ({device.total_memory / 2**30:.0f} GiB, compute capability {device.major}.{device.minor})"
