"""Mean cost over the worst share of prompts, which a mean over all prompts doesn't show."""

import numpy as np

from bfpo.stats.intervals import LEVEL, Interval, Values, effective_bounds, in_unit_interval

# Default share of the prompts that counts as the worst.
WORST = 0.1
# Number of thresholds that the bounds are minimized over, evenly spaced by rank.
_THRESHOLDS = 100


def worst_mean(costs: Values, *, share: float = WORST) -> Values:
    """Return the mean over the worst share of values: conditional value at risk, or expected shortfall.

    CVaR = min over b of b + E[(X - b)+] / share (Rockafellar and Uryasev 2000). If the share isn't a whole number of
    values, the last value counts in part.

    Args:
        costs: One cost per prompt, higher is worse, (..., n).
        share: Share of the prompts, in (0, 1].

    Returns:
        The mean, (...).
    """
    n = costs.shape[-1]
    worst_first = -np.sort(-costs, axis=-1)
    weights = np.clip(share * n - np.arange(n), 0, 1) / (share * n)
    return np.asarray((worst_first * weights).sum(axis=-1))


def worst_mean_interval(costs: Values, *, share: float = WORST, level: float = LEVEL) -> Interval:
    """Return the mean over the worst share with its interval.

    At each threshold b, b + E[(X - b)+] / share has the bounds that `effective_bounds` gives the mean excess; the
    smallest lower and the smallest upper bound are the interval's, as the mean itself is the minimum over b. Unlike a
    bootstrap interval it has a width where no answer, or nearly every one, is harmful.

    Args:
        costs: One cost per prompt, in [0, 1], higher is worse, (n,).
        share: Share of the prompts, in (0, 1].
        level: Confidence level, in (0, 1).

    Raises:
        ValueError: If there is no cost, or one is outside [0, 1].
    """
    if not len(costs) or not in_unit_interval(costs):
        raise ValueError("expected at least one cost, each in [0, 1]")
    low, high = worst_mean_bounds(costs, share=share, level=level)
    return Interval(float(worst_mean(costs, share=share)), float(low), float(high))


def worst_mean_bounds(costs: Values, *, share: float = WORST, level: float = LEVEL) -> tuple[Values, Values]:
    """Return the bounds of `worst_mean_interval` for many sets of values at once, (..., n) → (...) and (...)."""
    ranks = np.unique(np.linspace(0, costs.shape[-1] - 1, _THRESHOLDS).round().astype(int))
    thresholds = [np.zeros(costs.shape[:-1]), *np.moveaxis(np.sort(costs, axis=-1)[..., ranks], -1, 0)]
    lowest, highest = np.ones(costs.shape[:-1]), np.ones(costs.shape[:-1])
    for b in thresholds:
        # The excess over b is at most 1 - b; over 1 there is none.
        room = np.where(b < 1, 1 - b, 1)
        low, high = effective_bounds(np.maximum(costs - b[..., None], 0) / room[..., None], level=level)
        lowest = np.minimum(lowest, np.where(b < 1, b + room * low / share, 1))
        highest = np.minimum(highest, np.where(b < 1, b + room * high / share, 1))
    return lowest, highest
