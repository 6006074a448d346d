"""Evaluation of judges against human labels: tables, and all results in one JSON file."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from typing import Any

from bfpo.core.files import write_json
from bfpo.core.samples import Judge, Verdict
from bfpo.core.terminal import say, show_table, warn
from bfpo.data.stages import judge_completions
from bfpo.data.verdict_files import judge_file
from bfpo.generation.open import JudgeServerSection
from bfpo.judging.annotations import Annotation, compare_annotators
from bfpo.judging.ensemble import Ensemble
from bfpo.judging.labeled import LabeledAnswer, annotations_of, count_labelers, read_labeled
from bfpo.judging.languages import LanguageGuard
from bfpo.judging.likeness import is_unlike
from bfpo.judging.linear import HEADS, LinearJudge
from bfpo.judging.open import open_judge
from bfpo.judging.readings import ReadingJudge
from bfpo.stats.agreement import FOLDS, Kappa, agreement, held_out_threshold, kappa, threshold_for
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
    results["labelers"] = show_labelers(answers)
    results["annotators"] = show_annotators(annotations_of(labeled))
    verdicts: dict[str, list[Verdict]] = {}
    kinds = {answer.completion.prompt_id: answer.kind for answer in answers}
    for spec in specs:
        judge = open_judge(spec, threshold=threshold, server=server, kinds=kinds)
        path = judge_file(verdicts_folder(out), "verdicts", judge.name, judge.revision)
        verdicts[spec] = judge_completions(judge, completions, path)
        row: dict[str, Any] = {"judge": judge.name, "revision": judge.revision, "verdicts": str(path)}
        linear = _linear_judges(judge)
        row["fitted_on"] = fitted = _show_fitted(spec, linear, answers)
        row["unlike"] = show_unlike(spec, verdicts[spec])
        for question in HEADS:
            row[question] = agreement_by_model(question, answers, verdicts[spec])
            show_agreement(f"{spec}: {question}", row[question])
        if fitted is not None and 0 < fitted["answers"] < len(answers):
            row["other_prompts"] = _show_other_prompts(spec, _fitted_prompts(linear), answers, verdicts[spec])
        if "all" in row["safe"] and (choice := _choose_threshold(answers, verdicts[spec], max_false_safe)):
            row["threshold"] = choice
        results["judges"][spec] = row
    results["kappa"] = [_compare_judges(pair, verdicts) for pair in combinations(specs, 2)]
    write_json(out, results)
    say(f"results in {out}, verdicts in {verdicts_folder(out)}")


def show_labelers(answers: Sequence[LabeledAnswer]) -> list[dict[str, Any]]:
    """Print who gave the labels if the file says so, and return it."""
    counts = count_labelers(answers)
    if counts:
        say(f"labels by {', '.join(f'{labeler} {count:,}' for labeler, count in counts.items())}")
    if any(labeler.kind == "program" for labeler in counts):
        warn("some labels are a program's: agreement with them isn't agreement with people")
    return [{"name": labeler.name, "kind": labeler.kind, "answers": count} for labeler, count in counts.items()]


def show_unlike(spec: str, verdicts: Sequence[Verdict]) -> int:
    """Print how many answers are unlike those that a judge was fitted on, and return the number."""
    unlike = [verdict for verdict in verdicts if is_unlike(verdict)]
    if unlike:
        # With a threshold the judge decides on all of them.
        band = "; its undecided band is wider there" if any(verdict.safe is None for verdict in unlike) else ""
        say(
            f"{spec}: {len(unlike):,} of {len(verdicts):,} answers, or their prompts, are unlike those that this "
            f"judge was fitted on{band}"
        )
    return len(unlike)


def show_annotators(annotations: Sequence[Annotation]) -> list[dict[str, Any]]:
    """Print how far every two annotators agree, and the answers on which they don't; return the same."""
    results = []
    for pair in compare_annotators(annotations):
        names = " and ".join(map(str, pair.labelers))
        say(
            f"{names}, {pair.question}: {pair.answers:,} answers labeled by both, {pair.undecided:,} undecided; "
            f"equal on {_format(pair.share)} of the others, Cohen's kappa {_format_kappa(pair.kappa)}"
        )
        disagreements: list[dict[str, Any]] = [
            {
                "prompt_id": ours.prompt_id,
                "sample": ours.sample,
                "text_hash": ours.text_hash,
                "labels": [getattr(ours, pair.question), getattr(theirs, pair.question)],
                "reasons": [ours.reason, theirs.reason],
            }
            for ours, theirs in pair.disagreements
        ]
        if disagreements:
            show_table(
                f"disagreements on {pair.question}: {names}",
                ("prompt", "sample", "hash", *(labeler.name for labeler in pair.labelers)),
                [
                    [
                        row["prompt_id"],
                        row["sample"],
                        row["text_hash"],
                        *(_LABEL_WORDS[label] for label in row["labels"]),
                    ]
                    for row in disagreements
                ],
            )
        results.append(
            {
                "labelers": [labeler._asdict() for labeler in pair.labelers],
                "question": pair.question,
                "answers": pair.answers,
                "undecided": pair.undecided,
                "share": pair.share,
                "kappa": pair.kappa,
                "disagreements": disagreements,
            }
        )
    return results


