"""How often do the 95 % intervals of `bfpo.evaluation` hold the truth?

    OMP_NUM_THREADS=1 python benchmarks/coverage_study.py [--repetitions 5000]

Draws prompts again and again from worlds whose truth is known, makes the interval each time, and writes
`benchmarks/results/coverage.json`: coverage and mean width by interval, setting and number of prompts. One seed per
cell, so that a cell doesn't depend on the others. The table in `docs/statistics.md` is made from it.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
from coverage_worlds import World, worlds

from bfpo.core.files import content_hash, write_json
from bfpo.training.manifest import hardware, versions

RESULTS = Path(__file__).parent / "results" / "coverage.json"
PAGE = Path(__file__).parents[1] / "docs" / "statistics.md"
BEGIN, END = "<!-- coverage: begin -->", "<!-- coverage: end -->"
SIZES = (10, 25, 50, 100, 250, 500)
# From here on the coverage must be within these bounds.
LARGE, LEAST, MOST = 250, 0.93, 0.97


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
            "cpu_seconds": round(time.process_time(), 1),
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


if __name__ == "__main__":
    main()
