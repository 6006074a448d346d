"""An adapter and its base model merged into one model that loads without peft."""

from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, PeftType
from torch import Tensor
from transformers import PreTrainedModel

from bfpo.config.loading import parse_yaml
from bfpo.config.recipes import ModelSection, is_gguf
from bfpo.core.terminal import say
from bfpo.errors import ModelError, RecipeError
from bfpo.model.load import load_model, load_tokenizer, read_config
from bfpo.model.lora import is_adapter
from bfpo.model.save import check_out, save_checkpoint

DTYPES = ("float32", "bfloat16", "float16")
# Float32 sums in another order: a merged weight is rounded once where the adapter's product is added afterwards.
TOLERANCE = 1e-3


def merge_checkpoint(
    checkpoint: Path,
    out: Path,
    *,
    dtype: str = "float32",
    trust_remote_code: bool = False,
    records: dict[str, Any] | None = None,
) -> None:
    """Merge a LoRA adapter into its base model, and save the merged model with the tokenizer.

    Weights are merged in float32. Before it is saved, the merged model must give the same logits as the adapter on
    its base. It is saved under a temporary name and renamed, so that `out` is never incomplete.

    Args:
        checkpoint: Folder with an adapter.
        out: Output folder; must be empty or not exist yet.
        dtype: Type of the saved weights, one of `DTYPES`.
        trust_remote_code: Whether to run code that comes with the base model.
        records: Content of further JSON files, by file name.

    Raises:
        RecipeError: If `dtype` isn't one of `DTYPES`.
        ModelError: If the checkpoint isn't a LoRA adapter, its base is quantized or can't be loaded, `out` isn't
            empty, or merging changes the logits.
    """
    if dtype not in DTYPES:
        raise RecipeError(f"dtype is '{dtype}'; expected one of {', '.join(DTYPES)}")
    check_out(out)
    check_adapter(checkpoint, trust_remote_code=trust_remote_code)
    section = ModelSection(path=str(checkpoint), trust_remote_code=trust_remote_code)
    tokenizer = load_tokenizer(section)
    adapted = load_model(section).eval()
    assert isinstance(adapted, PeftModel)
    expected = _probe_logits(adapted)
    merged = adapted.merge_and_unload()
    assert isinstance(merged, PreTrainedModel)
    difference = float((_probe_logits(merged) - expected).abs().max() / expected.abs().max())
    # Not `difference > TOLERANCE`, which is False for NaN.
    if not difference <= TOLERANCE:
        raise ModelError(
            f"{checkpoint}: merging changes the logits by {difference:.2g} of their size (allowed {TOLERANCE:g}), "
            "as it does for an adapter on tied embeddings; use the adapter unmerged"
        )
    save_checkpoint(merged.to(getattr(torch, dtype)), tokenizer, out, records)
    say(f"merged into {out} ({dtype}); logits agree to {difference:.1g} of their size before rounding to {dtype}")
    if _was_quantized(checkpoint):
        say(
            "note: the adapter was trained on 4-bit weights and is merged into unquantized ones; completions differ "
            "slightly from those in training, so evaluate the merged model"
        )


def check_adapter(checkpoint: Path, *, trust_remote_code: bool = False) -> None:
    """Check that a folder contains a LoRA adapter that can be merged into its base model.

    Args:
        checkpoint: Folder with an adapter.
        trust_remote_code: Whether to run code that comes with the base model.

    Raises:
        ModelError: If it contains none, or its base model is quantized or can't be read.
    """
    if is_gguf(str(checkpoint)):
        raise ModelError(f"'{checkpoint}' is a GGUF file, which contains a whole model (bfpo model import)")
    if not checkpoint.is_dir():
        raise ModelError(f"'{checkpoint}': no such folder; expected a run's output folder or a checkpoint in it")
    if not is_adapter(str(checkpoint)):
        content = "a whole model, which needs no merging" if (checkpoint / "config.json").is_file() else "no model"
        raise ModelError(f"'{checkpoint}' contains {content}; expected a folder with adapter_config.json")
    try:
        config = PeftConfig.from_pretrained(str(checkpoint))
    except (ValueError, TypeError, KeyError) as error:
        raise ModelError(f"{checkpoint / 'adapter_config.json'}: {error}") from None
    if config.peft_type != PeftType.LORA:
        raise ModelError(f"'{checkpoint}' is an adapter of type {config.peft_type}; only LORA can be merged")
    base = str(config.base_model_name_or_path)
    try:
        base_config = read_config(base, config.revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        reason = next(iter(str(error).splitlines()), "")
        raise ModelError(f"'{checkpoint}': its base model '{base}' can't be read: {reason}") from None
    if getattr(base_config, "quantization_config", None):
        raise ModelError(
            f"'{checkpoint}': its base model '{base}' is stored quantized, and rounding would remove most of the "
            "merged adapter; set base_model_name_or_path in adapter_config.json to the unquantized model"
        )


def _probe_logits(model: torch.nn.Module) -> Tensor:
    """Return the model's logits for a fixed sequence of 32 token ids, in float32."""
    ids = torch.arange(1, 33).remainder(model.config.get_text_config().vocab_size)  # type: ignore[union-attr, operator]
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids[None]).logits
    return logits.float()


def _was_quantized(checkpoint: Path) -> bool:
    """Return whether the checkpoint's run trained on 4-bit weights, according to its resolved recipe."""
    for folder in (checkpoint, checkpoint.resolve().parent):
        file = folder / "recipe.resolved.yaml"
        if file.is_file():
            recipe = parse_yaml(file.read_text(encoding="utf-8"), str(file))
            return bool(recipe["model"]["load_in_4bit"])
    return False
