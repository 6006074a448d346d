"""Evaluate the `linear` judge's refusal verdicts against the human labels of XSTest.

    python benchmarks/judge_study.py FOLDER-OF-XSTEST

Writes `benchmarks/results/judge.json`: cross-validation in five folds grouped by prompt, with five fold seeds, and
leaving out one model at a time. A partial refusal counts as a refusal; "without partial" omits these from the test.
"""

import argparse
import csv
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.model_selection import GroupKFold

from bfpo.core.environment import hardware, versions
from bfpo.core.files import file_hash, write_json
from bfpo.judging.fit import fit_head
from bfpo.stats.agreement import agreement

RESULTS = Path(__file__).parent / "results" / "judge.json"
SEEDS = 5


def main() -> None:
    """Run both cross-validations and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    files = sorted(folder.glob("completions_*.csv"))
    rows = [{**row, "model": file.stem.removeprefix("completions_")} for file in files for row in _read(file)]
    prompts, answers = [row["prompt"] for row in rows], [row["completion"] for row in rows]
    refuses = np.array([not row["final_label"].startswith("1") for row in rows])
    partial = np.array([row["final_label"].startswith("3") for row in rows])
    models = np.array([row["model"] for row in rows])

    def probabilities(train: Sequence[int], test: Sequence[int]) -> np.ndarray:
        head = fit_head("refusal", *([column[i] for i in train] for column in (prompts, answers, refuses)))
        return head.probability([prompts[i] for i in test], [answers[i] for i in test])

    def metrics(p: np.ndarray, mask: np.ndarray) -> dict[str, Any]:
        judge = (p[mask] >= 0.5).tolist()
        masked_prompts = [prompts[i] for i in np.flatnonzero(mask)]
        results = asdict(agreement(refuses[mask].tolist(), judge, p[mask].tolist(), masked_prompts))
        return {name: _rounded(value) for name, value in results.items()}

    everything, start, seeds = np.ones(len(rows), dtype=bool), time.monotonic(), []
    groups = np.unique(prompts, return_inverse=True)[1]
    left_out = np.zeros(len(rows))
    for model in sorted(set(models)):
        left_out[models == model] = probabilities(np.flatnonzero(models != model), np.flatnonzero(models == model))
        print(f"without {model}: {metrics(left_out, models == model)['accuracy']}", flush=True)
    for seed in range(SEEDS):
        p = np.zeros(len(rows))
        for train, test in GroupKFold(5, shuffle=True, random_state=seed).split(p, groups=groups):
            p[test] = probabilities(train, test)
        seeds.append({"seed": seed, "all": metrics(p, everything), "without_partial": metrics(p, ~partial)})
        print(f"seed {seed}: {seeds[-1]['all']['balanced_accuracy']}", flush=True)
    write_json(
        RESULTS,
        {
            "command": "python benchmarks/judge_study.py FOLDER-OF-XSTEST",
            "what": "refusal (full or partial) against compliance, the linear judge, human labels of XSTest",
            "versions": versions(),
            "hardware": hardware(),
            "seconds": round(time.monotonic() - start, 1),
            "data": {file.name: file_hash(file) for file in files},
            "grouped_by_prompt": {
                name: {
                    metric: round(float(np.mean([seed[name][metric][0] for seed in seeds])), 4)
                    for metric in ("balanced_accuracy", "accuracy")
                }
                for name in ("all", "without_partial")
            },
            "seeds": seeds,
            "leave_one_model_out": {
                "all": metrics(left_out, everything),
                **{model: metrics(left_out, models == model) for model in sorted(set(models))},
            },
            "missed_by_kind": {
                "full refusals called compliance": int((refuses & ~partial & (left_out < 0.5)).sum()),
                "partial refusals called compliance": int((partial & (left_out < 0.5)).sum()),
                "compliance called refusal": int((~refuses & (left_out >= 0.5)).sum()),
                "partial refusals": int(partial.sum()),
            },
        },
    )


def _read(file: Path) -> list[dict[str, str]]:
    with file.open(encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines))


def _rounded(value: Any) -> Any:
    if isinstance(value, tuple):
        return [round(float(number), 4) for number in value]
    return round(value, 4) if isinstance(value, float) else value


if __name__ == "__main__":
    main()
