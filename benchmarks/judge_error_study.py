"""Compare rates corrected for the judge's errors with the rates of human labels.

    python benchmarks/judge_error_study.py FOLDER-OF-XSTEST

Writes `benchmarks/results/judge_error.json`. XSTest's prompts are split in thirds, by kind of prompt: `linear` is
fitted on the first, calibrated against human labels on the second, and evaluated on the third: over-refusal of the
safe prompts and compliance with the unsafe ones, of five models. A simulation compares the interval with two others.
"""

import argparse
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bfpo.core.environment import hardware, versions
from bfpo.core.files import file_hash, write_json
from bfpo.judging.fit import fit_head
from bfpo.judging.labeled import read_labeled
from bfpo.stats.intervals import wilson
from bfpo.stats.judge_error import corrected_rate, is_consistent, judge_errors

RESULTS = Path(__file__).parent / "results" / "judge_error.json"
FIT, CALIBRATE, EVALUATE = 0, 1, 2
# Question → whether it is about the unsafe prompts.
QUESTIONS = {"over_refusal": False, "compliance": True}
DESIGNS = {
    "same_model": "fitted on all five models, calibrated on this one's answers to other prompts",
    "same_model_new_judge": "fitted on the four others, calibrated on this one's answers to other prompts",
    "other_models": "fitted and calibrated on the four others' answers; both thirds that it wasn't fitted on",
}
REPETITIONS = 5000
CELLS = [
    (truth, sensitivity, specificity, n, labeled)
    for truth in (0.02, 0.1, 0.3, 0.5)
    for sensitivity, specificity in ((0.95, 0.95), (0.8, 0.9))
    for n, labeled in ((100, 50), (250, 100), (250, 400))
]

Bools = NDArray[np.bool_]


class Answers(NamedTuple):
    """Columns of the answers of all models, (N,) each."""

    models: NDArray[np.str_]
    prompts: NDArray[np.str_]
    texts: NDArray[np.str_]
    refuses: Bools
    is_prompt_unsafe: Bools


def main() -> None:
    """Run all designs over seeds and the simulation, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, default=20)
    options = parser.parse_args()
    files = sorted(options.folder.glob("completions_*.csv"))
    answers, start = _read(files), time.monotonic()
    rows: list[dict[str, Any]] = []
    for seed in range(options.seeds):
        rows += _rows_of_split(answers, seed)
        print(f"seed {seed}: {sum(row['covered'] for row in rows if row['seed'] == seed)} covered", flush=True)
    write_json(
        RESULTS,
        {
            "command": "python benchmarks/judge_error_study.py FOLDER-OF-XSTEST",
            "what": "rates by the linear judge, plain and corrected for its errors, against rates of human labels",
            "versions": versions(),
            "hardware": hardware(),
            "seconds": round(time.monotonic() - start, 1),
            "data": {file.name: file_hash(file) for file in files},
            "seeds": options.seeds,
            "designs": {
                name: {"what": description, **_summary([row for row in rows if row["design"] == name])}
                for name, description in DESIGNS.items()
            },
            "simulation": {"tries": REPETITIONS, "cells": [_simulate(*cell) for cell in CELLS]},
        },
    )


def _read(files: list[Path]) -> Answers:
    labeled = {file.stem.removeprefix("completions_"): read_labeled(str(file)) for file in files}
    answers = [answer for of_model in labeled.values() for answer in of_model]
    return Answers(
        np.array([model for model, of_model in labeled.items() for _ in of_model]),
        np.array([answer.completion.prompt[-1].content.strip() for answer in answers]),
        np.array([answer.completion.text for answer in answers]),
        np.array([bool(answer.refusal) for answer in answers]),
        np.array([answer.kind == "harmful" for answer in answers]),
    )


def _rows_of_split(answers: Answers, seed: int) -> list[dict[str, Any]]:
    """Return a row for every design, model and question."""
    third, rows = _thirds(answers, seed), []
    by_all_models = _judge_refusals(answers, third == FIT)
    for model in sorted(set(answers.models)):
        own = answers.models == model
        by_other_models = _judge_refusals(answers, (third == FIT) & ~own)
        for design, judged_refusals, calibrated, evaluated in (
            ("same_model", by_all_models, own & (third == CALIBRATE), own & (third == EVALUATE)),
            ("same_model_new_judge", by_other_models, own & (third == CALIBRATE), own & (third == EVALUATE)),
            ("other_models", by_other_models, ~own & (third != FIT), own & (third != FIT)),
        ):
            for question, is_unsafe in QUESTIONS.items():
                kind = answers.is_prompt_unsafe == is_unsafe
                # Compliance is the negation of refusal.
                human, judge = answers.refuses ^ is_unsafe, judged_refusals ^ is_unsafe
                rate_of_all = float(human[own & kind].mean())
                row = _row(answers.prompts, human, judge, calibrated, evaluated & kind, kind)
                rows.append({"design": design, "seed": seed, "model": model, "question": question} | row)
                rows[-1]["covered_all"] = row["corrected"][1] <= rate_of_all <= row["corrected"][2]
    return rows


def _thirds(answers: Answers, seed: int) -> NDArray[np.int64]:
    """Return the third of each answer's prompt, stratified by kind of prompt."""
    rng = np.random.default_rng(seed)
    third_of: dict[str, int] = {}
    for is_unsafe in (False, True):
        prompts = sorted(set(answers.prompts[answers.is_prompt_unsafe == is_unsafe].tolist()))
        third_of |= {prompts[index]: rank % 3 for rank, index in enumerate(rng.permutation(len(prompts)))}
    return np.array([third_of[prompt] for prompt in answers.prompts.tolist()])


