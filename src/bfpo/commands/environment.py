"""`bfpo env`: versions and devices for a bug report, and nothing else about the machine."""

import platform

import torch

from bfpo.core.terminal import say
from bfpo.training.manifest import PACKAGES, hardware, installed_version, versions

# Packages that one feature needs or uses; their versions decide how it behaves.
OPTIONAL = ("peft", "safetensors", "pydantic", "bitsandbytes", "deepspeed", "flash-attn", "liger-kernel", "trl")


def show_environment() -> None:
    """Print versions and devices as lines to paste into a bug report.

    They contain no paths, host or user names, or environment variables.
    """
    for name, value in environment().items():
        say(f"- {name}: {value}")


def environment() -> dict[str, str]:
    """Return versions and devices by name."""
    installed = versions() | {package: installed_version(package) for package in OPTIONAL}
    machine = hardware()
    return {
        "bfpo": installed.pop("bfpo"),
        "python": installed.pop("python"),
        **{package: installed.pop(package) for package in (*PACKAGES, *OPTIONAL)},
        "system": f"{platform.system()} {machine['machine']}",
        "processor": machine["processor"] or "unknown",
        "cores": f"{machine['cores']}, PyTorch uses {machine['threads']} threads",
        "PyTorch's CUDA": torch.version.cuda or "none (CPU build)",
        "accelerators": ", ".join(map(_accelerator, range(torch.cuda.device_count()))) or "none",
        "bfloat16": "yes" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "on the CPU only",
    }


def _accelerator(index: int) -> str:
    device = torch.cuda.get_device_properties(index)
    return f"{device.name} ({device.total_memory / 2**30:.0f} GiB, compute capability {device.major}.{device.minor})"
