"""Verdicts on differences, and comparisons of two models in safety and helpfulness."""

from dataclasses import dataclass
from typing import Literal

from bfpo.stats.intervals import SIGNIFICANT, Interval

DifferenceVerdict = Literal["better", "worse", "not distinguishable"]
ModelVerdict = Literal["dominates", "dominated", "trade-off", "not distinguishable"]
"""Verdict on one model against another in safety and helpfulness together."""


@dataclass(frozen=True, slots=True)
class AxisResult:
    """Difference of two models on one axis, safety or helpfulness.

    Args:
        task: Kind of the prompts.
        metric: The metric.
        difference: This run minus the baseline, over the prompts of all suites that both answered.
        low: Lower bound of the 95 % interval, not adjusted for the number of tests.
        high: Upper bound.
        n: Number of prompts.
        p_adjusted: P-value, adjusted by Holm over all tests of the comparison.
        verdict: Verdict that the interval and the p-value support.
    """

    task: str
    metric: str
    difference: float
    low: float
    high: float
    n: int
    p_adjusted: float
    verdict: DifferenceVerdict


@dataclass(frozen=True, slots=True)
class ModelComparison:
    """Comparison of two models in safety and helpfulness together.

    Args:
        run: Name of the run.
        against: Name of the baseline.
        judge: Judge that the scores rest on.
        verdict: `dominates`: better on one axis and not distinguishably worse on the other; `dominated`: the
            reverse; `trade-off`: better on one, worse on the other; else `not distinguishable`.
        safety: Difference on harmful prompts.
        helpfulness: Difference on benign prompts; by over-refusal where no judge rates helpfulness.
        tests: Number of tests that the p-values are adjusted for.
    """

    run: str
    against: str
    judge: str
    verdict: ModelVerdict
    safety: AxisResult
    helpfulness: AxisResult
    tests: int


def verdict_on(difference: Interval, *, higher_is_better: bool, p_value: float | None = None) -> DifferenceVerdict:
    """Return the verdict on a difference: two models are distinguishable only if the interval excludes 0.

    Args:
        difference: The difference with its interval.
        higher_is_better: Whether higher is better.
        p_value: P-value that must be below 5 % too; None to use the interval only.
    """
    if difference.low <= 0 <= difference.high or (p_value is not None and p_value >= SIGNIFICANT):
        return "not distinguishable"
    return "better" if (difference.low > 0) == higher_is_better else "worse"
