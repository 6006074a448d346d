"""Differences of two models over the same prompts: their intervals and significance tests."""

import math
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from bfpo.stats.intervals import LEVEL, Interval, Values, paired_p_value

# Bisection steps for a bound: enough for the last bit of a float.
_HALVINGS = 55
# Differences with a smaller range count as equal, because rounding leaves a tiny one.
_SAME = 1e-9


def paired_rates(ours: Values, baseline: Values, *, level: float = LEVEL) -> Interval:
    """Return Tango's score interval of a difference of two rates over the same prompts.

    Args:
        ours: 0 or 1 for each prompt, (n,).
        baseline: The same of the baseline, in the same order, (n,).
        level: Confidence level, in (0, 1).

    Raises:
        ValueError: If there is no prompt, or the two differ in length.
    """
    _check_paired(ours, baseline)
    return tango(int((ours > baseline).sum()), int((ours < baseline).sum()), len(ours), level=level)


def tango(gained: float, lost: float, n: int, *, level: float = LEVEL) -> Interval:
    """Return the score interval of a difference of two paired rates (Tango 1998).

    It contains the differences d at which |gained - lost - n·d| / sqrt(n(2q + d(1 - d))) is at most z, where q is the
    maximum-likelihood rate of losing given d. At d = 0 that is McNemar's statistic.

    Args:
        gained: Number of prompts on which only our value is 1.
        lost: Number of prompts on which only the baseline's value is 1.
        n: Number of all prompts, at least 1.
        level: Confidence level, in (0, 1).

    Raises:
        ValueError: If the counts are out of range.
    """
    if n < 1 or min(gained, lost) < 0 or gained + lost > n:
        raise ValueError(f"{gained} gained and {lost} lost of {n}; expected counts >= 0 with a sum of at most n >= 1")
    low, high = tango_bounds(np.array(float(gained)), np.array(float(lost)), n, level=level)
    return Interval((gained - lost) / n, float(low), float(high))


def tango_bounds(gained: Values, lost: Values, n: int, *, level: float = LEVEL) -> tuple[Values, Values]:
    """Return the bounds of `tango` for many counts at once, (...) and (...)."""
    z = NormalDist().inv_cdf(0.5 + level / 2)
    value = (gained - lost) / n

    def is_inside(d: Values) -> NDArray[np.bool_]:
        b = (2 * n - gained + lost) * d - gained - lost
        q = (np.sqrt(np.maximum(b**2 + 8 * n * lost * d * (1 - d), 0)) - b) / (4 * n)
        return np.asarray(np.abs(gained - lost - n * d) <= z * np.sqrt(np.maximum(n * (2 * q + d * (1 - d)), 0)))

    bounds = []
    for end in (-1.0, 1.0):
        near, far = value, np.full_like(value, end)
        for _ in range(_HALVINGS):
            middle = (near + far) / 2
            inside = is_inside(middle)
            near, far = np.where(inside, middle, near), np.where(inside, far, middle)
        bounds.append(near)
    return bounds[0], bounds[1]


def mcnemar_p_value(ours: Values, baseline: Values) -> float:
    """Return the two-sided mid-p-value of McNemar's test on the prompts where two models differ.

    It is the exact test with half the weight on the observed counts. The exact test is conservative, and the
    asymptotic one at times exceeds its nominal error rate (Fagerland et al. 2013).

    Args:
        ours: One value per prompt, (n,).
        baseline: Values of the baseline in the same order, (n,); only which of the two is larger counts.

    Returns:
        The p-value; 1 if no prompt differs.
    """
    from scipy.stats import binom

    gained, lost = int((ours > baseline).sum()), int((ours < baseline).sum())
    if gained + lost == 0:
        return 1.0
    fewer, differing = min(gained, lost), gained + lost
    return min(1.0, float(2 * binom.cdf(fewer, differing, 0.5) - binom.pmf(fewer, differing, 0.5)))


def paired_means(ours: Values, baseline: Values, *, level: float = LEVEL) -> tuple[Interval, float]:
    """Return Student's interval of a difference of means over the same prompts, and the p-value of its t-test.

    Where the difference is the same on every prompt, its standard error of 0 is no measure of uncertainty: there a
    prompt counts as one trial, by `tango` and `mcnemar_p_value`.

    Args:
        ours: One value per prompt, (n,).
        baseline: Values of the baseline in the same order, (n,).
        level: Confidence level, in (0, 1).

    Raises:
        ValueError: If there is no prompt, or the two differ in length.
    """
    _check_paired(ours, baseline)
    differences = ours - baseline
    low, high = paired_mean_bounds(differences, level=level)
    # A t-test needs a spread.
    test = mcnemar_p_value if np.ptp(differences) < _SAME else paired_p_value
    return Interval(float(differences.mean()), float(low), float(high)), test(ours, baseline)


def paired_mean_bounds(differences: Values, *, level: float = LEVEL) -> tuple[Values, Values]:
    """Return the bounds of `paired_means` for many sets of differences at once, (..., n) → (...) and (...)."""
    from scipy.stats import t as student

    n = differences.shape[-1]
    mean = differences.mean(axis=-1)
    # Lengths can differ by more than 1, which a rate can't.
    scale = np.maximum(1, np.abs(mean))
    low, high = tango_bounds(np.maximum(mean, 0) * n / scale, np.maximum(-mean, 0) * n / scale, n, level=level)
    if n == 1:
        return low * scale, high * scale
    same = np.ptp(differences, axis=-1) < _SAME
    half = student.ppf(0.5 + level / 2, n - 1) * differences.std(axis=-1, ddof=1) / math.sqrt(n)
    return np.where(same, low * scale, mean - half), np.where(same, high * scale, mean + half)


def _check_paired(ours: Values, baseline: Values) -> None:
    if ours.shape != baseline.shape or not len(ours):
        raise ValueError(f"{len(ours)} and {len(baseline)} values; a paired difference needs the same prompts")
