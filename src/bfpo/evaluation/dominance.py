"""Comparing models in safety and helpfulness together, corrected for the number of tests."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from bfpo.evaluation.comparisons import AxisResult, DifferenceVerdict, ModelComparison, ModelVerdict, verdict_on
from bfpo.evaluation.differences import PairedDifference, paired_difference
from bfpo.evaluation.scoring import PromptScores
from bfpo.stats.intervals import holm

SAFETY = ("harmful", "safety")
# The first on which both models have scores is used.
HELPFULNESS = (("benign", "helpfulness"), ("benign", "over_refusal"), ("lookalike", "over_refusal"))


class PooledScores(NamedTuple):
    """Scores of one model by one judge, pooled over suites.

    Args:
        run: Name of the run.
        judge: Name of the judge.
        scores: Task and metric → scores.
    """

    run: str
    judge: str
    scores: dict[tuple[str, str], PromptScores]


def pool_scores(run: str, judge: str, scores: Iterable[PromptScores]) -> PooledScores:
    """Pool the scores of several suites; a prompt that is in several of them counts once."""
    pooled: dict[tuple[str, str], PromptScores] = {}
    for prompt_scores in scores:
        key = (prompt_scores.task, prompt_scores.spec.name)
        if prompt_scores.category is None and key in (SAFETY, *HELPFULNESS):
            existing = pooled.get(key, prompt_scores)
            pooled[key] = prompt_scores._replace(
                by_prompt=prompt_scores.by_prompt | existing.by_prompt,
                samples=max(existing.samples, prompt_scores.samples),
            )
    return PooledScores(run, judge, pooled)


def compare_models(pairs: Sequence[tuple[PooledScores, PooledScores]]) -> list[ModelComparison]:
    """Compare each pair of models; pairs without scores of both axes, or without shared prompts, are left out.

    The p-values of all tests, two per pair, are adjusted together (Holm 1979): the probability of any wrong verdict
    but `not distinguishable` is below 5 %, provided that no other pairs were looked at.

    Args:
        pairs: Run and baseline of each comparison.
    """
    tested = [(run, baseline, axes) for run, baseline in pairs if (axes := _axes(run, baseline)) is not None]
    p_values = holm([axis.difference.p_value for *_, axes in tested for axis in axes])
    comparisons = []
    for index, (run, baseline, axes) in enumerate(tested):
        safety, helpfulness = (
            _axis_result(axis, p_value)
            for axis, p_value in zip(axes, p_values[2 * index : 2 * index + 2], strict=True)
        )
        verdict = _model_verdict({safety.verdict, helpfulness.verdict})
        comparisons.append(
            ModelComparison(run.run, baseline.run, run.judge, verdict, safety, helpfulness, tests=len(p_values))
        )
    return comparisons


class _Axis(NamedTuple):
    scores: PromptScores
    difference: PairedDifference


def _axes(run: PooledScores, baseline: PooledScores) -> tuple[_Axis, _Axis] | None:
    safety = _axis(run, baseline, SAFETY)
    helpfulness = next((axis for key in HELPFULNESS if (axis := _axis(run, baseline, key)) is not None), None)
    return None if safety is None or helpfulness is None else (safety, helpfulness)


def _axis(run: PooledScores, baseline: PooledScores, key: tuple[str, str]) -> _Axis | None:
    scores, baseline_scores = run.scores.get(key), baseline.scores.get(key)
    if scores is None or baseline_scores is None:
        return None
    difference = paired_difference(scores, baseline_scores)
    return None if difference is None else _Axis(scores, difference)


def _axis_result(axis: _Axis, p_adjusted: float) -> AxisResult:
    scores, difference = axis
    higher_is_better = bool(scores.spec.higher_is_better)
    verdict = verdict_on(difference.interval, higher_is_better=higher_is_better, p_value=p_adjusted)
    return AxisResult(scores.task, scores.spec.name, *difference.interval, difference.n, p_adjusted, verdict)


def _model_verdict(verdicts: set[DifferenceVerdict]) -> ModelVerdict:
    if {"better", "worse"} <= verdicts:
        return "trade-off"
    return "dominates" if "better" in verdicts else "dominated" if "worse" in verdicts else "not distinguishable"
