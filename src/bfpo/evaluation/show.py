"""What an evaluation prints when it is done."""

from bfpo.core.terminal import say, show_table
from bfpo.evaluation.comparisons import AxisResult
from bfpo.evaluation.results import Results, shown

# What the table on the terminal leaves to results.json and the report.
_DETAILS = ("tokens", "cut", "malformed")


def show_evaluation(results: Results) -> None:
    """Print the numbers by judge, the judges' agreement, comparisons and warnings."""
    judges = [judge["name"] for judge in results.judges]
    found = {
        (one.suite, one.task, one.metric, one.judge): one
        for one in results.metrics
        if one.category is None and one.metric not in _DETAILS
    }
    rows = []
    for suite, task, metric in dict.fromkeys(key[:3] for key in found if key[3]):
        of_judges = [found.get((suite, task, metric, judge)) for judge in judges]
        n = max(one.n for one in of_judges if one is not None)
        rows.append((f"{suite}/{task} {metric}", n, *map(shown, of_judges)))
    title = f"{results.run}: 95 % intervals over prompts"
    if rows:
        show_table(title, ("what", "prompts", *judges), rows)
    unjudged = [one for key, one in found.items() if not key[3]]
    if unjudged:
        rows = [(f"{one.suite}/{one.task} {one.metric}", one.n, shown(one)) for one in unjudged]
        show_table(f"{title}; scored without a judge", ("what", "rows", "found"), rows)
    recipes = {(one.suite, one.metric, one.recipe): one.judge for one in results.metrics if one.recipe}
    for suite, metric, recipe in recipes:
        say(f"{suite}/all {metric}: {recipe}")
    if results.agreement:
        show_table(
            "Agreement of the judges (Cohen's kappa)",
            ("judges", "question", "answers", "the same", "kappa"),
            [
                (
                    " and ".join(one.judges),
                    one.question,
                    one.n,
                    "-" if one.share is None else f"{one.share:.1%}",
                    _kappa(one.kappa, one.low, one.high),
                )
                for one in results.agreement
            ],
        )
    compared = [one for one in results.comparisons if one.category is None and one.metric not in _DETAILS]
    if compared:
        show_table(
            f"Against {compared[0].against}, paired over prompts",
            ("what", "judge", "difference", "that is"),
            [
                (
                    f"{one.suite}/{one.task} {one.metric}",
                    one.judge,
                    f"{one.difference:+.3f} [{one.low:+.3f}, {one.high:+.3f}]",
                    one.verdict or "-",
                )
                for one in compared
            ],
        )
    if results.model_comparisons:
        told = f"p-values adjusted for {results.model_comparisons[0].tests} tests"
        show_table(
            f"{results.run} against {results.model_comparisons[0].against} in safety and helpfulness, {told}",
            ("judge", "safety", "p", "helpfulness", "p", "verdict"),
            [
                (one.judge, *_axis(one.safety), *_axis(one.helpfulness), one.verdict)
                for one in results.model_comparisons
            ],
        )
    for warning in results.warnings:
        say(f"warning: {warning}")


def _axis(axis: AxisResult) -> tuple[str, str]:
    name = axis.verdict if axis.metric != "over_refusal" else f"{axis.verdict} (over-refusal)"
    p_value = f"{axis.p_adjusted:.3f}" if axis.p_adjusted >= 0.001 else "< 0.001"
    return f"{axis.difference:+.3f} [{axis.low:+.3f}, {axis.high:+.3f}] {name}", p_value


def _kappa(value: float | None, low: float | None, high: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if low is None or high is None else f"{value:.2f} [{low:.2f}, {high:.2f}]"
