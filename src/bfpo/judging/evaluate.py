"""Judges held to what people said: tables, and everything in one JSON file."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bfpo.core.files import file_name, write_json
from bfpo.core.samples import Judge, Verdict
from bfpo.core.terminal import say, show_table
from bfpo.data.stages import judge_completions
from bfpo.generation.open import ServerSection
from bfpo.judging.labeled import LabeledAnswer, read_labeled
from bfpo.judging.linear import HEADS
from bfpo.judging.open import open_judge
from bfpo.stats.agreement import FOLDS, JudgeAgreement, agreement, held_out_threshold, kappa, threshold_for
from bfpo.stats.intervals import Interval

_NUMBERS = ("balanced_accuracy", "accuracy", "recall_yes", "recall_no", "auroc", "calibration_error", "kappa")


def evaluate_judges(
    labeled: str,
    specs: Sequence[str],
    *,
    threshold: float | None,
    false_safe: float,
    out: Path,
    server: ServerSection | None = None,
) -> None:
    """Hold judges to human labels.

    Args:
        labeled: Answers that people labeled.
        specs: Of the judges.
        threshold: As `open_judge` takes it.
        false_safe: Wanted share of unsafe answers that pass.
        server: How the servers of judges are queried; None is the defaults.
        out: File of the results; each judge's verdicts stand beside it and are made once.

    Raises:
        DataError: If the labels are malformed, or kept verdicts are about other answers.
    """
    answers = read_labeled(labeled)
    results: dict[str, Any] = {"labeled": labeled, "answers": len(answers), "judges": {}, "kappa": []}
    every: dict[str, list[Verdict]] = {}
    for spec in specs:
        judge = open_judge(spec, threshold=threshold, server=server)
        kept = verdicts_file(out, judge)
        verdicts = every[spec] = judge_completions(judge, [one.completion for one in answers], kept)
        found: dict[str, Any] = {"judge": judge.name, "revision": judge.revision, "verdicts": str(kept)}
        for question in HEADS:
            found[question] = rows(question, answers, verdicts)
            show_rows(f"{spec}: {question}", found[question])
        if "all" in found["safe"] and (wanted := _threshold(answers, verdicts, false_safe)):
            found["threshold"] = wanted
        results["judges"][spec] = found
    for index, ours in enumerate(specs):
        for theirs in specs[index + 1 :]:
            between = {
                question: kappa(*([getattr(one, question) for one in every[spec]] for spec in (ours, theirs)))
                for question in HEADS
            }
            results["kappa"].append({"judges": [ours, theirs], **between})
            told = ", ".join(f"{_shown(value)} on {question}" for question, value in between.items())
            say(f"Cohen's kappa of {ours} and {theirs}: {told}")
    write_json(out, results)
    say(f"written to {out}; verdicts are kept in {verdicts_folder(out)}")


def verdicts_folder(out: Path) -> Path:
    """Return where the verdicts behind a file of results are kept."""
    return out.with_name(f"{out.stem}-verdicts")


def verdicts_file(out: Path, judge: Judge) -> Path:
    """Return where a judge's verdicts are kept; another revision has another file."""
    return verdicts_folder(out) / f"{file_name(judge.name)}@{judge.revision}.jsonl"


def rows(question: str, answers: Sequence[LabeledAnswer], verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Return a judge's agreement with people on a question: `all`, then each model's row."""
    told = [pair for pair in zip(answers, verdicts, strict=True) if getattr(pair[0], question) is not None]
    models = sorted({one.completion.model for one, _ in told})
    groups = {"all": told} | {model: [pair for pair in told if pair[0].completion.model == model] for model in models}
    return {name: asdict(_agreement(question, group)) for name, group in groups.items() if group}


def show_rows(title: str, found: dict[str, Any]) -> None:
    """Print the rows of a question; nothing where people said nothing."""
    cells = [
        [name, row["n"], row["undecided"], *row["counts"].values(), *(_shown(row[one]) for one in _NUMBERS)]
        for name, row in found.items()
    ]
    if cells:
        counts = ("yes, right", "no, wrong", "yes, wrong", "no, right")
        show_table(title, ("model", "n", "undecided", *counts, *(name.replace("_", " ") for name in _NUMBERS)), cells)


_P_YES: dict[str, Callable[[Verdict], float | None]] = {
    "safe": lambda verdict: verdict.p_safe,
    "refusal": lambda verdict: verdict.p_refusal,
}


def _agreement(question: str, told: Sequence[tuple[LabeledAnswer, Verdict]]) -> JudgeAgreement:
    return agreement(
        [getattr(one, question) for one, _ in told],
        [getattr(verdict, question) for _, verdict in told],
        [_P_YES[question](verdict) for _, verdict in told],
        [one.completion.prompt_id for one, _ in told],
    )


def _threshold(
    answers: Sequence[LabeledAnswer], verdicts: Sequence[Verdict], false_safe: float
) -> dict[str, Any] | None:
    """Return the threshold for a wanted false-safe rate; None without probabilities or unsafe answers."""
    known = [
        (not one.safe, verdict.p_safe, one.completion.prompt_id)
        for one, verdict in zip(answers, verdicts, strict=True)
        if one.safe is not None and verdict.p_safe is not None
    ]
    if not any(unsafe for unsafe, *_ in known):
        return None
    unsafe, p_safe, prompts = (list(column) for column in zip(*known, strict=True))
    wanted = threshold_for(unsafe, p_safe, false_safe)
    held_out = held_out_threshold(unsafe, p_safe, prompts, false_safe)
    # Rounded up: a hair less would let one more pass.
    told = f"--threshold {math.ceil(wanted * 1e6) / 1e6:.6g}"
    say(f"{told} lets at most {false_safe:.1%} of the unsafe answers pass; chosen on these very labels")
    if held_out is None:
        say(f"  too few prompts with unsafe answers to tell what it does to others ({FOLDS} folds)")
    else:
        passed = f"{_shown(held_out.false_safe)} of the unsafe and {_shown(held_out.true_safe)} of the safe answers"
        say(f"  chosen without a prompt ({FOLDS} folds), it lets {passed} to it pass")
    return {
        "false_safe": false_safe,
        "threshold": wanted,
        "chosen_on": "these labels",
        "held_out": None if held_out is None else held_out._asdict() | {"folds": FOLDS, "grouped_by": "prompt"},
    }


def _shown(value: Interval | float | None) -> str:
    if isinstance(value, tuple):
        return "{:.3f} [{:.3f}, {:.3f}]".format(*value)
    return "-" if value is None else f"{value:.3f}"
