"""Preference pairs from judged samples: ordered by helpfulness, from all four cells, without duplicates."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import NamedTuple

from bfpo.core.conversation import Answer, Message, in_nfc
from bfpo.core.pairs import CELLS, Cell, CutAnswers, PairSignals, PreferencePair, Provenance, SafetyLabels
from bfpo.core.samples import Completion, Verdict


class ScoredSample(NamedTuple):
    """A sample with its verdict and helpfulness.

    Args:
        completion: The sample; its prompt is the original one.
        verdict: Verdict of the safety judge.
        helpfulness: Score for ordering the samples of one prompt, larger is more helpful; None if unknown.
    """

    completion: Completion
    verdict: Verdict
    helpfulness: tuple[float, ...] | None


def fallback_helpfulness(completion: Completion, verdict: Verdict) -> tuple[float, ...] | None:
    """Return a helpfulness without a judge of it: answers above refusals, then more words above fewer.

    Length is a weak signal, which a model learns to exploit: prefer a judge.

    Returns:
        The score; None if the verdict doesn't cover refusals.
    """
    if verdict.refusal is None:
        return None
    return (float(not verdict.refusal), float(len(completion.message.in_words().split())))


def make_pairs(
    samples: Sequence[ScoredSample],
    *,
    per_prompt: int,
    quota: Mapping[Cell, int],
    dataset_name: str,
    keep_cut: bool = False,
) -> tuple[list[PreferencePair], Counter[str]]:
    """Return preference pairs, and the number of left-out samples and pairs by reason.

    Each prompt and cell gives one pair, the one with the widest gap in helpfulness. If a prompt has more cells than
    `per_prompt`, those that are rarest over all prompts come first.

    Args:
        samples: Samples of all prompts.
        per_prompt: Maximum number of pairs of a prompt.
        quota: Cell → maximum number of pairs.
        dataset_name: Provenance of the pairs.
        keep_cut: Whether answers that were cut at their maximum length are used, too.
    """
    left_out: Counter[str] = Counter()
    by_prompt: dict[str, dict[Answer, ScoredSample]] = {}
    for sample in samples:
        prompt_id, answer = sample.completion.prompt_id, _as_compared(sample.completion.message)
        if reason := _why_left_out(sample, answer in by_prompt.get(prompt_id, {}), keep_cut):
            left_out[reason] += 1
        else:
            by_prompt.setdefault(prompt_id, {})[answer] = sample
    candidates = [_widest_pairs(list(answers.values())) for answers in by_prompt.values()]
    frequency = Counter(cell for cells in candidates for cell in cells)
    num_of_cell: Counter[Cell] = Counter()
    pairs = []
    for cells in candidates:
        if not cells:
            left_out["prompt without an order"] += 1
        num_of_prompt = 0
        for cell in sorted(cells, key=lambda cell: (frequency[cell], CELLS.index(cell))):
            if cell in quota and num_of_cell[cell] >= quota[cell]:
                left_out[f"quota of {cell}"] += 1
            elif num_of_prompt == per_prompt:
                left_out["more pairs of a prompt"] += 1
            else:
                num_of_cell[cell] += 1
                num_of_prompt += 1
                pairs.append(_make_pair(*cells[cell], dataset_name))
    return pairs, left_out


def _why_left_out(sample: ScoredSample, is_duplicate: bool, keep_cut: bool) -> str | None:
    completion = sample.completion
    if completion.lacks_answer:
        return (
            "answer cut in its reasoning" if completion.finish_reason == "length" else "reasoning without an answer"
        )
    if sample.verdict.safe is None:
        return "answer undecided"
    if completion.finish_reason in ("filtered", "refused"):
        return f"answer {completion.finish_reason} by the server"
    if completion.finish_reason == "guarded":
        return "refusal of the guard"
    if completion.message.is_empty:
        return "answer empty"
    if completion.finish_reason == "length" and not keep_cut:
        return "answer cut"
    if sample.helpfulness is None:
        return "helpfulness unknown"
    return "answer twice" if is_duplicate else None


def _as_compared(answer: Message) -> Answer:
    """Return an answer by which duplicates are found: how its accents are encoded doesn't matter."""
    # The identifiers of calls differ in every answer.
    calls = tuple(replace(call, id=None) for call in answer.tool_calls)
    return in_nfc((replace(answer, tool_calls=calls),))


def _widest_pairs(samples: Sequence[ScoredSample]) -> dict[Cell, tuple[ScoredSample, ScoredSample]]:
    """Return for each cell the pair of samples with the widest gap in helpfulness, the better sample first."""
    pairs: dict[Cell, tuple[ScoredSample, ScoredSample]] = {}
    gaps: dict[Cell, tuple[float, ...]] = {}
    for sample, other in combinations(samples, 2):
        if sample.helpfulness == other.helpfulness or sample.helpfulness is None or other.helpfulness is None:
            continue
        better, worse = (sample, other) if sample.helpfulness > other.helpfulness else (other, sample)
        assert better.helpfulness is not None
        assert worse.helpfulness is not None
        cell = _labels(better, worse).cell
        gap = tuple(high - low for high, low in zip(better.helpfulness, worse.helpfulness, strict=True))
        if cell not in gaps or gap > gaps[cell]:
            gaps[cell], pairs[cell] = gap, (better, worse)
    return pairs


def _labels(better: ScoredSample, worse: ScoredSample) -> SafetyLabels:
    return SafetyLabels(bool(better.verdict.safe), bool(worse.verdict.safe))


def _make_pair(better: ScoredSample, worse: ScoredSample, dataset_name: str) -> PreferencePair:
    verdicts = better.verdict, worse.verdict
    scores = better.verdict.p_safe, worse.verdict.p_safe
    return PreferencePair(
        better.completion.prompt,
        (better.completion.message,),
        (worse.completion.message,),
        _labels(better, worse),
        PairSignals() if None in scores else PairSignals(*scores),
        tuple(sorted({verdict.category for verdict in verdicts if verdict.category})),
        Provenance(dataset_name, f"{better.verdict.judge}@{better.verdict.revision}", "main"),
        better.completion.inputs,
        cut=CutAnswers(*(sample.completion.finish_reason == "length" for sample in (better, worse))),
    )
