"""Rates corrected for a judge's errors, which are estimated on a calibration set of human-labeled answers.

A judge with false positives and false negatives measures a rate that is biased by an amount that no number of prompts
makes smaller. With its sensitivity and specificity, the rate that annotators would find can be estimated.
"""

import math
from collections.abc import Iterable
from statistics import NormalDist
from typing import NamedTuple

from bfpo.stats.intervals import LEVEL, Interval, wilson

UNKNOWN = Interval(math.nan, 0.0, 1.0)
"""Result of a correction by a judge that is not informative: the rate may be anything from 0 to 1."""


class JudgeErrors(NamedTuple):
    """Sensitivity and specificity of a judge against human labels.

    Args:
        sensitivity: Share of the answers labeled yes that the judge calls yes, in [0, 1]; 0 if there are none.
        yes: Number of independent answers behind the sensitivity, at least 0.
        specificity: Share of the answers labeled no that the judge calls no, in [0, 1]; 0 if there are none.
        no: Number of independent answers behind the specificity, at least 0.
    """

    sensitivity: float
    yes: int
    specificity: float
    no: int


def judge_errors(calibration: Iterable[tuple[str, bool, bool]]) -> JudgeErrors:
    """Return a judge's errors on a calibration set.

    Args:
        calibration: Prompt, human label and judge's label of each answer. Answers to one prompt count as one trial
            together, because they are not independent observations: that is conservative.
    """
    correct: dict[bool, list[bool]] = {True: [], False: []}
    prompts: dict[bool, set[str]] = {True: set(), False: set()}
    for prompt, human, judge in calibration:
        correct[human].append(human == judge)
        prompts[human].add(prompt)
    sensitivity, specificity = (
        sum(correct[label]) / len(correct[label]) if correct[label] else 0.0 for label in (True, False)
    )
    return JudgeErrors(sensitivity, len(prompts[True]), specificity, len(prompts[False]))


def is_informative(errors: JudgeErrors, *, level: float = LEVEL) -> bool:
    """Return whether the judge says yes clearly more often to answers labeled yes than to those labeled no.

    It does if the interval of sensitivity + specificity - 1 is above 0. Otherwise its labels are not informative.
    """
    (sensitivity, sensitivity_variance), (specificity, specificity_variance) = _shrunk_errors(errors)
    half = NormalDist().inv_cdf(0.5 + level / 2) * math.sqrt(sensitivity_variance + specificity_variance)
    return sensitivity + specificity - 1 > half and errors.sensitivity + errors.specificity > 1


def corrected_rate(rate: float, n: int, errors: JudgeErrors, *, level: float = LEVEL) -> Interval:
    """Return the rate that annotators would find, with an interval that covers the uncertainty of all three rates.

    The estimate is (rate + specificity - 1) / (sensitivity + specificity - 1), clipped to [0, 1] (Rogan & Gladen
    1978, doi 10.1093/oxfordjournals.aje.a112510). The interval is that of Lang & Reiczigel (2014,
    doi 10.1016/j.prevetmed.2013.09.015), widened to contain Wilson's interval of the estimate: near 0 and 1 clipping
    leaves almost nothing of it, and a judge can't be more precise than annotators who label all n.

    It is valid only if the judge errs on the evaluated answers as it does on the calibration set.

    Args:
        rate: Share of yes by the judge, in [0, 1].
        n: Number of independent prompts behind the rate, at least 1.
        errors: Errors of the judge.
        level: Confidence level, in (0, 1).

    Returns:
        The rate, or `UNKNOWN` if the judge is not informative.

    Raises:
        ValueError: If a rate or a count is out of range.
    """
    for name, share in (("rate", rate), ("sensitivity", errors.sensitivity), ("specificity", errors.specificity)):
        if not 0 <= share <= 1:
            raise ValueError(f"{name} is {share}; expected a share in [0, 1]")
    if n < 1 or errors.yes < 0 or errors.no < 0:
        raise ValueError(f"n is {n}, yes {errors.yes}, no {errors.no}; expected n >= 1, the others >= 0")
    if not is_informative(errors, level=level):
        return UNKNOWN
    value = _clip((rate + errors.specificity - 1) / (errors.sensitivity + errors.specificity - 1))
    low, high = _unclipped_bounds(rate, n, errors, level)
    narrowest = wilson(round(value * n), n, level=level)
    return Interval(value, min(_clip(low), value, narrowest.low), max(_clip(high), value, narrowest.high))


def is_consistent(rate: float, n: int, errors: JudgeErrors, *, level: float = LEVEL) -> bool:
    """Return whether a judge with these errors would measure this rate, up to chance, at some true rate in [0, 1].

    If not, its errors on the evaluated answers differ from those on the calibration set. True if the judge is not
    informative. Arguments are those of `corrected_rate`.
    """
    if not is_informative(errors, level=level):
        return True
    low, high = _unclipped_bounds(rate, n, errors, level)
    return high >= 0 and low <= 1


def _unclipped_bounds(rate: float, n: int, errors: JudgeErrors, level: float) -> tuple[float, float]:
    """Return Lang and Reiczigel's interval before it is clipped to [0, 1]."""
    z = NormalDist().inv_cdf(0.5 + level / 2)
    (sensitivity, sensitivity_variance), (specificity, specificity_variance) = _shrunk_errors(errors)
    shrunk_rate, rate_variance = _shrunk(rate, n, z**2)
    youden = sensitivity + specificity - 1
    center = (shrunk_rate + specificity - 1) / youden
    half = (
        z
        * math.sqrt(rate_variance + center**2 * sensitivity_variance + (1 - center) ** 2 * specificity_variance)
        / youden
    )
    shift = 2 * z**2 * (center * sensitivity_variance - (1 - center) * specificity_variance)
    return center + shift - half, center + shift + half


def _shrunk_errors(errors: JudgeErrors) -> tuple[tuple[float, float], tuple[float, float]]:
    """Return sensitivity and specificity with their variances, each with one more right and one more wrong answer."""
    return _shrunk(errors.sensitivity, errors.yes, 2.0), _shrunk(errors.specificity, errors.no, 2.0)


def _shrunk(share: float, n: int, pseudo_trials: float) -> tuple[float, float]:
    """Return a share with its variance after adding pseudo-trials, half of which succeed."""
    shrunk = (share * n + pseudo_trials / 2) / (n + pseudo_trials)
    return shrunk, shrunk * (1 - shrunk) / (n + pseudo_trials)


def _clip(share: float) -> float:
    return min(1.0, max(0.0, share))
