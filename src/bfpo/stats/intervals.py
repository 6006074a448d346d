"""Confidence intervals of rates, means and differences over a sample of prompts or runs.

The unit is the prompt. Several samples of one prompt are averaged first: they are not independent observations.
"""

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

LEVEL = 0.95
MIN_PROMPTS = 10
"""Number of prompts below which no bound, and no difference of harmonic means, is decided.

Fewer rarely contain one of the bad answers that a model gives now and then, and intervals of skewed scores cover too
seldom; see the coverage in docs/statistics.md.
"""
# Two models are called different where a test's p-value is below this.
SIGNIFICANT = 0.05
RESAMPLES = 4000
# Weight of the value that is added to scores, in prompts; docs/statistics.md compares others.
END_WEIGHT = 0.75

Values = NDArray[np.float64]


class Interval(NamedTuple):
    """An estimate with its confidence interval.

    Args:
        value: The estimate.
        low: Lower bound.
        high: Upper bound.
    """

    value: float
    low: float
    high: float


def wilson(successes: int, n: int, *, level: float = LEVEL) -> Interval:
    """Return the Wilson score interval of a rate (Wilson 1927).

    Args:
        successes: Number of successes, from 0 to n.
        n: Number of independent trials, at least 1.
        level: Confidence level, in (0, 1).

    Raises:
        ValueError: If the counts are out of range.
    """
    if not 0 <= successes <= n or n < 1:
        raise ValueError(f"{successes} successes of {n}; expected 0 <= successes <= n and n >= 1")
    rate = successes / n
    low, high = _wilson_bounds(np.array(rate), np.array(float(n)), level)
    return Interval(rate, float(low), float(high))


def score_interval(values: Values, *, most: float = math.inf, level: float = LEVEL) -> Interval:
    """Return the interval of a mean over prompts.

    Where all values are 0 or 1 it is Wilson's. For other scores it consists of quantiles of Beta distributions: those
    with the mean and the variance of the mean at random Dirichlet weights (Rubin 1981), with one value more of weight
    `END_WEIGHT`, 0 for the lower bound and 1 for the upper one. So scores that happen to be nearly equal don't
    exclude rare scores of 0 or 1.

    For rates of several answers a prompt (`most`) it is Wilson's at the effective sample size. A mean m of n values
    with variance s² has the standard error of a rate of m(1 - m)n / s² independent trials: the sample over its design
    effect (Korn and Graubard 1998; Franco et al. 2019). Two corrections for few prompts vanish as n grows:

    - s² is estimated as if one prompt more had been drawn, with the largest variance that values in [0, 1] with mean
      m can have, m(1 - m). Otherwise a few values that happen to be nearly equal have an interval of nearly no width.
    - The number of trials is multiplied by (z / t)², t being Student's quantile at n - 1 degrees of freedom (Korn and
      Graubard 1998), because s² is an estimate.

    A prompt counts as at least one trial, and as exactly one where all values are equal.

    Args:
        values: Mean over the samples of each prompt, in [0, 1], (n,).
        most: Maximum number of trials, for rates: the samples of all prompts together, each 0 or 1.
        level: Confidence level, in (0, 1).

    Raises:
        ValueError: If there is no value, or one is outside [0, 1].
    """
    if not len(values) or not in_unit_interval(values):
        raise ValueError("expected at least one value, each in [0, 1]")
    low, high = score_bounds(values, most=most, level=level)
    return Interval(float(values.mean()), float(low), float(high))


def score_bounds(values: Values, *, most: float = math.inf, level: float = LEVEL) -> tuple[Values, Values]:
    """Return the bounds of `score_interval` for many sets of values at once, (..., n) → (...) and (...)."""
    bounds = effective_bounds(values, most=most, level=level)
    is_score = ~np.isin(values, (0, 1)).all(axis=-1)
    if math.isfinite(most) or not is_score.any():
        return bounds
    low, high = (np.where(is_score, *pair) for pair in zip(_score_bounds(values, level), bounds, strict=True))
    return low, high


