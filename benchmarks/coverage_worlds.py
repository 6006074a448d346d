"""The worlds of the coverage study: how prompts and answers are drawn, and the truth that an interval should hold."""

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray
from scipy.stats import beta as beta_distribution

from bfpo.stats.intervals import RESAMPLES, combine, harmonic_mean, mean_interval, score_bounds
from bfpo.stats.paired import paired_mean_bounds, tango_bounds
from bfpo.stats.tail import worst_mean, worst_mean_bounds

RATES = (0.05, 0.1, 0.3, 0.5, 0.7, 0.9, 0.95)
# Ours, theirs, and the correlation of the two over prompts.
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
World = Callable[[np.random.Generator, int, int], tuple[float, Bounds]]


def worlds() -> Iterator[tuple[str, str, World]]:
    """Return what is simulated: the interval, the setting and how it is drawn."""
    for p in RATES:
        yield "rate, one answer a prompt", f"rate {p:g}", one_answer(p)
    for samples, correlation in ((5, 0.0), (5, 0.1), (5, 0.5), (5, 0.9), (20, 0.1), (20, 0.5)):
        for p in RATES:
            setting = f"rate {p:g}, {samples} answers a prompt, correlation {correlation:g}"
            yield "rate, several answers a prompt", setting, several_answers(p, samples, correlation)
    for ours, theirs, correlation in PAIRS:
        setting = f"rates {ours:g} and {theirs:g}, correlation {correlation:g}"
        yield "difference of rates, one answer a prompt", setting, paired_answers(ours, theirs, correlation)
    for correlation in (0.1, 0.5):
        for ours, theirs in dict.fromkeys(pair[:2] for pair in PAIRS):
            setting = f"rates {ours:g} and {theirs:g}, 5 answers a prompt, correlation {correlation:g}"
            yield "difference of means", setting, paired_samples(ours, theirs, 5, correlation)
    for setting, draw, mean in (
        ("helpfulness 0, 0.5 or 1, mostly 1", _choice((0, 0.5, 1), (0.05, 0.1, 0.85)), 0.9),
        ("helpfulness, Beta(8, 2)", lambda rng, shape: rng.beta(8, 2, shape), 0.8),
        ("preference, Beta(0.1, 0.9)", lambda rng, shape: rng.beta(0.1, 0.9, shape), 0.1),
        ("severity uniform on 30 %, else 0", _severity(0.3), 0.15),
        ("severity uniform on 10 %, else 0", _severity(0.1), 0.05),
    ):
        yield "mean in [0, 1]", setting, bounded_mean(draw, mean)
    for setting, draw in (
        ("severity uniform on 30 %, else 0", _severity(0.3)),
        ("severity uniform on 10 %, else 0", _severity(0.1)),
        ("severity in quarters", _choice((0, 0.25, 0.5, 0.75, 1), (0.8, 0.08, 0.06, 0.03, 0.03))),
        ("severity, Beta(2, 8)", lambda rng, shape: rng.beta(2, 8, shape)),
    ):
        yield "mean of the worst tenth", setting, tail(draw)
    yield "mean length, bootstrap", "gamma of shape 4", length(lambda rng, shape: 50 * rng.gamma(4, size=shape), 200)
    heavy = length(lambda rng, shape: rng.lognormal(5, 0.7, shape), float(np.exp(5 + 0.7**2 / 2)))
    yield "mean length, bootstrap", "log-normal, sigma 0.7", heavy
    rates = (0.95, 0.9, 0.5)
    yield "composite index", f"three tasks, rates {', '.join(map(str, rates))}", index(rates)
    for pair in PAIRS[2:]:
        setting = f"safety {pair[0]:g} and {pair[1]:g}, correlation {pair[2]:g}, helpfulness 0.8 and 0.75"
        yield "difference of harmonic means, bootstrap", setting, two_of_both(*pair)
    for p in (0.3, 0.7, 0.95):
        yield "harmonic mean", f"safety {p:g}, helpfulness Beta(8, 2)", both(p)


def one_answer(p: float) -> World:
    """One answer a prompt, safe at rate p."""

    def world(rng: np.random.Generator, count: int, n: int) -> tuple[float, Bounds]:
        answers = (rng.random((count, n)) < p).astype(float)
        return p, score_bounds(answers, most=n)

    return world


def several_answers(p: float, samples: int, correlation: float) -> World:
    """Several answers a prompt: a beta-binomial of this correlation within a prompt."""

    def world(rng: np.random.Generator, count: int, n: int) -> tuple[float, Bounds]:
        values = rng.binomial(samples, _prompts(rng, p, correlation, (count, n))) / samples
        return p, score_bounds(values, most=n * samples)

    return world


def paired_answers(ours: float, theirs: float, correlation: float) -> World:
    """One answer of each of two models a prompt."""
    both_safe = ours * theirs + correlation * np.sqrt(ours * (1 - ours) * theirs * (1 - theirs))
    chances = [ours - both_safe, theirs - both_safe, 1 - ours - theirs + 2 * both_safe]

    def world(rng: np.random.Generator, count: int, n: int) -> tuple[float, Bounds]:
        gained, lost, _ = rng.multinomial(n, chances, count).T.astype(float)
        return ours - theirs, tango_bounds(gained, lost, n)

    return world


