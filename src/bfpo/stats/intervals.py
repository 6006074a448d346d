"""Intervals: what a rate, a mean or a difference may be, given how few prompts were asked.

The unit is the prompt. Several samples of one prompt are averaged first: they are not independent observations.
"""

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import f as fisher
from scipy.stats import t as student

LEVEL = 0.95
# Two models are told apart where a test's p-value is below this.
SIGNIFICANT = 0.05
RESAMPLES = 4000

Values = NDArray[np.float64]


class Interval(NamedTuple):
    """An estimate and where the truth may be.

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
        successes: From 0 to n.
        n: Independent trials, at least 1.
        level: Confidence, in (0, 1).

    Raises:
        ValueError: If the counts aren't possible.
    """
    if not 0 <= successes <= n or n < 1:
        raise ValueError(f"{successes} successes of {n}; expected 0 <= successes <= n and n >= 1")
    rate = successes / n
    low, high = _score_bounds(np.array(rate), np.array(float(n)), level)
    return Interval(rate, float(low), float(high))


def score_interval(values: Values, *, most: float = math.inf, level: float = LEVEL) -> Interval:
    """Return Wilson's interval of a mean over prompts, with the number of trials that its variance speaks of.

    A mean m of n values with variance s² is as sure as a rate of m(1 - m)n / s² independent trials: the sample over
    its design effect (Korn and Graubard 1998; Franco et al. 2019). Where nothing differs, a resampling or a standard
    error would call the mean certain; there a prompt counts as one trial, the fewest that values in [0, 1] are worth.

    Args:
        values: One per prompt, in [0, 1], (n,): the mean over the prompt's samples.
        most: Trials at most: the samples of all prompts together, where each is 0 or 1.
        level: Confidence, in (0, 1).

    Raises:
        ValueError: If there is no value, or one isn't in [0, 1].
    """
    if not len(values) or not in_unit_interval(values):
        raise ValueError("expected at least one value, each in [0, 1]")
    low, high = score_bounds(values, most=most, level=level)
    return Interval(float(values.mean()), float(low), float(high))


def score_bounds(values: Values, *, most: float = math.inf, level: float = LEVEL) -> tuple[Values, Values]:
    """Return the bounds of `score_interval` for many sets of values at once, (..., n) → (...) and (...)."""
    n = values.shape[-1]
    mean = values.mean(axis=-1)
    squares = ((values - mean[..., None]) ** 2).sum(axis=-1)
    # Rounding leaves crumbs of a variance where all values are one.
    differs = squares > 1e-12 * n
    worth = np.divide(n * (n - 1) * mean * (1 - mean), squares, out=np.full(np.shape(mean), float(n)), where=differs)
    return _score_bounds(mean, np.clip(worth, n, max(n, most)), level)


def in_unit_interval(values: Values) -> bool:
    """Return whether all values are from 0 to 1."""
    return bool(((values >= 0) & (values <= 1)).all())


