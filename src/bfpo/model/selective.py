"""Selection of the trained parameters, and removal of dropout."""

import re
from difflib import get_close_matches
from typing import NamedTuple

from peft import PeftModel
from torch import nn

from bfpo.errors import ModelError, RecipeError


class Selection(NamedTuple):
    """Number of parameters that are trained.

    Args:
        trained: Number of trained parameters.
        total: Number of all parameters.
        tensors: Number of trained tensors.
    """

    trained: int
    total: int
    tensors: int

    def __str__(self) -> str:
        share = self.trained / self.total
        return f"{self.trained:,} of {self.total:,} parameters ({share:.1%}) in {self.tensors} tensors"


def select_parameters(model: nn.Module, patterns: list[str] | None) -> Selection:
    """Set `requires_grad` of every parameter by its name.

    Args:
        model: Model, changed in place.
        patterns: Regular expressions searched in parameter names (`down_proj` matches as in the official code); None
            trains all parameters.

    Returns:
        Counts of the selected parameters.

    Raises:
        ModelError: If a pattern matches no parameter.
        RecipeError: If a pattern isn't a regular expression, or patterns are given for a model with an adapter.
    """
    if isinstance(model, PeftModel):
        # peft has set requires_grad on the adapter's parameters, and on no others.
        if patterns is not None:
            raise RecipeError("train_only and an adapter exclude each other: only the adapter is trained")
        return _count_parameters(model)
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns or []:
        try:
            has_match = any(re.search(pattern, name) for name in names)
        except re.error as error:
            raise RecipeError(f"train_only: '{pattern}' is not a regular expression ({error})") from None
        if not has_match:
            raise ModelError(f"train_only: '{pattern}' matches no parameter; {_nearest_names(pattern, names)}")
    for name, parameter in model.named_parameters():
        is_selected = patterns is None or any(re.search(pattern, name) for pattern in patterns)
        # Integer (quantized) weights can't have gradients.
        parameter.requires_grad_(is_selected and parameter.is_floating_point())
    return _count_parameters(model)


def _count_parameters(model: nn.Module) -> Selection:
    trained = [parameter.numel() for parameter in model.parameters() if parameter.requires_grad]
    return Selection(sum(trained), sum(parameter.numel() for parameter in model.parameters()), len(trained))


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout probability to 0, so that policy and reference are the same network.

    Attention modules of transformers store theirs as a plain number (`attention_dropout`). `eval()` would turn it off
    as well, but gradient checkpointing works only in training mode.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def _nearest_names(pattern: str, names: list[str]) -> str:
    parts = sorted({part for name in names for part in name.split(".") if not part.isdecimal()})
    close = get_close_matches(pattern, parts, n=3, cutoff=0.4)
    return f"the nearest parts of names are {', '.join(close)}" if close else f"parts of names are {', '.join(parts)}"