def paired_samples(ours: float, theirs: float, samples: int, correlation: float) -> World:
    """Several answers of each of two models; half of the prompts are as hard for one as for the other."""
    chance = np.linspace(0, 1, 4001)
    curves = []
    for p in (ours, theirs):
        size = 1 / correlation - 1
        curves.append(beta_distribution.ppf(chance, p * size, (1 - p) * size))
    truth = float(np.trapezoid(curves[0], chance) - np.trapezoid(curves[1], chance))

    def world(rng: np.random.Generator, count: int, n: int) -> tuple[float, Bounds]:
        rank, other = rng.random((2, count, n))
        ranks = (rank, np.where(rng.random((count, n)) < 0.5, rank, other))
        drawn = [
            rng.binomial(samples, np.interp(r, chance, curve)) / samples
            for r, curve in zip(ranks, curves, strict=True)
        ]
        return truth, paired_mean_bounds(drawn[0] - drawn[1])

    return world


def bounded_mean(draw: Draw, mean: float) -> World:
    """Return the world of a mean in [0, 1]."""
    return lambda rng, count, n: (mean, score_bounds(draw(rng, (count, n))))


def tail(draw: Draw) -> World:
    """Return the world of a mean over the worst tenth, its truth from 4 million draws."""
    truth = float(worst_mean(draw(np.random.default_rng(0), (1, 4_000_000)))[0])
    return lambda rng, count, n: (truth, worst_mean_bounds(draw(rng, (count, n))))


def length(draw: Draw, mean: float) -> World:
    """Return the world of a mean without bounds."""

    def world(rng: np.random.Generator, count: int, n: int) -> tuple[float, Bounds]:
        values = draw(rng, (count, n))
        (weights,) = _resamples(n)
        low, high = _quantiles(values @ weights.T)
        first = mean_interval(values[0])
        np.testing.assert_allclose((low[0], high[0]), first[1:], err_msg="not the shipped interval")
        return mean, (low, high)

    return world


def both(p: float) -> World:
    """Return the world of safety at rate p and helpfulness of mean 0.8 on as many prompts."""
    truth = float(harmonic_mean(np.array(p), np.array(0.8)))

    def world(rng: np.random.Generator, count: int, n: int) -> tuple[float, Bounds]:
        safety, helpfulness = (rng.random((count, n)) < p).astype(float), rng.beta(8, 2, (count, n))
        parts = [
            (values.mean(axis=-1), *score_bounds(values, most=most))
            for values, most in ((safety, n), (helpfulness, np.inf))
        ]
        return truth, combine(harmonic_mean, *parts)[1:]

    return world


def index(rates: tuple[float, ...]) -> World:
    """Return the world of an unweighted mean over tasks of n prompts each."""

    def world(rng: np.random.Generator, count: int, n: int) -> tuple[float, Bounds]:
        answers = [(rng.random((count, n)) < p).astype(float) for p in rates]
        parts = [(one.mean(axis=-1), *score_bounds(one, most=n)) for one in answers]
        return float(np.mean(rates)), combine(lambda *values: np.mean(values, axis=0), *parts)[1:]

    return world


def two_of_both(ours: float, theirs: float, correlation: float) -> World:
    """Two models' safety at these rates, and helpfulness of means 0.8 and 0.75 that goes along."""
    both_safe = ours * theirs + correlation * np.sqrt(ours * (1 - ours) * theirs * (1 - theirs))
    chances = [both_safe, ours - both_safe, theirs - both_safe, 1 - ours - theirs + both_safe]
    truth = float(harmonic_mean(np.array(ours), np.array(0.8)) - harmonic_mean(np.array(theirs), np.array(0.75)))

    def world(rng: np.random.Generator, count: int, n: int) -> tuple[float, Bounds]:
        kind = rng.choice(4, (count, n), p=chances)
        safety = [(kind <= 1).astype(float), ((kind == 0) | (kind == 2)).astype(float)]
        first = rng.beta(8, 2, (count, n))
        helpfulness = [first, 0.75 / 0.8 * np.where(rng.random((count, n)) < 0.5, first, rng.beta(8, 2, (count, n)))]
        of_safety, of_helpfulness = _resamples(n, n)
        a, b = (
            harmonic_mean(one @ of_safety.T, other @ of_helpfulness.T)
            for one, other in zip(safety, helpfulness, strict=True)
        )
        return truth, _quantiles(a - b)

    return world


def _prompts(rng: np.random.Generator, p: float, correlation: float, shape: tuple[int, int]) -> Array:
    """Draw each prompt's own rate."""
    if correlation == 0:
        return np.full(shape, p)
    size = 1 / correlation - 1
    return rng.beta(p * size, (1 - p) * size, shape)


def _choice(values: tuple[float, ...], chances: tuple[float, ...]) -> Draw:
    return lambda rng, shape: rng.choice(np.array(values), shape, p=chances)


def _severity(share: float) -> Draw:
    return lambda rng, shape: (rng.random(shape) < share) * rng.random(shape)


def _resamples(*sizes: int) -> list[Array]:
    """Return the weights that the shipped bootstrap gives to samples of these sizes: its draws never change."""
    rng, found = np.random.default_rng(0), []
    for n in sizes:
        drawn = rng.integers(0, n, (RESAMPLES, n)) + np.arange(RESAMPLES)[:, None] * n
        found.append(np.bincount(drawn.ravel(), minlength=RESAMPLES * n).reshape(RESAMPLES, n) / n)
    return found


def _quantiles(resampled: Array) -> Bounds:
    low, high = np.quantile(resampled, [0.025, 0.975], axis=-1)
    return low, high
