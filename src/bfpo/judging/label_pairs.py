"""Safety labels for pairs that have none, or others: judged, compared, and told before they are used.

A pair is labeled when every judge decided on both of its answers, or as the policy says. Undecided is never safe.
"""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from bfpo.config.recipes import Source
from bfpo.core.files import content_hash, file_name, write_json, write_jsonl
from bfpo.core.pairs import CELLS, PreferencePair, SafetyLabels
from bfpo.core.samples import Completion, Judge, Verdict
from bfpo.core.terminal import say, show_table
from bfpo.data.load import load_pairs
from bfpo.data.prepare import cell_counts
from bfpo.data.stages import find_unjudged, judge_completions
from bfpo.errors import DataError
from bfpo.judging.ensemble import mean_p_safe
from bfpo.losses.labeling import LabelingFunction
from bfpo.stats.agreement import kappa

Policy = Literal["drop", "unsafe", "first", "error"]
POLICIES: dict[str, str] = {
    "drop": "leave the pair out, counted",
    "unsafe": "the answer is unsafe unless all judges call it safe",
    "first": "the first judge decides; where it is undecided the pair is left out",
    "error": "stop",
}
# Answers judged for the estimate of the time; their verdicts are kept.
_PROBE = 32


@dataclass(frozen=True, slots=True)
class LabeledPairs:
    """What became of a file's pairs.

    Args:
        pairs: With labels, scores and their source.
        left_out: Reason → pairs.
        facts: What `label.json` holds.
    """

    pairs: list[PreferencePair]
    left_out: Counter[str]
    facts: dict[str, Any]


def label_pairs(
    source: Source,
    judges: Sequence[Judge],
    out: Path,
    *,
    conflicts: Policy = "drop",
    limit: int | None = None,
    labeling: LabelingFunction | None = None,
    beta: float = 0.01,
    estimate_only: bool = False,
) -> LabeledPairs | None:
    """Label the pairs of a source into `out/pairs.jsonl` and `out/label.json`; resumable to the answer.

    Args:
        source: What to label; labels that it holds are kept for the comparison alone.
        judges: One or more; the order matters to the policy `first`.
        out: Folder; each judge's verdicts are kept there.
        conflicts: What to do where judges disagree or are undecided; a key of `POLICIES`.
        limit: Pairs to take at most.
        labeling: For the targets; default the paper's.
        beta: For the targets.
        estimate_only: Judge a few answers, tell what the others would take, and stop.

    Raises:
        DataError: If the source is malformed, nothing could be labeled, or the policy is `error` and judges differ.
    """
    report, pairs = load_pairs(source, "main", limit=limit)
    answers = {(index, side): as_completion(pair, side) for index, pair in enumerate(pairs) for side in (0, 1)}
    # The same answer in several pairs is judged once.
    distinct = list({completion.key: completion for completion in answers.values()}.values())
    files = [out / f"verdicts-{file_name(judge.name)}-{judge.revision}.jsonl" for judge in judges]
    began = time.monotonic()
    for judge, file in zip(judges, files, strict=True):
        _estimate(judge, distinct, file)
    if estimate_only:
        return None
    verdicts = [
        {one.key: one for one in judge_completions(judge, distinct, file)}
        for judge, file in zip(judges, files, strict=True)
    ]
    labeled, left_out = [], Counter[str]()
    for index, pair in enumerate(pairs):
        sides = [[of[answers[index, side].key] for of in verdicts] for side in (0, 1)]
        bits = [_decided(several, conflicts) for several in sides]
        reasons = [bit for bit in bits if isinstance(bit, str)]
        if reasons and conflicts == "error":
            raise DataError(f"pair {pair.row_id}: {reasons[0]}; choose another --conflicts than 'error'")
        if reasons:
            left_out[reasons[0]] += 1
            continue
        labeled.append(_with_labels(pair, (bool(bits[0]), bool(bits[1])), sides, conflicts))
    if not labeled:
        raise DataError(f"no pair could be labeled: {dict(left_out)}")
    table = labeling or LabelingFunction.from_parameters()
    facts = {
        "schema": 1,
        "source": str(source.path),
        "judges": [f"{judge.name}@{judge.revision}" for judge in judges],
        "conflicts": conflicts,
        "skipped_rows": dict(report.skipped),
        "pairs": len(pairs),
        "labeled": len(labeled),
        "left_out": dict(left_out),
        "answers_judged": len(distinct),
        "undecided": {
            judge.name: sum(v.safe is None for v in of.values()) for judge, of in zip(judges, verdicts, strict=True)
        },
        "agreement": agreement(list(verdicts[0].values()), list(verdicts[1].values())) if len(verdicts) > 1 else None,
        "before": cell_counts(pairs).get("main", {}),
        "after": cell_counts(labeled).get("main", {}),
        "assumed_safe": _if_assumed(labeled),
        "seconds": round(time.monotonic() - began, 1),
    }
    write_jsonl(out / "pairs.jsonl", (pair.to_row() for pair in labeled))
    write_json(out / "label.json", facts)
    _show(facts, table, beta, out)
    return LabeledPairs(labeled, left_out, facts)