def _score_bounds(rate: Values, n: Values, level: float) -> tuple[Values, Values]:
    z = NormalDist().inv_cdf(0.5 + level / 2)
    center = (rate + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(rate * (1 - rate) / n + z**2 / (4 * n**2))
    # The bounds at rates of 0 and 1 are 0 and 1 exactly; rounding must not say otherwise.
    return np.clip(center - half, 0, rate), np.clip(center + half, rate, 1)


def bootstrap(
    statistic: Callable[..., Values],
    *samples: Values,
    level: float = LEVEL,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Interval:
    """Return the percentile bootstrap interval of a statistic of one or several independent samples.

    Args:
        statistic: Takes one array per sample, the observations on its last axis, and reduces that axis.
        samples: Observations, one per prompt; rows of a 2-D sample (k, n) are resampled together, which makes the
            bootstrap a paired one.
        level: Confidence, in (0, 1).
        seed: Of the resampling.
        resamples: How many.

    Raises:
        ValueError: If a sample is empty.
    """
    if any(sample.shape[-1] == 0 for sample in samples):
        raise ValueError("a bootstrap needs at least one observation in every sample")
    rng = np.random.default_rng(seed)
    # One sample's resamples at a time, in pieces: n × resamples indices of a large sample would fill the memory.
    sizes = [sample.shape[-1] for sample in samples]
    piece = max(1, min(resamples, 4_000_000 // max(sizes)))
    found = []
    for done in range(0, resamples, piece):
        count = min(piece, resamples - done)
        drawn = [sample[..., rng.integers(0, n, (count, n))] for sample, n in zip(samples, sizes, strict=True)]
        found.append(np.asarray(statistic(*drawn), dtype=np.float64))
    tail = (1 - level) / 2
    low, high = np.quantile(np.concatenate(found), [tail, 1 - tail])
    return Interval(float(statistic(*samples)), float(low), float(high))


def mean_interval(values: Values, *, seed: int = 0) -> Interval:
    """Return the bootstrap interval of a mean over prompts, values (n,), that no range bounds."""
    return bootstrap(lambda x: x.mean(axis=-1), values, seed=seed)


def t_interval(values: Values, *, level: float = LEVEL) -> Interval:
    """Return Student's interval of a mean over independent runs, values (n,), n at least 2.

    Raises:
        ValueError: If there are fewer than two values.
    """
    if len(values) < 2:
        raise ValueError(f"{len(values)} values; an interval over runs needs at least two")
    mean = float(values.mean())
    half = float(student.ppf(0.5 + level / 2, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values)))
    return Interval(mean, mean - half, mean + half)


def mean_ellipse(points: Values, *, level: float = LEVEL, corners: int = 72) -> Values:
    """Return the outline of Hotelling's confidence ellipse of a mean in the plane over independent runs.

    Args:
        points: One per run, (n, 2), n at least 3.
        level: Confidence that the ellipse covers the mean, for both coordinates together; in (0, 1).
        corners: Of the outline.

    Returns:
        (corners, 2).

    Raises:
        ValueError: If there are fewer than three runs.
    """
    n = len(points)
    if n < 3:
        raise ValueError(f"{n} points; an ellipse over runs needs at least three")
    variances, axes = np.linalg.eigh(np.cov(points, rowvar=False) / n)
    radius = math.sqrt(2 * (n - 1) / (n - 2) * float(fisher.ppf(level, 2, n - 2)))
    angles = np.linspace(0, 2 * math.pi, corners, endpoint=False)
    circle = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    outline: Values = points.mean(axis=0) + radius * (circle * np.sqrt(variances.clip(min=0))) @ axes.T
    return outline


def paired_p_value(ours: Values, theirs: Values) -> float:
    """Return the two-sided p-value of a paired t-test over runs or prompts, (n,) each; 1 when none differs."""
    differences = ours - theirs
    if not differences.any():
        return 1.0
    spread = differences.std(ddof=1)
    if spread == 0:
        return 0.0
    t = abs(differences.mean()) / (spread / math.sqrt(len(differences)))
    return float(2 * student.sf(t, len(differences) - 1))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted for their number by Holm's step-down method (Holm 1979), in their order."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def harmonic_mean(a: Values, b: Values) -> Values:
    """Return the harmonic mean 2ab / (a + b); 0 where both are 0."""
    total = a + b
    result: Values = np.divide(
        2 * a * b, total, out=np.zeros_like(np.asarray(total, dtype=np.float64)), where=total > 0
    )
    return result


def combined(
    of: Callable[..., Values], *parts: tuple[ArrayLike, ArrayLike, ArrayLike]
) -> tuple[Values, Values, Values]:
    """Return a function of independent estimates with its bounds, by squaring and adding their margins.

    A bound's distance from the value is the root of the sum of squares of how far the function goes when one estimate
    after the other is put at its bound (Zou and Donner 2008; Newcombe's interval of a difference is one). So it has
    their good bounds, where a resampling would call what never differed certain.

    Args:
        of: Increasing in each argument.
        parts: Independent estimates, each with its lower and upper bound, (...); one for each argument.
    """
    low, value, high = (np.array([part[side] for part in parts], dtype=np.float64) for side in (1, 0, 2))
    found = of(*value)

    def margin(bounds: Values) -> Values:
        moved = np.array([of(*value[:i], bounds[i], *value[i + 1 :]) for i in range(len(parts))])
        return np.asarray(np.sqrt(((moved - found) ** 2).sum(axis=0)))

    return found, found - margin(low), found + margin(high)
