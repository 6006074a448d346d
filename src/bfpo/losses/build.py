"""From a recipe's `loss` section to the loss."""

import sys
from collections.abc import Mapping
from dataclasses import fields
from importlib import import_module
from inspect import isabstract
from pathlib import Path
from typing import Any

from bfpo.errors import RecipeError, did_you_mean
from bfpo.losses.labeling import TABLES, LabelingFunction
from bfpo.losses.pairwise import LOSSES, PairLoss


def make_loss(options: Mapping[str, Any]) -> PairLoss:
    """Build a loss from a recipe's `loss` section.

    Args:
        options: `name` (a key of `LOSSES`, or `package.module:Class`) and the loss's hyper-parameters.

    Raises:
        RecipeError: If the name or a hyper-parameter is unknown, or a value isn't a number in its range.
    """
    values = dict(options)
    name = values.pop("name", "bfpo")
    if not isinstance(name, str):
        raise RecipeError(f"loss.name is {name!r}; expected one of {', '.join(sorted(LOSSES))}, or 'module:Class'")
    loss_class = _import_loss(name) if ":" in name else LOSSES.get(name)
    if loss_class is None:
        raise RecipeError(f"loss.name is '{name}'; {did_you_mean(name, list(LOSSES))}, or 'module:Class'")
    known = {field.name for field in fields(loss_class)}
    for key, value in values.items():
        if key not in known:
            raise RecipeError(f"loss.{key} is not an option of '{name}'; {did_you_mean(key, sorted(known))}")
        if key == "table":
            values[key] = _table(value)
        elif isinstance(value, bool) or not isinstance(value, int | float):
            raise RecipeError(f"loss.{key} is {value!r} ({type(value).__name__}); expected a number")
    return loss_class(**values)


def _table(value: object) -> LabelingFunction:
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


def _import_loss(path: str) -> type[PairLoss]:
    module, _, name = path.partition(":")
    if str(Path.cwd()) not in sys.path:
        # A loss of one's own usually lies beside the recipe.
        sys.path.append(str(Path.cwd()))
    try:
        loss_class = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise RecipeError(f"loss.name is '{path}'; {error}") from error
    if not (isinstance(loss_class, type) and issubclass(loss_class, PairLoss)):
        raise RecipeError(f"loss.name is '{path}', which is not a subclass of bfpo.losses.pairwise.PairLoss")
    if isabstract(loss_class):
        raise RecipeError(f"loss.name is '{path}', which doesn't define __call__")
    return loss_class
