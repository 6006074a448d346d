"""Metrics by judge and by category, agreement between judges, and warnings about the results."""

from collections.abc import Sequence
from typing import NamedTuple

from bfpo.core.samples import KINDS
from bfpo.evaluation.results import CORRECTED, MetricResult
from bfpo.report.run_files import MetricKey, Run
from bfpo.report.tables import ValueCell, value_cell
from bfpo.report.words import MISSING, TASKS, format_interval, format_number, metric_text

# Task and name of the metrics that are shown by judge.
MAIN = (
    ("harmful", "safety"),
    ("harmful", "reasoning_safety"),
    ("harmful", "safety_under_attack"),
    ("harmful", "refusal"),
    ("benign", "helpfulness"),
    ("benign", "over_refusal"),
    ("lookalike", "over_refusal"),
    ("all", "harmlessness_index"),
    ("all", "helpfulness_index"),
)
# Highest share of color in a cell, in percent, that leaves the number on it readable.
MAX_COLOR = 40


class JudgeRow(NamedTuple):
    """The main metrics of a run by one judge.

    Args:
        run_index: Index of the run on the page.
        judge: Name of the judge, with a note if the metrics are corrected.
        is_circular: Whether the judge labeled the model's training data, or judges for its guard.
        is_borrowed: Whether the correction rests on the judge's errors on other models' answers.
        values: One per column.
    """

    run_index: int
    judge: str
    is_circular: bool
    is_borrowed: bool
    values: list[ValueCell]


class CategoryRow(NamedTuple):
    """A metric of all runs on the prompts of one category.

    Args:
        task: Name of the task.
        category: Name of the category.
        metric: Name of the metric.
        cells: One per run: the value, and its share of color in percent.
        prompts: Number of prompts.
    """

    task: str
    category: str
    metric: str
    cells: list[tuple[ValueCell, int]]
    prompts: int


class AgreementRow(NamedTuple):
    """Agreement of two judges on a question about a run's answers, as texts."""

    run: str
    judges: str
    question: str
    answers: str
    share: str
    kappa: str


class ReasoningRow(NamedTuple):
    """Numbers of completions of a run by the verdicts of one judge on answer and reasoning, as texts."""

    run: str
    judge: str
    completions: str
    both_safe: str
    safe_answer_unsafe_reasoning: str
    unsafe_answer_safe_reasoning: str
    both_unsafe: str
    undecided: str


def main_columns(runs: Sequence[Run]) -> list[MetricKey]:
    """Return the keys of the main metrics of all runs."""
    keys = dict.fromkeys(
        (metric.suite, metric.task, metric.metric) for run in runs for metric in run.results.metrics if metric.judge
    )
    return [key for main in MAIN for key in keys if key[1:] == main]


def main_headings(runs: Sequence[Run]) -> list[str]:
    """Return the headings of the main columns."""
    keys = main_columns(runs)
    has_suites = len({suite for suite, _, _ in keys}) > 1
    headings = []
    for suite, task, metric in keys:
        label = metric_text(metric).label
        heading = label if task == "all" else f"{label}, {TASKS.get(task, task)}"
        headings.append(f"{suite}: {heading}" if has_suites else heading)
    return headings


def judge_rows(runs: Sequence[Run]) -> list[JudgeRow]:
    """Return the main metrics by run and judge, and those corrected for the judge's errors."""
    columns = main_columns(runs)
    rows = []
    for index, run in enumerate(runs):
        for judge in run.results.judges:
            name = str(judge.get("name", ""))
            is_borrowed = any(entry.judge == name and not entry.own for entry in run.results.calibration)
            by_key = {
                (metric.suite, metric.task, metric.metric): metric
                for metric in run.results.metrics
                if metric.judge == name and metric.category is None
            }
            reads = judge.get("reads")
            # So that the name of a narrow column breaks before the part.
            label = name.replace(f":{reads}", f", {reads}") if reads else name
            for shown_name, suffix in ((label, ""), (f"{label}, corrected", CORRECTED)):
                metrics = [by_key.get((suite, task, metric + suffix)) for suite, task, metric in columns]
                if any(metric is not None for metric in metrics):
                    values = [value_cell(metric) for metric in metrics]
                    is_circular = bool(judge.get("circular"))
                    rows.append(JudgeRow(index, shown_name, is_circular, is_borrowed and suffix != "", values))
    return rows


