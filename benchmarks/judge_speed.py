"""Time `bfpo judge fit` and the `linear` judge's verdicts, before and after n-grams were hashed and counted once.

    python benchmarks/judge_speed.py FOLDER-OF-XSTEST --before SRC-OF-AN-EARLIER-VERSION

Writes `benchmarks/results/judge_speed.json`: CPU seconds of one thread, in processes of their own: each version fits
once, then they judge in turn. It also compares the fits, and both versions' verdicts by the earlier version's file.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from bfpo.core.environment import hardware, versions
from bfpo.core.files import file_hash, write_json

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "judge_speed.json"
JUDGE = """
import json, sys, time
from pathlib import Path
from bfpo.judging.labeled import read_labeled
from bfpo.judging.linear import load_judge
answers = [answer.completion for answer in read_labeled(sys.argv[2])]
start = time.process_time()
judge = load_judge(Path(sys.argv[1]))
loaded = time.process_time()
# The batches of `bfpo judge run`.
verdicts = [v for i in range(0, len(answers), 64) for v in judge.judge(answers[i : i + 64])]
seconds = time.process_time() - loaded
rows = [[v.p_safe, v.p_refusal, v.safe, v.refusal] for v in verdicts]
print(json.dumps({"load": loaded - start, "seconds": seconds, "answers": len(answers), "rows": rows}))
"""


def main() -> None:
    """Run both versions in turn, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--before", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    labeled = str(options.folder / "completions_*.csv")
    sources = {"before": options.before, "after": ROOT / "src"}
    timings: dict[str, dict[str, list[float]]] = {name: {"fit": [], "load": [], "judge": []} for name in sources}
    judged: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        files = {name: f"{folder}/{name}.npz" for name in sources}
        for name, source in sources.items():
            timings[name]["fit"].append(run(source, "-m", "bfpo", "judge", "fit", labeled, "--out", files[name])[0])
            print(name, timings[name], flush=True)
        for _ in range(options.rounds):
            for name, source in sources.items():
                judged[name] = json.loads(run(source, "-c", JUDGE, files[name], labeled)[1])
                timings[name]["load"].append(judged[name]["load"])
                timings[name]["judge"].append(judged[name]["seconds"])
        print(timings, flush=True)
        by_old_file = json.loads(run(sources["after"], "-c", JUDGE, files["before"], labeled)[1])
        sizes = {name: Path(file).stat().st_size for name, file in files.items()}
    before, after = (np.array([row[:2] for row in judged[name]["rows"]], dtype=float) for name in sources)
    write_json(
        RESULTS,
        {
            "command": "python benchmarks/judge_speed.py FOLDER-OF-XSTEST --before SRC-OF-AN-EARLIER-VERSION",
            "versions": versions(),
            "hardware": hardware(),
            "data": {file.name: file_hash(file) for file in sorted(options.folder.glob("completions_*.csv"))},
            "answers": judged["after"]["answers"],
            "cpu_seconds": {
                name: {what: [round(value, 3) for value in values] for what, values in of_version.items()}
                for name, of_version in timings.items()
            },
            "answers_per_cpu_second": {
                name: round(judged[name]["answers"] / median(of_version["judge"]))
                for name, of_version in timings.items()
            },
            "bytes_of_the_file": sizes,
            "file_of_the_earlier_version": {
                "verdicts_are_bit_identical": by_old_file["rows"] == judged["before"]["rows"],
                "answers_per_cpu_second": round(by_old_file["answers"] / by_old_file["seconds"]),
            },
            "greatest_difference_of_the_two_fits": {
                name: float(np.abs(before - after)[:, column].max())
                for column, name in enumerate(("p_safe", "p_refusal"))
            },
        },
    )


def run(source: Path, *arguments: str) -> tuple[float, str]:
    """Run a process by one version of the package; return its CPU seconds and output."""
    start = os.times()
    environment = os.environ | {"PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"}
    output = subprocess.run(
        [sys.executable, *arguments], env=environment, check=True, capture_output=True, text=True
    ).stdout
    end = os.times()
    return end.children_user + end.children_system - start.children_user - start.children_system, output


if __name__ == "__main__":
    main()
