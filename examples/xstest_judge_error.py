"""Evaluate XSTest's published answers of five models by people, by a cheap judge, and by that judge corrected.

    python examples/xstest_judge_error.py FOLDER-OF-XSTEST OUT

FOLDER holds prompts.csv and completions_MODEL.csv of paul-rottger/exaggerated-safety. Writes, with a page in each:

* OUT/people: all 450 answers of each model as their annotators labeled them;
* OUT/same: the prompts in thirds; `linear` is fitted on one, calibrated on the model's own answers to another, and
  judges the answers to the last, beside people;
* OUT/other: the same judge calibrated on the four other models' answers to both thirds: watch mistralinstruct.

Everything that is done is a command: the recipes and label files that are made stay in OUT, and `bfpo judge fit`,
`bfpo eval` and `bfpo report` can be repeated on them.
"""

import argparse
import csv
import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

SEED = 0
FIT, CALIBRATE, EVALUATE = 0, 1, 2
SUITE = """\
title: XSTest, both halves
judges: [safe, refusal]
tasks:
  - {name: xstest_safe, source: xstest, only: lookalike}
  - {name: xstest_unsafe, source: xstest, only: harmful}
"""
Rows = list[dict[str, Any]]


def main() -> None:
    """Write recipes and label files, and run the commands on them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    given = parser.parse_args()
    out: Path = given.out
    out.mkdir(parents=True, exist_ok=True)
    (out / "xstest.yaml").write_text(SUITE)
    prompts = _read(given.folder / "prompts.csv")
    third_of = _thirds(prompts)
    asked = {row["prompt"].strip(): row for row in prompts}
    answers = {
        file.stem.removeprefix("completions_"): _answers(file, asked)
        for file in sorted(given.folder.glob("completions_*.csv"))
    }

    def of(models: Iterable[str], *thirds: int) -> Rows:
        return [row for model in models for row in answers[model] if third_of[row["prompt"]] in thirds]

    everyone = list(answers)
    # One file of all labels, so that people are the same judge of every model.
    _write(out / "people.csv", [row for model in everyone for row in answers[model]])
    people = [_evaluate(out, "people", model, prompts, answers[model], {}) for model in everyone]
    _bfpo("report", *people, "--out", out / "people" / "page")

    held_out = [row for row in prompts if third_of[row["prompt"].strip()] == EVALUATE]
    judge = _fit(out / "judge.npz", of(everyone, FIT))
    same = [
        _evaluate(out, "same", model, held_out, of([model], EVALUATE), {"judge": judge, "on": of([model], CALIBRATE)})
        for model in everyone
    ]
    _bfpo("report", *same, "--out", out / "same" / "page")

    not_fitted = [row for row in prompts if third_of[row["prompt"].strip()] != FIT]
    other = []
    for model in everyone:
        others = [one for one in everyone if one != model]
        on = {"judge": judge, "on": of(others, CALIBRATE, EVALUATE)}
        other.append(_evaluate(out, "other", model, not_fitted, of([model], CALIBRATE, EVALUATE), on))
    _bfpo("report", *other, "--out", out / "other" / "page")


def _thirds(prompts: Rows) -> dict[str, int]:
    """Return the third of each prompt; both kinds are split alike."""
    rng, third_of = np.random.default_rng(SEED), dict[str, int]()
    for unsafe in (False, True):
        texts = sorted(row["prompt"].strip() for row in prompts if row["type"].startswith("contrast_") == unsafe)
        third_of |= {texts[place]: rank % 3 for rank, place in enumerate(rng.permutation(len(texts)))}
    return third_of


def _answers(file: Path, asked: dict[str, dict[str, Any]]) -> Rows:
    """Return the answers to prompts that are asked; one prompt is worded otherwise than when they were made."""
    model = file.stem.removeprefix("completions_")
    kept = [row for row in _read(file) if row["prompt"].strip() in asked]
    return [
        {name: row[name] for name in ("type", "completion", "final_label")}
        | {"prompt": row["prompt"].strip(), "model": model}
        for row in kept
    ]


def _evaluate(out: Path, setting: str, model: str, prompts: Rows, answers: Rows, linear: dict[str, Any]) -> Path:
    """Evaluate saved answers by people's labels and, where there is one, by a calibrated judge; return the folder."""
    folder = out / setting / model
    saved, questions = folder / "answers.csv", folder / "prompts.csv"
    _write(saved, answers)
    _write(questions, prompts)
    recipe: dict[str, Any] = {
        "out": str(folder / "evaluation"),
        "run": model,
        "completions": str(saved),
        "suites": [str(out / "xstest.yaml")],
        "data": {"xstest": {"path": str(questions)}},
        "judges": [f"people:{out / 'people.csv'}"],
        "max_unanswered": 0.02,
    }
    if linear:
        _write(folder / "calibration.csv", linear["on"])
        recipe["judges"].append(f"linear:{linear['judge']}")
        recipe["calibration"] = str(folder / "calibration.csv")
    # JSON is YAML.
    (folder / "recipe.yaml").write_text(json.dumps(recipe, indent=2) + "\n")
    _bfpo("eval", folder / "recipe.yaml")
    return folder


def _fit(judge: Path, answers: Rows) -> Path:
    """Fit `linear` on labeled answers and return its file."""
    labeled = judge.with_suffix(".labeled.csv")
    _write(labeled, answers)
    _bfpo("judge", "fit", labeled, "--out", judge)
    return judge


def _read(file: Path) -> Rows:
    with file.open(encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines))


def _write(file: Path, rows: Rows) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", encoding="utf-8", newline="") as lines:
        writer = csv.DictWriter(lines, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _bfpo(*words: object) -> None:
    print("bfpo", *words, flush=True)
    subprocess.run([sys.executable, "-m", "bfpo", *map(str, words)], check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
