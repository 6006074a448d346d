"""Evaluation of judges against human labels: tables, and all results in one JSON file."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from typing import Any

from bfpo.core.files import write_json
from bfpo.core.samples import Verdict
from bfpo.core.terminal import say, show_table
from bfpo.data.stages import judge_completions
from bfpo.data.verdict_files import judge_file
from bfpo.generation.open import JudgeServerSection
from bfpo.judging.labeled import LabeledAnswer, read_labeled
from bfpo.judging.linear import HEADS
from bfpo.judging.open import open_judge
from bfpo.stats.agreement import FOLDS, JudgeAgreement, agreement, held_out_threshold, kappa, threshold_for
from bfpo.stats.intervals import Interval

_COLUMNS = ("balanced_accuracy", "accuracy", "recall_yes", "recall_no", "auroc", "calibration_error", "kappa")


def evaluate_judges(
    labeled: str,
    specs: Sequence[str],
    *,
    threshold: float | None,
    max_false_safe: float,
    out: Path,
    server: JudgeServerSection | None = None,
) -> None:
    """Evaluate judges against human labels.

    Args:
        labeled: File of labeled answers, as `read_labeled` reads it.
        specs: Specs of the judges.
        threshold: Probability from which an answer counts as safe; see `open_judge`.
        max_false_safe: Maximum false-safe rate, for which a threshold is chosen: share of unsafe answers that pass.
        out: Output file of the results; the verdicts are written to a folder beside it, and reused.
        server: How the servers of judges are queried; None is the defaults.

    Raises:
        DataError: If the labels are malformed, or existing verdicts are about other answers.
    """
    answers = read_labeled(labeled)
    completions = [answer.completion for answer in answers]
    results: dict[str, Any] = {"labeled": labeled, "answers": len(answers), "judges": {}, "kappa": []}
    verdicts: dict[str, list[Verdict]] = {}
    for spec in specs:
        judge = open_judge(spec, threshold=threshold, server=server)
        path = judge_file(verdicts_folder(out), "verdicts", judge.name, judge.revision)
        verdicts[spec] = judge_completions(judge, completions, path)
        row: dict[str, Any] = {"judge": judge.name, "revision": judge.revision, "verdicts": str(path)}
        for question in HEADS:
            row[question] = agreement_by_model(question, answers, verdicts[spec])
            show_agreement(f"{spec}: {question}", row[question])
        if "all" in row["safe"] and (choice := _choose_threshold(answers, verdicts[spec], max_false_safe)):
            row["threshold"] = choice
        results["judges"][spec] = row
    results["kappa"] = [_compare_judges(pair, verdicts) for pair in combinations(specs, 2)]
    write_json(out, results)
    say(f"results in {out}, verdicts in {verdicts_folder(out)}")


def verdicts_folder(out: Path) -> Path:
    """Return the folder of the verdicts behind a file of results."""
    return out.with_name(f"{out.stem}-verdicts")


def agreement_by_model(
    question: str, answers: Sequence[LabeledAnswer], verdicts: Sequence[Verdict]
) -> dict[str, Any]:
    """Return a judge's agreement with the human labels on a question, over all answers (`all`) and for each model."""
    pairs = [
        (answer, verdict)
        for answer, verdict in zip(answers, verdicts, strict=True)
        if getattr(answer, question) is not None
    ]
    groups: dict[str, list[tuple[LabeledAnswer, Verdict]]] = {"all": pairs} if pairs else {}
    for model in sorted({answer.completion.model for answer, _ in pairs}):
        groups[model] = [pair for pair in pairs if pair[0].completion.model == model]
    return {name: asdict(_compute_agreement(question, group)) for name, group in groups.items()}


def show_agreement(title: str, rows: dict[str, Any]) -> None:
    """Print a table of a judge's agreement with the human labels; nothing if no answer is labeled."""
    cells = [
        [name, row["n"], row["undecided"], *row["counts"].values(), *(_format(row[column]) for column in _COLUMNS)]
        for name, row in rows.items()
    ]
    if cells:
        counts = ("yes, right", "no, wrong", "yes, wrong", "no, right")
        columns = [column.replace("_", " ") for column in _COLUMNS]
        show_table(title, ("model", "n", "undecided", *counts, *columns), cells)


_P_YES: dict[str, Callable[[Verdict], float | None]] = {
    "safe": lambda verdict: verdict.p_safe,
    "refusal": lambda verdict: verdict.p_refusal,
}


def _compute_agreement(question: str, pairs: Sequence[tuple[LabeledAnswer, Verdict]]) -> JudgeAgreement:
    return agreement(
        [getattr(answer, question) for answer, _ in pairs],
        [getattr(verdict, question) for _, verdict in pairs],
        [_P_YES[question](verdict) for _, verdict in pairs],
        [answer.completion.prompt_id for answer, _ in pairs],
    )


def _choose_threshold(
    answers: Sequence[LabeledAnswer], verdicts: Sequence[Verdict], max_false_safe: float
) -> dict[str, Any] | None:
    """Return the threshold for a maximum false-safe rate; None without probabilities or unsafe answers."""
    rows = [
        (not answer.safe, verdict.p_safe, answer.completion.prompt_id)
        for answer, verdict in zip(answers, verdicts, strict=True)
        if answer.safe is not None and verdict.p_safe is not None
    ]
    if not any(unsafe for unsafe, *_ in rows):
        return None
    unsafe, p_safe, prompts = (list(column) for column in zip(*rows, strict=True))
    threshold = threshold_for(unsafe, p_safe, max_false_safe)
    held_out = held_out_threshold(unsafe, p_safe, prompts, max_false_safe)
    # Rounded up: a slightly lower threshold would let one more answer pass.
    shown = f"{math.ceil(threshold * 1e6) / 1e6:.6g}"
    say(f"threshold {shown}: at most {max_false_safe:.1%} of the unsafe answers pass; chosen on these labels")
    if held_out is None:
        say(f"  too few prompts with unsafe answers to estimate its rates on other prompts ({FOLDS} folds)")
    else:
        passed = f"{_format(held_out.false_safe)} of the unsafe and {_format(held_out.true_safe)} of the safe answers"
        say(f"  on prompts held out from the choice ({FOLDS} folds), {passed} pass")
    return {
        "false_safe": max_false_safe,
        "threshold": threshold,
        "chosen_on": "these labels",
        "held_out": None if held_out is None else held_out._asdict() | {"folds": FOLDS, "grouped_by": "prompt"},
    }


def _compare_judges(pair: tuple[str, str], verdicts: dict[str, list[Verdict]]) -> dict[str, Any]:
    """Return Cohen's kappa of two judges with each other, on each question."""
    kappas = {
        question: kappa(*([getattr(verdict, question) for verdict in verdicts[spec]] for spec in pair))
        for question in HEADS
    }
    values = ", ".join(f"{_format(value)} on {question}" for question, value in kappas.items())
    say(f"Cohen's kappa of {pair[0]} and {pair[1]}: {values}")
    return {"judges": list(pair), **kappas}


def _format(value: Interval | float | None) -> str:
    if isinstance(value, tuple):
        return "{:.3f} [{:.3f}, {:.3f}]".format(*value)
    return "-" if value is None else f"{value:.3f}"
