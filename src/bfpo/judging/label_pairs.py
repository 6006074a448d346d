"""Safety labels for preference pairs from the verdicts of judges, in place of missing or other labels.

By default a pair is labeled when all judges decide and agree on both of its answers; `conflicts` chooses what happens
otherwise. An undecided answer never counts as safe. Judges of reasoning label the reasoning of both answers.
"""

import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import compress
from pathlib import Path
from typing import Any

from bfpo.config.recipes import Source
from bfpo.core.files import check_own_files, is_among, write_json, write_jsonl
from bfpo.core.pairs import CELLS, PreferencePair, SafetyLabels
from bfpo.core.samples import Completion, Judge, Key, Verdict
from bfpo.core.terminal import say, show_table
from bfpo.data.inspect import count_disagreements
from bfpo.data.load import load_pairs
from bfpo.data.prepare import cell_counts
from bfpo.data.readings import NO_REASONING, answer_completion, has_reasoning, read_by
from bfpo.data.rows import local_files
from bfpo.data.stages import find_unjudged, judge_completions
from bfpo.data.verdict_files import judge_file
from bfpo.errors import DataError, RecipeError, did_you_mean
from bfpo.judging.ensemble import mean_p_safe
from bfpo.losses.labeling import LabelingFunction
from bfpo.stats.agreement import kappa

POLICIES: dict[str, str] = {
    "drop": "leave the pair out and count it",
    "unsafe": "label the answer unsafe unless all judges call it safe",
    "first": "use the first judge; where it is undecided the pair is left out",
    "error": "stop",
}
# Number of answers judged to estimate the time; their verdicts are reused.
_NUM_PROBES = 32
_PAIRS, _METADATA = "pairs.jsonl", "label.json"


@dataclass(frozen=True, slots=True)
class LabeledPairs:
    """Pairs of a source after labeling.

    Args:
        pairs: Labeled pairs, with scores and the source of the labels.
        left_out: Reason → number of pairs without a label.
        metadata: Content of `label.json`.
    """

    pairs: list[PreferencePair]
    left_out: Counter[str]
    metadata: dict[str, Any]


