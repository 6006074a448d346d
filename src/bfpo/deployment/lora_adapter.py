"""LoRA adapters that vLLM, transformers and peft load beside their base model."""

import json
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
from bfpo.errors import ModelError
from bfpo.model.load import load_tokenizer
from bfpo.model.shared_adapter import check_beside

# Values of vLLM's --max-lora-rank. Source: vllm/config/lora.py (`MaxLoRARanks`).
_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
# Parts of a configuration that vLLM refuses, or leaves out without a word, with the reason.
# Source: vllm/lora/peft_helper.py (`PEFTHelper`) and lora_model.py.
_UNSUPPORTED = {
    "modules_to_save": "whole modules are trained besides the LoRA matrices",
    "use_dora": "DoRA changes the size of the weights too",
    "use_qalora": "QA-LoRA changes what the matrices are applied to",
    "lora_bias": "the LoRA matrices have biases",
    "rank_pattern": "layers have different ranks",
    "alpha_pattern": "layers have different factors",
    "layer_replication": "layers of the base model are repeated",
    "trainable_token_indices": "embeddings of single tokens are trained",
    "target_parameters": "parameters other than those of linear layers are trained",
}


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
    return [f"matrices rounded from {', '.join(others)} to {dtype}"] if dtype is not None and others else []


def say_how_to_serve(folder: Path) -> None:
    """Print the command by which vLLM serves an exported adapter."""
    config: Any = PeftConfig.from_pretrained(str(folder))
    base, name = str(config.base_model_name_or_path), file_name(folder.name)
    options = f" --revision {config.revision}" if config.revision else ""
    max_rank = min(rank for rank in _RANKS if rank >= config.r)
    say(f"wrote {folder}: an adapter of rank {config.r} on {base}. To serve it as the model '{name}':")
    say(f"  vllm serve {base}{options} --enable-lora --lora-modules {name}={folder} --max-lora-rank {max_rank}")
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
    faults = [f"{key} is {written[key]!r}: {reason}" for key, reason in _UNSUPPORTED.items() if written.get(key)]
    if (bias := written.get("bias", "none")) != "none":
        faults.append(f"bias is '{bias}': biases of the base model are trained too")
    if config.r > _RANKS[-1]:
        faults.append(f"its rank is {config.r}: the highest is {_RANKS[-1]}")
    others = [name for name in tensors if not name.endswith((".lora_A.weight", ".lora_B.weight"))]
    if others and not faults:
        faults.append(f"it contains {others[0]}: only LoRA matrices of linear layers are loaded")
    if faults:
        raise ModelError(
            f"'{checkpoint}' can't be loaded by vLLM beside its base model ({'; '.join(faults)}). Export a whole "
            "model, which it can load (--to merged)"
        )
