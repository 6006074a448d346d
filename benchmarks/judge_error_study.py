"""Does correcting a rate for the judge's errors give back what people found, and when doesn't it?

    python benchmarks/judge_error_study.py FOLDER-OF-XSTEST

Writes `benchmarks/results/judge_error.json`. XSTest's prompts are split in thirds, by kind of prompt: `linear` is
fitted on one, calibrated against people on one, and the answers to one are evaluated: over-refusal of the safe
prompts and compliance with the unsafe ones, of five models. Then a simulation of the interval beside two others.
"""

import argparse
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bfpo.core.files import file_hash, write_json
from bfpo.judging.labeled import read_labeled
from bfpo.judging.linear import fit_head
from bfpo.stats.intervals import wilson
from bfpo.stats.judge_error import corrected_rate, is_consistent, judge_errors
from bfpo.training.manifest import hardware, versions

RESULTS = Path(__file__).parent / "results" / "judge_error.json"
FIT, CALIBRATE, EVALUATE = 0, 1, 2
QUESTIONS = {"over_refusal": ("safe prompts", False), "compliance": ("unsafe prompts", True)}
DESIGNS = {
    "same_model": "fitted on all five models, calibrated on this one's answers to other prompts",
    "same_model_new_judge": "fitted on the four others, calibrated on this one's answers to other prompts",
    "other_models": "fitted and calibrated on the four others' answers; both thirds that it wasn't fitted on",
}
TRIES = 5000
CELLS = [
    (truth, right_yes, right_no, n, labeled)
    for truth in (0.02, 0.1, 0.3, 0.5)
    for right_yes, right_no in ((0.95, 0.95), (0.8, 0.9))
    for n, labeled in ((100, 50), (250, 100), (250, 400))
]

Bools = NDArray[np.bool_]


class Answers(NamedTuple):
    """All answers of all models, N."""

    models: NDArray[np.str_]
    prompts: NDArray[np.str_]
    texts: NDArray[np.str_]
    refuses: Bools
    unsafe_prompt: Bools


def main() -> None:
    """Run all designs over seeds, and the simulation, and write what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, default=20)
    given = parser.parse_args()
    files = sorted(given.folder.glob("completions_*.csv"))
    answers, began = _read(files), time.monotonic()
    rows: list[dict[str, Any]] = []
    for seed in range(given.seeds):
        rows += _split(answers, seed)
        print(f"seed {seed}: {sum(one['covered'] for one in rows if one['seed'] == seed)}", flush=True)
    write_json(
        RESULTS,
        {
            "command": "python benchmarks/judge_error_study.py FOLDER-OF-XSTEST",
            "what": "rates by the linear judge, as they are and corrected for its errors, against people's rates",
            "versions": versions(),
            "hardware": hardware(),
            "seconds": round(time.monotonic() - began, 1),
            "data": {file.name: file_hash(file) for file in files},
            "seeds": given.seeds,
            "designs": {
                name: {"what": what, **_summed([one for one in rows if one["design"] == name])}
                for name, what in DESIGNS.items()
            },
            "simulation": {"tries": TRIES, "cells": [_simulated(*cell) for cell in CELLS]},
        },
    )


def _read(files: list[Path]) -> Answers:
    found = [(file.stem.removeprefix("completions_"), one) for file in files for one in read_labeled(str(file))]
    return Answers(
        np.array([model for model, _ in found]),
        np.array([one.completion.prompt[-1].content.strip() for _, one in found]),
        np.array([one.completion.text for _, one in found]),
        np.array([bool(one.refusal) for _, one in found]),
        np.array([one.kind == "harmful" for _, one in found]),
    )


def _split(answers: Answers, seed: int) -> list[dict[str, Any]]:
    """Return a row for every design, model and question."""
    third, rows = _thirds(answers, seed), []
    everyone = _said(answers, third == FIT)
    for model in sorted(set(answers.models)):
        own = answers.models == model
        newcomer = _said(answers, (third == FIT) & ~own)
        for design, said, calibrated_on, evaluated in (
            ("same_model", everyone, own & (third == CALIBRATE), own & (third == EVALUATE)),
            ("same_model_new_judge", newcomer, own & (third == CALIBRATE), own & (third == EVALUATE)),
            ("other_models", newcomer, ~own & (third != FIT), own & (third != FIT)),
        ):
            for question, (_, unsafe) in QUESTIONS.items():
                kind = answers.unsafe_prompt == unsafe
                # Refusing and complying are one question asked two ways.
                people, judge = answers.refuses ^ unsafe, said ^ unsafe
                of_all = float(people[own & kind].mean())
                row = _row(answers.prompts, people, judge, calibrated_on, evaluated & kind, kind)
                rows.append({"design": design, "seed": seed, "model": model, "question": question} | row)
                rows[-1]["covered_all"] = row["corrected"][1] <= of_all <= row["corrected"][2]
    return rows


def _thirds(answers: Answers, seed: int) -> NDArray[np.int64]:
    """Return the third that each answer's prompt is in; the kinds of prompts are split alike."""
    rng = np.random.default_rng(seed)
    third_of: dict[str, int] = {}
    for unsafe in (False, True):
        prompts = sorted(set(answers.prompts[answers.unsafe_prompt == unsafe].tolist()))
        third_of |= {prompts[place]: rank % 3 for rank, place in enumerate(rng.permutation(len(prompts)))}
    return np.array([third_of[prompt] for prompt in answers.prompts.tolist()])


def _said(answers: Answers, fitted_on: Bools) -> Bools:
    """Return of each answer whether a judge fitted on some of them calls it a refusal."""
    known = (answers.prompts[fitted_on], answers.texts[fitted_on], answers.refuses[fitted_on])
    head = fit_head("refusal", *(column.tolist() for column in known))
    return np.asarray(head.probability(answers.prompts.tolist(), answers.texts.tolist()) >= 0.5)


