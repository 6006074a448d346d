"""Building a loss from its name and hyperparameters."""

from collections.abc import Mapping
from dataclasses import fields, replace
from inspect import isabstract
from typing import Any

from bfpo.core.imports import import_object
from bfpo.errors import RecipeError, did_you_mean
from bfpo.losses.baselines import BSO, DPO, IPO, MODPO, CatDPO, IPOAvg, SafeDPO
from bfpo.losses.dual import read_safety_weight
from bfpo.losses.label_errors import LabelErrors, read_label_errors
from bfpo.losses.labeling import TABLES, LabelingFunction
from bfpo.losses.pairwise import BFPO, Additive, BFPOSoft, PairLoss
from bfpo.losses.token_level import TDPO

LOSSES: dict[str, type[PairLoss]] = {
    "bfpo": BFPO,
    "bfpo_soft": BFPOSoft,
    "ipo": IPO,
    "ipo_avg": IPOAvg,
    "dpo": DPO,
    "tdpo": TDPO,
    "safe_dpo": SafeDPO,
    "bso": BSO,
    "cat_dpo": CatDPO,
    "additive": Additive,
    "modpo": MODPO,
}


def make_loss(options: Mapping[str, Any]) -> PairLoss:
    """Return the loss that a mapping describes, such as a recipe's `loss` section.

    Args:
        options: `name` (a key of `LOSSES`, or `package.module:Class`; default `bfpo`) and the loss's
            hyperparameters; for `bfpo` also `multiplier`, the `dual.json` with its safety weight, and `label_errors`
            may be the file of `bfpo judge eval`.

    Raises:
        RecipeError: If the name or a hyperparameter is unknown, a value isn't a number in its range, or the
            multiplier belongs to another loss.
        DataError: If the file of the multiplier or of the label errors is missing or malformed.
    """
    values = dict(options)
    name = values.pop("name", "bfpo")
    loss_class = _loss_class(name)
    multiplier = values.pop("multiplier", None) if loss_class is BFPO else None
    allowed = {field.name for field in fields(loss_class)}
    for key, value in values.items():
        if key not in allowed:
            raise RecipeError(f"loss.{key} is not an option of '{name}'; {did_you_mean(key, sorted(allowed))}")
        if key == "table":
            values[key] = _labeling_table(value)
        elif key == "label_errors":
            values[key] = None if value is None else _label_errors(value)
        elif key == "graded":
            if not isinstance(value, bool):
                raise RecipeError(f"loss.graded is {value!r} ({type(value).__name__}); expected true or false")
        elif isinstance(value, bool) or not isinstance(value, int | float):
            raise RecipeError(f"loss.{key} is {value!r} ({type(value).__name__}); expected a number")
    loss = loss_class(**values)
    return loss if multiplier is None else _with_multiplier(loss, multiplier)


def _with_multiplier(loss: PairLoss, path: object) -> BFPO:
    if not isinstance(path, str):
        raise RecipeError(f"loss.multiplier is {path!r} ({type(path).__name__}); expected the path of a dual.json")
    assert isinstance(loss, BFPO)
    if loss.safety_weight:
        raise RecipeError("loss: 'multiplier' is a file with the safety_weight; give either the file or the number")
    return replace(loss, safety_weight=read_safety_weight(path, labeling=loss.labeling, beta=loss.beta))


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


def _label_errors(value: object) -> LabelErrors:
    if isinstance(value, str):
        return read_label_errors(value)
    rates = {field.name for field in fields(LabelErrors)}
    if not isinstance(value, Mapping) or set(value) != rates:
        raise RecipeError(
            f"loss.label_errors is {value!r}; expected {{sensitivity: .., specificity: ..}}, or the path of the "
            "results of `bfpo judge eval`"
        )
    for name, number in value.items():
        if isinstance(number, bool) or not isinstance(number, int | float):
            raise RecipeError(f"loss.label_errors.{name} is {number!r}; expected a number")
    return LabelErrors(**value)
