"""The report: one page that explains itself, its figure and its tables as files beside it."""

import base64
import hashlib
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from bfpo.core.files import write_text
from bfpo.errors import DataError
from bfpo.report import svg as drawing
from bfpo.report.curves import curves
from bfpo.report.judge_tables import (
    agreements,
    by_judge,
    column_name,
    columns,
    heat_map,
    recipes,
    warnings_of_results,
)
from bfpo.report.lengths import lengths
from bfpo.report.markdown import as_markdown
from bfpo.report.model_comparisons import pairs
from bfpo.report.plane import Stand, front, plane, stands
from bfpo.report.provenance import facts, label_table, warnings
from bfpo.report.run_files import Run, read_runs
from bfpo.report.samples import ANY_PER_KIND, FAILURES_PER_KIND, sample_groups
from bfpo.report.summary import stories
from bfpo.report.tables import comparisons_csv, groups, metrics_csv
from bfpo.report.words import CORRECTED_MEANS

PAGE, TEXT, FIGURE = "report.html", "report.md", "pareto.svg"
METRICS, COMPARISONS = "metrics.csv", "comparisons.csv"
FILES = (PAGE, TEXT, FIGURE, METRICS, COMPARISONS)
# More names than this cover each other on the plane.
MOST_NAMES = 6
# With more runs than this, a run is a row of the tables.
MOST_COLUMNS = 3
# More pairs than this are folded.
MOST_PAIRS = 10
GENERATOR = b'<meta name="generator" content="bfpo">'


def write_report(out: Path, runs: Sequence[Path], *, title: str = "Safety and helpfulness", note: str = "") -> Path:
    """Write `report.html` into a folder, with `report.md`, `pareto.svg` and two tables beside it.

    Args:
        out: The folder; made if there is none.
        runs: Folders of runs, the base first. Each holds `evaluation/results.json` (or `results.json`); beside that
            prompts, completions and verdicts, and `run.json`, `metrics.jsonl` and `recipe.resolved.yaml` are shown
            where they are.
        title: Of the page.
        note: A paragraph under the verdict, as plain text.

    Returns:
        The page.

    Raises:
        DataError: If a file is missing or malformed, the runs don't compare, or `out` holds a file of one of these
            names that isn't a report's.
    """
    read = read_runs(runs)
    check_own(out)
    # The page goes first: it is what says that the other files are a report's.
    write_text(out / PAGE, render(read, title=title, note=note))
    write_text(out / TEXT, as_markdown(read, title=title, note=note))
    found = stands(read)
    if found:
        write_text(out / FIGURE, _plane(found).standalone())
    else:
        # One of an earlier report would not be about these runs.
        (out / FIGURE).unlink(missing_ok=True)
    write_text(out / METRICS, metrics_csv(read))
    write_text(out / COMPARISONS, comparisons_csv(read))
    return out / PAGE


def check_own(out: Path) -> None:
    """Refuse a folder in which a file that isn't a report's bears the name of one.

    Raises:
        DataError: If there is one.
    """
    there = [name for name in FILES if (out / name).exists()]
    page = out / PAGE
    if page.is_file():
        with page.open("rb") as file:
            if GENERATOR in file.read(2000):
                return
    if there:
        raise DataError(f"{out / there[0]} isn't from bfpo report; choose another folder (--out) or move it")


def render(runs: Sequence[Run], *, title: str, note: str = "") -> str:
    """Return the page.

    Args:
        runs: The base first.
        title: Of the page.
        note: A paragraph under the verdict, as plain text.
    """
    environment = Environment(
        loader=PackageLoader("bfpo.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found = stands(runs)
    script = files("bfpo.report").joinpath("browse.js").read_text(encoding="utf-8")
    # The page's policy names the one script by its hash: nothing that a model wrote could run, were it not escaped.
    script_hash = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    page = environment.get_template("template.html").render(
        title=title,
        note=note,
        script=script,
        script_hash=script_hash,
        runs=runs,
        colors={"light": drawing.LIGHT, "dark": drawing.DARK},
        plot_style=drawing.STYLE,
        run_class=drawing.run_class,
        stories=stories(runs),
        told=warnings_of_results(runs),
        by_judge=by_judge(runs),
        judge_columns=_heads(runs),
        corrected_means=CORRECTED_MEANS if any(run.results.calibration for run in runs) else "",
        recipes=recipes(runs),
        heat=heat_map(runs),
        agreements=agreements(runs),
        lengths=lengths(runs),
        pairs=pairs(runs),
        most_pairs=MOST_PAIRS,
        numbered=len(found) > MOST_NAMES,
        many=len(runs) > MOST_COLUMNS,
        warnings=warnings(runs),
        plane=_plane(found).inline() if found else None,
        on_front=len({found[index].value for index in front([one.value for one in found])}) > 1,
        off_plane=[run.name for index, run in enumerate(runs) if index not in {one.place for one in found}],
        groups=groups(runs),
        n_comparisons=sum(one.verdict is not None for run in runs[1:] for one in run.results.comparisons),
        has_undecided=any(one.least is not None for run in runs for one in run.results.metrics),
        interval_kinds=_interval_kinds(runs),
        curves=[drawn for index, run in enumerate(runs) if (drawn := curves(run, index))],
        label_tables=[table for run in runs if (table := label_table(run))],
        sample_groups=sample_groups(runs),
        any_per_kind=ANY_PER_KIND,
        failures_per_kind=FAILURES_PER_KIND,
        facts=facts(runs),
    )
    # A text may hold half a character, which JSON can write and UTF-8 can't.
    return page.encode("utf-8", "backslashreplace").decode("utf-8")


def _plane(found: Sequence[Stand]) -> drawing.Drawing:
    """Draw the plane; many runs are numbered, and without arrows that would cover them."""
    several = len(found) > MOST_NAMES
    return plane(found, arrows=not several, legend=several)


def _heads(runs: Sequence[Run]) -> list[str]:
    """Return how the columns of the main numbers are headed."""
    keys = columns(runs)
    return [column_name(key, with_suite=len({one[0] for one in keys}) > 1) for key in keys]


def _interval_kinds(runs: Sequence[Run]) -> list[str]:
    """Return how the intervals on the page were made."""
    of_values = {one.interval for run in runs for one in run.results.metrics}
    return sorted(of_values | {one.interval for run in runs[1:] for one in run.results.comparisons})