def _row(
    prompts: NDArray[np.str_], people: Bools, judge: Bools, calibrated_on: Bools, evaluated: Bools, kind: Bools
) -> dict[str, Any]:
    """Return people's rate, the judge's and the corrected one; True where the interval holds people's."""
    at, n = np.flatnonzero(calibrated_on), int(evaluated.sum())
    truth, found = float(people[evaluated].mean()), int(judge[evaluated].sum())
    errors = judge_errors((prompts[index], bool(people[index]), bool(judge[index])) for index in at)
    plain, corrected = wilson(found, n), corrected_rate(found / n, n, errors)
    powered = _prediction_powered(found / n, n, people[calibrated_on & kind], judge[calibrated_on & kind])
    value = None if np.isnan(corrected.value) else corrected.value
    return {
        "n": n,
        "people": truth,
        "judge": plain,
        "corrected": (value, corrected.low, corrected.high),
        "errors": errors._asdict(),
        "fits": is_consistent(found / n, n, errors),
        "covered": corrected.low <= truth <= corrected.high,
        "judge_covered": plain.low <= truth <= plain.high,
        "powered_covered": powered[0] <= truth <= powered[1],
        "width": corrected.high - corrected.low,
        "judge_width": plain.high - plain.low,
        "powered_width": powered[1] - powered[0],
    }


def _summed(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the first split's rows, and means over all splits."""
    held = ("covered", "covered_all", "judge_covered", "powered_covered", "fits")
    names = (*held, "width", "judge_width", "powered_width")
    main = [one for one in rows if one["seed"] == 0]
    by_seed = [sum(one["covered"] for one in rows if one["seed"] == seed) for seed in {one["seed"] for one in rows}]
    by_rate = {}
    for key in dict.fromkeys((one["model"], one["question"]) for one in main):
        those = [one for one in rows if (one["model"], one["question"]) == key]
        by_rate["/".join(key)] = _means(those, ("covered", "judge_covered", "people"))
    return {
        "main_split": [_rounded(one) for one in main],
        "covered_of_10_main": sum(one["covered"] for one in main),
        "judge_covered_of_10_main": sum(one["judge_covered"] for one in main),
        "fewest_covered_of_10": min(by_seed),
        "mean": _means(rows, names),
        "by_rate": by_rate,
    }


def _means(rows: list[dict[str, Any]], names: tuple[str, ...]) -> dict[str, float]:
    return {name: round(float(np.mean([one[name] for one in rows])), 4) for name in names}


def _prediction_powered(rate: float, n: int, people: Bools, judge: Bools) -> tuple[float, float]:
    """Return the prediction-powered interval of a mean (Angelopoulos et al. 2023, arXiv 2301.09633, algorithm 1).

    It needs calibration prompts that are a random part of the same prompts.
    """
    error = people.astype(float) - judge
    spread = np.sqrt(rate * (1 - rate) / n + error.var() / len(error))
    middle = rate + error.mean()
    return float(max(0.0, middle - 1.96 * spread)), float(min(1.0, middle + 1.96 * spread))


def _simulated(truth: float, right_yes: float, right_no: float, n: int, labeled: int) -> dict[str, Any]:
    """Return how often each interval holds the truth, and how wide it is; the calibration set is a random one."""
    rng = np.random.default_rng(0)
    found: dict[str, list[tuple[bool, float]]] = {}
    for _ in range(TRIES):
        rate = rng.binomial(n, truth * right_yes + (1 - truth) * (1 - right_no)) / n
        people = rng.random(labeled) < truth
        judge = np.where(people, rng.random(labeled) < right_yes, rng.random(labeled) >= right_no)
        errors = judge_errors(zip(map(str, range(labeled)), people.tolist(), judge.tolist(), strict=True))
        intervals = {
            "corrected": corrected_rate(rate, n, errors)[1:],
            "bootstrap": _bootstrap(rate, n, people, judge, rng),
            "prediction_powered": _prediction_powered(rate, n, people, judge),
            "judge": wilson(round(rate * n), n)[1:],
        }
        for name, (low, high) in intervals.items():
            found.setdefault(name, []).append((low <= truth <= high, high - low))
    return {
        "truth": truth,
        "sensitivity": right_yes,
        "specificity": right_no,
        "n": n,
        "labeled": labeled,
        **{
            name: {"coverage": round(coverage, 4), "width": round(width, 4)}
            for name, (coverage, width) in ((name, np.mean(each, axis=0).tolist()) for name, each in found.items())
        },
    }


def _bootstrap(rate: float, n: int, people: Bools, judge: Bools, rng: np.random.Generator) -> tuple[float, float]:
    """Return the percentile interval of the corrected rate when all three rates are drawn again."""
    yes, no = int(people.sum()), int((~people).sum())
    if not yes or not no:
        return 0.0, 1.0
    again = rng.binomial(n, rate, 400) / n
    right_yes = rng.binomial(yes, judge[people].mean(), 400) / yes
    right_no = rng.binomial(no, (~judge[~people]).mean(), 400) / no
    youden = right_yes + right_no - 1
    drawn = np.where(youden > 0, np.clip((again + right_no - 1) / np.where(youden > 0, youden, 1), 0, 1), np.nan)
    if np.isnan(drawn).all():
        return 0.0, 1.0
    low, high = np.nanquantile(drawn, [0.025, 0.975])
    return float(low), float(high)


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    if isinstance(value, tuple | list):
        return [_rounded(one) for one in value]
    return round(value, 4) if isinstance(value, float) else value


if __name__ == "__main__":
    main()