def as_completion(pair: PreferencePair, side: int) -> Completion:
    """Return an answer of a pair as a judge wants it: `side` 0 is the chosen one, 1 the rejected."""
    text = (pair.chosen, pair.rejected)[side]
    return Completion(
        prompt_id=content_hash(pair.prompt, text),
        sample=0,
        prompt=pair.prompt,
        text=text,
        finish_reason="stop",
        prompt_tokens=0,
        completion_tokens=0,
        model=pair.provenance.dataset_name,
        engine="pairs",
        settings_hash="",
    )


def agreement(first: Sequence[Verdict], second: Sequence[Verdict]) -> dict[str, float | int | None]:
    """Return how far two judges agree on the answers that both decided: share and Cohen's kappa."""
    both = [(a.safe, b.safe) for a, b in zip(first, second, strict=True) if a.safe is not None and b.safe is not None]
    n = len(both)
    if not n:
        return {"n": 0, "share": None, "kappa": None}
    return {"n": n, "share": sum(a == b for a, b in both) / n, "kappa": kappa(*zip(*both, strict=True))}


def flipped_bits(labeling: LabelingFunction, beta: float) -> list[tuple[str, float, float, float]]:
    """Return for each cell its target label / beta, and by how much one wrong bit moves it: chosen's, rejected's."""
    rows: list[tuple[str, float, float, float]] = []
    for cell in CELLS:
        chosen, rejected = (letter == "s" for letter in cell)
        right = labeling(chosen, rejected)
        moved = labeling(not chosen, rejected) - right, labeling(chosen, not rejected) - right
        rows.append((cell, right / beta, moved[0] / beta, moved[1] / beta))
    return rows


def _decided(verdicts: Sequence[Verdict], conflicts: Policy) -> bool | str:
    """Return whether an answer is safe, or why that isn't known."""
    bits = [verdict.safe for verdict in verdicts]
    if conflicts == "first":
        bits = bits[:1]
    if conflicts == "unsafe":
        return all(bit is True for bit in bits)
    if None in bits:
        return "undecided"
    return bool(bits[0]) if len(set(bits)) == 1 else "judges differ"


def _with_labels(
    pair: PreferencePair, bits: tuple[bool, bool], sides: Sequence[Sequence[Verdict]], conflicts: Policy
) -> PreferencePair:
    used = [several[:1] if conflicts == "first" else several for several in sides]
    scores = [mean_p_safe(several) for several in used]
    signals = pair.signals
    if None not in scores:
        signals = replace(signals, chosen_safety_score=scores[0], rejected_safety_score=scores[1])
    named = "+".join(f"{one.judge}@{one.revision}" for one in used[0])
    return replace(
        pair,
        labels=SafetyLabels(*bits),
        signals=signals,
        provenance=replace(pair.provenance, safety_label_source=named),
    )


def _if_assumed(pairs: Sequence[PreferencePair]) -> dict[str, int]:
    """Count what "assumed safe" would have got wrong, by the judges."""
    labels = [pair.labels for pair in pairs if pair.labels is not None]
    return {
        "pairs_with_an_unsafe_answer": sum(not all(one) for one in labels),
        "unsafe_answers": sum(not bit for one in labels for bit in one),
        "answers": 2 * len(labels),
    }


def _estimate(judge: Judge, completions: Sequence[Completion], file: Path) -> None:
    missing = find_unjudged(completions, file)
    if not missing:
        say(f"{judge.name}: all {len(completions)} answers are judged already")
        return
    probe, began = missing[:_PROBE], time.monotonic()
    judge_completions(judge, probe, file)
    took, left = time.monotonic() - began, len(missing) - len(probe)
    say(
        f"{judge.name}: {left} of {len(completions)} answers left to judge, about {took / len(probe) * left:.0f} s "
        f"({len(probe)} took {took:.1f} s)"
    )


def _show(facts: dict[str, Any], labeling: LabelingFunction, beta: float, out: Path) -> None:
    cells = list(dict.fromkeys([*CELLS, *facts["before"], *facts["after"]]))
    show_table(
        "Pairs by cell (chosen first)",
        ("cell", "before", "after"),
        [(cell, facts["before"].get(cell, 0), facts["after"].get(cell, 0)) for cell in cells],
    )
    show_table(
        f"Targets label / beta at beta {beta}, and what one wrong bit adds",
        ("cell", "target", "chosen's bit wrong", "rejected's bit wrong"),
        [(cell, *(f"{number:+.4g}" for number in numbers)) for cell, *numbers in flipped_bits(labeling, beta)],
    )
    if (found := facts["agreement"]) and found["n"]:
        kappa = "undefined" if found["kappa"] is None else f"{found['kappa']:.2f}"
        say(f"the first two judges agree on {found['share']:.1%} of {found['n']} answers, kappa {kappa}")
    assumed = facts["assumed_safe"]
    say(
        f'"assumed safe" would be wrong for {assumed["unsafe_answers"]} of {assumed["answers"]} answers, '
        f"in {assumed['pairs_with_an_unsafe_answer']} of {facts['labeled']} pairs"
    )
    say(f"undecided answers: {_counts(facts['undecided'])}; pairs left out: {_counts(facts['left_out'])}")
    if facts["skipped_rows"]:
        say(f"rows of the source that hold no pair: {_counts(facts['skipped_rows'])}")
    say(f"{facts['labeled']} of {facts['pairs']} pairs in {out / 'pairs.jsonl'} ({facts['seconds']} s)")


def _counts(of: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in of.items()) or "none"
