"""Measure the coverage of the 95 % intervals of `bfpo.stats` by simulation.

    OMP_NUM_THREADS=1 python benchmarks/coverage_study.py [--repetitions 5000]

Draws samples of prompts from simulated worlds with a known true value, computes the interval of each sample, and
writes `benchmarks/results/coverage.json`: coverage and mean width by interval, setting and number of prompts. Each
cell has its own seed, so that it doesn't depend on the others. `candidates` contains other intervals of a mean in
[0, 1] on the same samples. Also updates the tables in `docs/statistics.md`.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
from coverage_worlds import CANDIDATES, NEARLY_EQUAL, World, candidates, worlds

from bfpo.core.environment import hardware, versions
from bfpo.core.files import content_hash, write_json

RESULTS = Path(__file__).parent / "results" / "coverage.json"
PAGE = Path(__file__).parents[1] / "docs" / "statistics.md"
SIZES = (2, 3, 5, 10, 25, 50, 100, 250, 500)
CANDIDATE_SIZES = (2, 3, 5, 10, 25, 100)
# From this number of prompts on the coverage must be within these bounds.
LARGE, LEAST, MOST = 250, 0.93, 0.975


def main() -> None:
    """Simulate every cell and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=5000)
    repetitions = parser.parse_args().repetitions
    start, cells = time.monotonic(), []
    for interval, setting, world in worlds():
        for n in SIZES:
            cells.append(simulate_cell(interval, setting, world, n, repetitions))
        coverages = ", ".join(f"{cell['n']}: {cell['coverage']:.1%}" for cell in cells[-len(SIZES) :])
        print(f"{interval}; {setting}; {coverages}", flush=True)
    compared = [
        simulate_cell(interval, setting, world, n, repetitions, seeded_by="mean in [0, 1]")
        for interval, setting, world in candidates()
        for n in CANDIDATE_SIZES
    ]
    write_json(
        RESULTS,
        {
            "command": f"OMP_NUM_THREADS=1 python benchmarks/coverage_study.py --repetitions {repetitions}",
            "what": "share of repetitions in which the nominal 95 % interval over n prompts contains the true value",
            "versions": versions(),
            "hardware": hardware(),
            "seconds": round(time.monotonic() - start, 1),
            "cpu_seconds": round(time.process_time(), 1),
            "repetitions": repetitions,
            "seed": "the first 12 hex digits of content_hash(interval, setting, n)",
            "cells": cells,
            "candidates": compared,
        },
    )
    large = [cell for cell in cells if cell["n"] >= LARGE]
    outside = [cell for cell in large if not LEAST <= cell["coverage"] <= MOST]
    print(f"{len(outside)} of {len(large)} cells from n = {LARGE} on are out of bounds")
    study = {"cells": cells, "candidates": compared}
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8"), study), encoding="utf-8")


def simulate_cell(
    interval: str, setting: str, world: World, n: int, repetitions: int, *, seeded_by: str | None = None
) -> dict[str, Any]:
    """Return coverage and mean width of one interval in one world with n prompts."""
    rng = np.random.default_rng(int(content_hash(seeded_by or interval, setting, n)[:12], 16))
    covered, widths = 0, 0.0
    # In batches, because the resamples of a bootstrap would fill the memory.
    for start in range(0, repetitions, 1000):
        count = min(1000, repetitions - start)
        truth, (low, high) = world(rng, count, n)
        covered += int(((low <= truth + 1e-12) & (truth - 1e-12 <= high)).sum())
        widths += float((high - low).sum())
    return {
        "interval": interval,
        "setting": setting,
        "n": n,
        "coverage": round(covered / repetitions, 4),
        "width": round(widths / repetitions, 4),
    }


def coverage_table(study: dict[str, Any]) -> str:
    """Return the Markdown table of the docs: lowest and highest coverage of each interval, in percent."""
    lines = [
        f"| interval | {' | '.join(f'n = {n}' for n in SIZES)} |",
        f"|---|{'---|' * len(SIZES)}",
    ]
    cells = study["cells"]
    for interval in dict.fromkeys(cell["interval"] for cell in cells):
        ranges = []
        for n in SIZES:
            coverages = [cell["coverage"] for cell in cells if (cell["interval"], cell["n"]) == (interval, n)]
            ranges.append(f"{100 * min(coverages):.1f} to {100 * max(coverages):.1f}")
        lines.append(f"| {interval} | {' | '.join(ranges)} |")
    return "\n".join(lines)


def candidates_table(study: dict[str, Any]) -> str:
    """Return the Markdown table of the compared intervals: lowest coverage in percent, and mean width."""
    lines = [
        f"| interval, worlds | {' | '.join(f'n = {n}' for n in CANDIDATE_SIZES)} |",
        f"|---|{'---|' * len(CANDIDATE_SIZES)}",
    ]
    nearly_equal = {setting for setting, _, _ in NEARLY_EQUAL}
    for is_nearly_equal, worlds_name in ((False, "ordinary"), (True, "nearly equal")):
        for interval in CANDIDATES:
            texts = []
            for n in CANDIDATE_SIZES:
                cells = [
                    cell
                    for cell in study["candidates"]
                    if (cell["interval"], cell["n"]) == (interval, n)
                    and (cell["setting"] in nearly_equal) == is_nearly_equal
                ]
                width = sum(cell["width"] for cell in cells) / len(cells)
                texts.append(f"{100 * min(cell['coverage'] for cell in cells):.1f}, {width:.2f}")
            lines.append(f"| {interval}, {worlds_name} | {' | '.join(texts)} |")
    return "\n".join(lines)


def with_tables(page: str, study: dict[str, Any]) -> str:
    """Return the page with the tables between their markers."""
    for name, table in (("coverage", coverage_table), ("candidates", candidates_table)):
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        before, _, rest = page.partition(begin)
        page = f"{before}{begin}\n{table(study)}\n{end}{rest.partition(end)[2]}"
    return page


if __name__ == "__main__":
    main()