_LABEL_WORDS = {True: "yes", False: "no", None: "undecided"}


def _show_fitted(spec: str, judges: Sequence[LinearJudge], answers: Sequence[LabeledAnswer]) -> dict[str, int] | None:
    """Print whether linear judges were fitted on the prompts of these answers, and return it; None if unknown."""
    if not all(judge.fitted_prompts for judge in judges):
        say(f"{spec}: its file doesn't say which prompts it was fitted on; on those it errs less than on others")
        return None
    if not judges:
        return None
    prompts = _fitted_prompts(judges)
    count = sum(answer.prompt_key in prompts for answer in answers)
    if not count:
        say(f"{spec}: transfer: this judge was fitted on none of these prompts")
    elif count == len(answers):
        say(f"{spec}: this judge was fitted on these prompts, so the numbers don't say how often it errs on others")
    else:
        say(f"{spec}: this judge was fitted on the prompts of {count:,} of these {len(answers):,} answers")
    return {"answers": count, "of": len(answers)}


def _linear_judges(judge: Judge) -> list[LinearJudge]:
    """Return the linear judges of a judge, which may be an ensemble, or have a guard or another part to read."""
    if isinstance(judge, Ensemble):
        return [linear for member in judge.judges for linear in _linear_judges(member)]
    if isinstance(judge, LanguageGuard):
        return _linear_judges(judge.inner)
    if isinstance(judge, ReadingJudge):
        return _linear_judges(judge.judge_of_text)
    return [judge] if isinstance(judge, LinearJudge) else []


def _fitted_prompts(judges: Sequence[LinearJudge]) -> frozenset[str]:
    return frozenset[str]().union(*(judge.fitted_prompts for judge in judges))


def _show_other_prompts(
    spec: str, prompts: frozenset[str], answers: Sequence[LabeledAnswer], verdicts: Sequence[Verdict]
) -> dict[str, Any]:
    """Print and return the agreement on the answers to prompts that a judge wasn't fitted on."""
    indices = [index for index, answer in enumerate(answers) if answer.prompt_key not in prompts]
    others, their_verdicts = [answers[index] for index in indices], [verdicts[index] for index in indices]
    results = {}
    for question in HEADS:
        results[question] = agreement_by_model(question, others, their_verdicts)
        show_agreement(f"{spec}: {question}, prompts that it wasn't fitted on", results[question])
    return results


def show_transfer(transfer: dict[str, dict[str, Any]]) -> None:
    """Print the quality of judges on sources that they weren't fitted on, as `card.transfer_results` has it."""
    for question in HEADS:
        rows = []
        for name, results in transfer.items():
            if question not in results:
                continue
            result = results[question]
            if "reason" in result:
                say(f"{question}, {name}: no transfer measured: {result['reason']}")
                continue
            columns = ("false_yes", "balanced_accuracy", "auroc", "undecided_share")
            unlike = f"{results['unlike']:,}" if question == "safe" else "-"
            rows.append([name, result["n"], unlike, *(_format(result[column]) for column in columns)])
        if rows:
            heading = "false-safe rate" if question == "safe" else "false-refusal rate"
            show_table(
                f"{question}: TRANSFER, each source by a judge fitted on the others",
                ("source", "n", "unlike", heading, "balanced accuracy", "auroc", "undecided"),
                rows,
            )


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
    return {
        name: compute_agreement(question, [answer for answer, _ in group], [verdict for _, verdict in group])
        for name, group in groups.items()
    }


def compute_agreement(question: str, answers: Sequence[LabeledAnswer], verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Return a judge's agreement with the human labels on a question that all these answers have a label for."""
    return asdict(
        agreement(
            [getattr(answer, question) for answer in answers],
            [getattr(verdict, question) for verdict in verdicts],
            [_P_YES[question](verdict) for verdict in verdicts],
            [answer.completion.prompt_id for answer in answers],
        )
    )


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


def _format_kappa(result: Kappa) -> str:
    if result.value is None or result.low is None or result.high is None:
        return _format(result.value)
    return _format(Interval(result.value, result.low, result.high))


def _format(value: Interval | float | None) -> str:
    if isinstance(value, tuple):
        return "{:.3f} [{:.3f}, {:.3f}]".format(*value)
    return "-" if value is None else f"{value:.3f}"
