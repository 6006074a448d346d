"""Printing the results of evaluations."""

from collections.abc import Iterable

from bfpo.core.terminal import say, show_table
from bfpo.evaluation.comparisons import AxisResult
from bfpo.evaluation.results import Results, format_metric

# Metrics that only results.json and the report contain.
_DETAILS = ("tokens", "cut", "malformed")


def show_results(runs: Iterable[Results]) -> None:
    """Print the metrics of several runs side by side, each with its interval."""
    runs = list(runs)
    keys = dict.fromkeys((metric.task, metric.metric) for results in runs for metric in results.metrics)
    rows = []
    for task, name in keys:
        metrics = [results.metric(task, name) for results in runs]
        n = next(metric.n for metric in metrics if metric is not None)
        rows.append((f"{task}: {name}", *map(format_metric, metrics), n))
    title = "Means over held-out prompts with 95 % intervals over prompts"
    show_table(title, ("metric", *(results.run for results in runs), "prompts"), rows)


def show_evaluation(results: Results) -> None:
    """Print metrics by judge, agreement, comparisons and warnings."""
    _show_metrics(results)
    if results.agreement:
        _show_agreement(results)
    if results.reasoning:
        _show_reasoning(results)
    if results.comparisons:
        _show_comparisons(results)
    if results.model_comparisons:
        _show_model_comparisons(results)
    for warning in results.warnings:
        say(f"warning: {warning}")


def _show_metrics(results: Results) -> None:
    judges = [judge["name"] for judge in results.judges]
    by_key = {
        (metric.suite, metric.task, metric.metric, metric.judge): metric
        for metric in results.metrics
        if metric.category is None and metric.metric not in _DETAILS
    }
    rows = []
    for suite, task, name in dict.fromkeys(key[:3] for key in by_key if key[3]):
        metrics = [by_key.get((suite, task, name, judge)) for judge in judges]
        n = max(metric.n for metric in metrics if metric is not None)
        rows.append((f"{suite}/{task} {name}", n, *map(format_metric, metrics)))
    title = f"{results.run}: 95 % intervals over prompts"
    if rows:
        show_table(title, ("metric", "prompts", *judges), rows)
    unjudged = [metric for (*_, judge), metric in by_key.items() if not judge]
    if unjudged:
        rows = [
            (f"{metric.suite}/{metric.task} {metric.metric}", metric.n, format_metric(metric)) for metric in unjudged
        ]
        show_table(f"{title}; scored without a judge", ("metric", "rows", "value"), rows)
    recipes = dict.fromkeys(
        (metric.suite, metric.metric, metric.recipe) for metric in results.metrics if metric.recipe
    )
    for suite, name, recipe in recipes:
        say(f"{suite}/all {name}: {recipe}")


def _show_agreement(results: Results) -> None:
    rows = [
        (
            " and ".join(agreement.judges),
            agreement.question,
            agreement.n,
            "-" if agreement.share is None else f"{agreement.share:.1%}",
            _format_kappa(agreement.kappa, agreement.low, agreement.high),
        )
        for agreement in results.agreement
    ]
    title = "Agreement of the judges (Cohen's kappa)"
    show_table(title, ("judges", "question", "answers", "equal", "kappa"), rows)


def _show_reasoning(results: Results) -> None:
    rows = [
        (
            row.judge,
            row.completions,
            row.both_safe,
            row.safe_answer_unsafe_reasoning,
            row.unsafe_answer_safe_reasoning,
            row.both_unsafe,
            row.undecided,
        )
        for row in results.reasoning
    ]
    columns = (
        "both safe",
        "safe answer, unsafe reasoning",
        "unsafe answer, safe reasoning",
        "both unsafe",
        "undecided",
    )
    show_table("Completions with reasoning, by the verdicts on both", ("judge", "completions", *columns), rows)


def _show_comparisons(results: Results) -> None:
    rows = [
        (
            f"{comparison.suite}/{comparison.task} {comparison.metric}",
            comparison.judge,
            f"{comparison.difference:+.3f} [{comparison.low:+.3f}, {comparison.high:+.3f}]",
            comparison.verdict or "-",
        )
        for comparison in results.comparisons
        if comparison.category is None and comparison.metric not in _DETAILS
    ]
    if rows:
        title = f"Against {results.comparisons[0].against}, paired over prompts"
        show_table(title, ("metric", "judge", "difference", "verdict"), rows)


def _show_model_comparisons(results: Results) -> None:
    first = results.model_comparisons[0]
    show_table(
        f"{results.run} against {first.against} in safety and helpfulness, p-values adjusted for {first.tests} tests",
        ("judge", "safety", "p", "helpfulness", "p", "verdict"),
        [
            (
                comparison.judge,
                *_format_axis(comparison.safety),
                *_format_axis(comparison.helpfulness),
                comparison.verdict,
            )
            for comparison in results.model_comparisons
        ],
    )


def _format_axis(axis: AxisResult) -> tuple[str, str]:
    verdict = axis.verdict if axis.metric != "over_refusal" else f"{axis.verdict} (over-refusal)"
    p_value = f"{axis.p_adjusted:.3f}" if axis.p_adjusted >= 0.001 else "< 0.001"
    return f"{axis.difference:+.3f} [{axis.low:+.3f}, {axis.high:+.3f}] {verdict}", p_value


def _format_kappa(value: float | None, low: float | None, high: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if low is None or high is None else f"{value:.2f} [{low:.2f}, {high:.2f}]"
