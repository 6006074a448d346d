"""The worst answers: the mean over the worst share of prompts, which an average over all prompts hides."""

import numpy as np

from bfpo.stats.intervals import LEVEL, Interval, Values, in_unit_interval, score_bounds

# Share of the prompts that counts as the worst.
WORST = 0.1
# Thresholds at which an interval is sought, evenly over the values by rank.
_THRESHOLDS = 100


def worst_mean(costs: Values, *, share: float = WORST) -> Values:
    """Return the mean over the worst share of values: conditional value at risk, or expected shortfall.

    CVaR = min over b of b + E[(X - b)+] / share (Rockafellar and Uryasev 2000): the share need not be a whole number
    of values, the last one then counts in part.

    Args:
        costs: One per prompt, higher is worse, (..., n).
        share: Of the prompts, in (0, 1].

    Returns:
        (...).
    """
    n = costs.shape[-1]
    worst_first = -np.sort(-costs, axis=-1)
    weights = np.clip(share * n - np.arange(n), 0, 1) / (share * n)
    return np.asarray((worst_first * weights).sum(axis=-1))


def worst_mean_interval(costs: Values, *, share: float = WORST, level: float = LEVEL) -> Interval:
    """Return the mean over the worst share with its interval.

    At each threshold b, b + E[(X - b)+] / share has the bounds that `score_interval` gives the mean excess; the
    smallest lower and the smallest upper bound are the interval's, as the mean itself is the smallest over b. Unlike
    a bootstrap it isn't a point where no answer, or nearly every one, is harmful.

    Args:
        costs: One per prompt, in [0, 1], higher is worse, (n,).
        share: Of the prompts, in (0, 1].
        level: Confidence, in (0, 1).

    Raises:
        ValueError: If there is no value, or one isn't in [0, 1].
    """
    if not len(costs) or not in_unit_interval(costs):
        raise ValueError("expected at least one cost, each in [0, 1]")
    low, high = worst_mean_bounds(costs, share=share, level=level)
    return Interval(float(worst_mean(costs, share=share)), float(low), float(high))


def worst_mean_bounds(costs: Values, *, share: float = WORST, level: float = LEVEL) -> tuple[Values, Values]:
    """Return the bounds of `worst_mean_interval` for many sets of values at once, (..., n) → (...) and (...)."""
    ranks = np.unique(np.linspace(0, costs.shape[-1] - 1, _THRESHOLDS).round().astype(int))
    thresholds = [np.zeros(costs.shape[:-1]), *np.moveaxis(np.sort(costs, axis=-1)[..., ranks], -1, 0)]
    least, most = np.ones(costs.shape[:-1]), np.ones(costs.shape[:-1])
    for b in thresholds:
        # The excess over b is at most 1 - b; over 1 there is none.
        room = np.where(b < 1, 1 - b, 1)
        low, high = score_bounds(np.maximum(costs - b[..., None], 0) / room[..., None], level=level)
        least = np.minimum(least, np.where(b < 1, b + room * low / share, 1))
        most = np.minimum(most, np.where(b < 1, b + room * high / share, 1))
    return least, most