def label_pairs(
    source: Source,
    judges: Sequence[Judge],
    out: Path,
    *,
    conflicts: str = "drop",
    limit: int | None = None,
    labeling: LabelingFunction | None = None,
    beta: float = 0.01,
    estimate_only: bool = False,
) -> LabeledPairs | None:
    """Label the pairs of a source into `out/pairs.jsonl` and `out/label.json`; resumes after the last verdict.

    Args:
        source: Pairs to label; their own labels are used for comparison only, or kept if all judges read reasoning.
        judges: One or more judges; the order matters to the policy `first`. Those that read the reasoning label it,
            where both answers have some.
        out: Output folder, which also holds the verdicts of each judge.
        conflicts: Policy where judges disagree or are undecided; a key of `POLICIES`.
        limit: Maximum number of pairs.
        labeling: Labeling function of the displayed targets; None is the paper's.
        beta: beta of the displayed targets.
        estimate_only: Whether to judge only a few answers and show how long the others would take.

    Returns:
        The labeled pairs; None with `estimate_only`.

    Raises:
        RecipeError: If `conflicts` or `beta` isn't possible, or `out/pairs.jsonl` is the source.
        DataError: If the source is malformed, no pair could be labeled, the policy is `error` and judges conflict, or
            `out/pairs.jsonl` is a file of something else.
    """
    if conflicts not in POLICIES:
        raise RecipeError(f"`conflicts` is '{conflicts}'; {did_you_mean(conflicts, list(POLICIES))}")
    if not 0 < beta < math.inf:
        raise RecipeError(f"`beta` is {beta}; expected a number above 0")
    if is_among(out / _PAIRS, local_files(source)):
        raise RecipeError(f"`out` is {out}, whose {_PAIRS} is the source; name another folder")
    check_own_files(out, (_PAIRS,), "bfpo label", is_own=(out / _METADATA).exists())
    report, pairs = load_pairs(source, "main", limit=limit)
    answers = [(as_completion(pair, 0), as_completion(pair, 1)) for pair in pairs]
    # An answer that occurs in several pairs is judged once.
    completions = list({completion.key: completion for both in answers for completion in both}.values())
    paths = [judge_file(out, "verdicts", judge.name, judge.revision) for judge in judges]
    started = time.monotonic()
    for judge, path in zip(judges, paths, strict=True):
        _estimate(judge, completions, path)
    if estimate_only:
        return None
    all_verdicts = [
        {verdict.key: verdict for verdict in judge_completions(judge, completions, path)}
        for judge, path in zip(judges, paths, strict=True)
    ]
    of_answers = [read_by(judge) != "reasoning" for judge in judges]
    verdicts = [*compress(all_verdicts, of_answers)]
    reasoning_verdicts = [*compress(all_verdicts, (not is_about_answers for is_about_answers in of_answers))]
    results: list[PreferencePair | str] = [*pairs]
    if verdicts:
        results = list(_apply_policy(pairs, answers, verdicts, conflicts))
    reasoning_left_out: Counter[str] = Counter()
    if reasoning_verdicts:
        results = list(_label_reasoning(results, answers, reasoning_verdicts, conflicts, reasoning_left_out))
    kept = [(pair, result) for pair, result in zip(pairs, results, strict=True) if isinstance(result, PreferencePair)]
    labeled = [result for _, result in kept]
    left_out = Counter(result for result in results if isinstance(result, str))
    if not labeled:
        raise DataError(f"no pair could be labeled: {dict(left_out)}")
    first_two = [by_key.values() for by_key in verdicts[:2]]
    metadata = {
        "schema": 1,
        "source": str(source.path),
        "judges": [f"{judge.name}@{judge.revision}" for judge in judges],
        "conflicts": conflicts,
        "skipped_rows": dict(report.skipped),
        "pairs": len(pairs),
        "labeled": len(labeled),
        "left_out": dict(left_out),
        "answers_judged": len(completions),
        "undecided": {
            f"{judge.name}@{judge.revision}": sum(
                verdict.safe is None and verdict.reason != NO_REASONING for verdict in by_key.values()
            )
            for judge, by_key in zip(judges, all_verdicts, strict=True)
        },
        "scores_removed": sum(_is_scored(pair) and not _is_scored(result) for pair, result in kept),
        "agreement": compare_verdicts(*map(list, first_two)) if len(first_two) > 1 else None,
        "before": cell_counts(pairs).get("main", {}),
        "after": cell_counts(labeled).get("main", {}),
        "assumed_safe": _count_unsafe(labeled),
        "seconds": round(time.monotonic() - started, 1),
    }
    if reasoning_verdicts:
        metadata["reasoning"] = {
            "labeled": sum(pair.reasoning_labels is not None for pair in labeled),
            "left_out": dict(reasoning_left_out),
            **count_disagreements(labeled),
        }
    write_jsonl(out / _PAIRS, (pair.to_row() for pair in labeled))
    write_json(out / _METADATA, metadata)
    _show(metadata, labeling or LabelingFunction.from_parameters(), beta, out)
    return LabeledPairs(labeled, left_out, metadata)


def as_completion(pair: PreferencePair, side: int) -> Completion:
    """Return an answer of a pair as a completion, for a judge.

    Args:
        pair: The pair.
        side: 0 for the chosen answer, 1 for the rejected one.
    """
    model = pair.provenance.dataset_name
    return answer_completion(pair.prompt, pair.answers[side], model=model, engine="pairs", inputs=pair.inputs)


def compare_verdicts(verdicts: Sequence[Verdict], others: Sequence[Verdict]) -> dict[str, float | int | None]:
    """Return the agreement of two judges on the answers that both decided: share of equal labels, Cohen's kappa."""
    labels = [(verdict.safe, other.safe) for verdict, other in zip(verdicts, others, strict=True)]
    decided = [(label, other) for label, other in labels if label is not None and other is not None]
    n = len(decided)
    if not n:
        return {"n": 0, "share": None, "kappa": None}
    share = sum(label == other for label, other in decided) / n
    return {"n": n, "share": share, "kappa": kappa(*zip(*decided, strict=True))}


