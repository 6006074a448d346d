"""Metrics by the language of prompts."""

from collections.abc import Sequence
from typing import NamedTuple

from bfpo.evaluation.results import LanguageResult
from bfpo.report.run_files import Run
from bfpo.report.tables import ValueCell
from bfpo.report.words import TASKS, format_interval, format_number, metric_text


class LanguageRow(NamedTuple):
    """A metric of all runs on the prompts in one language.

    Args:
        language: Language of the prompts.
        metric: Name of the metric.
        task: Name of the suite and the kind of prompts.
        values: One per run.
        prompts: Number of prompts.
    """

    language: str
    metric: str
    task: str
    values: list[ValueCell]
    prompts: int


def language_rows(runs: Sequence[Run]) -> list[LanguageRow]:
    """Return the metrics of all runs by language, by each run's first judge."""
    tables: list[dict[tuple[str, str, str, str], LanguageResult]] = []
    for run in runs:
        first = [str(judge.get("name", "")) for judge in run.results.judges[:1]]
        tables.append(
            {
                (result.suite, result.task, result.metric, result.language): result
                for result in run.results.languages
                if result.judge in (*first, "")
            }
        )
    rows = []
    for key in dict.fromkeys(key for table in tables for key in table):
        suite, task, metric, language = key
        results = [table.get(key) for table in tables]
        prompts = max(result.n for result in results if result is not None)
        name = f"{suite}: {TASKS.get(task, task)}"
        rows.append(LanguageRow(language, metric_text(metric).label, name, list(map(_cell, results)), prompts))
    # All languages of a metric together.
    return sorted(rows, key=lambda row: (row.task, row.metric))


def _cell(result: LanguageResult | None) -> ValueCell:
    if result is None:
        return ValueCell(format_number(None), "", "")
    undecided = f"{result.unscored:,} undecided" if result.unscored else ""
    return ValueCell(format_number(result.value), format_interval(result.low, result.high), undecided)
