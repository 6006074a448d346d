"""The report: a self-contained HTML page, with its figure, tables and text as separate files."""

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from bfpo.core.files import check_own_files, write_text
from bfpo.report.certificates import HEADINGS, certificate_notes, certificate_rows
from bfpo.report.conversations import conversation_groups
from bfpo.report.curves import learning_curves
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
from bfpo.report.lengths import length_figures
from bfpo.report.markdown import as_markdown
from bfpo.report.model_comparisons import compare_runs
from bfpo.report.plane import PlanePoint, draw_plane, front, plane_points
from bfpo.report.provenance import label_tables, metadata, protocol_warnings
from bfpo.report.run_files import Run, read_runs
from bfpo.report.samples import FAILURES_PER_KIND, SAMPLES_PER_KIND, sample_groups
from bfpo.report.summary import summarize
from bfpo.report.svg import DARK, LIGHT, STYLE, Drawing, run_class
from bfpo.report.tables import comparisons_csv, metric_groups, metrics_csv
from bfpo.report.words import CORRECTION_NOTE

PAGE, TEXT, FIGURE = "report.html", "report.md", "pareto.svg"
METRICS, COMPARISONS = "metrics.csv", "comparisons.csv"
FILES = (PAGE, TEXT, FIGURE, METRICS, COMPARISONS)
# With more runs than this, their names cover each other on the plane.
MAX_NAMES = 6
# With more runs than this, each run is a row of the tables.
MAX_COLUMNS = 3
# More model comparisons than this are folded.
MAX_UNFOLDED = 10
GENERATOR = b'<meta name="generator" content="bfpo">'


def write_report(out: Path, runs: Sequence[Path], *, title: str = "Safety and helpfulness", note: str = "") -> Path:
    """Write `report.html`, `report.md`, `pareto.svg`, `metrics.csv` and `comparisons.csv`.

    Args:
        out: Output folder; created if it does not exist.
        runs: Run folders, baseline first. Each contains `evaluation/results.json` or `results.json`. Prompts,
            completions and verdicts next to it, and `run.json`, `metrics.jsonl` and `recipe.resolved.yaml` in the
            run folder, are shown if they exist.
        title: Title of the page.
        note: A paragraph below the summary, as plain text.

    Returns:
        Path of the page.

    Raises:
        DataError: If a file is missing or malformed, the runs are not comparable, or `out` contains a file with one
            of these names that is not part of a report.
    """
    check_ownership(out)
    loaded = read_runs(runs)
    # The page is written first: it identifies the other files as part of a report.
    write_text(out / PAGE, render(loaded, title=title, note=note))
    write_text(out / TEXT, as_markdown(loaded, title=title, note=note))
    points = plane_points(loaded)
    if points:
        write_text(out / FIGURE, _draw_plane(points, legend=True).standalone())
    else:
        # The figure of an earlier report would show other runs.
        (out / FIGURE).unlink(missing_ok=True)
    write_text(out / METRICS, metrics_csv(loaded))
    write_text(out / COMPARISONS, comparisons_csv(loaded))
    return out / PAGE


def check_ownership(
    out: Path, *, page: str = PAGE, names: Sequence[str] = FILES, command: str = "bfpo report"
) -> None:
    """Check that writing a report into a folder overwrites only the files of an earlier report.

    Args:
        out: Output folder.
        page: File name of the page.
        names: File names of all parts of the report.
        command: Command that writes it, for the message.

    Raises:
        DataError: If the folder contains a file with a report's file name that is not part of a report.
    """
    is_own = False
    if (out / page).is_file():
        with (out / page).open("rb") as file:
            is_own = GENERATOR in file.read(2000)
    check_own_files(out, names, command, is_own=is_own)


