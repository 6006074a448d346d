"""Differences of two models over the same prompts: intervals, and the tests that go with them."""

import math
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binom
from scipy.stats import t as student

from bfpo.stats.intervals import LEVEL, Interval, Values, paired_p_value

# Halvings of the interval in which a limit lies: to the last bit of a float.
_HALVINGS = 55
# Differences whose spread is smaller are one; rounding leaves crumbs.
_SAME = 1e-9


def paired_rates(ours: Values, theirs: Values, *, level: float = LEVEL) -> Interval:
    """Return Tango's score interval of a difference of two rates over the same prompts.

    Args:
        ours: 0 or 1 for each prompt, (n,).
        theirs: Of the other model, prompt by prompt.
        level: Confidence, in (0, 1).

    Raises:
        ValueError: If there is no prompt, or the two aren't of one length.
    """
    _check(ours, theirs)
    return tango(int((ours > theirs).sum()), int((ours < theirs).sum()), len(ours), level=level)


def tango(gained: float, lost: float, n: int, *, level: float = LEVEL) -> Interval:
    """Return the score interval of a difference of two paired rates (Tango 1998).

    It holds the differences d at which |gained - lost - n·d| / sqrt(n(2q + d(1 - d))) is at most z, q the likeliest
    rate of losing if d were the truth. At d = 0 that is McNemar's statistic.

    Args:
        gained: Prompts on which only ours is 1.
        lost: Prompts on which only theirs is 1.
        n: All prompts, at least 1.
        level: Confidence, in (0, 1).

    Raises:
        ValueError: If the counts aren't possible.
    """
    if n < 1 or min(gained, lost) < 0 or gained + lost > n:
        raise ValueError(f"{gained} gained and {lost} lost of {n}; expected counts that fit")
    low, high = tango_bounds(np.array(float(gained)), np.array(float(lost)), n, level=level)
    return Interval((gained - lost) / n, float(low), float(high))


def tango_bounds(gained: Values, lost: Values, n: int, *, level: float = LEVEL) -> tuple[Values, Values]:
    """Return the bounds of `tango` for many counts at once, (...) and (...)."""
    z = NormalDist().inv_cdf(0.5 + level / 2)
    value = (gained - lost) / n

    def inside(d: Values) -> NDArray[np.bool_]:
        b = (2 * n - gained + lost) * d - gained - lost
        q = (np.sqrt(np.maximum(b**2 + 8 * n * lost * d * (1 - d), 0)) - b) / (4 * n)
        return np.asarray(np.abs(gained - lost - n * d) <= z * np.sqrt(np.maximum(n * (2 * q + d * (1 - d)), 0)))

    bounds = []
    for end in (-1.0, 1.0):
        near, far = value, np.full_like(value, end)
        for _ in range(_HALVINGS):
            middle = (near + far) / 2
            within = inside(middle)
            near, far = np.where(within, middle, near), np.where(within, far, middle)
        bounds.append(near)
    return bounds[0], bounds[1]


def mcnemar_p_value(ours: Values, theirs: Values) -> float:
    """Return the two-sided mid-p-value of McNemar's test on the prompts where two models differ.

    The exact test with half the weight on what was seen: the exact test itself errs far less often than it says, the
    asymptotic one at times more often (Fagerland et al. 2013).

    Args:
        ours: One value per prompt, (n,).
        theirs: Of the other model, prompt by prompt; only which is larger counts.

    Returns:
        1 when no prompt differs.
    """
    gained, lost = int((ours > theirs).sum()), int((ours < theirs).sum())
    if gained + lost == 0:
        return 1.0
    fewer, differing = min(gained, lost), gained + lost
    return min(1.0, float(2 * binom.cdf(fewer, differing, 0.5) - binom.pmf(fewer, differing, 0.5)))


def paired_means(ours: Values, theirs: Values, *, level: float = LEVEL) -> tuple[Interval, float]:
    """Return Student's interval of a difference of means over the same prompts, and the p-value that goes with it.

    Where the difference is the same on every prompt, its standard error of 0 says nothing: there a prompt counts as
    one trial, by `tango` and `mcnemar_p_value`.

    Args:
        ours: One value per prompt, (n,).
        theirs: Of the other model, prompt by prompt.
        level: Confidence, in (0, 1).

    Raises:
        ValueError: If there is no prompt, or the two aren't of one length.
    """
    _check(ours, theirs)
    difference = ours - theirs
    low, high = paired_mean_bounds(difference, level=level)
    # Without a spread there is no t-test.
    p_value = mcnemar_p_value(ours, theirs) if np.ptp(difference) < _SAME else paired_p_value(ours, theirs)
    return Interval(float(difference.mean()), float(low), float(high)), p_value


def paired_mean_bounds(differences: Values, *, level: float = LEVEL) -> tuple[Values, Values]:
    """Return the bounds of `paired_means` for many sets of differences at once, (..., n) → (...) and (...)."""
    n = differences.shape[-1]
    mean = differences.mean(axis=-1)
    # Lengths differ by more than a rate can.
    size = np.maximum(1, np.abs(mean))
    low, high = tango_bounds(np.maximum(mean, 0) * n / size, np.maximum(-mean, 0) * n / size, n, level=level)
    if n == 1:
        return low * size, high * size
    same = np.ptp(differences, axis=-1) < _SAME
    half = student.ppf(0.5 + level / 2, n - 1) * differences.std(axis=-1, ddof=1) / math.sqrt(n)
    return np.where(same, low * size, mean - half), np.where(same, high * size, mean + half)


def _check(ours: Values, theirs: Values) -> None:
    if ours.shape != theirs.shape or not len(ours):
        raise ValueError(f"{len(ours)} and {len(theirs)} values; a paired difference needs the same prompts")
