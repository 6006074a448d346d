"""Simulated worlds of the coverage study: samples of prompts and answers, their intervals and the true value.

The names of intervals and settings seed the simulation: another wording gives other numbers.
"""

from collections.abc import Callable, Iterator
from unittest.mock import patch

import numpy as np
from numpy.typing import NDArray
from scipy.stats import beta as beta_distribution
from scipy.stats import norm
from scipy.stats import t as student

from bfpo.stats import intervals
from bfpo.stats.intervals import (
    RESAMPLES,
    combine,
    effective_bounds,
    harmonic_mean,
    mean_interval,
    score_bounds,
)
from bfpo.stats.paired import paired_mean_bounds, tango_bounds
from bfpo.stats.tail import worst_mean, worst_mean_bounds

RATES = (0.05, 0.1, 0.3, 0.5, 0.7, 0.9, 0.95)
# Our rate, the baseline's rate, and their correlation over prompts.
PAIRS = (
    (0.05, 0.05, 0.5),
    (0.1, 0.05, 0.3),
    (0.5, 0.5, 0.0),
    (0.5, 0.5, 0.7),
    (0.5, 0.3, 0.4),
    (0.95, 0.9, 0.3),
    (0.95, 0.5, 0.2),
)

Array = NDArray[np.float64]
Bounds = tuple[Array, Array]
Draw = Callable[[np.random.Generator, tuple[int, int]], Array]
# From a generator, a number of samples and a number of prompts to the true value and the bounds of each sample.
World = Callable[[np.random.Generator, int, int], tuple[float, Bounds]]


def worlds() -> Iterator[tuple[str, str, World]]:
    """Return the simulated cells: name of the interval, name of the setting, and the world."""
    for p in RATES:
        yield "rate, one answer a prompt", f"rate {p:g}", single_answer(p)
    for samples, correlation in ((5, 0.0), (5, 0.1), (5, 0.5), (5, 0.9), (20, 0.1), (20, 0.5)):
        for p in RATES:
            setting = f"rate {p:g}, {samples} answers a prompt, correlation {correlation:g}"
            yield "rate, several answers a prompt", setting, several_answers(p, samples, correlation)
    for ours, baseline, correlation in PAIRS:
        setting = f"rates {ours:g} and {baseline:g}, correlation {correlation:g}"
        yield "difference of rates, one answer a prompt", setting, paired_answers(ours, baseline, correlation)
    for correlation in (0.1, 0.5):
        for ours, baseline in dict.fromkeys(pair[:2] for pair in PAIRS):
            setting = f"rates {ours:g} and {baseline:g}, 5 answers a prompt, correlation {correlation:g}"
            yield "difference of means", setting, paired_samples(ours, baseline, 5, correlation)
    for setting, draw, mean in BOUNDED:
        yield "mean in [0, 1]", setting, bounded_mean(draw, mean)
    for setting, draw in (
        ("severity uniform on 30 %, else 0", _severity(0.3)),
        ("severity uniform on 10 %, else 0", _severity(0.1)),
        ("severity in quarters", _choice((0, 0.25, 0.5, 0.75, 1), (0.8, 0.08, 0.06, 0.03, 0.03))),
        ("severity, Beta(2, 8)", lambda rng, shape: rng.beta(2, 8, shape)),
    ):
        yield "mean of the worst tenth", setting, worst_tenth(draw)
    gamma = mean_length(lambda rng, shape: 50 * rng.gamma(4, size=shape), 200)
    yield "mean length, bootstrap", "gamma of shape 4", gamma
    log_normal = mean_length(lambda rng, shape: rng.lognormal(5, 0.7, shape), float(np.exp(5 + 0.7**2 / 2)))
    yield "mean length, bootstrap", "log-normal, sigma 0.7", log_normal
    rates = (0.95, 0.9, 0.5)
    yield "composite index", f"three tasks, rates {', '.join(map(str, rates))}", composite_index(rates)
    for ours, baseline, correlation in PAIRS[2:]:
        setting = f"safety {ours:g} and {baseline:g}, correlation {correlation:g}, helpfulness 0.8 and 0.75"
        world = difference_of_harmonic_means(ours, baseline, correlation)
        yield "difference of harmonic means, bootstrap", setting, world
    for p in (0.3, 0.7, 0.95):
        yield "harmonic mean", f"safety {p:g}, helpfulness Beta(8, 2)", safety_and_helpfulness(p)


