"""Provenance of runs: labels and targets, versions, hardware, seeds and time, from the run's own records."""

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

from bfpo.core.pairs import CELLS
from bfpo.errors import RecipeError
from bfpo.losses.labeling import LabelingFunction
from bfpo.report.curves import last_margin
from bfpo.report.run_files import Run
from bfpo.report.words import MISSING, format_duration, format_exact, lesson


class LabelCell(NamedTuple):
    """A cell of the label table, as texts.

    Args:
        cell: Short name of the cell.
        label: The label.
        target: Target margin, in nats.
        lesson: What the label teaches.
        final_margin: Last logged margin, in nats.
    """

    cell: str
    label: str
    target: str
    lesson: str
    final_margin: str


class LabelTable(NamedTuple):
    """The labels of a run's loss.

    Args:
        run: Name of the run.
        loss: Name of the loss.
        beta: The loss's beta, as text.
        cells: Cells by short name; empty when the loss has no label table.
        reason: Why there is no label table; "" if there is one.
        pairs: Pairs that it is for, in words; "" for all.
    """

    run: str
    loss: str
    beta: str
    cells: dict[str, LabelCell]
    reason: str
    pairs: str = ""


_GRADED = "the label of two versions of one answer is multiplied by the difference of their degrees"


def label_tables(run: Run) -> list[LabelTable]:
    """Return the label table of a run, or two if the labels of judged pairs are corrected; none without a loss."""
    options = run.section("recipe", "loss")
    if not options:
        return []
    name = str(options.get("name", "bfpo"))
    if ":" in name:
        # The class may not be importable here, and a page does not run code that a record names.
        reason = "it is a custom loss, and the run's record has no label table"
        return [LabelTable(run.name, name, MISSING, {}, reason)]
    from bfpo.losses.build import make_loss

    try:
        loss = make_loss(options)
    except RecipeError as error:
        return [LabelTable(run.name, name, MISSING, {}, f"this version of bfpo cannot build it ({error})")]
    labeling = getattr(loss, "labeling", None)
    beta = f"{loss.beta:g}"
    if not isinstance(labeling, LabelingFunction):
        return [LabelTable(run.name, name, beta, {}, "it does not regress to the labels of a fixed table")]
    by_pairs = {"": labeling}
    if (errors := getattr(loss, "label_errors", None)) is not None:
        found = f"sensitivity {errors.sensitivity:g}, specificity {errors.specificity:g}"
        by_pairs = {
            f"pairs that a judge labeled, corrected for its errors ({found})": labeling.corrected(errors),
            "other pairs": labeling,
        }
    note = [_GRADED] if getattr(loss, "graded", False) else []
    return [
        LabelTable(
            run.name,
            name,
            beta,
            _label_cells(run, of_pairs, loss.beta),
            reason="",
            pairs="; ".join([*filter(None, [pairs]), *note]),
        )
        for pairs, of_pairs in by_pairs.items()
    ]


def _label_cells(run: Run, labeling: LabelingFunction, beta: float) -> dict[str, LabelCell]:
    cells: dict[str, LabelCell] = {}
    for cell in CELLS:
        label = getattr(labeling, cell)
        margin = last_margin(run, cell)
        cells[cell] = LabelCell(
            cell,
            format_exact(label),
            format_exact(label / beta),
            lesson(cell, label),
            MISSING if margin is None else format_exact(round(margin, 1)),
        )
    return cells


def metadata(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Return the metadata of the runs: a heading and one text per run; rows that no run has are left out."""
    rows = []
    for heading, describe in _METADATA:
        values = [describe(run) or MISSING for run in runs]
        if any(value != MISSING for value in values):
            rows.append((heading, values))
    return rows


def protocol_warnings(runs: Sequence[Run]) -> list[str]:
    """Return warnings that the runs were evaluated differently, so that their numbers may not be comparable."""
    warnings = []
    for difference, describe in (("judged by different judges", _judges), ("sampled differently", _sampling)):
        if len({describe(run) for run in runs}) > 1:
            warnings.append(f"The runs were {difference}; see “Provenance” before comparing them.")
    return warnings


def calibration(run: Run) -> str:
    """Return what the corrected rates of a run rest on; "" where there are none."""
    return "; ".join(
        f"{entry.judge} on '{entry.question}': right on {_format_share(entry.sensitivity, entry.yes)} of "
        f"the answers that annotators labeled yes and on {_format_share(entry.specificity, entry.no)} of those "
        f"labeled no, {entry.answers:,} answers of {', '.join(entry.models)} in {entry.labeled}"
        for entry in run.results.calibration
    )


def _format_share(share: float, count: int) -> str:
    return f"{share:.1%} ({count:,})" if count else f"{MISSING} (none)"


def _format_value(value: object) -> str:
    return "" if value is None else str(value)


def _format_time(value: object) -> str:
    try:
        return datetime.fromisoformat(_format_value(value)).astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC")
    except ValueError:
        return _format_value(value)


def _format_mapping(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items() if value not in (None, "", []))


def _judges(run: Run) -> str:
    return ", ".join("@".join(filter(None, map(judge.get, ("name", "revision")))) for judge in run.results.judges)


def _sampling(run: Run) -> str:
    return _format_mapping(run.results.sampling)


def _command(run: Run) -> str:
    command = _format_value(run.record.get("command"))
    return f"bfpo {command}" if command else ""


def _training_time(run: Run) -> str:
    wall, cpu = run.record.get("wall_seconds"), run.record.get("cpu_seconds")
    return "" if wall is None and cpu is None else f"{format_duration(wall)} wall, {format_duration(cpu)} CPU"


def _training(run: Run) -> str:
    trained, steps = run.section("trained"), run.record.get("steps")
    parts = []
    if isinstance(steps, int):
        parts.append(f"{steps:,} steps")
    if isinstance(trained.get("parameters"), int) and isinstance(trained.get("of"), int):
        parts.append(f"{trained['parameters']:,} of {trained['of']:,} parameters")
    return ", ".join(parts)


def _pair_counts(run: Run) -> str:
    parts = []
    for stream, cells in run.section("data", "train").items():
        if isinstance(cells, Mapping):
            counts = ", ".join(f"{cell} {count:,}" for cell, count in cells.items() if isinstance(count, int))
            parts.append(f"{stream}: {counts}")
    return "; ".join(parts)


_METADATA: tuple[tuple[str, Callable[[Run], str]], ...] = (
    ("Model", lambda run: _format_value(run.results.model)),
    ("Command", _command),
    ("Trained at", lambda run: _format_time(run.record.get("created"))),
    ("Loss", lambda run: _format_mapping(run.section("recipe", "loss"))),
    ("Training pairs by cell", _pair_counts),
    ("Training", _training),
    ("Training seed", lambda run: _format_value(run.section("recipe", "trainer").get("seed"))),
    ("Training time", _training_time),
    ("Hardware", lambda run: _format_mapping(run.section("hardware"))),
    ("Versions", lambda run: _format_mapping(run.section("versions"))),
    ("Code revision", lambda run: _format_value(run.record.get("git_revision"))),
    ("Evaluated at", lambda run: _format_time(run.results.created)),
    ("Sampling", _sampling),
    ("Prompt template", lambda run: _format_value(run.results.template_policy)),
    ("Judges", _judges),
    ("Correction", calibration),
)
