"""The report as Markdown: the numbers of the page, without the models' answers."""

import re
from collections.abc import Iterable, Sequence

from bfpo.report.certificates import HEADINGS, certificate_notes, certificate_rows
from bfpo.report.judge_tables import (
    agreement_rows,
    category_rows,
    composite_notes,
    judge_rows,
    main_headings,
    reasoning_rows,
    result_warnings,
)
from bfpo.report.languages import language_rows
from bfpo.report.model_comparisons import AxisCell, compare_runs
from bfpo.report.provenance import metadata, protocol_warnings
from bfpo.report.run_files import Run
from bfpo.report.tables import MetricGroup, ValueCell, metric_groups
from bfpo.report.words import CORRECTION_NOTE

MARK = "<!-- made by bfpo report -->"


def escape(text: object) -> str:
    """Return a text on one line, with all Markdown and HTML escaped."""
    line = " ".join("".join(char if char.isprintable() else " " for char in str(text)).split())
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|~#!])", r"\\\1", line)


def format_table(headings: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a Markdown table with escaped cells."""
    lines = [[escape(cell) for cell in row] for row in (headings, *rows)]
    lines.insert(1, ["---"] * len(headings))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def format_value(value: ValueCell) -> str:
    """Return a value with its interval and its undecided answers."""
    undecided = f" ({value.undecided})" if value.undecided else ""
    return f"{value.value} {value.interval}".strip() + undecided


def judge_table(runs: Sequence[Run]) -> str:
    """Return the main metrics by run and judge."""
    rows = []
    for row in judge_rows(runs):
        judge = row.judge
        judge += " (calibrated on other models' answers)" if row.is_borrowed else ""
        judge += " (circular)" if row.is_circular else ""
        rows.append((runs[row.run_index].name, judge, *map(format_value, row.values)))
    return format_table(["run", "judge", *main_headings(runs)], rows)


def reasoning_table(runs: Sequence[Run]) -> str:
    """Return the numbers of completions by the verdicts on answer and reasoning."""
    headings = (
        "run",
        "judge",
        "completions with reasoning",
        "both safe",
        "safe answer, unsafe reasoning",
        "unsafe answer, safe reasoning",
        "both unsafe",
        "undecided",
    )
    return format_table(headings, reasoning_rows(runs))


def agreement_table(runs: Sequence[Run]) -> str:
    """Return the agreement between judges."""
    return format_table(("run", "judges", "question", "answers", "agreement", "kappa"), agreement_rows(runs))


def language_table(runs: Sequence[Run]) -> str:
    """Return the main metrics by the language of the prompts."""
    headings = ("language", "metric", "prompts", *(run.name for run in runs), "n")
    rows = [
        (row.language, row.metric, row.task, *map(format_value, row.values), row.prompts)
        for row in language_rows(runs)
    ]
    return format_table(headings, rows)


def as_markdown(runs: Sequence[Run], *, title: str, note: str = "") -> str:
    """Return the report as Markdown.

    Args:
        runs: Runs, baseline first.
        title: Title of the report.
        note: A paragraph below the title, as plain text.
    """
    parts = [MARK, f"# {escape(title)}"]
    if note:
        parts.append(escape(note))
    warnings = [f"{names}: {warning}" if names else warning for names, warning in result_warnings(runs)]
    parts += [f"> **Note.** {escape(warning)}" for warning in warnings + protocol_warnings(runs)]
    parts.append(
        "Brackets show 95% confidence intervals over prompts; they do not include the variation between training "
        "seeds."
    )
    parts += _model_comparison_parts(runs)
    parts += ["## By judge", judge_table(runs), *map(escape, composite_notes(runs))]
    if any(run.results.calibration for run in runs):
        parts.append(escape(CORRECTION_NOTE))
    parts.append("## All metrics, by the first judge")
    for group in metric_groups(runs):
        parts += _metric_parts(group, runs)
    if categories := category_rows(runs):
        headings = ("prompts", "category", "metric", *(run.name for run in runs), "n")
        rows = [
            (row.task, row.category, row.metric, *(format_value(value) for value, _ in row.cells), row.prompts)
            for row in categories
        ]
        parts += ["## By category", format_table(headings, rows)]
    if language_rows(runs):
        parts += ["## By language", language_table(runs)]
    if agreement_rows(runs):
        parts += ["## Agreement between judges", agreement_table(runs)]
    if reasoning_rows(runs):
        parts += ["## Answers and their reasoning", reasoning_table(runs)]
    if certified := certificate_rows(runs):
        rows = [(row.run, *row.cells) for row in certified]
        parts += ["## Certified boxes of hidden states", format_table(HEADINGS, rows)]
        parts += map(escape, certificate_notes(runs))
    headings = ("", *(run.name for run in runs))
    parts += ["## Provenance", format_table(headings, [(heading, *values) for heading, values in metadata(runs)])]
    text = "\n\n".join(parts) + "\n"
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _model_comparison_parts(runs: Sequence[Run]) -> list[str]:
    """Return the comparison of every two runs; nothing for one run."""
    comparisons = compare_runs(runs)
    if not comparisons.rows:
        not_compared = f"Not compared: {'; '.join(comparisons.left_out)}."
        return ["## Model comparisons", escape(not_compared)] if comparisons.left_out else []
    headings = ("run", "verdict", "other run", "safety", "helpfulness")
    rows = [
        (row.run, row.verdict, row.against, _format_axis(row.safety), _format_axis(row.helpfulness))
        for row in comparisons.rows
    ]
    note = f"The p-values of all {comparisons.tests} tests are adjusted together (Holm)."
    if comparisons.left_out:
        note += f" Not compared: {'; '.join(comparisons.left_out)}."
    return ["## Model comparisons", format_table(headings, rows), escape(note)]


def _format_axis(axis: AxisCell) -> str:
    difference = axis.difference
    return f"{axis.metric}: {difference.value} {difference.interval} {difference.verdict}, {axis.p_value}"


def _metric_parts(group: MetricGroup, runs: Sequence[Run]) -> list[str]:
    """Return a group's table of values, and of differences from the baseline if there are several runs."""
    headings = ("metric", *(run.name for run in runs), "prompts")
    rows = [(row.label, *map(format_value, row.values), row.prompts) for row in group.rows]
    parts = [f"### {escape(group.label)}", format_table(headings, rows)]
    if len(runs) > 1:
        headings = (f"difference from {runs[0].name}", *(run.name for run in runs[1:]))
        differences = [
            (
                row.label,
                *(
                    " ".join(filter(None, (difference.value, difference.interval, difference.verdict)))
                    for difference in row.differences
                ),
            )
            for row in group.rows
        ]
        parts.append(format_table(headings, differences))
    return parts
