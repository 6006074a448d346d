"""Pairs of models in safety and helpfulness together: which dominates, corrected for the number of tests."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from bfpo.evaluation.comparisons import AxisResult, DifferenceVerdict, ModelComparison, Word, verdict_on
from bfpo.evaluation.differences import PairedDifference, difference_of
from bfpo.evaluation.scoring import PromptScores
from bfpo.stats.intervals import holm

SAFETY = ("harmful", "safety")
# The first that both models have values for counts.
HELPFULNESS = (("benign", "helpfulness"), ("benign", "over_refusal"), ("lookalike", "over_refusal"))


class PooledScores(NamedTuple):
    """What one judge measured on one model, of all suites.

    Args:
        run: Name of the run.
        judge: Name of the judge.
        found: Task and metric → values by prompt.
    """

    run: str
    judge: str
    found: dict[tuple[str, str], PromptScores]


def pooled(run: str, judge: str, measured: Iterable[PromptScores]) -> PooledScores:
    """Put the measures of several suites together: a prompt that stands in two counts once."""
    found: dict[tuple[str, str], PromptScores] = {}
    for one in measured:
        key = (one.task, one.measure.name)
        if one.category is None and key in (SAFETY, *HELPFULNESS):
            there = found.get(key)
            samples = one.samples if there is None else max(one.samples, there.samples)
            by_prompt = one.by_prompt if there is None else one.by_prompt | there.by_prompt
            found[key] = one._replace(by_prompt=by_prompt, samples=samples)
    return PooledScores(run, judge, found)


def pair_verdicts(pairs: Sequence[tuple[PooledScores, PooledScores]]) -> list[ModelComparison]:
    """Say of each pair what the first is to the second; a pair without both measures, or shared prompts, is left out.

    The p-values of all tests, two a pair, are adjusted together (Holm 1979): the chance that any word but `not
    distinguishable` is wrong stays below 5 %, if all that is compared here is all that was looked at.
    """
    tested = [(ours, theirs, both) for ours, theirs in pairs if (both := _axes(ours, theirs)) is not None]
    p_values = holm([axis.found.p_value for *_, both in tested for axis in both])
    verdicts = []
    for place, (ours, theirs, both) in enumerate(tested):
        safety, helpfulness = (
            _axis(one, p) for one, p in zip(both, p_values[2 * place : 2 * place + 2], strict=True)
        )
        word = _word({safety.verdict, helpfulness.verdict})
        verdicts.append(
            ModelComparison(ours.run, theirs.run, ours.judge, word, safety, helpfulness, tests=len(p_values))
        )
    return verdicts


class _Tested(NamedTuple):
    measured: PromptScores
    found: PairedDifference


def _axes(ours: PooledScores, theirs: PooledScores) -> tuple[_Tested, _Tested] | None:
    safety = _tested(ours, theirs, SAFETY)
    helpfulness = next((one for key in HELPFULNESS if (one := _tested(ours, theirs, key)) is not None), None)
    return None if safety is None or helpfulness is None else (safety, helpfulness)


def _tested(ours: PooledScores, theirs: PooledScores, key: tuple[str, str]) -> _Tested | None:
    one, other = ours.found.get(key), theirs.found.get(key)
    found = None if one is None or other is None else difference_of(one, other)
    return None if one is None or found is None else _Tested(one, found)


def _axis(tested: _Tested, p_adjusted: float) -> AxisResult:
    measured, found = tested
    verdict = verdict_on(found.interval, higher_is_better=bool(measured.measure.higher_is_better), p_value=p_adjusted)
    return AxisResult(measured.task, measured.measure.name, *found.interval, found.n, p_adjusted, verdict)


def _word(verdicts: set[DifferenceVerdict]) -> Word:
    if {"better", "worse"} <= verdicts:
        return "trade-off"
    return "dominates" if "better" in verdicts else "dominated" if "worse" in verdicts else "not distinguishable"
