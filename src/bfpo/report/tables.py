"""The metrics of several runs side by side, on the page and as CSV."""

import csv
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields
from io import StringIO
from typing import Any, NamedTuple

from markupsafe import Markup

from bfpo.evaluation.results import CORRECTED, METRIC_COLUMNS, MetricComparison, MetricResult
from bfpo.report.curves import strip
from bfpo.report.run_files import Run
from bfpo.report.words import DASH, TASK_HINTS, TASKS, interval, measure, number, signed

Key = tuple[str, str, str]


class Value(NamedTuple):
    """A number of a run.

    Args:
        value: As text.
        interval: As text; "" when there is none.
        undecided: How many answers have no verdict on it, and how far that reaches, as text; "" for none.
    """

    value: str
    interval: str
    undecided: str


class DifferenceCell(NamedTuple):
    """A number of a run minus the base's.

    Args:
        value: As text.
        interval: As text.
        verdict: In words; "" when neither direction is better, or nothing was compared.
    """

    value: str
    interval: str
    verdict: str


class TableRow(NamedTuple):
    """A metric.

    Args:
        label: Its name.
        hint: What it counts; "" where a row above says it.
        better: Which way is good.
        values: One per run.
        strip: The same, drawn; None for what doesn't lie from 0 to 1.
        differences: One per run after the base.
        prompts: How many it rests on.
    """

    label: str
    hint: str
    better: str
    values: list[Value]
    strip: Markup | None
    differences: list[DifferenceCell]
    prompts: str


class Group(NamedTuple):
    """The metrics of one kind of prompts.

    Args:
        label: The prompts.
        hint: What is expected of a model.
        rows: The metrics.
    """

    label: str
    hint: str
    rows: list[TableRow]


def keys(runs: Sequence[Run]) -> list[Key]:
    """Return suite, task and name of every metric that some run has, in the order of the files.

    Of corrected rates those by the first judge: beside its plain ones another judge's would not be of a kind.
    """
    found = [
        (one.suite, one.task, one.metric)
        for run in runs
        for one in run.results.metrics
        if not one.metric.endswith(CORRECTED) or one.judge == run.results.judges[0]["name"]
    ]
    return list(dict.fromkeys(found))


def groups(runs: Sequence[Run]) -> list[Group]:
    """Return the table of all metrics; what sums up stands first."""
    several_suites = len({suite for suite, _, _ in keys(runs)}) > 1
    tasks: dict[tuple[str, str], list[Key]] = {}
    for key in keys(runs):
        tasks.setdefault(key[:2], []).append(key)
    found: list[Group] = []
    explained: set[str] = set()
    for suite, task in sorted(tasks, key=lambda one: (one[1] != "all", list(tasks).index(one))):
        label = TASKS.get(task, task)
        rows = []
        for place, key in enumerate(tasks[suite, task]):
            row = _row(runs, key, f"strip-{len(found)}-{place}")
            rows.append(row._replace(hint="") if key[2] in explained else row)
            explained.add(key[2])
        found.append(Group(f"{suite}: {label}" if several_suites else label, TASK_HINTS.get(task, ""), rows))
    return found


def _row(runs: Sequence[Run], key: Key, name: str) -> TableRow:
    metrics = [run.metric(key) for run in runs]
    called = measure(key[2])
    first = next(one for one in metrics if one is not None)
    counts = sorted({one.n for one in metrics if one is not None})
    better = {True: "higher is better", False: "lower is better", None: ""}[first.higher_is_better]
    return TableRow(
        called.label,
        called.hint,
        better,
        [value(one) for one in metrics],
        strip(name, metrics) if called.unit_interval else None,
        [_difference(run.versus(runs[0], key)) for run in runs[1:]],
        DASH.join(f"{count:,}" for count in (counts[0], counts[-1])[: len(counts)]),
    )


def value(metric: MetricResult | None) -> Value:
    """Return a metric as texts; a dash where there is none."""
    if metric is None:
        return Value(number(None), "", "")
    undecided = f"{metric.unscored:,} undecided" if metric.unscored else ""
    if metric.least is not None and metric.most is not None:
        undecided += f": {number(metric.least)} to {number(metric.most)}"
    return Value(number(metric.value), interval(metric.low, metric.high), undecided)


def _difference(found: MetricComparison | None) -> DifferenceCell:
    if found is None:
        return DifferenceCell(number(None), "", "")
    return DifferenceCell(signed(found.difference), interval(found.low, found.high, of=signed), found.verdict or "")


def metrics_csv(runs: Iterable[Run]) -> str:
    """Return every metric of every run, unrounded, as CSV."""
    rows = [[run.name, *asdict(one).values()] for run in runs for one in run.results.metrics]
    return _csv(("run", *METRIC_COLUMNS), rows)


def comparisons_csv(runs: Iterable[Run]) -> str:
    """Return every comparison of every run, unrounded, as CSV."""
    rows = [[run.name, *asdict(one).values()] for run in runs for one in run.results.comparisons]
    return _csv(("run", *(column.name for column in fields(MetricComparison))), rows)


def _csv(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    text = StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    return text.getvalue()