def _score_bounds(values: Values, level: float) -> tuple[Values, Values]:
    """Return the quantiles of Beta distributions with the moments of the posterior mean, with a 0 or a 1 more."""
    from scipy.special import betaincinv

    n, mean = values.shape[-1], values.mean(axis=-1)
    sums, squares = values.sum(axis=-1), (values**2).sum(axis=-1)
    bounds = []
    for end, quantile in ((0.0, 0.5 - level / 2), (1.0, 0.5 + level / 2)):
        center = (sums + END_WEIGHT * end) / (n + END_WEIGHT)
        variance = ((squares + END_WEIGHT * end) / (n + END_WEIGHT) - center**2) / (n + END_WEIGHT + 1)
        # Only values of 0 or 1, which have Wilson's interval, have no variance.
        size = np.divide(center * (1 - center), variance, out=np.full_like(center, np.inf), where=variance > 0) - 1
        bounds.append(betaincinv(center * size, (1 - center) * size, quantile))
    return np.minimum(bounds[0], mean), np.maximum(bounds[1], mean)


def effective_bounds(values: Values, *, most: float = math.inf, level: float = LEVEL) -> tuple[Values, Values]:
    """Return Wilson's bounds at the effective sample size, (..., n) → (...) and (...); see `score_interval`."""
    from scipy.special import stdtrit

    n = values.shape[-1]
    mean = values.mean(axis=-1)
    largest = mean * (1 - mean)
    squares = ((values - mean[..., None]) ** 2).sum(axis=-1)
    trials = np.full(np.shape(mean), float(n))
    if n > 1:
        quantile = 0.5 + level / 2
        shrinkage = (NormalDist().inv_cdf(quantile) / stdtrit(n - 1, quantile)) ** 2
        # Rounding leaves a tiny variance where all values are equal.
        differs = squares > 1e-12 * n
        variance = (squares + largest) / n
        trials = np.divide(shrinkage * n * largest, variance, out=trials, where=differs)
    return _wilson_bounds(mean, np.clip(trials, n, max(n, most)), level)


def in_unit_interval(values: Values) -> bool:
    """Return whether all values are from 0 to 1."""
    return bool(((values >= 0) & (values <= 1)).all())


