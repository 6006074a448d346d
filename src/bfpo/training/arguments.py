"""The recipe's `trainer:` section as `transformers.TrainingArguments`."""

import math
import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import torch
from pydantic import TypeAdapter, ValidationError
from transformers import TrainingArguments
from transformers.integrations.integration_utils import get_available_reporting_integrations

from bfpo.errors import RecipeError, did_you_mean

Arguments = TypeVar("Arguments", bound=TrainingArguments)

_CHUNKS = "log-probabilities over the vocabulary are always computed in chunks"
# Arguments that bfpo sets itself, with the reason: another value would be ignored or change what is trained.
DECIDED = {
    "auto_find_batch_size": "the batch size is part of the plan",
    "average_tokens_across_devices": "losses are always scaled by the counts of the whole step",
    "dataloader_drop_last": "the plan has no partial batches",
    "dataloader_pin_memory": "batches are made and moved pack by pack",
    "deepspeed": "the launcher decides how weights are sharded: accelerate launch --config_file FILE",
    "fsdp": "the launcher decides how weights are sharded: accelerate launch --config_file FILE",
    "fsdp_config": "the launcher decides how weights are sharded: accelerate launch --config_file FILE",
    "hub_token": "secrets don't belong in recipes; set the environment variable HF_TOKEN",
    "ignore_data_skip": "a resumed run continues from its step of the plan",
    "label_names": "bfpo makes its own batches",
    "label_smoothing_factor": "use loss: {name: dpo, label_smoothing: ..}",
    "logging_nan_inf_filter": "a loss that isn't finite always stops the run",
    "liger_kernel_config": _CHUNKS,
    "neftune_noise_alpha": "noise in the embeddings would make policy and reference differ",
    "push_to_hub": "upload the finished run with its card: bfpo push",
    "remove_unused_columns": "bfpo makes its own batches",
    "train_sampling_strategy": "the stream plan decides the order",
    "use_liger_kernel": _CHUNKS,
}

# Inclusive ranges of values that transformers accepts outside of them and that would train nothing, or something else
# than was meant. -1 for max_steps means num_train_epochs.
_NOT_NEGATIVE, _POSITIVE, _MOMENT = (0, math.inf), (math.ulp(0.0), math.inf), (0, math.nextafter(1, 0))
RANGES: dict[str, tuple[tuple[float, float], str]] = {
    "learning_rate": (_NOT_NEGATIVE, "0 or more"),
    "weight_decay": (_NOT_NEGATIVE, "0 or more"),
    "max_grad_norm": (_NOT_NEGATIVE, "0 (no clipping) or more"),
    "adam_beta1": (_MOMENT, "a number in [0, 1)"),
    "adam_beta2": (_MOMENT, "a number in [0, 1)"),
    "adam_epsilon": (_POSITIVE, "a number above 0"),
    "num_train_epochs": (_POSITIVE, "a number above 0"),
    "warmup_steps": (_NOT_NEGATIVE, "0 or more"),
    "logging_steps": (_POSITIVE, "a number above 0"),
    "save_steps": (_POSITIVE, "a number above 0"),
    "eval_steps": (_POSITIVE, "a number above 0"),
    "eval_delay": (_NOT_NEGATIVE, "0 or more"),
    "save_total_limit": ((1, math.inf), "1 or more, or null for all"),
    "seed": ((0, 2**32 - 1), "an integer from 0 to 4294967295"),
    "data_seed": ((0, 2**32 - 1), "an integer from 0 to 4294967295"),
    "dataloader_num_workers": (_NOT_NEGATIVE, "0 or more"),
    "dataloader_prefetch_factor": ((1, math.inf), "1 or more"),
    "per_device_train_batch_size": ((1, math.inf), "1 or more"),
    "per_device_eval_batch_size": ((1, math.inf), "1 or more"),
    "gradient_accumulation_steps": ((1, math.inf), "1 or more"),
}

AUTO = "auto"
"""Value of `per_device_train_batch_size` that stands for the largest that fits; see `bfpo.training.micro_batch`."""
_ROWS_OF_A_STEP = 8

DEFAULTS: dict[str, Any] = {"logging_steps": 10, "report_to": "none"}


def without_resume(trainer: Mapping[str, Any]) -> dict[str, Any]:
    """Return keys of `trainer` that `training_arguments` takes: a run resumes or not whatever they are."""
    return {name: value for name, value in trainer.items() if name != "resume_from_checkpoint"}


def training_arguments(options: dict[str, Any]) -> TrainingArguments:
    """Build training arguments from a recipe's `trainer:` section.

    Args:
        options: Names and values of `transformers.TrainingArguments`; `output_dir` is required.
            `per_device_train_batch_size` may be `auto`: the arguments have 1 until it is measured.

    Raises:
        RecipeError: If a name is unknown or in `DECIDED`, or a value is wrong; the message names the key.
    """
    return build_arguments(TrainingArguments, default_options() | check_options(options))