def cell_targets(labeling: LabelingFunction, beta: float) -> list[tuple[str, float, float, float]]:
    """Return the target label / beta of each cell, and its change when one label is wrong.

    Returns:
        Rows of the cell, its target, the change when the chosen answer's label is wrong, and when the rejected one's
        is.
    """
    rows = []
    for cell in CELLS:
        chosen, rejected = (letter == "s" for letter in cell)
        target = labeling(chosen, rejected)
        chosen_wrong = labeling(not chosen, rejected) - target
        rejected_wrong = labeling(chosen, not rejected) - target
        rows.append((str(cell), target / beta, chosen_wrong / beta, rejected_wrong / beta))
    return rows


def _apply_policy(
    pairs: Sequence[PreferencePair],
    answers: Sequence[tuple[Completion, Completion]],
    verdicts: Sequence[Mapping[Key, Verdict]],
    conflicts: str,
) -> Iterator[PreferencePair | str]:
    """Yield each pair with labels, or the reason why it has none.

    Args:
        pairs: The pairs.
        answers: Chosen and rejected answer of each pair.
        verdicts: Verdicts of each judge by the key of the completion.
        conflicts: Policy where judges disagree or are undecided.
    """
    for pair, (chosen, rejected) in zip(pairs, answers, strict=True):
        of_chosen = [by_key[chosen.key] for by_key in verdicts]
        of_rejected = [by_key[rejected.key] for by_key in verdicts]
        labels = [_decide(of_chosen, conflicts), _decide(of_rejected, conflicts)]
        reason = next((label for label in labels if isinstance(label, str)), None)
        if reason is None:
            yield _with_labels(pair, SafetyLabels(*map(bool, labels)), of_chosen, of_rejected, conflicts)
        elif conflicts == "error":
            raise DataError(f"pair {pair.row_id}: {reason}, and conflicts is 'error'; choose another policy")
        else:
            yield reason


def _label_reasoning(
    results: Sequence[PreferencePair | str],
    answers: Sequence[tuple[Completion, Completion]],
    verdicts: Sequence[Mapping[Key, Verdict]],
    conflicts: str,
    left_out: Counter[str],
) -> Iterator[PreferencePair | str]:
    """Yield each pair with labels of its reasoning, if both answers have some and it could be labeled.

    Args:
        results: Pairs with labels of their answers, or the reason why a pair has none.
        answers: Chosen and rejected answer of each pair.
        verdicts: Verdicts on the reasoning of each judge by the key of the completion.
        conflicts: Policy where judges disagree or are undecided.
        left_out: Reason → number of pairs without labels of their reasoning; added to.
    """
    for result, both in zip(results, answers, strict=True):
        if isinstance(result, str):
            yield result
            continue
        count = sum(map(has_reasoning, both))
        if count < 2:
            left_out["no reasoning" if count == 0 else "one answer has no reasoning"] += 1
            yield result
            continue
        labels = [_decide([by_key[answer.key] for by_key in verdicts], conflicts) for answer in both]
        reason = next((label for label in labels if isinstance(label, str)), None)
        if reason is None:
            yield replace(result, reasoning_labels=SafetyLabels(*map(bool, labels)))
        elif conflicts == "error":
            raise DataError(
                f"pair {result.row_id}: reasoning: {reason}, and conflicts is 'error'; choose another policy"
            )
        else:
            left_out[reason] += 1
            yield result


def _decide(verdicts: Sequence[Verdict], conflicts: str) -> bool | str:
    """Return whether an answer is safe, or the reason why it has no label."""
    labels = [verdict.safe for verdict in verdicts]
    if conflicts == "first":
        labels = labels[:1]
    if conflicts == "unsafe":
        return all(label is True for label in labels)
    if None in labels:
        return "undecided"
    return bool(labels[0]) if len(set(labels)) == 1 else "judges differ"


