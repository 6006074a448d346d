"""Low-rank adapters: putting new ones on a model, and recognising a model that has some."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeAlias

import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import BitsAndBytesConfig, PreTrainedModel

from bfpo.errors import MissingExtra, ModelError, RecipeError
from bfpo.recipe import LoraSection

CausalLM: TypeAlias = PreTrainedModel | PeftModel


def lora_config(section: LoraSection) -> LoraConfig:
    """Return peft's configuration of a recipe's `lora` section."""
    return LoraConfig(
        r=section.r,
        lora_alpha=section.alpha,
        lora_dropout=0.0,
        target_modules=section.target_modules,
        task_type="CAUSAL_LM",
    )


def add_adapter(model: CausalLM, config: Any, *, seed: int) -> PeftModel:
    """Put a new adapter on a model; at first it changes nothing.

    Args:
        model: Without an adapter.
        config: Of peft.
        seed: Of the adapter's initial weights, so that a run can be repeated and resumed.

    Raises:
        ModelError: If the model has an adapter already, or none of the target modules.
    """
    if isinstance(model, PeftModel):
        raise ModelError("the model has an adapter already: go on training it (leave lora out), or merge it first")
    if getattr(model, "is_loaded_in_4bit", False):
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)  # type: ignore[no-untyped-call]
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            adapted: PeftModel = get_peft_model(model, config)
    except ValueError as error:
        raise ModelError(f"lora: {str(error).splitlines()[0]}") from None
    return adapted


def under_adapter(model: CausalLM) -> PreTrainedModel:
    """Return the causal language model that an adapter sits on, or the model itself if there is none."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    assert isinstance(base, PreTrainedModel)
    return base


def is_adapter(path: str) -> bool:
    """Return whether a folder holds an adapter rather than a model."""
    return (Path(path) / "adapter_config.json").is_file()


def quantisation(compute_dtype: Any) -> BitsAndBytesConfig:
    """Return the 4-bit configuration of QLoRA (NF4, double quantisation).

    Raises:
        MissingExtra: If bitsandbytes isn't installed.
        RecipeError: If there is no GPU.
    """
    if find_spec("bitsandbytes") is None:
        raise MissingExtra("model.load_in_4bit", "bitsandbytes", "qlora")
    if not torch.cuda.is_available():
        raise RecipeError("model.load_in_4bit needs a GPU, and there is none; leave it out to train on full weights")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )
