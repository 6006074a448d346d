"""From judged samples to pairs: ordered by helpfulness, of all four cells, none twice."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

from bfpo.core.pairs import CELLS, Cell, PairSignals, PreferencePair, Provenance, SafetyLabels
from bfpo.core.samples import Completion, Verdict


class ScoredSample(NamedTuple):
    """An answer with what is known of it.

    Args:
        completion: The answer; its prompt is the one that was asked.
        verdict: Of the safety judge.
        helpfulness: Larger is more helpful; comparable among answers to one prompt. None when unknown.
    """

    completion: Completion
    verdict: Verdict
    helpfulness: tuple[float, ...] | None


def fallback_helpfulness(completion: Completion, verdict: Verdict) -> tuple[float, ...] | None:
    """Order without a judge of helpfulness: answers above refusals, then more words above fewer.

    Length is a weak sign that a model learns to please: prefer a judge. None where the judge can't tell a refusal.
    """
    if verdict.refusal is None:
        return None
    return (float(not verdict.refusal), float(len(completion.text.split())))


def make_pairs(
    answers: Sequence[ScoredSample], *, per_prompt: int, quota: Mapping[Cell, int], dataset_name: str
) -> tuple[list[PreferencePair], Counter[str]]:
    """Return the pairs kept, and what was left out, by reason.

    Of each prompt and cell the pair with the widest gap in helpfulness stands for the rest. Where a prompt has more
    cells than `per_prompt`, those rarest among all prompts go first.

    Args:
        answers: Of all prompts.
        per_prompt: Pairs of a prompt at most.
        quota: Cell → pairs at most.
        dataset_name: Provenance of the pairs.
    """
    left_out: Counter[str] = Counter()
    by_prompt: dict[str, dict[str, ScoredSample]] = defaultdict(dict)
    for one in answers:
        reason = (
            "answer undecided" if one.verdict.safe is None
            else "answer empty" if not one.completion.text.strip()
            else "answer cut" if one.completion.finish_reason == "length"
            else "helpfulness unknown" if one.helpfulness is None
            else "answer twice" if one.completion.text in by_prompt[one.completion.prompt_id]
            else None
        )  # fmt: skip
        if reason:
            left_out[reason] += 1
        else:
            by_prompt[one.completion.prompt_id][one.completion.text] = one
    best = {prompt: _best_of_each_cell(list(several.values())) for prompt, several in by_prompt.items()}
    common = Counter(cell for cells in best.values() for cell in cells)
    taken: Counter[Cell] = Counter()
    kept = []
    for cells in best.values():
        if not cells:
            left_out["prompt without an order"] += 1
        of_prompt = 0
        for cell in sorted(cells, key=lambda cell: (common[cell], CELLS.index(cell))):
            if taken[cell] >= quota.get(cell, len(answers) ** 2):
                left_out[f"quota of {cell}"] += 1
            elif of_prompt == per_prompt:
                left_out["more pairs of a prompt"] += 1
            else:
                taken[cell] += 1
                of_prompt += 1
                kept.append(_pair(*cells[cell], dataset_name))
    return kept, left_out


def _best_of_each_cell(several: Sequence[ScoredSample]) -> dict[Cell, tuple[ScoredSample, ScoredSample]]:
    best: dict[Cell, tuple[ScoredSample, ScoredSample]] = {}
    gaps: dict[Cell, tuple[float, ...]] = {}
    for one, other in combinations(several, 2):
        if one.helpfulness == other.helpfulness or one.helpfulness is None or other.helpfulness is None:
            continue
        better, worse = (one, other) if one.helpfulness > other.helpfulness else (other, one)
        assert better.helpfulness is not None
        assert worse.helpfulness is not None
        cell = SafetyLabels(bool(better.verdict.safe), bool(worse.verdict.safe)).cell
        gap = tuple(a - b for a, b in zip(better.helpfulness, worse.helpfulness, strict=True))
        if cell not in gaps or gap > gaps[cell]:
            gaps[cell], best[cell] = gap, (better, worse)
    return best


def _pair(better: ScoredSample, worse: ScoredSample, dataset_name: str) -> PreferencePair:
    scores = better.verdict.p_safe, worse.verdict.p_safe
    signals = PairSignals() if None in scores else PairSignals(*scores)
    verdict = better.verdict
    categories = sorted({one.category for one in (better.verdict, worse.verdict) if one.category})
    return PreferencePair(
        better.completion.prompt,
        better.completion.text,
        worse.completion.text,
        SafetyLabels(bool(better.verdict.safe), bool(worse.verdict.safe)),
        signals,
        tuple(categories),
        Provenance(dataset_name, f"{verdict.judge}@{verdict.revision}", "main"),
    )