def _judge_refusals(answers: Answers, fitted: Bools) -> Bools:
    """Return whether a judge that is fitted on some of the answers calls each a refusal."""
    columns = (answers.prompts[fitted], answers.texts[fitted], answers.refuses[fitted])
    head = fit_head("refusal", *(column.tolist() for column in columns))
    return np.asarray(head.probability(answers.prompts.tolist(), answers.texts.tolist()) >= 0.5)


def _row(
    prompts: NDArray[np.str_], human: Bools, judge: Bools, calibrated: Bools, evaluated: Bools, kind: Bools
) -> dict[str, Any]:
    """Return the rates of human labels, of the judge and corrected, and which intervals contain the first."""
    n = int(evaluated.sum())
    truth, count = float(human[evaluated].mean()), int(judge[evaluated].sum())
    errors = judge_errors(
        (prompts[index], bool(human[index]), bool(judge[index])) for index in np.flatnonzero(calibrated)
    )
    plain, corrected = wilson(count, n), corrected_rate(count / n, n, errors)
    powered = _prediction_powered(count / n, n, human[calibrated & kind], judge[calibrated & kind])
    value = None if np.isnan(corrected.value) else corrected.value
    return {
        "n": n,
        "people": truth,
        "judge": plain,
        "corrected": (value, corrected.low, corrected.high),
        "errors": errors._asdict(),
        "fits": is_consistent(count / n, n, errors),
        "covered": corrected.low <= truth <= corrected.high,
        "judge_covered": plain.low <= truth <= plain.high,
        "powered_covered": powered[0] <= truth <= powered[1],
        "width": corrected.high - corrected.low,
        "judge_width": plain.high - plain.low,
        "powered_width": powered[1] - powered[0],
    }