def is_auto(options: Mapping[str, Any]) -> bool:
    """Return whether keys of `trainer` leave the micro-batch to be measured."""
    return bool(options.get("per_device_train_batch_size") == AUTO)


def for_any_machine(trainer: Mapping[str, Any]) -> dict[str, Any]:
    """Return keys of `trainer` with which a run for a GPU can be checked and planned on a machine without one."""
    return {**trainer} if torch.cuda.is_available() else {**trainer, "use_cpu": True}


def build_arguments(kind: type[Arguments], values: dict[str, Any]) -> Arguments:
    """Build training arguments from checked values.

    Args:
        kind: `TrainingArguments` or a subclass.
        values: Names and values, defaults included; `output_dir` is required.

    Raises:
        RecipeError: If values contradict each other, or a package that a value needs is missing.
    """
    if not values.get("output_dir"):
        raise RecipeError("trainer.output_dir is missing; name the run's output folder, e.g. runs/my-run")
    if Path(values["output_dir"]).is_file():
        raise RecipeError(f"trainer.output_dir is '{values['output_dir']}', which is a file; name a folder")
    try:
        # bfpo prints its own lines instead of a tqdm bar and dictionaries.
        args = kind(**values, remove_unused_columns=False, logging_nan_inf_filter=False, disable_tqdm=True)
    except (ValueError, TypeError, ImportError) as error:
        raise RecipeError(f"trainer: {error}") from None
    missing = sorted(set(map(str, args.report_to or ())) - {"none", *get_available_reporting_integrations()})
    if missing:
        raise RecipeError(f"trainer.report_to: {', '.join(missing)} is not installed; install it, or leave it out")
    return args


def output_folder(trainer: Mapping[str, Any]) -> Path:
    """Return the output folder that keys of `trainer` name, also on a machine that couldn't run them.

    Raises:
        RecipeError: If a key or its value is wrong.
    """
    return Path(str(training_arguments(for_any_machine(without_resume(trainer))).output_dir))


def check_has_data(args: TrainingArguments, held_out: object) -> None:
    """Check that there are held-out data, or tables of them, if a run evaluates.

    Raises:
        RecipeError: If it does, and there are none.
    """
    if args.eval_strategy != "no" and not held_out:
        raise RecipeError("trainer.eval_strategy needs data to evaluate on, and there are none; set holdout")


def default_options() -> dict[str, Any]:
    """Return the training arguments whose defaults differ from those of transformers."""
    if launched_processes() > 1 and not torch.accelerator.is_available():
        # Otherwise each process would see itself as the only one and train separately.
        return DEFAULTS | {"use_cpu": True}
    return DEFAULTS


def launched_processes() -> int:
    """Return the number of processes that the launcher started, read from the environment."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def check_options(
    options: Mapping[str, Any],
    kind: type[TrainingArguments] = TrainingArguments,
    *,
    decided: Mapping[str, str] = DECIDED,
) -> dict[str, Any]:
    """Check names, types and ranges, and return the options converted to the types of `TrainingArguments`.

    Args:
        options: Names and values of `transformers.TrainingArguments`.
        kind: `TrainingArguments` or a subclass, which may have more names.
        decided: Arguments that can't be set, with the reason.

    Raises:
        RecipeError: If a name is unknown or in `decided`, or a value is wrong; the message names the key.
    """
    if kind is TrainingArguments and is_auto(options):
        rows: dict[str, Any] = {"gradient_accumulation_steps": _ROWS_OF_A_STEP}
        options = rows | dict(options) | {"per_device_train_batch_size": 1}
    names = {field.name for field in fields(kind) if field.init}
    hints = get_type_hints(kind)
    values = {}
    for name, value in options.items():
        if name in decided:
            raise RecipeError(f"trainer.{name} can't be set: {decided[name]}")
        if name not in names:
            suggestion = did_you_mean(name, sorted(names)).partition("known:")[0]
            raise RecipeError(
                f"trainer.{name} is not one of {kind.__module__.partition('.')[0]}.{kind.__name__}; {suggestion}see "
                "its documentation for the names"
            )
        try:
            values[name] = TypeAdapter(hints[name]).validate_python(value)
        except ValidationError as error:
            raise RecipeError(f"trainer.{name} is {value!r}: {error.errors()[0]['msg']}") from None
        _check_range(name, values[name])
    return values


def _check_range(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    if not math.isfinite(value):
        raise RecipeError(f"trainer.{name} is {value}; expected a finite number")
    if name == "max_steps" and value != -1 and value < 1:
        raise RecipeError(f"trainer.max_steps is {value}; expected 1 or more, or -1 to use num_train_epochs")
    (lowest, highest), expected = RANGES.get(name, ((-math.inf, math.inf), ""))
    if not lowest <= value <= highest:
        raise RecipeError(f"trainer.{name} is {value}; expected {expected}")