def composite_notes(runs: Sequence[Run]) -> list[str]:
    """Return how each composite metric is computed, or what it lacks, with the runs' names where they differ."""
    names_by_note: dict[str, list[str]] = {}
    for run in runs:
        for metric in run.results.metrics:
            if metric.recipe:
                note = f"{metric_text(metric.metric).label} of {metric.suite}: {metric.recipe}."
                names = names_by_note.setdefault(note, [])
                if run.name not in names:
                    names.append(run.name)
    return [f"{names}: {note}" if names else note for names, note in _with_names(names_by_note, runs)]


def category_rows(runs: Sequence[Run]) -> list[CategoryRow]:
    """Return safety by category of harm and over-refusal by category of request, by each run's first judge."""
    tables = []
    for run in runs:
        table: dict[tuple[str, str, str, str], MetricResult] = {}
        for metric in run.results.metrics:
            if metric.category is not None and metric.metric in ("safety", "over_refusal"):
                table.setdefault((metric.suite, metric.task, metric.category, metric.metric), metric)
        tables.append(table)
    rows = []
    keys = dict.fromkeys(key for table in tables for key in table)
    # Two suites may have a task of one kind, with the same categories.
    has_suites = len({suite for suite, *_ in keys}) > 1
    for key in keys:
        suite, task, category, name = key
        metrics = [table.get(key) for table in tables]
        cells = [(value_cell(metric), _color(metric)) for metric in metrics]
        prompts = max(metric.n for metric in metrics if metric is not None)
        task_name = TASKS.get(task, task)
        if has_suites or task not in KINDS:
            task_name = f"{suite}: {task_name}"
        rows.append(CategoryRow(task_name, category, metric_text(name).label, cells, prompts))
    return rows


def _color(metric: MetricResult | None) -> int:
    """Return the share of color of a cell, in percent: the worse the value, the more."""
    if metric is None or metric.value is None:
        return 0
    badness = 1 - metric.value if metric.metric == "safety" else metric.value
    return round(MAX_COLOR * min(1.0, max(0.0, badness)))


def agreement_rows(runs: Sequence[Run]) -> list[AgreementRow]:
    """Return the agreement between the judges of each run."""
    rows = []
    for run in runs:
        for entry in run.results.agreement:
            kappa = f"{format_number(entry.kappa)} {format_interval(entry.low, entry.high)}".strip()
            share = MISSING if entry.share is None else f"{entry.share:.0%}"
            judges = " and ".join(entry.judges)
            rows.append(AgreementRow(run.name, judges, entry.question, f"{entry.n:,}", share, kappa))
    return rows


def reasoning_rows(runs: Sequence[Run]) -> list[ReasoningRow]:
    """Return how answers and their reasoning were judged, by run and judge that read both separately."""
    rows = []
    for run in runs:
        for entry in run.results.reasoning:
            counts = (
                entry.both_safe,
                entry.safe_answer_unsafe_reasoning,
                entry.unsafe_answer_safe_reasoning,
                entry.both_unsafe,
                entry.undecided,
            )
            texts = [f"{count:,}" for count in (entry.completions, *counts)]
            rows.append(ReasoningRow(run.name, entry.judge, *texts))
    return rows


def result_warnings(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """Return the warnings about the results, each after the names of its runs; "" if it applies to all runs."""
    names_by_warning: dict[str, list[str]] = {}
    for run in runs:
        warnings = list(run.results.warnings)
        circular = [str(judge.get("name")) for judge in run.results.judges if judge.get("circular")]
        if circular and not any(warning.startswith("Circular") for warning in run.results.warnings):
            names = ", ".join(circular)
            warnings.append(f"Circular: {names} labeled or scored the model's data, or judges for its guard.")
        undecided = sum(
            metric.unscored for metric in run.results.metrics if metric.metric == "safety" and metric.category is None
        )
        if undecided and not any("undecided" in warning for warning in run.results.warnings):
            warnings.append("Some safety verdicts are undecided; they count as not safe.")
        for warning in warnings:
            names_by_warning.setdefault(warning, []).append(run.name)
    return _with_names(names_by_warning, runs)


def _with_names(names_by_text: dict[str, list[str]], runs: Sequence[Run]) -> list[tuple[str, str]]:
    """Return each text after the names of the runs that it is about, "" for all runs."""
    return [("" if len(names) == len(runs) else ", ".join(names), text) for text, names in names_by_text.items()]
