"""Compare the bootstrap of `bfpo.stats` with scipy's, in alternation: the difference of two runs' harmonic means.

    python benchmarks/bootstrap_speed.py     # a few seconds

The two runs answer the same prompts, which are resampled together; scipy's function has no such pairs beside
independent groups in one call, so it draws each of the four columns by itself. Writes
`benchmarks/results/bootstrap_speed.json`: CPU seconds of each, after a round that isn't counted.
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import bootstrap as scipy_bootstrap

from bfpo.core.environment import hardware, versions
from bfpo.core.files import write_json
from bfpo.stats.intervals import RESAMPLES, bootstrap, harmonic_mean

RESULT = Path(__file__).parent / "results" / "bootstrap_speed.json"
PROMPTS, ROUNDS = 5000, 3


def difference(safety: Any, helpfulness: Any) -> Any:
    """Return the difference of the harmonic means of two runs, whose values are the rows of both arrays."""
    of_runs = harmonic_mean(safety.mean(axis=-1), helpfulness.mean(axis=-1))
    return of_runs[0] - of_runs[1]


def unpaired(*columns: Any, axis: int = -1) -> Any:
    """Return the same of four columns, as scipy passes them."""
    first, second = (harmonic_mean(columns[run].mean(axis), columns[2 + run].mean(axis)) for run in (0, 1))
    return first - second


def seconds(work: Callable[[], Any]) -> float:
    """Return the CPU seconds that work takes."""
    start = time.process_time()
    work()
    return round(time.process_time() - start, 2)


def main() -> None:
    """Measure and write the results."""
    rng = np.random.default_rng(0)
    safety, helpfulness = ((rng.random((2, PROMPTS)) < 0.7).astype(np.float64) for _ in range(2))
    columns = (*safety, *helpfulness)
    taken: dict[str, list[float]] = {"bfpo": [], "scipy": []}
    for number in range(1 + ROUNDS):
        for name, work in (
            ("bfpo", lambda: bootstrap(difference, safety, helpfulness)),
            (
                "scipy",
                lambda: scipy_bootstrap(
                    columns, unpaired, n_resamples=RESAMPLES, method="percentile", vectorized=True, rng=0, batch=800
                ),
            ),
        ):
            spent = seconds(work)
            if number:
                taken[name].append(spent)
                print(name, spent, flush=True)
    write_json(
        RESULT,
        {
            "command": "python benchmarks/bootstrap_speed.py",
            "versions": versions(),
            "hardware": hardware(),
            "prompts": PROMPTS,
            "resamples": RESAMPLES,
            "cpu_seconds": taken,
            "ratio": statistics.median(b / a for a, b in zip(taken["bfpo"], taken["scipy"], strict=True)),
        },
    )


if __name__ == "__main__":
    main()