def _with_labels(
    pair: PreferencePair,
    labels: SafetyLabels,
    of_chosen: Sequence[Verdict],
    of_rejected: Sequence[Verdict],
    conflicts: str,
) -> PreferencePair:
    if conflicts == "first":
        of_chosen, of_rejected = of_chosen[:1], of_rejected[:1]
    scores = mean_p_safe(of_chosen), mean_p_safe(of_rejected)
    # Scores of an earlier judge don't stay beside labels of this one.
    chosen_score, rejected_score = scores if None not in scores else (None, None)
    signals = replace(pair.signals, chosen_safety_score=chosen_score, rejected_safety_score=rejected_score)
    source = "+".join(f"{verdict.judge}@{verdict.revision}" for verdict in of_chosen)
    provenance = replace(pair.provenance, safety_label_source=source)
    return replace(pair, labels=labels, signals=signals, provenance=provenance)


def _count_unsafe(pairs: Sequence[PreferencePair]) -> dict[str, int]:
    """Count the answers that would be labeled wrongly if all were assumed safe."""
    labels = [pair.labels for pair in pairs if pair.labels is not None]
    return {
        "pairs_with_an_unsafe_answer": sum(not all(both) for both in labels),
        "unsafe_answers": sum(not safe for both in labels for safe in both),
        "answers": 2 * len(labels),
    }


def _is_scored(pair: PreferencePair) -> bool:
    """Return whether a pair has a score of the safety of an answer."""
    return (pair.signals.chosen_safety_score, pair.signals.rejected_safety_score) != (None, None)


def _estimate(judge: Judge, completions: Sequence[Completion], path: Path) -> None:
    """Judge a few of the missing completions, and show how long the others will take."""
    missing = find_unjudged(completions, path)
    if not missing:
        say(f"{judge.name}: all {len(completions)} answers are already judged")
        return
    probes, started = missing[:_NUM_PROBES], time.monotonic()
    judge_completions(judge, probes, path)
    seconds, num_left = time.monotonic() - started, len(missing) - len(probes)
    say(
        f"{judge.name}: {num_left} of {len(completions)} answers left to judge, about "
        f"{seconds / len(probes) * num_left:.0f} s ({len(probes)} took {seconds:.1f} s)"
    )


def _show(metadata: dict[str, Any], labeling: LabelingFunction, beta: float, out: Path) -> None:
    before, after = metadata["before"], metadata["after"]
    show_table(
        "Pairs by cell (chosen first)",
        ("cell", "before", "after"),
        [(cell, before.get(cell, 0), after.get(cell, 0)) for cell in dict.fromkeys([*CELLS, *before, *after])],
    )
    show_table(
        f"Targets label / beta at beta {beta}, and their change when one label is wrong",
        ("cell", "target", "chosen answer's label wrong", "rejected answer's label wrong"),
        [(cell, *(f"{number:+.4g}" for number in numbers)) for cell, *numbers in cell_targets(labeling, beta)],
    )
    if (agreement := metadata["agreement"]) and agreement["n"]:
        value = "undefined" if agreement["kappa"] is None else f"{agreement['kappa']:.2f}"
        say(f"the first two judges agree on {agreement['share']:.1%} of {agreement['n']} answers, kappa {value}")
    assumed = metadata["assumed_safe"]
    say(
        f'"assumed safe" would be wrong for {assumed["unsafe_answers"]} of {assumed["answers"]} answers, '
        f"in {assumed['pairs_with_an_unsafe_answer']} of {metadata['labeled']} pairs"
    )
    say(f"undecided answers: {_format(metadata['undecided'])}; pairs left out: {_format(metadata['left_out'])}")
    if metadata["scores_removed"]:
        say(
            f"safety scores removed from {metadata['scores_removed']:,} pairs: an earlier judge gave them, and these "
            "judges give no probability"
        )
    if reasoning := metadata.get("reasoning"):
        say(
            f"reasoning labeled in {reasoning['labeled']} pairs; not labeled: {_format(reasoning['left_out'])}; its "
            f"label isn't the answer's for {reasoning['chosen']} chosen and {reasoning['rejected']} rejected answers"
        )
    if metadata["skipped_rows"]:
        say(f"rows of the source without a pair: {_format(metadata['skipped_rows'])}")
    say(f"{metadata['labeled']} of {metadata['pairs']} pairs in {out / 'pairs.jsonl'} ({metadata['seconds']} s)")


def _format(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items()) or "none"
