"""Rates corrected for a judge's errors, which a calibration set of answers that people labeled tells.

A judge that misses yeses and sees yeses that aren't there finds a rate that is off by an amount that no number of
prompts makes smaller. Knowing how often it does both, the rate that people would find can be had back.
"""

import math
from collections.abc import Iterable
from statistics import NormalDist
from typing import NamedTuple

from bfpo.stats.intervals import LEVEL, Interval, wilson

UNKNOWN = Interval(math.nan, 0.0, 1.0)
"""What is left when a judge's word tells nothing: the rate may be anything."""


class JudgeErrors(NamedTuple):
    """How often a judge is right about people's yes and about their no.

    Args:
        sensitivity: Share of people's yes that the judge calls yes, in [0, 1]; 0 where there is none.
        yes: Independent answers that it rests on, at least 0.
        specificity: Share of people's no that the judge calls no, in [0, 1]; 0 where there is none.
        no: Independent answers that it rests on, at least 0.
    """

    sensitivity: float
    yes: int
    specificity: float
    no: int


def judge_errors(pairs: Iterable[tuple[str, bool, bool]]) -> JudgeErrors:
    """Return a judge's errors from a calibration set.

    Args:
        pairs: Of each answer: what it answers, what people say, what the judge says. Answers to one prompt count as
            one together, because they are no independent observations: that is cautious.
    """
    right: dict[bool, list[bool]] = {True: [], False: []}
    prompts: dict[bool, set[str]] = {True: set(), False: set()}
    for prompt, people, judge in pairs:
        right[people].append(people == judge)
        prompts[people].add(prompt)
    sensitivity, specificity = (
        sum(right[label]) / len(right[label]) if right[label] else 0.0 for label in (True, False)
    )
    return JudgeErrors(sensitivity, len(prompts[True]), specificity, len(prompts[False]))


def tells_apart(errors: JudgeErrors, *, level: float = LEVEL) -> bool:
    """Whether the judge's yes is clearly likelier where people say yes than where they say no.

    That is where sensitivity + specificity - 1 is above 0 by its own interval; else its word tells nothing.
    """
    (right_yes, var_yes), (right_no, var_no) = _of_errors(errors)
    half = NormalDist().inv_cdf(0.5 + level / 2) * math.sqrt(var_yes + var_no)
    return right_yes + right_no - 1 > half and errors.sensitivity + errors.specificity > 1


def corrected_rate(rate: float, n: int, errors: JudgeErrors, *, level: float = LEVEL) -> Interval:
    """Return the rate that people would find, with an interval that holds the uncertainty of all three rates.

    The estimate is (rate + specificity - 1) / (sensitivity + specificity - 1), cut to [0, 1] (Rogan & Gladen 1978,
    doi 10.1093/oxfordjournals.aje.a112510); the interval is that of Lang & Reiczigel (2014,
    doi 10.1016/j.prevetmed.2013.09.015), widened to hold Wilson's around the estimate: near 0 and 1 cutting leaves
    next to nothing of it, and a judge can't tell more than people would if they labeled all n.

    It holds only if the judge errs on the evaluated answers as on those of the calibration set.

    Args:
        rate: Share of yes by the judge, in [0, 1].
        n: Independent prompts that it rests on, at least 1.
        errors: Of the judge.
        level: Confidence, in (0, 1).

    Returns:
        The rate; `UNKNOWN` where the judge doesn't tell yes and no apart.

    Raises:
        ValueError: If a rate or a count isn't possible.
    """
    for name, share in (("rate", rate), ("sensitivity", errors.sensitivity), ("specificity", errors.specificity)):
        if not 0 <= share <= 1:
            raise ValueError(f"{name} is {share}; expected a share in [0, 1]")
    if n < 1 or errors.yes < 0 or errors.no < 0:
        raise ValueError(f"n is {n}, yes {errors.yes}, no {errors.no}; expected n >= 1, the others >= 0")
    if not tells_apart(errors, level=level):
        return UNKNOWN
    value = _cut((rate + errors.specificity - 1) / (errors.sensitivity + errors.specificity - 1))
    low, high = _uncut(rate, n, errors, level)
    least = wilson(round(value * n), n, level=level)
    return Interval(value, min(_cut(low), value, least.low), max(_cut(high), value, least.high))


def fits(rate: float, n: int, errors: JudgeErrors, *, level: float = LEVEL) -> bool:
    """Whether some rate of people would make a judge with these errors find this rate, give or take chance.

    If none would, the judge errs otherwise on the evaluated answers than on the calibration set. True where the judge
    doesn't tell yes and no apart. Arguments as for `corrected_rate`.
    """
    if not tells_apart(errors, level=level):
        return True
    low, high = _uncut(rate, n, errors, level)
    return high >= 0 and low <= 1


def _uncut(rate: float, n: int, errors: JudgeErrors, level: float) -> tuple[float, float]:
    """Return Lang and Reiczigel's interval before it is cut to [0, 1]."""
    z = NormalDist().inv_cdf(0.5 + level / 2)
    (right_yes, var_yes), (right_no, var_no) = _of_errors(errors)
    found, var_found = _shrunk(rate, n, z**2)
    youden = right_yes + right_no - 1
    center = (found + right_no - 1) / youden
    half = z * math.sqrt(var_found + center**2 * var_yes + (1 - center) ** 2 * var_no) / youden
    shift = 2 * z**2 * (center * var_yes - (1 - center) * var_no)
    return center + shift - half, center + shift + half


def _of_errors(errors: JudgeErrors) -> tuple[tuple[float, float], tuple[float, float]]:
    """Return sensitivity and specificity with their variances; one more right and one more wrong answer each."""
    return _shrunk(errors.sensitivity, errors.yes, 2.0), _shrunk(errors.specificity, errors.no, 2.0)


def _shrunk(share: float, n: int, more: float) -> tuple[float, float]:
    """Return a share drawn to one half by so many more trials, and its variance."""
    drawn = (share * n + more / 2) / (n + more)
    return drawn, drawn * (1 - drawn) / (n + more)


def _cut(share: float) -> float:
    return min(1.0, max(0.0, share))
