"""The report as Markdown: the numbers of the page, without the models' answers."""

import re
from collections.abc import Iterable, Sequence

from bfpo.report.judge_tables import (
    agreements,
    by_judge,
    column_name,
    columns,
    heat_map,
    recipes,
    warnings_of_results,
)
from bfpo.report.model_comparisons import pairs
from bfpo.report.provenance import facts, warnings
from bfpo.report.run_files import Run
from bfpo.report.tables import Value, groups
from bfpo.report.words import CORRECTED_MEANS

MARK = "<!-- made by bfpo report -->"


def plain(text: object) -> str:
    """Return a text that Markdown shows as it is, on one line: nothing in it is a mark-up or a tag."""
    one_line = " ".join("".join(char if char.isprintable() else " " for char in str(text)).split())
    shown = one_line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|~#!])", r"\\\1", shown)


def table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a Markdown table; every cell is made plain."""
    lines = [heads, ["---"] * len(heads)]
    lines += [[plain(cell) for cell in row] for row in rows]
    lines[0] = [plain(head) for head in heads]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def said(value: Value) -> str:
    """Return a number with its interval and what is undecided."""
    undecided = f" ({value.undecided})" if value.undecided else ""
    return f"{value.value} {value.interval}".strip() + undecided


def judged_table(runs: Sequence[Run]) -> str:
    """Return the main numbers by run and judge."""
    keys = columns(runs)
    with_suite = len({key[0] for key in keys}) > 1
    heads = ["run", "judge", *(column_name(key, with_suite=with_suite) for key in keys)]
    rows = [
        (
            runs[one.place].name,
            one.judge
            + (" on other models' answers" if one.borrowed else "")
            + (" (circular)" if one.circular else ""),
            *map(said, one.values),
        )
        for one in by_judge(runs)
    ]
    return table(heads, rows)


def agreement_table(runs: Sequence[Run]) -> str:
    """Return how far judges agree."""
    heads = ("run", "judges", "question", "answers", "the same", "kappa")
    return table(heads, agreements(runs))


def pair_parts(runs: Sequence[Run]) -> list[str]:
    """Return what each run is to each earlier one; nothing for one run."""
    every = pairs(runs)
    if not every.rows:
        return []
    rows = []
    for row in every.rows:
        axes = [
            f"{what}: {found.value} {found.interval} {found.verdict}, {p_value}"
            for what, found, p_value in (row.safety, row.helpfulness)
        ]
        rows.append((row.run, row.verdict, row.against, *axes))
    told = f"p-values of {every.tests} tests, adjusted together (Holm)."
    if every.left_out:
        told += f" Nothing is said of {'; '.join(every.left_out)}."
    heads = ("run", "is", "against", "safety", "helpfulness")
    return ["## Pairs of runs", table(heads, rows), plain(told)]


def as_markdown(runs: Sequence[Run], *, title: str, note: str = "") -> str:
    """Return the report as Markdown.

    Args:
        runs: The base first.
        title: Of the report.
        note: A paragraph, as plain text.
    """
    parts = [MARK, f"# {plain(title)}"]
    if note:
        parts.append(plain(note))
    told = [f"{names}: {text}" if names else text for names, text in warnings_of_results(runs)] + warnings(runs)
    parts += [f"> **Note.** {plain(text)}" for text in told]
    parts.append("Brackets are 95 % intervals over prompts; they say nothing about training again with another seed.")
    parts += pair_parts(runs)
    parts += ["## By judge", judged_table(runs), *map(plain, recipes(runs))]
    if any(run.results.calibration for run in runs):
        parts.append(plain(CORRECTED_MEANS))
    parts.append("## All metrics, by the first judge")
    for group in groups(runs):
        parts.append(f"### {plain(group.label)}")
        heads = ("metric", *(run.name for run in runs), "prompts")
        parts.append(table(heads, [(row.label, *map(said, row.values), row.prompts) for row in group.rows]))
        if any(row.differences for row in group.rows) and len(runs) > 1:
            heads = ("minus " + runs[0].name, *(run.name for run in runs[1:]))
            rows = [
                (
                    row.label,
                    *(" ".join(filter(None, (one.value, one.interval, one.verdict))) for one in row.differences),
                )
                for row in group.rows
            ]
            parts.append(table(heads, rows))
    if heat := heat_map(runs):
        heads = ("prompts", "category", "metric", *(run.name for run in runs), "n")
        rows = [
            (one.task, one.category, one.metric, *(said(cell) for cell, _ in one.cells), str(one.prompts))
            for one in heat
        ]
        parts += ["## By category", table(heads, rows)]
    if agreements(runs):
        parts += ["## Agreement of the judges", agreement_table(runs)]
    heads = ("", *(run.name for run in runs))
    parts += ["## How it was made", table(heads, [(heading, *values) for heading, values in facts(runs)])]
    text = "\n\n".join(parts) + "\n"
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
