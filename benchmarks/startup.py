"""What commands cost before they do anything: CPU seconds, median of five, each in a fresh process.

    python benchmarks/startup.py [--as before]

Processor time, user and system, of the process and its children, on one thread, hardly depends on what else the
machine does. Files are read once before they are timed. The results go under a name, `after` unless told, into
benchmarks/results/startup.json, and as a table into docs/performance.md.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bfpo.core.environment import hardware, versions
from bfpo.core.files import write_json, write_jsonl, write_text

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "startup.json"
PAGE = ROOT / "docs" / "performance.md"
REPEATS = 5
RECIPE = """
model: {new: {shape: tiny, vocab_size: 300}}
data: [{path: pairs.jsonl}]
trainer: {output_dir: runs/toy, use_cpu: true}
"""
COMMANDS = {
    "bfpo --version": ["--version"],
    "bfpo --help": ["--help"],
    "bfpo env": ["env"],
    "bfpo report RUN": ["report", "run"],
    "bfpo data inspect FILE": ["data", "inspect", "pairs.jsonl"],
    "bfpo train RECIPE --dry-run": ["train", "recipe.yaml", "--dry-run"],
}
"""How a command is called on the page → its arguments."""


def write_inputs(folder: Path) -> None:
    """Write four pairs, a recipe of a new tiny model, and an evaluated run of 120 prompts."""
    # The run is that of the report's own tests.
    sys.path.append(str(ROOT / "tests" / "report"))
    from fake_runs import judge_prompts, make_prompts, write_evaluation

    labels = {"is_chosen_safe": True, "is_rejected_safe": False}
    pairs = [{"prompt": f"which {n}", "chosen": "a box", "rejected": "a ball", **labels} for n in range(4)]
    write_jsonl(folder / "pairs.jsonl", pairs)
    write_text(folder / "recipe.yaml", RECIPE)
    prompts = make_prompts()
    judged = judge_prompts(prompts, safe=0.8, helpful=0.7, refusing=0.2, seed=0)
    write_evaluation(folder / "run" / "evaluation", "run", prompts, judged)


def cpu_seconds(arguments: list[str], folder: Path) -> float:
    """Return the CPU seconds of a command in a fresh process."""
    began = os.times()
    subprocess.run([sys.executable, "-m", "bfpo", *arguments], check=True, capture_output=True, cwd=folder)
    ended = os.times()
    return ended.children_user + ended.children_system - began.children_user - began.children_system


def with_table(page: str, results: dict[str, Any]) -> str:
    """Return the page with the medians in the place for them."""
    rows = [f"| `{title}` | {results['after'][title]['median']:.2f} |" for title in COMMANDS]
    table = "\n".join(["| command | CPU seconds |", "| --- | ---: |", *rows])
    start, end = "<!-- startup -->\n", "<!-- /startup -->"
    before, rest = page.split(start)
    return f"{before}{start}\n{table}\n\n{end}{rest.split(end, 1)[1]}"


def main() -> None:
    """Measure every command and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--as", dest="name", default="after", help="name of these results")
    name = parser.parse_args().name
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    results = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    measured = {}
    with tempfile.TemporaryDirectory() as folder:
        write_inputs(Path(folder))
        for title, arguments in COMMANDS.items():
            cpu_seconds(arguments, Path(folder))
            seconds = [round(cpu_seconds(arguments, Path(folder)), 3) for _ in range(REPEATS)]
            measured[title] = {"median": statistics.median(seconds), "all": seconds}
            print(title, measured[title], flush=True)
    about = {"command": "python benchmarks/startup.py", "versions": versions(), "hardware": hardware()}
    results |= about | {name: measured}
    write_json(RESULT, results)
    if "after" in results:
        write_text(PAGE, with_table(PAGE.read_text(), results))


if __name__ == "__main__":
    main()
