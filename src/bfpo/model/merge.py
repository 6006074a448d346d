"""`bfpo merge`: an adapter and its base as one model that needs no adapter library."""

import os
import shutil
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel, PeftType
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from bfpo.config.loading import parse_yaml
from bfpo.config.recipes import ModelSection
from bfpo.core.terminal import say
from bfpo.errors import ModelError, RecipeError
from bfpo.model.load import load_model, load_tokenizer
from bfpo.model.lora import is_adapter

DTYPES = ("float32", "bfloat16", "float16")
# Float32 sums in another order: a merged weight is rounded once where the adapter's product is added afterwards.
TOLERANCE = 1e-3


def merge_checkpoint(checkpoint: Path, out: Path, *, dtype: str = "float32", trust_remote_code: bool = False) -> None:
    """Merge a LoRA adapter into its base model, and save both as one with the tokenizer.

    Arithmetic is float32. The merged model must give the adapter's logits before it is saved, and is written aside
    and renamed, so that `out` is either whole or not there.

    Args:
        checkpoint: Folder with an adapter.
        out: Folder to make; must not exist, or be empty.
        dtype: Type of the saved weights, one of `DTYPES`.
        trust_remote_code: Run code that comes with the base model.

    Raises:
        RecipeError: If `dtype` isn't one of them.
        ModelError: If the checkpoint is no LoRA adapter, its base is quantized or can't be loaded, `out` holds
            something, or merging changes what the model computes.
    """
    if dtype not in DTYPES:
        raise RecipeError(f"--dtype is '{dtype}'; expected one of {', '.join(DTYPES)}")
    _check_out(out)
    _check_adapter(checkpoint, trust_remote_code=trust_remote_code)
    section = ModelSection(path=str(checkpoint), trust_remote_code=trust_remote_code)
    tokenizer = load_tokenizer(section)
    adapted = load_model(section).eval()
    assert isinstance(adapted, PeftModel)
    before = _probe(adapted)
    merged = adapted.merge_and_unload()
    assert isinstance(merged, PreTrainedModel)
    difference = float((_probe(merged) - before).abs().max() / before.abs().max())
    # Written so that a difference that isn't a number is refused too.
    if not difference <= TOLERANCE:
        raise ModelError(
            f"{checkpoint}: merging changes the logits by {difference:.2g} of their size (allowed {TOLERANCE:g}), "
            "as it does when an adapter sits on tied embeddings; use the adapter as it is"
        )
    _save_whole(merged.to(getattr(torch, dtype)), tokenizer, out)
    say(f"merged into {out} ({dtype}); logits agree to {difference:.1g} of their size before rounding to {dtype}")
    if _was_quantized(checkpoint):
        say(
            "note: the adapter was trained on 4-bit weights and is merged into the full ones; answers differ "
            "slightly from those in training, so evaluate the merged model itself"
        )


def _check_out(out: Path) -> None:
    if out.is_dir() and any(out.iterdir()):
        raise ModelError(f"--out '{out}' holds something already; name a folder that doesn't exist")
    if out.exists() and not out.is_dir():
        raise ModelError(f"--out '{out}' is a file; name a folder")


def _check_adapter(checkpoint: Path, *, trust_remote_code: bool) -> None:
    if not checkpoint.is_dir():
        raise ModelError(f"'{checkpoint}': no such folder; expected a run's output folder or a checkpoint in it")
    if not is_adapter(str(checkpoint)):
        what = "a whole model, which needs no merging" if (checkpoint / "config.json").is_file() else "no model"
        raise ModelError(f"'{checkpoint}' holds {what}; bfpo merge takes a folder with adapter_config.json")
    try:
        config = PeftConfig.from_pretrained(str(checkpoint))
    except (ValueError, TypeError, KeyError) as error:
        raise ModelError(f"{checkpoint / 'adapter_config.json'}: {error}") from None
    if config.peft_type != PeftType.LORA:
        raise ModelError(f"'{checkpoint}' is an adapter of type {config.peft_type}; only LORA can be merged")
    base = str(config.base_model_name_or_path)
    try:
        loaded = AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        first = next(iter(str(error).splitlines()), "")
        raise ModelError(f"'{checkpoint}': its base model '{base}' can't be read: {first}") from None
    if getattr(loaded, "quantization_config", None):
        raise ModelError(
            f"'{checkpoint}': its base model '{base}' is stored quantized, and merging into rounded weights would "
            "round the adapter away; set base_model_name_or_path in adapter_config.json to the unquantized model"
        )


def _probe(model: torch.nn.Module) -> Tensor:
    """Return the model's logits for a few token ids, on the CPU in float32."""
    ids = torch.arange(1, 33).remainder(model.config.get_text_config().vocab_size)  # type: ignore[union-attr, operator]
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids[None]).logits
    return logits.float()


def _save_whole(model: PreTrainedModel, tokenizer: object, out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)  # type: ignore[attr-defined]
        aside.replace(out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _was_quantized(checkpoint: Path) -> bool:
    """Return whether the run that the checkpoint belongs to says that it trained on 4-bit weights."""
    for folder in (checkpoint, checkpoint.resolve().parent):
        file = folder / "recipe.resolved.yaml"
        if file.is_file():
            recipe = parse_yaml(file.read_text(encoding="utf-8"), str(file))
            return bool(recipe["model"]["load_in_4bit"])
    return False