def _wilson_bounds(rate: Values, n: Values, level: float) -> tuple[Values, Values]:
    z = NormalDist().inv_cdf(0.5 + level / 2)
    center = (rate + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(rate * (1 - rate) / n + z**2 / (4 * n**2))
    # The bounds at rates of 0 and 1 are exactly 0 and 1; rounding must not change that.
    return np.clip(center - half, 0, rate), np.clip(center + half, rate, 1)


def bootstrap(
    statistic: Callable[..., Values],
    *samples: Values,
    level: float = LEVEL,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Interval:
    """Return the percentile bootstrap interval of a statistic of one or several independent samples.

    The resamples are those of `scipy.stats.bootstrap(method="percentile", rng=seed)`. That function rejects a sample
    of one observation, and its bounds can differ in the last digit because it interpolates quantiles differently.

    Args:
        statistic: Function of one array per sample, with the observations on the last axis, which it reduces.
        samples: Observations, one per prompt. The rows of a 2-D sample (k, n) are resampled together, which makes the
            bootstrap a paired one.
        level: Confidence level, in (0, 1).
        seed: Seed of the resampling.
        resamples: Number of resamples.

    Raises:
        ValueError: If a sample is empty.
    """
    if any(sample.shape[-1] == 0 for sample in samples):
        raise ValueError("a bootstrap needs at least one observation in every sample")
    rng = np.random.default_rng(seed)
    sizes = [sample.shape[-1] for sample in samples]
    # In batches, because n × resamples indices of a large sample would fill the memory.
    batch = max(1, min(resamples, 4_000_000 // max(sizes)))
    distribution = []
    for start in range(0, resamples, batch):
        count = min(batch, resamples - start)
        # Indexing the last of two axes would put it first in memory, where reducing it takes five times as long.
        drawn = [
            np.take(sample, rng.integers(0, n, (count, n)), axis=-1) for sample, n in zip(samples, sizes, strict=True)
        ]
        distribution.append(np.asarray(statistic(*drawn), dtype=np.float64))
    tail = (1 - level) / 2
    low, high = np.quantile(np.concatenate(distribution), [tail, 1 - tail])
    return Interval(float(statistic(*samples)), float(low), float(high))


def mean_interval(values: Values, *, seed: int = 0) -> Interval:
    """Return the bootstrap interval of a mean over prompts, for values (n,) without a fixed range."""
    return bootstrap(lambda drawn: drawn.mean(axis=-1), values, seed=seed)


def t_interval(values: Values, *, level: float = LEVEL) -> Interval:
    """Return Student's interval of a mean over independent runs, the mean itself where all values are equal.

    Equals `scipy.stats.ttest_1samp` up to rounding, but doesn't warn about nearly equal values.

    Args:
        values: One value per run, (n,), n at least 2.
        level: Confidence level, in (0, 1).

    Raises:
        ValueError: If there are fewer than two values.
    """
    from scipy.stats import t as student

    if len(values) < 2:
        raise ValueError(f"{len(values)} values; an interval over runs needs at least two")
    mean = float(values.mean())
    half = float(student.ppf(0.5 + level / 2, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values)))
    return Interval(mean, mean - half, mean + half)


def mean_ellipse(points: Values, *, level: float = LEVEL, corners: int = 72) -> Values:
    """Return the outline of Hotelling's confidence ellipse of a mean in the plane over independent runs.

    Args:
        points: One point per run, (n, 2), n at least 3.
        level: Confidence level that the ellipse covers the mean, for both coordinates together, in (0, 1).
        corners: Number of points of the outline.

    Returns:
        The outline, (corners, 2).

    Raises:
        ValueError: If there are fewer than three runs.
    """
    from scipy.stats import f as fisher

    n = len(points)
    if n < 3:
        raise ValueError(f"{n} points; an ellipse over runs needs at least three")
    variances, axes = np.linalg.eigh(np.cov(points, rowvar=False) / n)
    radius = math.sqrt(2 * (n - 1) / (n - 2) * float(fisher.ppf(level, 2, n - 2)))
    angles = np.linspace(0, 2 * math.pi, corners, endpoint=False)
    circle = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    outline: Values = points.mean(axis=0) + radius * (circle * np.sqrt(variances.clip(min=0))) @ axes.T
    return outline


def paired_p_value(ours: Values, baseline: Values) -> float:
    """Return the two-sided p-value of a paired t-test over runs or prompts.

    Equals `scipy.stats.ttest_rel` up to rounding, but doesn't warn about nearly equal differences.

    Args:
        ours: One value per run or prompt, (n,).
        baseline: Values of the baseline in the same order, (n,).

    Returns:
        The p-value; 1 if no value differs or there is only one, 0 if all of several differ by the same amount.
    """
    from scipy.stats import t as student

    differences = ours - baseline
    if len(differences) < 2 or not differences.any():
        return 1.0
    spread = differences.std(ddof=1)
    if spread == 0:
        return 0.0
    t = abs(differences.mean()) / (spread / math.sqrt(len(differences)))
    return float(2 * student.sf(t, len(differences) - 1))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted for their number by Holm's step-down method (Holm 1979), in the same order."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def harmonic_mean(a: Values, b: Values) -> Values:
    """Return the harmonic mean 2ab / (a + b), and 0 where both are 0."""
    total = a + b
    result: Values = np.divide(
        2 * a * b, total, out=np.zeros_like(np.asarray(total, dtype=np.float64)), where=total > 0
    )
    return result


def combine(
    function: Callable[..., Values], *estimates: tuple[ArrayLike, ArrayLike, ArrayLike]
) -> tuple[Values, Values, Values]:
    """Return a function of independent estimates with its bounds, by squaring and adding their margins.

    A bound's distance from the value is the root of the sum of squares of how far the function moves when one
    estimate after the other is set to its bound (Zou and Donner 2008; Newcombe's interval of a difference is one). So
    the result has a width even where all values are equal, unlike a bootstrap interval.

    Args:
        function: Function of one array per estimate, increasing in each.
        estimates: Independent estimates, each as (value, lower bound, upper bound) of shape (...).

    Returns:
        The function's value, lower bound and upper bound, (...) each.
    """
    low, value, high = (np.array([estimate[side] for estimate in estimates], dtype=np.float64) for side in (1, 0, 2))
    center = function(*value)

    def margin(bounds: Values) -> Values:
        moved = np.array([function(*value[:i], bounds[i], *value[i + 1 :]) for i in range(len(estimates))])
        return np.asarray(np.sqrt(((moved - center) ** 2).sum(axis=0)))

    return center, center - margin(low), center + margin(high)