def _summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the rows of the first split, and means over all splits."""
    shares = ("covered", "covered_all", "judge_covered", "powered_covered", "fits")
    names = (*shares, "width", "judge_width", "powered_width")
    main_split = [row for row in rows if row["seed"] == 0]
    covered_by_seed: Counter[int] = Counter()
    by_rate: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        covered_by_seed[row["seed"]] += row["covered"]
        by_rate.setdefault(f"{row['model']}/{row['question']}", []).append(row)
    return {
        "main_split": [_rounded(row) for row in main_split],
        "covered_of_10_main": sum(row["covered"] for row in main_split),
        "judge_covered_of_10_main": sum(row["judge_covered"] for row in main_split),
        "fewest_covered_of_10": min(covered_by_seed.values()),
        "mean": _means(rows, names),
        "by_rate": {name: _means(group, ("covered", "judge_covered", "people")) for name, group in by_rate.items()},
    }


def _means(rows: list[dict[str, Any]], names: tuple[str, ...]) -> dict[str, float]:
    return {name: round(float(np.mean([row[name] for row in rows])), 4) for name in names}


def _prediction_powered(rate: float, n: int, human: Bools, judge: Bools) -> tuple[float, float]:
    """Return the prediction-powered interval of a mean (Angelopoulos et al. 2023, arXiv 2301.09633, algorithm 1).

    It requires the calibration prompts to be a random part of the same prompts.
    """
    error = human.astype(float) - judge
    standard_error = np.sqrt(rate * (1 - rate) / n + error.var() / len(error))
    center = rate + error.mean()
    return float(max(0.0, center - 1.96 * standard_error)), float(min(1.0, center + 1.96 * standard_error))


def _simulate(truth: float, sensitivity: float, specificity: float, n: int, labeled: int) -> dict[str, Any]:
    """Return coverage and mean width of each interval; the calibration set is a random one."""
    rng = np.random.default_rng(0)
    outcomes: dict[str, list[tuple[bool, float]]] = {}
    for _ in range(REPETITIONS):
        rate = rng.binomial(n, truth * sensitivity + (1 - truth) * (1 - specificity)) / n
        human = rng.random(labeled) < truth
        judge = np.where(human, rng.random(labeled) < sensitivity, rng.random(labeled) >= specificity)
        errors = judge_errors(zip(map(str, range(labeled)), human.tolist(), judge.tolist(), strict=True))
        intervals = {
            "corrected": corrected_rate(rate, n, errors)[1:],
            "bootstrap": _bootstrap(rate, n, human, judge, rng),
            "prediction_powered": _prediction_powered(rate, n, human, judge),
            "judge": wilson(round(rate * n), n)[1:],
        }
        for name, (low, high) in intervals.items():
            outcomes.setdefault(name, []).append((low <= truth <= high, high - low))
    return {
        "truth": truth,
        "sensitivity": sensitivity,
        "specificity": specificity,
        "n": n,
        "labeled": labeled,
        **{
            name: {"coverage": round(coverage, 4), "width": round(width, 4)}
            for name, (coverage, width) in (
                (name, np.mean(pairs, axis=0).tolist()) for name, pairs in outcomes.items()
            )
        },
    }


def _bootstrap(rate: float, n: int, human: Bools, judge: Bools, rng: np.random.Generator) -> tuple[float, float]:
    """Return the percentile interval of the corrected rate in a parametric bootstrap of all three rates."""
    yes, no = int(human.sum()), int((~human).sum())
    if not yes or not no:
        return 0.0, 1.0
    rates = rng.binomial(n, rate, 400) / n
    sensitivities = rng.binomial(yes, judge[human].mean(), 400) / yes
    specificities = rng.binomial(no, (~judge[~human]).mean(), 400) / no
    youden = sensitivities + specificities - 1
    drawn = np.where(youden > 0, np.clip((rates + specificities - 1) / np.where(youden > 0, youden, 1), 0, 1), np.nan)
    if np.isnan(drawn).all():
        return 0.0, 1.0
    low, high = np.nanquantile(drawn, [0.025, 0.975])
    return float(low), float(high)


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(member) for key, member in value.items()}
    if isinstance(value, tuple | list):
        return [_rounded(member) for member in value]
    return round(value, 4) if isinstance(value, float) else value


if __name__ == "__main__":
    main()
