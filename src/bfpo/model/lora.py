"""Low-rank adapters: adding one to a model, and recognizing a model that has one."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, Literal, TypeAlias

import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.utils.peft_utils import find_adapter_config_file

from bfpo.config.recipes import LoraSection, is_gguf
from bfpo.errors import MissingExtra, ModelError, RecipeError

CausalLM: TypeAlias = PreTrainedModel | PeftModel


def lora_config(
    section: LoraSection, *, revision: str | None = None, task_type: Literal["CAUSAL_LM", "SEQ_CLS"] = "CAUSAL_LM"
) -> LoraConfig:
    """Return peft's configuration of a recipe's `lora` section.

    Args:
        section: The `lora` section.
        revision: Hub revision of the base model, saved with the adapter so that it is later loaded on that base.
        task_type: Kind of the model; peft trains and saves the head of a `SEQ_CLS` model with the adapter.
    """
    return LoraConfig(
        revision=revision,
        r=section.r,
        lora_alpha=section.alpha,
        lora_dropout=0.0,
        target_modules=section.target_modules,
        task_type=task_type,
    )


def add_adapter(model: CausalLM, config: Any, *, seed: int) -> PeftModel:
    """Add a new adapter to a model; until it is trained, it doesn't change the model's output.

    Args:
        model: Model without an adapter.
        config: peft's configuration of the adapter.
        seed: Seed of the adapter's initial weights, so that a run can be repeated and resumed.

    Raises:
        ModelError: If the model already has an adapter, or has none of the target modules.
    """
    if isinstance(model, PeftModel):
        raise ModelError(
            "lora: the model already has an adapter: train that one (leave lora out), or merge it first "
            "(bfpo export --to merged)"
        )
    try:
        with torch.random.fork_rng(), without_checkpointing_warning():
            torch.manual_seed(seed)
            adapted: PeftModel = get_peft_model(prepare_for_adapter(model), config)
    except ValueError as error:
        raise ModelError(f"lora: {str(error).splitlines()[0]}") from None
    return adapted


def activate(model: PeftModel, names: list[str]) -> None:
    """Make some of a model's adapters the active ones, whose updates are added in this order; none is trained."""
    # `PeftModel.set_adapter` takes one name only.
    model.base_model.set_adapter(names, inference_mode=True)  # type: ignore[operator]


@contextmanager
def without_checkpointing_warning() -> Iterator[None]:
    """Hide the warning that peft 0.21 causes in transformers 5.23 by a deprecated name, which users can't change."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


@contextmanager
def without_base_config_warning() -> Iterator[None]:
    """Hide peft's warning that the base model of an adapter has no config.json: a GGUF file needs none."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Could not find a config file in .*\.gguf")
        yield


def prepare_for_adapter(model: PreTrainedModel) -> PreTrainedModel:
    """Return the model, prepared for an adapter: norms and head of a quantized model are cast to float32."""
    if getattr(model, "is_loaded_in_4bit", False):
        prepared: PreTrainedModel = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)  # type: ignore[no-untyped-call]
        return prepared
    return model


def unwrap_adapter(model: CausalLM) -> PreTrainedModel:
    """Return the model under an adapter, or the model itself if it has none."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    assert isinstance(base, PreTrainedModel)
    return base


def is_adapter(path: str, revision: str | None = None) -> bool:
    """Return whether a folder or hub repository contains an adapter rather than a whole model."""
    return not is_gguf(path) and find_adapter_config_file(path, revision=revision) is not None


def quantization_config(compute_dtype: Any) -> BitsAndBytesConfig:
    """Return the 4-bit configuration of QLoRA (NF4, double quantization).

    Args:
        compute_dtype: torch.dtype of the matrix products.

    Raises:
        MissingExtra: If bitsandbytes isn't installed.
        RecipeError: If there is no GPU.
    """
    if find_spec("bitsandbytes") is None:
        raise MissingExtra("model.load_in_4bit", "bitsandbytes", "qlora")
    if not torch.cuda.is_available():
        raise RecipeError(
            "model.load_in_4bit needs a GPU, and there is none; leave it out to use unquantized weights"
        )
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )
