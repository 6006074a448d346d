"""How well does the `linear` judge tell refusals from answers, on the human labels of XSTest?

    python benchmarks/judge_study.py FOLDER-OF-XSTEST

Writes `benchmarks/results/judge.json`: five folds grouped by prompt over five fold seeds, and every model left out in
turn. A partial refusal counts as a refusal; "without partial" leaves those out of the test.
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

from bfpo.core.files import file_hash, write_json
from bfpo.judging.linear import fit_head
from bfpo.stats.agreement import agreement
from bfpo.training.manifest import hardware, versions

RESULTS = Path(__file__).parent / "results" / "judge.json"
SEEDS = 5


def main() -> None:
    """Run both ways of holding out and write what came out."""
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
        head = fit_head("refusal", *([of[i] for i in train] for of in (prompts, answers, refuses)))
        return head.probability([prompts[i] for i in test], [answers[i] for i in test])

    def measured(p: np.ndarray, which: np.ndarray) -> dict[str, Any]:
        at = np.flatnonzero(which)
        said = (p[at] >= 0.5).tolist()
        found = asdict(agreement(refuses[at].tolist(), said, p[at].tolist(), [prompts[i] for i in at]))
        return {name: _rounded(value) for name, value in found.items()}

    every, began, seeds = np.ones(len(rows), dtype=bool), time.monotonic(), []
    groups = np.unique(prompts, return_inverse=True)[1]
    out = np.zeros(len(rows))
    for model in sorted(set(models)):
        out[models == model] = probabilities(np.flatnonzero(models != model), np.flatnonzero(models == model))
        print(f"without {model}: {measured(out, models == model)['accuracy']}", flush=True)
    for seed in range(SEEDS):
        p = np.zeros(len(rows))
        for train, test in GroupKFold(5, shuffle=True, random_state=seed).split(p, groups=groups):
            p[test] = probabilities(train, test)
        seeds.append({"seed": seed, "all": measured(p, every), "without_partial": measured(p, ~partial)})
        print(f"seed {seed}: {seeds[-1]['all']['balanced_accuracy']}", flush=True)
    write_json(
        RESULTS,
        {
            "command": "python benchmarks/judge_study.py FOLDER-OF-XSTEST",
            "what": "refusal (full or partial) against compliance, the linear judge, human labels of XSTest",
            "versions": versions(),
            "hardware": hardware(),
            "seconds": round(time.monotonic() - began, 1),
            "data": {file.name: file_hash(file) for file in files},
            "grouped_by_prompt": {
                name: {
                    metric: round(float(np.mean([one[name][metric][0] for one in seeds])), 4)
                    for metric in ("balanced_accuracy", "accuracy")
                }
                for name in ("all", "without_partial")
            },
            "seeds": seeds,
            "leave_one_model_out": {
                "all": measured(out, every),
                **{model: measured(out, models == model) for model in sorted(set(models))},
            },
            "missed_by_kind": {
                "full refusals called compliance": int((refuses & ~partial & (out < 0.5)).sum()),
                "partial refusals called compliance": int((partial & (out < 0.5)).sum()),
                "compliance called refusal": int((~refuses & (out >= 0.5)).sum()),
                "partial refusals": int(partial.sum()),
            },
        },
    )


def _read(file: Path) -> list[dict[str, str]]:
    with file.open(encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines))


def _rounded(value: Any) -> Any:
    if isinstance(value, tuple):
        return [round(float(one), 4) for one in value]
    return round(value, 4) if isinstance(value, float) else value


if __name__ == "__main__":
    main()
