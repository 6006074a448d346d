"""Tables of the metrics of all runs, for the page and as CSV."""

import csv
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields
from io import StringIO
from typing import Any, NamedTuple

from markupsafe import Markup

from bfpo.evaluation.results import CORRECTED, METRIC_COLUMNS, MetricComparison, MetricResult
from bfpo.report.curves import draw_strip
from bfpo.report.run_files import MetricKey, Run
from bfpo.report.words import (
    DASH,
    TASK_HINTS,
    TASKS,
    format_interval,
    format_number,
    format_signed,
    metric_text,
)

FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")
NUMBER = re.compile(r"[+-]?\d+(\.\d*)?([eE][+-]?\d+)?")


class ValueCell(NamedTuple):
    """A metric of a run, as texts.

    Args:
        value: The value.
        interval: Confidence interval; "" for none.
        undecided: Number of undecided answers and the bounds they leave open; "" for none.
    """

    value: str
    interval: str
    undecided: str


class DifferenceCell(NamedTuple):
    """A metric of a run minus the baseline's, as texts.

    Args:
        value: The difference.
        interval: Confidence interval.
        verdict: Verdict on the difference; "" when neither direction is better, or the runs were not compared.
    """

    value: str
    interval: str
    verdict: str


class MetricRow(NamedTuple):
    """A row of the table of all metrics.

    Args:
        label: Name of the metric.
        hint: What the metric measures; "" when a row above says so.
        better: Which direction is better.
        values: One per run.
        strip: The values as a drawing; None for a metric outside [0, 1].
        differences: One per run after the baseline.
        prompts: Number of prompts.
    """

    label: str
    hint: str
    better: str
    values: list[ValueCell]
    strip: Markup | None
    differences: list[DifferenceCell]
    prompts: str


class MetricGroup(NamedTuple):
    """The metrics of one task.

    Args:
        label: Name of the task.
        hint: What a model is expected to do.
        rows: The metrics.
    """

    label: str
    hint: str
    rows: list[MetricRow]


def metric_keys(runs: Sequence[Run]) -> list[MetricKey]:
    """Return the keys of all metrics of all runs, in the order of the files.

    Corrected rates are limited to the first judge, whose uncorrected rates the table shows.
    """
    keys = [
        (metric.suite, metric.task, metric.metric)
        for run in runs
        for metric in run.results.metrics
        if metric.category is None
        and (not metric.metric.endswith(CORRECTED) or metric.judge in [row["name"] for row in run.results.judges[:1]])
    ]
    return list(dict.fromkeys(keys))


def metric_groups(runs: Sequence[Run]) -> list[MetricGroup]:
    """Return the table of all metrics; the groups of aggregate metrics come first."""
    keys = metric_keys(runs)
    has_suites = len({suite for suite, _, _ in keys}) > 1
    by_task: dict[tuple[str, str], list[MetricKey]] = {}
    for key in keys:
        by_task.setdefault(key[:2], []).append(key)
    groups: list[MetricGroup] = []
    explained: set[str] = set()
    # The sort is stable: within either part, tasks keep the order of the files.
    for suite, task in sorted(by_task, key=lambda suite_and_task: suite_and_task[1] != "all"):
        rows = []
        for index, key in enumerate(by_task[suite, task]):
            row = _metric_row(runs, key, f"strip-{len(groups)}-{index}")
            rows.append(row._replace(hint="") if key[2] in explained else row)
            explained.add(key[2])
        label = TASKS.get(task, task)
        groups.append(MetricGroup(f"{suite}: {label}" if has_suites else label, TASK_HINTS.get(task, ""), rows))
    return groups


def _metric_row(runs: Sequence[Run], key: MetricKey, strip_name: str) -> MetricRow:
    metrics = [run.metric(key) for run in runs]
    present = [metric for metric in metrics if metric is not None]
    counts = sorted({metric.n for metric in present})
    text = metric_text(key[2])
    return MetricRow(
        text.label,
        text.hint,
        {True: "higher is better", False: "lower is better", None: ""}[present[0].higher_is_better],
        [value_cell(metric) for metric in metrics],
        draw_strip(strip_name, metrics) if text.unit_interval else None,
        [_difference_cell(run.comparison(runs[0], key)) for run in runs[1:]],
        DASH.join(f"{count:,}" for count in (counts[0], counts[-1])[: len(counts)]),
    )


def value_cell(metric: MetricResult | None) -> ValueCell:
    """Return a metric as texts; a dash for None."""
    if metric is None:
        return ValueCell(format_number(None), "", "")
    undecided = f"{metric.unscored:,} undecided" if metric.unscored else ""
    if metric.least is not None and metric.most is not None:
        undecided += f": {format_number(metric.least)} to {format_number(metric.most)}"
    return ValueCell(format_number(metric.value), format_interval(metric.low, metric.high), undecided)


def _difference_cell(comparison: MetricComparison | None) -> DifferenceCell:
    if comparison is None:
        return DifferenceCell(format_number(None), "", "")
    interval = format_interval(comparison.low, comparison.high, format_bound=format_signed)
    return DifferenceCell(format_signed(comparison.difference), interval, comparison.verdict or "")


def metrics_csv(runs: Iterable[Run]) -> str:
    """Return every metric of every run, unrounded, as CSV."""
    rows = [[run.name, *asdict(metric).values()] for run in runs for metric in run.results.metrics]
    return _to_csv(("run", *METRIC_COLUMNS), rows)


def comparisons_csv(runs: Iterable[Run]) -> str:
    """Return every comparison of every run, unrounded, as CSV."""
    rows = [[run.name, *asdict(comparison).values()] for run in runs for comparison in run.results.comparisons]
    return _to_csv(("run", *(column.name for column in fields(MetricComparison))), rows)


def _to_csv(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = []
    for row in (columns, *rows):
        line = StringIO()
        # The writer quotes the characters of its line terminator; a carriage return without quotes ends a row.
        csv.writer(line, lineterminator="\r\n").writerow([_quote_formula(value) for value in row])
        lines.append(line.getvalue().removesuffix("\r\n") + "\n")
    return "".join(lines)


def _quote_formula(value: Any) -> Any:
    """Return a text that a spreadsheet would read as a formula with a single quote before it; other values as is."""
    is_formula = isinstance(value, str) and value.startswith(FORMULA_STARTS) and not NUMBER.fullmatch(value)
    return f"'{value}" if is_formula else value
