"""Low-rank adapters: putting new ones on a model, and recognizing a model that has some."""

from importlib.util import find_spec
from typing import Any, TypeAlias

import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.utils.peft_utils import find_adapter_config_file

from bfpo.config.recipes import LoraSection
from bfpo.errors import MissingExtra, ModelError, RecipeError

CausalLM: TypeAlias = PreTrainedModel | PeftModel

ADAPTED = "the model has an adapter already: go on training it (leave lora out), or merge it first (bfpo merge)"


def lora_config(section: LoraSection, *, revision: str | None = None) -> LoraConfig:
    """Return peft's configuration of a recipe's `lora` section.

    Args:
        section: The section.
        revision: Of the base model on the hub; whoever loads the adapter later must get that base.
    """
    return LoraConfig(
        revision=revision,
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
        raise ModelError(ADAPTED)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            adapted: PeftModel = get_peft_model(ready_for_adapter(model), config)
    except ValueError as error:
        raise ModelError(f"lora: {str(error).splitlines()[0]}") from None
    return adapted


def ready_for_adapter(model: PreTrainedModel) -> PreTrainedModel:
    """Return a model as an adapter needs it: around quantized weights, norms and head are made float32."""
    if getattr(model, "is_loaded_in_4bit", False):
        ready: PreTrainedModel = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)  # type: ignore[no-untyped-call]
        return ready
    return model


def under_adapter(model: CausalLM) -> PreTrainedModel:
    """Return the causal language model that an adapter sits on, or the model itself if there is none."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    assert isinstance(base, PreTrainedModel)
    return base


def is_adapter(path: str, revision: str | None = None) -> bool:
    """Return whether a folder, or a repository of the hub, holds an adapter rather than a model."""
    return find_adapter_config_file(path, revision=revision) is not None


def quantization(compute_dtype: Any) -> BitsAndBytesConfig:
    """Return the 4-bit configuration of QLoRA (NF4, double quantization).

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
