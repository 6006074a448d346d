"""Compare a training step of BFPOTrainer with one of TRL's DPOTrainer: time, memory, numerical error.

    python benchmarks/step_speed.py            # about 25 minutes; resumes after an interruption
    python benchmarks/step_speed.py --quick    # under a minute; the last line is the ratio on HH-RLHF
    python benchmarks/step_speed.py --docs     # only update the tables and the plot of docs/performance.md

docs/performance.md describes the measurements; gpu.py measures a GPU. Real data are read from ../shared/data (see
--data).
"""

import argparse
import json
import os
import subprocess
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch reads it when it is imported

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "step_speed.json"
DOCS = ROOT / "docs" / "performance.md"
SEED = 42

PLAIN = ("TRL", "bfpo")
MAIN = ("TRL", "TRL, completion-only head", "bfpo")
EVERY = (*MAIN, "bfpo, padded", "TRL, its defaults", "bfpo, bf16", "TRL, selective bf16", "bfpo, selective bf16")
MEMORY = ("TRL", "TRL, its defaults", "TRL, selective bf16", "bfpo, padded", "bfpo", "bfpo, selective bf16")
MEMORY_ROUNDS = 3
EXACTNESS_PAIRS = 8


def main() -> None:
    """Parse the command line and run the measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    mode = parser.add_mutually_exclusive_group()
    for name, help_text in (
        ("quick", "HH-RLHF only, a few rounds, nothing written"),
        ("docs", "only write docs/performance.md from the results"),
    ):
        mode.add_argument(f"--{name}", action="store_true", help=help_text)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="folder of real data")
    options = parser.parse_args()
    if options.docs:
        from speed.report import update_docs

        update_docs(json.loads(RESULTS.read_text()), DOCS)
        return
    if not options.data.is_dir():
        raise SystemExit(f"--data: {options.data} is not a folder")
    # These are measurements of a CPU. torch reads this variable, too, when it is imported.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if options.quick:
        measure_quickly(options.data)
    else:
        measure_all(options.data)


def measure_quickly(data: Path) -> None:
    """Print the ratio of TRL's step time to ours on HH-RLHF with 4 pairs and the 9 M model."""
    from speed.data import make_pairs
    from speed.measure import Group, measure_together
    from speed.report import format_range, ratios, speed_table

    group = Group("hh", "9M", 4, PLAIN, rounds=3)
    result = measure_together(group, make_pairs(group.data, data, count=group.pairs, seed=SEED))
    print(speed_table(result))
    print(f"{group.name}: {format_range(ratios(result, 'TRL', 'bfpo'))} x as fast as TRL")


def measure_all(data: Path) -> None:
    """Measure every group that is missing in the results file, and write the file after each."""
    from speed.data import make_pairs
    from speed.exactness import largest_errors
    from speed.measure import Group, in_fresh_process, measure_memory, measure_together
    from speed.variants import SHAPES

    groups = (
        Group("hh", "9M", 4, EVERY, rounds=7),
        Group("xstest", "9M", 4, EVERY, rounds=5),
        Group("hh", "9M", 8, MAIN, rounds=5),
        Group("hh", "25M", 4, MAIN, rounds=5),
        Group("hh", "9M, vocabulary 32k", 4, MAIN, rounds=3),
        Group("alpaca", "9M", 4, MAIN, rounds=4),
        Group("ultrafeedback", "9M", 4, MAIN, rounds=4),
        Group("pku", "9M", 4, MAIN, rounds=5),
        Group("hh", "9M", 4, PLAIN, rounds=7, keeps_memory=False),
        Group("xstest", "9M", 4, PLAIN, rounds=5, keeps_memory=False),
        Group("hh", "9M", 8, PLAIN, rounds=3, keeps_memory=False),
        Group("hh", "25M", 4, PLAIN, rounds=3, keeps_memory=False),
    )
    results = load_results(RESULTS, "python benchmarks/step_speed.py")
    for group in groups:
        if group.name not in results["groups"]:
            table = make_pairs(group.data, data, count=group.pairs, seed=SEED)
            add_result(RESULTS, results, "groups", group.name, in_fresh_process(measure_together, group, table))
    for group in groups[:2]:
        if group.name not in results["memory"]:
            group = replace(group, variants=MEMORY, rounds=MEMORY_ROUNDS)
            table = make_pairs(group.data, data, count=group.pairs, seed=SEED)
            add_result(RESULTS, results, "memory", group.name, measure_memory(group, table))
        if group.name not in results["exactness"]:
            table = make_pairs(group.data, data, count=EXACTNESS_PAIRS, seed=SEED)
            errors = largest_errors(SHAPES[group.shape], table, list(range(EXACTNESS_PAIRS)))
            add_result(RESULTS, results, "exactness", group.name, errors)


def load_results(path: Path, command: str) -> dict[str, Any]:
    """Return the results of a file if they were measured with the same code and machine, else empty results."""
    from bfpo.core.environment import hardware, versions

    head = {
        "command": command,
        "seed": SEED,
        "source": source_revision(),
        "versions": versions() | {"trl": version("trl")},
        "hardware": hardware(),
    }
    if path.exists():
        results = json.loads(path.read_text())
        if {key: results.get(key) for key in head} == head:
            return results
        print(f"{path.name} was measured with other code or on another machine: starting over")
    return head | {"groups": {}, "memory": {}, "exactness": {}}


def source_revision() -> str:
    """Return the last commit that changed `src`, with `+changes` if there are uncommitted changes."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()

    return git("log", "-1", "--format=%H", "--", "src") + ("+changes" if git("status", "--porcelain", "src") else "")


def add_result(path: Path, results: dict[str, Any], part: str, name: str, result: Any) -> None:
    """Add a measurement to the results and write them."""
    from bfpo.core.files import write_json

    results[part][name] = result
    write_json(path, results)
    print(f"{part}: {name}: written to {path.name}", flush=True)


if __name__ == "__main__":
    main()