def render(runs: Sequence[Run], *, title: str, note: str = "") -> str:
    """Return the page.

    Args:
        runs: Runs, baseline first.
        title: Title of the page.
        note: A paragraph below the summary, as plain text.
    """
    script = files("bfpo.report").joinpath("browse.js").read_text(encoding="utf-8")
    points = plane_points(runs)
    on_plane = {point.run_index for point in points}
    best = {points[index].coordinates for index in front([point.coordinates for point in points])}
    curves = [learning_curves(run, index) for index, run in enumerate(runs)]
    groups = metric_groups(runs)
    tables = [table for run in runs for table in label_tables(run)]
    page = load_template("template.html").render(
        title=title,
        note=note,
        script=script,
        # The content security policy allows only this script, so that no text of a model could run even unescaped.
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        runs=runs,
        colors={"light": LIGHT, "dark": DARK},
        plot_style=STYLE,
        run_class=run_class,
        has_run_rows=len(runs) > MAX_COLUMNS,
        summaries=summarize(runs),
        result_warnings=result_warnings(runs),
        protocol_warnings=protocol_warnings(runs),
        plane=_draw_plane(points, legend=False).inline() if points else None,
        numbered_points=points if len(points) > MAX_NAMES else [],
        has_front=len(best) > 1,
        off_plane=[run.name for index, run in enumerate(runs) if index not in on_plane],
        length_figures=length_figures(runs),
        model_comparisons=compare_runs(runs),
        max_unfolded=MAX_UNFOLDED,
        judge_rows=judge_rows(runs),
        main_headings=main_headings(runs),
        correction_note=CORRECTION_NOTE if any(run.results.calibration for run in runs) else "",
        composite_notes=composite_notes(runs),
        agreement_rows=agreement_rows(runs),
        category_rows=category_rows(runs),
        metric_groups=groups,
        interval_kinds=_interval_kinds(runs),
        has_undecided=any(metric.least is not None for run in runs for metric in run.results.metrics),
        num_comparisons=sum(bool(cell.verdict) for group in groups for row in group.rows for cell in row.differences),
        learning_curves=[run_curves for run_curves in curves if run_curves is not None],
        label_tables=tables,
        language_rows=language_rows(runs),
        certificate_headings=HEADINGS,
        certificate_rows=certificate_rows(runs),
        certificate_notes=certificate_notes(runs),
        sample_groups=[*sample_groups(runs), *conversation_groups(runs)],
        reasoning_rows=reasoning_rows(runs),
        has_reasoning_verdicts=any(run.results.reasoning for run in runs),
        as_json=_as_json,
        tool_names=_tool_names,
        samples_per_kind=SAMPLES_PER_KIND,
        failures_per_kind=FAILURES_PER_KIND,
        metadata=metadata(runs),
    )
    # A text may contain a lone surrogate, which JSON can write and UTF-8 cannot.
    return page.encode("utf-8", "backslashreplace").decode("utf-8")


def _as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=2)


def _tool_names(tools: Sequence[Mapping[str, Any]]) -> str:
    """Return the names of tools, which may be schemas of functions or other objects."""
    functions = [tool.get("function", tool) for tool in tools]
    return ", ".join(
        str(function.get("name", "")) if isinstance(function, Mapping) else "unnamed" for function in functions
    )


@cache
def load_template(name: str) -> Template:
    """Return a template of a page, with escaping on."""
    environment = Environment(
        loader=PackageLoader("bfpo.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def _draw_plane(points: Sequence[PlanePoint], *, legend: bool) -> Drawing:
    """Draw the plane; many runs are numbered, without arrows, which would cover them.

    Args:
        points: At least one run.
        legend: Whether the drawing contains the legend of numbered runs. The page has one that fits narrow screens.
    """
    is_numbered = len(points) > MAX_NAMES
    return draw_plane(points, arrows=not is_numbered, numbers=is_numbered, legend=is_numbered and legend)


def _interval_kinds(runs: Sequence[Run]) -> list[str]:
    """Return the kinds of all intervals on the page."""
    of_metrics = {metric.interval for run in runs for metric in run.results.metrics}
    of_comparisons = {comparison.interval for run in runs[1:] for comparison in run.results.comparisons}
    return sorted(of_metrics | of_comparisons)
