"""Which LoRA adapters vLLM loads beside their base model, and how it is told to; read in its source, not run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Values of --max-lora-rank. Source: vllm/config/lora.py (`MaxLoRARanks`).
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


def adapter_faults(config: Mapping[str, Any]) -> list[str]:
    """Return why vLLM can't load an adapter, or would load it as another one; empty if it can.

    Args:
        config: Content of `adapter_config.json`.
    """
    faults = [f"{key} is {config[key]!r}: {reason}" for key, reason in _UNSUPPORTED.items() if config.get(key)]
    if (bias := config.get("bias", "none")) != "none":
        faults.append(f"bias is '{bias}': biases of the base model are trained too")
    if config["r"] > _RANKS[-1]:
        faults.append(f"its rank is {config['r']}: the highest is {_RANKS[-1]}")
    return faults


def adapter_options(folder: Path | str, name: str, rank: int) -> list[str]:
    """Return the options of `vllm serve` that load an adapter without faults.

    Args:
        folder: Folder of the adapter.
        name: Name of the model for clients.
        rank: Rank of the adapter.
    """
    max_rank = min(allowed for allowed in _RANKS if allowed >= rank)
    return ["--enable-lora", "--max-lora-rank", str(max_rank), "--lora-modules", f"{name}={folder}"]
