"""Building a loss from its name and hyperparameters."""

from collections.abc import Mapping
from dataclasses import fields
from inspect import isabstract
from typing import Any

from bfpo.core.imports import import_object
from bfpo.errors import RecipeError, did_you_mean
from bfpo.losses.labeling import TABLES, LabelingFunction
from bfpo.losses.pairwise import LOSSES, PairLoss


def make_loss(options: Mapping[str, Any]) -> PairLoss:
    """Return the loss that a mapping describes, such as a recipe's `loss` section.

    Args:
        options: `name` (a key of `LOSSES`, or `package.module:Class`; default `bfpo`) and the loss's
            hyperparameters.

    Raises:
        RecipeError: If the name or a hyperparameter is unknown, or a value isn't a number in its range.
    """
    values = dict(options)
    name = values.pop("name", "bfpo")
    loss_class = _loss_class(name)
    allowed = {field.name for field in fields(loss_class)}
    for key, value in values.items():
        if key not in allowed:
            raise RecipeError(f"loss.{key} is not an option of '{name}'; {did_you_mean(key, sorted(allowed))}")
        if key == "table":
            values[key] = _labeling_table(value)
        elif isinstance(value, bool) or not isinstance(value, int | float):
            raise RecipeError(f"loss.{key} is {value!r} ({type(value).__name__}); expected a number")
    return loss_class(**values)


def _loss_class(name: object) -> type[PairLoss]:
    if not isinstance(name, str):
        raise RecipeError(f"loss.name is {name!r}; expected one of {', '.join(sorted(LOSSES))}, or 'module:Class'")
    if ":" in name:
        return _custom_loss_class(name)
    if name not in LOSSES:
        raise RecipeError(f"loss.name is '{name}'; {did_you_mean(name, list(LOSSES))}, or 'module:Class'")
    return LOSSES[name]


def _custom_loss_class(path: str) -> type[PairLoss]:
    loss_class = import_object(path, "loss.name")
    if not (isinstance(loss_class, type) and issubclass(loss_class, PairLoss)):
        raise RecipeError(f"loss.name is '{path}', which is not a subclass of bfpo.losses.pairwise.PairLoss")
    if isabstract(loss_class):
        raise RecipeError(f"loss.name is '{path}', which doesn't define __call__")
    return loss_class


def _labeling_table(value: object) -> LabelingFunction:
    if isinstance(value, str) and value in TABLES:
        return TABLES[value]
    cells = {field.name for field in fields(LabelingFunction)}
    if not isinstance(value, Mapping) or set(value) != cells:
        raise RecipeError(
            f"loss.table is {value!r}; expected four numbers, {{ss: .., su: .., us: .., uu: ..}}, or a name "
            f"({', '.join(TABLES)})"
        )
    for cell, number in value.items():
        if isinstance(number, bool) or not isinstance(number, int | float):
            raise RecipeError(f"loss.table.{cell} is {number!r}; expected a number")
    return LabelingFunction(**value)
