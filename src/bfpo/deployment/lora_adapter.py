"""LoRA adapters that vLLM, transformers and peft load beside their base model."""

import json
import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftType
from safetensors.torch import load_file, save_file
from torch import Tensor

from bfpo.config.recipes import ModelSection, is_gguf
from bfpo.core.files import file_name
from bfpo.core.terminal import say
from bfpo.deployment.vllm import adapter_faults, adapter_options
from bfpo.errors import ModelError
from bfpo.model.load import load_tokenizer
from bfpo.model.shared_adapter import check_beside


def export_adapter(checkpoint: Path, temporary: Path, *, dtype: str | None) -> list[str]:
    """Write an adapter with its tokenizer and chat template into a folder.

    Args:
        checkpoint: Folder with a LoRA adapter.
        temporary: Folder to write.
        dtype: Type of the matrices; None for their own.

    Returns:
        What rounding lost.

    Raises:
        ModelError: If vLLM can't load the adapter, or would load it as another one.
    """
    check_beside(str(checkpoint), None)
    file = checkpoint / "adapter_model.safetensors"
    if not file.is_file():
        raise ModelError(f"'{checkpoint}' has no adapter_model.safetensors; save the adapter as safetensors")
    config = PeftConfig.from_pretrained(str(checkpoint))
    tensors = load_file(file)
    _check(checkpoint, config, tensors)
    stored = {str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()}
    temporary.mkdir(parents=True)
    converted = {
        name: (tensor if dtype is None else tensor.to(getattr(torch, dtype))).contiguous()
        for name, tensor in tensors.items()
    }
    save_file(converted, temporary / file.name, metadata={"format": "pt"})
    shutil.copyfile(checkpoint / "adapter_config.json", temporary / "adapter_config.json")
    load_tokenizer(ModelSection(path=str(checkpoint))).save_pretrained(temporary)
    others = sorted(stored - {dtype})
    is_rounded = dtype not in (None, "float32") and others
    return [f"matrices rounded from {', '.join(others)} to {dtype}"] if is_rounded else []


def say_how_to_serve(folder: Path) -> None:
    """Print the command by which vLLM serves an exported adapter."""
    config: Any = PeftConfig.from_pretrained(str(folder))
    base, name = str(config.base_model_name_or_path), file_name(folder.resolve().name)
    revision = ["--revision", str(config.revision)] if config.revision else []
    say(f"wrote {folder}: an adapter of rank {config.r} on {base}. To serve it as the model '{name}':")
    say(f"  {shlex.join(['vllm', 'serve', base, *revision, *adapter_options(folder, name, config.r)])}")
    if Path(base).is_dir():
        say(f"note: its base model is the folder '{base}', which must be copied along")


def _check(checkpoint: Path, config: Any, tensors: Mapping[str, Tensor]) -> None:
    """Check that vLLM loads the adapter as it is."""
    if config.peft_type != PeftType.LORA:
        raise ModelError(f"'{checkpoint}' is an adapter of type {config.peft_type}; only LORA can be exported")
    base = str(config.base_model_name_or_path)
    if is_gguf(base):
        raise ModelError(
            f"'{checkpoint}': its base model '{base}' is a GGUF file, beside which no adapter is loaded; import it "
            "(bfpo model import) and set base_model_name_or_path in adapter_config.json to the folder"
        )
    written = json.loads((checkpoint / "adapter_config.json").read_text(encoding="utf-8"))
    faults = adapter_faults(written)
    others = [name for name in tensors if not name.endswith((".lora_A.weight", ".lora_B.weight"))]
    if others and not faults:
        faults.append(f"it contains {others[0]}: only LoRA matrices of linear layers are loaded")
    if faults:
        raise ModelError(
            f"'{checkpoint}' can't be loaded by vLLM beside its base model ({'; '.join(faults)}). Export a whole "
            "model, which it can load (--to merged)"
        )