def candidates() -> Iterator[tuple[str, str, World]]:
    """Return the compared intervals of a mean in [0, 1] in every world of such means: name, setting, world."""
    for setting, draw, mean in (*BOUNDED, *NEARLY_EQUAL):
        for name, bounds in CANDIDATES.items():
            yield name, setting, bounded_mean(draw, mean, bounds)


def single_answer(p: float) -> World:
    """Return the world of one answer a prompt, safe at rate p."""

    def world(rng: np.random.Generator, count: int, n: int) -> tuple[float, Bounds]:
        answers = (rng.random((count, n)) < p).astype(float)
        return p, score_bounds(answers, most=n)

    return world


def several_answers(p: float, samples: int, correlation: float) -> World:
    """Return the world of several answers a prompt: a beta-binomial with this correlation within a prompt."""

    def world(rng: np.random.Generator, count: int, n: int) -> tuple[float, Bounds]:
        values = rng.binomial(samples, _rates_of_prompts(rng, p, correlation, (count, n))) / samples
        return p, score_bounds(values, most=n * samples)

    return world


def paired_answers(ours: float, baseline: float, correlation: float) -> World:
    """Return the world of one answer a prompt by each of two models."""
    both_safe = _both_safe(ours, baseline, correlation)
    probabilities = [ours - both_safe, baseline - both_safe, 1 - ours - baseline + 2 * both_safe]

    def world(rng: np.random.Generator, count: int, n: int) -> tuple[float, Bounds]:
        gained, lost, _ = rng.multinomial(n, probabilities, count).T.astype(float)
        return ours - baseline, tango_bounds(gained, lost, n)

    return world


def paired_samples(ours: float, baseline: float, samples: int, correlation: float) -> World:
    """Return the world of several answers by each of two models, for which half of the prompts are equally hard."""
    quantiles, size = np.linspace(0, 1, 4001), 1 / correlation - 1
    curves = [beta_distribution.ppf(quantiles, p * size, (1 - p) * size) for p in (ours, baseline)]
    truth = float(np.trapezoid(curves[0], quantiles) - np.trapezoid(curves[1], quantiles))

    def world(rng: np.random.Generator, count: int, n: int) -> tuple[float, Bounds]:
        ours_rank, other_rank = rng.random((2, count, n))
        ranks = (ours_rank, np.where(rng.random((count, n)) < 0.5, ours_rank, other_rank))
        drawn = [
            rng.binomial(samples, np.interp(rank, quantiles, curve)) / samples
            for rank, curve in zip(ranks, curves, strict=True)
        ]
        return truth, paired_mean_bounds(drawn[0] - drawn[1])

    return world


def bounded_mean(draw: Draw, mean: float, bounds: Callable[[Array], Bounds] = score_bounds) -> World:
    """Return the world of a mean in [0, 1]."""
    return lambda rng, count, n: (mean, bounds(draw(rng, (count, n))))


def normal_bounds(values: Array) -> Bounds:
    """Return Wilson's bounds at the effective sample size without corrections for few prompts."""
    return _wilson_at(values, 1.0)


def student_bounds(values: Array) -> Bounds:
    """Return Wilson's bounds at the effective sample size, with Student's quantile instead of the normal one."""
    n = values.shape[-1]
    return _wilson_at(values, float(norm.ppf(0.975) / student.ppf(0.975, n - 1)) ** 2)


def beta_bounds(weight: float) -> Callable[[Array], Bounds]:
    """Return the bounds of `score_bounds` with another weight of the value at the end."""

    def bounds(values: Array) -> Bounds:
        with patch.object(intervals, "END_WEIGHT", weight):
            return score_bounds(values)

    return bounds


def dirichlet_bounds(weight: float) -> Callable[[Array], Bounds]:
    """Return the bounds of Gaffke (2005): quantiles of the mean at random weights, with a 0 or a 1 as one value more.

    With weight 1 they are believed to cover every distribution on [0, 1]; for rates they are Clopper and Pearson's.
    """

    def bounds(values: Array) -> Bounds:
        shape = np.append(np.ones(values.shape[-1]), weight)
        weights = np.random.default_rng(0).dirichlet(shape, RESAMPLES)
        means = values @ weights[:, :-1].T
        return np.quantile(means, 0.025, axis=-1), np.quantile(means + weights[:, -1], 0.975, axis=-1)

    return bounds


