"""How often do the 95 % intervals of `bfpo.evaluation` hold the truth?

    OMP_NUM_THREADS=1 python benchmarks/coverage_study.py [--repetitions 5000]

Draws prompts again and again from worlds whose truth is known, makes the interval each time, and writes
`benchmarks/results/coverage.json`: coverage and mean width by interval, setting and number of prompts. One seed per
cell, so that a cell doesn't depend on the others. The table in `docs/statistics.md` is made from it.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import beta as beta_distribution

from bfpo.evaluation.paired import paired_mean_bounds, tango_bounds
from bfpo.evaluation.statistics import RESAMPLES, combined, harmonic_mean, mean_interval, score_bounds
from bfpo.evaluation.tail import worst_mean, worst_mean_bounds
from bfpo.files import content_hash, write_json
from bfpo.training.manifest import hardware, versions

RESULTS = Path(__file__).parent / "results" / "coverage.json"
PAGE = Path(__file__).parents[1] / "docs" / "statistics.md"
BEGIN, END = "<!-- coverage: begin -->", "<!-- coverage: end -->"
SIZES = (10, 25, 50, 100, 250, 500)
# From here on the coverage must be within these bounds.
LARGE, LEAST, MOST = 250, 0.93, 0.97
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


def main() -> None:
    """Simulate every cell and write what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=5000)
    repetitions = parser.parse_args().repetitions
    began, cells = time.monotonic(), []
    for interval, setting, world in worlds():
        for n in SIZES:
            cells.append(cell(interval, setting, world, n, repetitions))
        shown = ", ".join(f"{one['n']}: {one['coverage']:.1%}" for one in cells[-len(SIZES) :])
        print(f"{interval}; {setting}; {shown}", flush=True)
    write_json(
        RESULTS,
        {
            "command": f"OMP_NUM_THREADS=1 python benchmarks/coverage_study.py --repetitions {repetitions}",
            "what": "share of repetitions in which the nominal 95 % interval over n prompts holds the truth",
            "versions": versions(),
            "hardware": hardware(),
            "seconds": round(time.monotonic() - began, 1),
            "repetitions": repetitions,
            "cells": cells,
        },
    )
    outside = [one for one in cells if one["n"] >= LARGE and not LEAST <= one["coverage"] <= MOST]
    print(f"{len(outside)} of {sum(one['n'] >= LARGE for one in cells)} cells from n = {LARGE} on are out of bounds")
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8"), {"cells": cells}), encoding="utf-8")


def cell(interval: str, setting: str, world: World, n: int, repetitions: int) -> dict[str, Any]:
    """Return the coverage of one interval in one world with n prompts."""
    rng = np.random.default_rng(int(content_hash(interval, setting, n)[:12], 16))
    covered, widths, done = 0, 0.0, 0
    while done < repetitions:
        # In pieces: the resamples of a bootstrap would fill the memory.
        count = min(1000, repetitions - done)
        truth, (low, high) = world(rng, count, n)
        covered += int(((low <= truth + 1e-12) & (truth - 1e-12 <= high)).sum())
        widths, done = widths + float((high - low).sum()), done + count
    return {
        "interval": interval,
        "setting": setting,
        "n": n,
        "coverage": round(covered / repetitions, 4),
        "width": round(widths / repetitions, 4),
    }


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
        weights = _resamples(n)
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
        return truth, combined(harmonic_mean, *parts)[1:]

    return world


def table(study: dict[str, Any]) -> str:
    """Return the table of the docs: lowest and highest coverage of each interval, in percent."""
    lines = [
        f"| interval | {' | '.join(f'n = {n}' for n in SIZES)} |",
        f"|---|{'---|' * len(SIZES)}",
    ]
    for interval in dict.fromkeys(one["interval"] for one in study["cells"]):
        ranges = []
        for n in SIZES:
            found = [one["coverage"] for one in study["cells"] if (one["interval"], one["n"]) == (interval, n)]
            ranges.append(f"{100 * min(found):.1f} to {100 * max(found):.1f}")
        lines.append(f"| {interval} | {' | '.join(ranges)} |")
    return "\n".join(lines)


def with_table(page: str, study: dict[str, Any]) -> str:
    """Return a page with the table between its marks."""
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}\n{table(study)}\n{END}{rest.partition(END)[2]}"


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


def _resamples(n: int) -> Array:
    """Return the weights that the shipped bootstrap gives n observations: it draws the same ones each time."""
    drawn = np.random.default_rng(0).integers(0, n, (RESAMPLES, n)) + np.arange(RESAMPLES)[:, None] * n
    return np.bincount(drawn.ravel(), minlength=RESAMPLES * n).reshape(RESAMPLES, n) / n


def _quantiles(resampled: Array) -> Bounds:
    low, high = np.quantile(resampled, [0.025, 0.975], axis=-1)
    return low, high


if __name__ == "__main__":
    main()
