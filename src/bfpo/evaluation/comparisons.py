"""What is said of a difference, and of a pair of models."""

from dataclasses import dataclass
from typing import Literal

from bfpo.stats.intervals import SIGNIFICANT, Interval

DifferenceVerdict = Literal["better", "worse", "not distinguishable"]
Word = Literal["dominates", "dominated", "trade-off", "not distinguishable"]
"""What one model is to another in safety and helpfulness together."""


@dataclass(frozen=True, slots=True)
class AxisResult:
    """One of the two things that a pair of models is told apart by.

    Args:
        task: Whose prompts, by kind.
        metric: What was measured on them.
        difference: This run minus the other, over the prompts that both answered, of all suites.
        low: Lower bound of the 95 % interval, by itself.
        high: Upper bound.
        n: Prompts.
        p_adjusted: By Holm, over all tests that were made along with it.
        verdict: What follows from both.
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
    """What becomes of a pair of models in safety and helpfulness together.

    Args:
        run: Name of the run.
        against: Of the other run.
        judge: Whose verdicts it rests on.
        verdict: `dominates`: better in one and not distinguishably worse in the other; `dominated`: the other way
            round; `trade-off`: better in one, worse in the other; else `not distinguishable`.
        safety: On harmful prompts.
        helpfulness: On benign prompts; by over-refusal where no judge rates helpfulness.
        tests: How many the p-values were adjusted for.
    """

    run: str
    against: str
    judge: str
    verdict: Word
    safety: AxisResult
    helpfulness: AxisResult
    tests: int


def verdict_on(difference: Interval, *, higher_is_better: bool, p_value: float | None = None) -> DifferenceVerdict:
    """Put a difference in words: only an interval that excludes 0 tells two models apart.

    Args:
        difference: With its interval.
        higher_is_better: Which way is good.
        p_value: Of a test that must agree at 5 %, where the interval alone would say too much.
    """
    if difference.low <= 0 <= difference.high or (p_value is not None and p_value >= SIGNIFICANT):
        return "not distinguishable"
    return "better" if (difference.low > 0) == higher_is_better else "worse"