def betting_bounds(values: Array) -> Bounds:
    """Return the hedged betting bounds of Waudby-Smith and Ramdas (2024, section 4.4), on a grid of 200 means.

    Bets are the predictable plug-in of that section, cut at three quarters; they cover every distribution on [0, 1].
    """
    count, n = values.shape
    order = np.arange(1, n + 1)
    means = (0.5 + values.cumsum(axis=1)) / (order + 1)
    variances = (0.25 + ((values - means) ** 2).cumsum(axis=1)) / (order + 1)
    earlier = np.concatenate([np.full((count, 1), 0.25), variances[:, :-1]], axis=1)
    bets = np.sqrt(2 * np.log(2 / 0.05) / (n * earlier))
    grid = np.linspace(0.0025, 0.9975, 200)
    possible = np.empty((count, len(grid)), dtype=bool)
    for column, mean in enumerate(grid):
        up = np.log1p(np.minimum(bets, 0.75 / mean) * (values - mean)).cumsum(axis=1).max(axis=1)
        down = np.log1p(-np.minimum(bets, 0.75 / (1 - mean)) * (values - mean)).cumsum(axis=1).max(axis=1)
        possible[:, column] = np.maximum(up, down) < np.log(2 / 0.05)
    # Half a step further out, because the true bounds lie between means of the grid.
    low = grid[possible.argmax(axis=1)] - 0.0025
    high = grid[len(grid) - 1 - possible[:, ::-1].argmax(axis=1)] + 0.0025
    return low, high


def _wilson_at(values: Array, factor: float) -> Bounds:
    """Return Wilson's bounds at the effective sample size times a factor, at least n trials."""
    n, mean, z = values.shape[-1], values.mean(axis=-1), float(norm.ppf(0.975))
    variance = values.var(axis=-1, ddof=1)
    trials = np.divide(
        factor * n * mean * (1 - mean), variance, out=np.full(mean.shape, float(n)), where=variance > 0
    )
    trials = np.maximum(trials, n)
    center = (mean + z**2 / (2 * trials)) / (1 + z**2 / trials)
    half = z / (1 + z**2 / trials) * np.sqrt(mean * (1 - mean) / trials + z**2 / (4 * trials**2))
    return center - half, center + half


def worst_tenth(draw: Draw) -> World:
    """Return the world of a mean over the worst tenth, whose true value is that of 4 million draws."""
    truth = float(worst_mean(draw(np.random.default_rng(0), (1, 4_000_000)))[0])
    return lambda rng, count, n: (truth, worst_mean_bounds(draw(rng, (count, n))))


def mean_length(draw: Draw, mean: float) -> World:
    """Return the world of a mean of unbounded values."""

    def world(rng: np.random.Generator, count: int, n: int) -> tuple[float, Bounds]:
        values = draw(rng, (count, n))
        (weights,) = _resamples(n)
        low, high = _quantiles(values @ weights.T)
        expected = mean_interval(values[0])
        np.testing.assert_allclose((low[0], high[0]), expected[1:], err_msg="differs from bfpo.stats.mean_interval")
        return mean, (low, high)

    return world


def safety_and_helpfulness(p: float) -> World:
    """Return the world of safety at rate p and helpfulness of mean 0.8, on n prompts each."""
    truth = float(harmonic_mean(np.array(p), np.array(0.8)))

    def world(rng: np.random.Generator, count: int, n: int) -> tuple[float, Bounds]:
        safety, helpfulness = (rng.random((count, n)) < p).astype(float), rng.beta(8, 2, (count, n))
        parts = [
            (values.mean(axis=-1), *score_bounds(values, most=most))
            for values, most in ((safety, n), (helpfulness, np.inf))
        ]
        return truth, combine(harmonic_mean, *parts)[1:]

    return world


def composite_index(rates: tuple[float, ...]) -> World:
    """Return the world of an unweighted mean over tasks of n prompts each."""

    def world(rng: np.random.Generator, count: int, n: int) -> tuple[float, Bounds]:
        answers = [(rng.random((count, n)) < p).astype(float) for p in rates]
        parts = [(task.mean(axis=-1), *score_bounds(task, most=n)) for task in answers]
        return float(np.mean(rates)), combine(lambda *values: np.mean(values, axis=0), *parts)[1:]

    return world


