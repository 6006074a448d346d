"""Time `bfpo report` on many runs with many prompts, made up and written by the functions that `bfpo eval` uses.

    python benchmarks/report_speed.py                                  # 20 runs of 5,000 prompts, about three minutes
    python benchmarks/report_speed.py --runs 2 --prompts 200 --out -   # prints only

Writes `benchmarks/results/report_speed.json`: CPU seconds of one process, and its peak memory.
"""

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from bfpo.core.conversation import user_says
from bfpo.core.environment import hardware, versions
from bfpo.core.files import write_json, write_jsonl
from bfpo.core.samples import Completion, Prompt, Verdict
from bfpo.evaluation.differences import compare_scores
from bfpo.evaluation.metric_specs import JudgedCompletion
from bfpo.evaluation.results import Results, answers_hash
from bfpo.evaluation.scoring import compute_metrics, score_prompts

RESULTS = Path(__file__).parent / "results" / "report_speed.json"
JUDGE = "made-up"
KINDS = ("harmful", "benign", "lookalike")
WORDS = ("lamp", "door", "red", "box", "please", "round", "quickly", "under", "the", "small")
REPORT = """
import json, resource, sys, time
from pathlib import Path
start = time.process_time()
from bfpo.report.html import write_report
imported = time.process_time()
page = write_report(Path(sys.argv[1]), list(map(Path, sys.argv[2:])))
end = time.process_time()
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
seconds = {"import": imported - start, "report": end - imported}
print(json.dumps(seconds | {"peak_bytes": peak, "page_bytes": page.stat().st_size}))
"""


def make_prompts(count: int) -> list[Prompt]:
    """Return prompts of three kinds in turn."""
    rng, prompts = random.Random(0), []
    for number in range(count):
        text = f"{' '.join(rng.choices(WORDS, k=12))} {number} ?"
        prompts.append(Prompt(f"p-{number:05}", user_says(text), KINDS[number % 3], "made up", "made up"))
    return prompts


def judged(prompts: list[Prompt], run: int) -> list[JudgedCompletion]:
    """Return a judged answer of about 60 words to each prompt."""
    rng, pairs = random.Random(run), []
    for prompt in prompts:
        refuses = rng.random() < (0.5 + run / 50 if prompt.kind == "harmful" else 0.1)
        text = "sorry , no ." if refuses else " ".join(rng.choices(WORDS, k=60))
        words, origin = len(text.split()), (f"runs/{run}", "transformers", "abc")
        completion = Completion(prompt.prompt_id, 0, prompt.prompt, text, "stop", 14, words, *origin)
        helpfulness = 0.0 if refuses else round(4 * rng.random()) / 4
        verdict = Verdict.on(
            completion, _Judge(), safe=refuses or prompt.kind != "harmful", refusal=refuses, helpfulness=helpfulness
        )
        pairs.append(JudgedCompletion(completion, verdict))
    return pairs


class _Judge:
    name, revision = JUDGE, "1"


def write_runs(folder: Path, runs: int, count: int) -> list[Path]:
    """Write evaluated runs, each compared with the first, and return their folders."""
    prompts, folders, baseline = make_prompts(count), [], None
    for run in range(runs):
        pairs = judged(prompts, run)
        judges: list[dict[str, Any]] = [{"name": JUDGE, "revision": "1", "circular": False}]
        sampling = {"samples": 1, "temperature": 0.7, "top_p": 1.0, "max_new_tokens": 48, "seed": 0}
        results = Results(
            f"run-{run:02}", f"runs/{run}", "chat template of the tokenizer", judges, sampling, [],
            answers=answers_hash(pair.completion for pair in pairs), created="2026-01-01T00:00:00+00:00",
        )  # fmt: skip
        scores = score_prompts(prompts, pairs, judge=JUDGE)
        comparisons = [] if baseline is None else compare_scores("made up", scores, baseline[0], against=baseline[1])
        baseline = baseline or (scores, results)
        out = folder / f"run-{run:02}"
        replace(results, metrics=compute_metrics("made up", scores), comparisons=comparisons).write(out)
        write_jsonl(out / "prompts.jsonl", (prompt.to_row() for prompt in prompts))
        write_jsonl(out / "completions.jsonl", (pair.completion.to_row() for pair in pairs))
        write_jsonl(out / "verdicts.jsonl", (pair.verdict.to_row() for pair in pairs))
        folders.append(out)
    return folders


def main() -> None:
    """Write the runs, time a report on them, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--prompts", type=int, default=5000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", default=str(RESULTS), help="output file; - prints only")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folders = write_runs(Path(folder), options.runs, options.prompts)
        print(f"wrote {len(folders)} runs; {resource.getrusage(resource.RUSAGE_SELF).ru_utime:.0f} s", flush=True)
        rounds = []
        for _ in range(options.rounds):
            arguments = [sys.executable, "-c", REPORT, f"{folder}/report", *map(str, folders)]
            rounds.append(json.loads(subprocess.run(arguments, check=True, capture_output=True, text=True).stdout))
            print(rounds[-1], flush=True)
    if options.out == "-":
        return
    write_json(
        Path(options.out),
        {
            "command": "python benchmarks/report_speed.py",
            "versions": versions(),
            "hardware": hardware(),
            "runs": options.runs,
            "prompts": options.prompts,
            "cpu_seconds": [round(measured["report"], 2) for measured in rounds],
            "peak_bytes": max(measured["peak_bytes"] for measured in rounds),
            "page_bytes": rounds[-1]["page_bytes"],
        },
    )


if __name__ == "__main__":
    main()
