"""The model, arguments and tokenizer of a trainer: loaded from a path, or filled in with defaults like TRL's."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from bfpo.config.recipes import ModelSection
from bfpo.data.table import TokenTable
from bfpo.errors import ModelError
from bfpo.model.load import load_tokenizer
from bfpo.model.lora import CausalLM, unwrap_adapter
from bfpo.training.arguments import default_options
from bfpo.training.start import load_start_model

ModelOrPath = str | os.PathLike[str] | CausalLM


class TrainerInputs(NamedTuple):
    """The inputs of a trainer after paths are loaded and defaults filled in.

    Args:
        model: Causal language model.
        args: Training arguments.
        tokenizer: Tokenizer; None if neither given nor needed.
    """

    model: CausalLM
    args: TrainingArguments
    tokenizer: PreTrainedTokenizerBase | None


def resolve_inputs(
    model: ModelOrPath,
    args: TrainingArguments | None,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    method: str,
    learning_rate: float,
    datasets: Sequence[object],
) -> TrainerInputs:
    """Load a model that is given by its path, and fill in arguments and tokenizer where they are None.

    Args:
        model: Model, or the folder or hub id of a model or an adapter, which is loaded in float32.
        args: Training arguments; None for transformers' defaults with the output folder `{model name}-{method}`,
            `learning_rate`, `logging_steps=10` and `report_to="none"`.
        tokenizer: Tokenizer; None for the model's own.
        method: Name of the training method, for the default output folder.
        learning_rate: Default learning rate.
        datasets: Data sets of the trainer; unless all are tables, a tokenizer is needed.

    Raises:
        ModelError: If the model, or a tokenizer that is needed, can't be loaded.
        TypeError: If an input has the wrong type.
    """
    _check_types(model, args, tokenizer)
    if args is None:
        options = default_options() | {"learning_rate": learning_rate}
        args = TrainingArguments(f"{_model_name(model)}-{method}", **options)
    if isinstance(model, PreTrainedModel | PeftModel):
        if tokenizer is None and not all(isinstance(dataset, TokenTable) for dataset in datasets):
            tokenizer = _load_tokenizer_of(model)
        return TrainerInputs(model, args, tokenizer)
    section = ModelSection(path=os.fspath(model))
    tokenizer = tokenizer or load_tokenizer(section)
    return TrainerInputs(load_start_model(section, tokenizer), args, tokenizer)


def _check_types(model: object, args: object, tokenizer: object) -> None:
    if not isinstance(model, str | os.PathLike | PreTrainedModel | PeftModel):
        raise TypeError(f"model is a {type(model).__name__}; expected a folder, a hub id or a model of transformers")
    if not isinstance(args, TrainingArguments | None):
        raise TypeError(f"args is a {type(args).__name__}; expected transformers.TrainingArguments")
    if any(base.__module__.partition(".")[0] == "trl" for base in type(args).__mro__):
        raise TypeError(
            f"args is TRL's {type(args).__name__}, whose own fields would be ignored; pass "
            "transformers.TrainingArguments, beta with the loss (loss=BFPO(beta=0.1)) and the maximum length with "
            "text=TextSection(max_length=1024)"
        )
    if not isinstance(tokenizer, PreTrainedTokenizerBase | None):
        raise TypeError(f"processing_class is a {type(tokenizer).__name__}; expected a tokenizer")


def _model_name(model: ModelOrPath) -> str:
    """Return the last part of the model's path or hub id; the model's type if it has neither."""
    if isinstance(model, PreTrainedModel | PeftModel):
        config = unwrap_adapter(model).config
        path = config._name_or_path or str(config.model_type)
    else:
        path = os.fspath(model)
    return Path(path).resolve().name


def _load_tokenizer_of(model: CausalLM) -> PreTrainedTokenizerBase:
    path = unwrap_adapter(model).config._name_or_path
    if not path:
        raise ModelError("processing_class is missing, and the model has no path to load its tokenizer from")
    try:
        return load_tokenizer(ModelSection(path=path))
    except ModelError as error:
        raise ModelError(f"processing_class is missing, and the model's own can't be loaded: {error}") from None
