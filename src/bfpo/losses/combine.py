"""Combiners as values: what an online run maximizes, by a name or an import path.

A combiner is a frozen dataclass whose fields are its hyperparameters and whose call is its equation, of rewards and
costs (prompts, answers). What changes during a run, such as a multiplier, is a field too: `after` returns the
combiner of the next step. Scores that are missing are NaN, and so are their values.

Every class says what it prefers in the four cases: safe and helpful, safe and unhelpful, unsafe and helpful, unsafe
and unhelpful.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from inspect import isabstract
from typing import Any, ClassVar, Literal

import numpy as np

from bfpo.core.imports import import_object
from bfpo.errors import RecipeError, did_you_mean
from bfpo.losses import combiners
from bfpo.losses.combiners import Array
from bfpo.losses.dual import feasible_multiplier, read_dual

Reads = Literal["cost", "unsafe", "probability"]
"""What a combiner reads. `cost`: raw rewards and costs. `unsafe`: raw rewards, and a cost of 1 for an unsafe answer.
`probability`: helpfulness from 0 to 1, and the probability that the answer is unsafe."""
CostMeasure = Literal["cost", "unsafe"]

_SAME = 1e-9


@dataclass(frozen=True)
class Combiner(ABC):
    """Base class of combiners; subclass it for your own."""

    state: ClassVar[tuple[str, ...]] = ()
    """Fields that `after` changes; they are part of every checkpoint."""

    @property
    @abstractmethod
    def reads(self) -> Reads:
        """What rewards and costs are."""

    @abstractmethod
    def __call__(self, reward: Array, cost: Array) -> Array:
        """Return the values that the policy maximizes, (prompts, answers), of rewards and costs of this shape."""

    def after(self, reward: Array, cost: Array) -> "Combiner":
        """Return the combiner of the next step, from the rewards and costs of all samples of this one."""
        return self


@dataclass(frozen=True)
class Lagrangian(Combiner):
    """(reward - λ·cost) / (1 + λ), with λ by ascent on its logarithm.

    Prefers the more helpful of two answers that are alike in safety, safe or not. A safe unhelpful answer is
    preferred to an unsafe helpful one if λ times the difference of the costs exceeds the difference of the rewards.

    Args:
        cost_at_most: Largest allowed mean cost.
        measure: What the cost is: the scorer's number, or 1 for an unsafe answer.
        rate: Step size of log λ per unit of cost; 0 keeps λ.
        start: First λ.
        min: Smallest λ, from which it can grow again; 0 only with a rate of 0.
        max: Largest λ.
        normalize: Whether to divide by 1 + λ, so that the values keep their scale. The weight of the KL penalty is
            then beta·(1 + λ) in terms of rewards.
        multiplier: Current λ; by default `start`.

    Source:
        Safe RLHF, arXiv 2310.12773: value and update of log λ.
    """

    cost_at_most: float = 0.0
    measure: CostMeasure = "cost"
    rate: float = 0.1
    start: float = 1.0
    min: float = 0.01
    max: float = 5.0
    normalize: bool = True
    multiplier: float = None  # type: ignore[assignment]

    state: ClassVar[tuple[str, ...]] = ("multiplier",)

    def __post_init__(self) -> None:
        if self.multiplier is None:
            object.__setattr__(self, "multiplier", self.start)

    @property
    def reads(self) -> Reads:
        """What rewards and costs are."""
        return self.measure

    def __call__(self, reward: Array, cost: Array) -> Array:
        """Return the values of answers."""
        return combiners.lagrangian(reward, cost, multiplier=self.multiplier, normalize=self.normalize)

    def after(self, reward: Array, cost: Array) -> "Lagrangian":
        """Return the combiner with λ·exp(rate·(mean cost - cost_at_most)), in its bounds."""
        if not self.rate or np.isnan(cost).all():
            return self
        # The exponent is bounded so that a large cost can't overflow; the bounds of λ come first anyway.
        step = np.clip(self.rate * (float(np.nanmean(cost)) - self.cost_at_most), -50, 50)
        return replace(self, multiplier=float(np.clip(self.multiplier * math.exp(step), self.min, self.max)))


@dataclass(frozen=True)
class Bilinear(Combiner):
    """(p(safe) + a1)·(helpfulness + a2), the objective of BFPO.

    Prefers the more helpful of two answers that are alike in safety, and the more clearly the safer they are. A safe
    unhelpful answer is preferred to an unsafe helpful one if a2 > a1 (for helpfulness 0 and 1).

    Args:
        a1: Offset of safety; None is E_s, the mean safety of the first batch of samples.
        a2: Offset of helpfulness.

    Source:
        Paper, RL objective (a1 = E_s, a2 = 1/2).
    """

    a1: float | None = None
    a2: float = 0.5

    state: ClassVar[tuple[str, ...]] = ("a1",)

    @property
    def reads(self) -> Reads:
        """What rewards and costs are."""
        return "probability"

    def __call__(self, reward: Array, cost: Array) -> Array:
        """Return the values of answers."""
        offset = _mean(1 - cost) if self.a1 is None else self.a1
        return combiners.bilinear(1 - cost, reward, a1=offset, a2=self.a2)

    def after(self, reward: Array, cost: Array) -> "Bilinear":
        """Return the combiner with E_s of the first batch."""
        return self if self.a1 is not None or np.isnan(cost).all() else replace(self, a1=_mean(1 - cost))


@dataclass(frozen=True)
class Multiplicative(Combiner):
    """(helpfulness - floor)·(1 - p(unsafe)).

    Prefers the more helpful of two safe answers, and a safe unhelpful answer to an unsafe one if the floor is below
    its helpfulness. Two unsafe answers are equal, however helpful they are.

    Args:
        floor: Helpfulness at which a safe answer is worth as much as an unsafe one; at most 0, because an answer
            below it would be worth more if it is unsafe.

    Source:
        Multiplicative value function, arXiv 2303.04118, on whole answers.
    """

    floor: float = 0.0

    @property
    def reads(self) -> Reads:
        """What rewards and costs are."""
        return "probability"

    def __call__(self, reward: Array, cost: Array) -> Array:
        """Return the values of answers."""
        return combiners.multiplicative(reward, cost, floor=self.floor)


@dataclass(frozen=True)
class Tail(Combiner):
    """Mean of reward - λ·cost over the worst share of the answers, or of the prompts (CVaR).

    In the tail it prefers what reward - λ·cost prefers: the more helpful of two answers alike in safety, and a safe
    unhelpful answer to an unsafe helpful one if λ times the difference of the costs exceeds that of the rewards.
    Above the tail all answers are equal in all four cases. With `over: prompts` a prompt is in the tail if the mean
    of its answers is; then all its answers count.

    Args:
        share: Share of the answers or prompts in the tail, in (0, 1].
        over: What the tail consists of.
        multiplier: λ, at least 0, which doesn't change.
        measure: What the cost is: the scorer's number, or 1 for an unsafe answer.
        rate: Weight of the new batch in the running quantile, in (0, 1].
        tail_start: Current quantile, below which the tail is; None is the quantile of the batch at hand.

    Source:
        Rockafellar and Uryasev 2000: the gradient of CVaR is that of an expected value at the quantile.
    """

    share: float = 0.2
    over: Literal["answers", "prompts"] = "answers"
    multiplier: float = 1.0
    measure: CostMeasure = "cost"
    rate: float = 0.1
    tail_start: float | None = None

    state: ClassVar[tuple[str, ...]] = ("tail_start",)

    @property
    def reads(self) -> Reads:
        """What rewards and costs are."""
        return self.measure

    def __call__(self, reward: Array, cost: Array) -> Array:
        """Return the values of answers."""
        values = combiners.lagrangian(reward, cost, multiplier=self.multiplier)
        start = self.tail_start
        if start is None:
            start = self._quantile(values)
        if self.over == "answers":
            return combiners.tail(values, start=start, share=self.share)
        in_tail = _prompt_means(values)[:, None] <= start
        return np.where(in_tail, (values - start) / self.share, np.where(np.isnan(values), np.nan, 0.0))

    def after(self, reward: Array, cost: Array) -> "Tail":
        """Return the combiner with the running quantile."""
        values = combiners.lagrangian(reward, cost, multiplier=self.multiplier)
        if np.isnan(values).all():
            return self
        quantile = self._quantile(values)
        previous = quantile if self.tail_start is None else self.tail_start
        return replace(self, tail_start=previous + self.rate * (quantile - previous))

    def _quantile(self, values: Array) -> float:
        outcomes = values if self.over == "answers" else _prompt_means(values)
        finite = outcomes[~np.isnan(outcomes)]
        return float(np.quantile(finite, self.share)) if finite.size else math.nan


COMBINERS: dict[str, type[Combiner]] = {
    "lagrangian": Lagrangian,
    "bilinear": Bilinear,
    "multiplicative": Multiplicative,
    "tail": Tail,
}


def make_combiner(options: Mapping[str, Any]) -> Combiner:
    """Return the combiner that a mapping describes, such as a recipe's `combine` section.

    Args:
        options: `name` (a key of `COMBINERS`, or `package.module:Class`; default `lagrangian`) and the
            hyperparameters. The `multiplier` of a Lagrangian must be resolved; see `read_solved_multiplier`.

    Raises:
        RecipeError: If the name or a hyperparameter is unknown.
    """
    values = dict(options)
    name = values.pop("name", "lagrangian")
    combiner_class = _combiner_class(name)
    allowed = {field.name for field in fields(combiner_class)}
    if unknown := sorted(values.keys() - allowed):
        raise RecipeError(
            f"combine.{unknown[0]} is not an option of '{name}'; {did_you_mean(unknown[0], sorted(allowed))}"
        )
    try:
        return combiner_class(**values)
    except TypeError as error:
        raise RecipeError(f"combine: '{name}' can't be made ({error})") from None


def read_solved_multiplier(path: str, *, measure: CostMeasure, beta: float) -> float:
    """Return the multiplier of a `dual.json` for a Lagrangian that isn't normalized.

    Args:
        path: `dual.json` of `bfpo dual`, or its folder.
        measure: What the costs of the run are.
        beta: Weight of the KL penalty of the run.

    Raises:
        DataError: If the file is missing or malformed.
        RecipeError: If its multiplier is not one for this run.
    """
    dual = read_dual(path)
    where = f"combine.multiplier: {path}"
    multiplier = feasible_multiplier(dual, where)
    if dual.objective != "reward" or dual.constraint.measure != measure:
        raise RecipeError(
            f"{where} bounds {dual.constraint.measure} for the objective {dual.objective}; this run needs a bound on "
            f"{measure} for the objective reward: set combine.measure, or run `bfpo dual` again"
        )
    if abs(dual.beta - beta) > _SAME * beta:
        raise RecipeError(
            f"{where} was computed for beta {dual.beta:g}, and trainer.beta is {beta:g}; use the same beta, or run "
            "`bfpo dual` again"
        )
    if dual.reward_scale != 1:
        raise RecipeError(
            f"{where} was computed for rewards times {dual.reward_scale:g}, and the run has them as they are; run "
            "`bfpo dual` without --reward-scale"
        )
    return multiplier


def _combiner_class(name: object) -> type[Combiner]:
    if not isinstance(name, str) or (":" not in name and name not in COMBINERS):
        raise RecipeError(f"combine.name is {name!r}; {did_you_mean(str(name), list(COMBINERS))}, or 'module:Class'")
    if ":" not in name:
        return COMBINERS[name]
    combiner_class = import_object(name, "combine.name")
    if not (isinstance(combiner_class, type) and issubclass(combiner_class, Combiner)):
        raise RecipeError(f"combine.name is '{name}', which is not a subclass of bfpo.losses.combine.Combiner")
    if isabstract(combiner_class):
        raise RecipeError(f"combine.name is '{name}', which doesn't define __call__ and reads")
    return combiner_class


def _mean(values: Array) -> float:
    finite = values[~np.isnan(values)]
    return float(finite.mean()) if finite.size else math.nan


def _prompt_means(values: Array) -> Array:
    """Return the mean of each prompt's values that aren't NaN, (prompts,); NaN where all are."""
    counts = (~np.isnan(values)).sum(axis=1)
    sums = np.nansum(values, axis=1)
    means: Array = np.divide(sums, counts, out=np.full(len(values), np.nan), where=counts > 0)
    return means
