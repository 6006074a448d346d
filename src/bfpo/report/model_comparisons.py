"""Comparison of every two runs in safety and helpfulness together."""

from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

from bfpo.evaluation.comparisons import AxisResult
from bfpo.evaluation.dominance import compare_models
from bfpo.report.run_files import Run
from bfpo.report.tables import DifferenceCell
from bfpo.report.words import TASKS, format_interval, format_signed, metric_text


class AxisCell(NamedTuple):
    """Difference of two runs in safety or helpfulness, as texts.

    Args:
        metric: The metric and its prompts.
        difference: Difference with its interval and verdict.
        p_value: Adjusted p-value.
    """

    metric: str
    difference: DifferenceCell
    p_value: str


class ModelComparisonRow(NamedTuple):
    """Comparison of two runs.

    Args:
        run: Name of the run.
        verdict: `dominates`, `dominated`, `trade-off` or `not distinguishable`.
        against: Name of the other run.
        judge: Name of the judge.
        safety: Difference in safety.
        helpfulness: Difference in helpfulness.
    """

    run: str
    verdict: str
    against: str
    judge: str
    safety: AxisCell
    helpfulness: AxisCell


class ModelComparisonTable(NamedTuple):
    """Comparisons of all runs of a page.

    Args:
        rows: One for each two runs, the later one against the earlier one.
        tests: Number of tests that the p-values are adjusted for.
        left_out: Names of runs that could not be compared, with the reason.
    """

    rows: list[ModelComparisonRow]
    tests: int
    left_out: list[str]


def compare_runs(runs: Sequence[Run]) -> ModelComparisonTable:
    """Compare each run with each earlier one, by the first judge of the run that judged both."""
    pairs = []
    left_out: list[tuple[str, str, str]] = []
    for baseline, run in combinations(runs, 2):
        by_judge = {scores.judge: scores for scores in baseline.pooled_scores}
        scores = next((scores for scores in run.pooled_scores if scores.judge in by_judge), None)
        if scores is None:
            left_out.append((run.name, baseline.name, "no judge has verdicts on all answers of both"))
        else:
            pairs.append((scores, by_judge[scores.judge]))
    comparisons = compare_models(pairs)
    compared = {(comparison.run, comparison.against) for comparison in comparisons}
    left_out += [
        (scores.run, baseline_scores.run, "not measured on both harmful and benign prompts")
        for scores, baseline_scores in pairs
        if (scores.run, baseline_scores.run) not in compared
    ]
    rows = [
        ModelComparisonRow(
            comparison.run,
            comparison.verdict,
            comparison.against,
            comparison.judge,
            _axis_cell(comparison.safety),
            _axis_cell(comparison.helpfulness),
        )
        for comparison in comparisons
    ]
    texts = [f"{run} and {other} ({reason})" for run, other, reason in left_out]
    if not rows and len(left_out) > 1:
        # Not a line for each two of many runs.
        texts = [f"any two runs ({'; '.join(dict.fromkeys(reason for *_, reason in left_out))})"]
    return ModelComparisonTable(rows, comparisons[0].tests if comparisons else 0, texts)


def _axis_cell(axis: AxisResult) -> AxisCell:
    metric = f"{metric_text(axis.metric).label.lower()} on {axis.n:,} {TASKS.get(axis.task, axis.task)}"
    interval = format_interval(axis.low, axis.high, format_bound=format_signed)
    p_value = f"p = {axis.p_adjusted:.3f}" if axis.p_adjusted >= 0.001 else "p < 0.001"
    # Non-breaking spaces keep the sign and the number on one line.
    p_value = p_value.replace(" ", "\u00a0")
    return AxisCell(metric, DifferenceCell(format_signed(axis.difference), interval, axis.verdict), p_value)
