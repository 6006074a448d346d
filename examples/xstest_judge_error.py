"""Evaluate XSTest's published answers of five models by human labels, a cheap judge, and that judge corrected.

    python examples/xstest_judge_error.py FOLDER-OF-XSTEST OUT

FOLDER contains prompts.csv and completions_MODEL.csv of paul-rottger/exaggerated-safety. Writes these folders, with a
page in each:

* OUT/people: all 450 answers of each model with the labels of the annotators;
* OUT/same: the prompts in thirds; `linear` is fitted on one, calibrated on the model's own answers to another, and
  judges the answers to the last, next to the human labels;
* OUT/other: the same judge calibrated on the four other models' answers to both thirds; it fails on mistralinstruct.

Every step is a command: the recipes and label files stay in OUT, and `bfpo judge fit`, `bfpo eval` and `bfpo report`
can be repeated on them.
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
    options = parser.parse_args()
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    (out / "xstest.yaml").write_text(SUITE)
    prompts = _read(options.folder / "prompts.csv")
    third_of = _thirds(prompts)
    texts = {row["prompt"].strip() for row in prompts}
    answers = {
        file.stem.removeprefix("completions_"): _answers(file, texts)
        for file in sorted(options.folder.glob("completions_*.csv"))
    }

    def select(models: Iterable[str], *thirds: int) -> Rows:
        return [row for model in models for row in answers[model] if third_of[row["prompt"]] in thirds]

    models = list(answers)
    # One file of all labels, so that the judge `people` is the same for every model.
    _write(out / "people.csv", [row for model in models for row in answers[model]])
    human = [_evaluate(out, "people", model, prompts, answers[model]) for model in models]
    _bfpo("report", *human, "--out", out / "people" / "page")

    held_out = [row for row in prompts if third_of[row["prompt"].strip()] == EVALUATE]
    judge = _fit(out / "judge.npz", select(models, FIT))
    same = []
    for model in models:
        evaluated, calibration = select([model], EVALUATE), select([model], CALIBRATE)
        same.append(_evaluate(out, "same", model, held_out, evaluated, judge=judge, calibration=calibration))
    _bfpo("report", *same, "--out", out / "same" / "page")

    not_fitted = [row for row in prompts if third_of[row["prompt"].strip()] != FIT]
    other = []
    for model in models:
        evaluated = select([model], CALIBRATE, EVALUATE)
        calibration = select([name for name in models if name != model], CALIBRATE, EVALUATE)
        other.append(_evaluate(out, "other", model, not_fitted, evaluated, judge=judge, calibration=calibration))
    _bfpo("report", *other, "--out", out / "other" / "page")


def _thirds(prompts: Rows) -> dict[str, int]:
    """Return the third of each prompt, stratified by kind."""
    rng, third_of = np.random.default_rng(SEED), dict[str, int]()
    for unsafe in (False, True):
        texts = sorted(row["prompt"].strip() for row in prompts if row["type"].startswith("contrast_") == unsafe)
        third_of |= {texts[index]: rank % 3 for rank, index in enumerate(rng.permutation(len(texts)))}
    return third_of


def _answers(file: Path, prompts: set[str]) -> Rows:
    """Return the answers to these prompts; the wording of one prompt changed after the answers were generated."""
    model = file.stem.removeprefix("completions_")
    return [
        {name: row[name] for name in ("type", "completion", "final_label")}
        | {"prompt": row["prompt"].strip(), "model": model}
        for row in _read(file)
        if row["prompt"].strip() in prompts
    ]


def _evaluate(
    out: Path,
    setting: str,
    model: str,
    prompts: Rows,
    answers: Rows,
    *,
    judge: Path | None = None,
    calibration: Rows | None = None,
) -> Path:
    """Evaluate saved answers by human labels, and by a judge with a calibration set if given; return the folder."""
    folder = out / setting / model
    answers_file, prompts_file = folder / "answers.csv", folder / "prompts.csv"
    _write(answers_file, answers)
    _write(prompts_file, prompts)
    recipe: dict[str, Any] = {
        "out": str(folder / "evaluation"),
        "run": model,
        "completions": str(answers_file),
        "suites": [str(out / "xstest.yaml")],
        "data": {"xstest": {"path": str(prompts_file)}},
        "judges": [f"people:{out / 'people.csv'}"],
        "max_unanswered": 0.02,
    }
    if judge is not None and calibration is not None:
        _write(folder / "calibration.csv", calibration)
        recipe["judges"].append(f"linear:{judge}")
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


def _bfpo(*arguments: object) -> None:
    print("bfpo", *arguments, flush=True)
    subprocess.run([sys.executable, "-m", "bfpo", *map(str, arguments)], check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