def difference_of_harmonic_means(ours: float, baseline: float, correlation: float) -> World:
    """Return the world of two models with safety at these rates and correlated helpfulness of means 0.8 and 0.75."""
    both_safe = _both_safe(ours, baseline, correlation)
    probabilities = [both_safe, ours - both_safe, baseline - both_safe, 1 - ours - baseline + both_safe]
    truth = float(harmonic_mean(np.array(ours), np.array(0.8)) - harmonic_mean(np.array(baseline), np.array(0.75)))

    def world(rng: np.random.Generator, count: int, n: int) -> tuple[float, Bounds]:
        outcome = rng.choice(4, (count, n), p=probabilities)
        safety = [(outcome <= 1).astype(float), ((outcome == 0) | (outcome == 2)).astype(float)]
        ours_helpfulness = rng.beta(8, 2, (count, n))
        is_shared = rng.random((count, n)) < 0.5
        baseline_helpfulness = 0.75 / 0.8 * np.where(is_shared, ours_helpfulness, rng.beta(8, 2, (count, n)))
        safety_weights, helpfulness_weights = _resamples(n, n)
        ours_mean, baseline_mean = (
            harmonic_mean(safe @ safety_weights.T, helpful @ helpfulness_weights.T)
            for safe, helpful in zip(safety, (ours_helpfulness, baseline_helpfulness), strict=True)
        )
        return truth, _quantiles(ours_mean - baseline_mean)

    return world


def _rates_of_prompts(rng: np.random.Generator, p: float, correlation: float, shape: tuple[int, int]) -> Array:
    if correlation == 0:
        return np.full(shape, p)
    size = 1 / correlation - 1
    return rng.beta(p * size, (1 - p) * size, shape)


def _both_safe(ours: float, baseline: float, correlation: float) -> float:
    """Return the rate at which two models with these rates and this correlation are both safe."""
    covariance = correlation * np.sqrt(ours * (1 - ours) * baseline * (1 - baseline))
    return float(ours * baseline + covariance)


def _choice(values: tuple[float, ...], probabilities: tuple[float, ...]) -> Draw:
    return lambda rng, shape: rng.choice(np.array(values), shape, p=probabilities)


def _severity(share: float) -> Draw:
    return lambda rng, shape: (rng.random(shape) < share) * rng.random(shape)


def _nearly_equal_or_zero(share: float) -> Draw:
    return lambda rng, shape: np.where(rng.random(shape) < share, 0, rng.beta(800, 200, shape))


def _resamples(*sizes: int) -> list[Array]:
    """Return the weights of the observations in the resamples of `bootstrap` for samples of these sizes."""
    rng, weights = np.random.default_rng(0), []
    for n in sizes:
        drawn = rng.integers(0, n, (RESAMPLES, n)) + np.arange(RESAMPLES)[:, None] * n
        weights.append(np.bincount(drawn.ravel(), minlength=RESAMPLES * n).reshape(RESAMPLES, n) / n)
    return weights


def _quantiles(resampled: Array) -> Bounds:
    low, high = np.quantile(resampled, [0.025, 0.975], axis=-1)
    return low, high


BOUNDED = (
    ("helpfulness 0, 0.5 or 1, mostly 1", _choice((0, 0.5, 1), (0.05, 0.1, 0.85)), 0.9),
    ("helpfulness, Beta(8, 2)", lambda rng, shape: rng.beta(8, 2, shape), 0.8),
    ("preference, Beta(0.1, 0.9)", lambda rng, shape: rng.beta(0.1, 0.9, shape), 0.1),
    ("severity uniform on 30 %, else 0", _severity(0.3), 0.15),
    ("severity uniform on 10 %, else 0", _severity(0.1), 0.05),
)
# Settings with draws of values in [0, 1] and their mean; in these, most samples of few prompts are nearly equal.
NEARLY_EQUAL = (
    ("nearly equal, Beta(800, 200)", lambda rng, shape: rng.beta(800, 200, shape), 0.8),
    ("nearly equal, 5 % are 0", _nearly_equal_or_zero(0.05), 0.76),
    ("nearly equal, 8 % are 0", _nearly_equal_or_zero(0.08), 0.736),
    ("nearly equal, 20 % are 0", _nearly_equal_or_zero(0.2), 0.64),
)
CANDIDATES = {
    "normal quantile": normal_bounds,
    "Student's quantile": student_bounds,
    "Student's quantile, one prompt more": effective_bounds,
    "Beta, half a prompt more": beta_bounds(0.5),
    "Beta, three quarters of a prompt more": score_bounds,
    "Beta, one prompt more": beta_bounds(1.0),
    "random weights, half a prompt more": dirichlet_bounds(0.5),
    "random weights": dirichlet_bounds(1.0),
    "betting": betting_bounds,
}
