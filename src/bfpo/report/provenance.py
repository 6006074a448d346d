"""How runs were made: labels and targets, versions, hardware, seeds and time, as the records say."""

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

from bfpo.core.pairs import CELLS
from bfpo.errors import RecipeError
from bfpo.losses.labeling import LabelingFunction
from bfpo.report.curves import last_margin
from bfpo.report.run_files import Run
from bfpo.report.words import MISSING, duration, lesson, short


class LabelCell(NamedTuple):
    """A cell of the label table.

    Args:
        cell: Its short name.
        label: As text.
        target: In nats, as text.
        lesson: What it teaches.
        reached: Margin in the log's last line, in nats, as text.
    """

    cell: str
    label: str
    target: str
    lesson: str
    reached: str


class LabelTable(NamedTuple):
    """The labels of a run's loss.

    Args:
        run: Name of the run.
        loss: Name of the loss.
        beta: Of the loss, as text.
        cells: By short name; empty when the loss has no label table.
        why_none: Why there is none.
    """

    run: str
    loss: str
    beta: str
    cells: dict[str, LabelCell]
    why_none: str


def label_table(run: Run) -> LabelTable | None:
    """Return the label table of a run; None when its record has no preference loss."""
    options = run.section("recipe", "loss")
    if not options:
        return None
    name = str(options.get("name", "bfpo"))
    if ":" in name:
        # Its class may not be here, and a page doesn't run code that a record names.
        return LabelTable(run.name, name, MISSING, {}, "it is a loss of its own, and its record has no label table")
    from bfpo.losses.build import make_loss

    try:
        loss = make_loss(options)
    except RecipeError as error:
        return LabelTable(run.name, name, MISSING, {}, f"this version of bfpo can't build it ({error})")
    labeling = getattr(loss, "labeling", None)
    if not isinstance(labeling, LabelingFunction):
        why = "it doesn't regress onto the labels of a fixed table"
        return LabelTable(run.name, name, f"{loss.beta:g}", {}, why)
    cells: dict[str, LabelCell] = {}
    for cell in CELLS:
        label = getattr(labeling, cell)
        reached = last_margin(run, cell)
        cells[cell] = LabelCell(
            cell,
            short(label),
            short(label / loss.beta),
            lesson(cell, label),
            MISSING if reached is None else short(round(reached, 1)),
        )
    return LabelTable(run.name, name, f"{loss.beta:g}", cells, "")


Fact = tuple[str, list[str]]


def facts(runs: Sequence[Run]) -> list[Fact]:
    """Return what is known of how the runs were made: a heading and one text per run; what no run has is left out."""
    found: list[Fact] = []
    for heading, of in _FACTS:
        values = [of(run) or MISSING for run in runs]
        if any(value != MISSING for value in values):
            found.append((heading, values))
    return found


def warnings(runs: Sequence[Run]) -> list[str]:
    """Return in what ways the runs were evaluated differently, so that their numbers compare with care."""
    found = []
    for what, of in (("judged by different judges", _judges), ("sampled differently", _sampling)):
        if len({of(run) for run in runs}) > 1:
            found.append(f"The runs were {what}; see “How it was made” before comparing them.")
    return found


def _text(value: object) -> str:
    return "" if value is None else str(value)


def _time(value: object) -> str:
    try:
        return datetime.fromisoformat(_text(value)).astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC")
    except ValueError:
        return _text(value)


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items() if value not in (None, "", []))


def _judges(run: Run) -> str:
    return ", ".join("@".join(filter(None, map(judge.get, ("name", "revision")))) for judge in run.results.judges)


def _sampling(run: Run) -> str:
    return _pairs(run.results.sampling)


def _command(run: Run) -> str:
    command = _text(run.record.get("command"))
    return f"bfpo {command}" if command else ""


def _seconds(run: Run) -> str:
    wall, cpu = run.record.get("wall_seconds"), run.record.get("cpu_seconds")
    return "" if wall is None and cpu is None else f"{duration(wall)} wall, {duration(cpu)} CPU"


def _trained(run: Run) -> str:
    trained, steps = run.section("trained"), run.record.get("steps")
    told = []
    if isinstance(steps, int):
        told.append(f"{steps:,} steps")
    if isinstance(trained.get("parameters"), int) and isinstance(trained.get("of"), int):
        told.append(f"{trained['parameters']:,} of {trained['of']:,} parameters")
    return ", ".join(told)


def _pair_counts(run: Run) -> str:
    told = []
    for stream, cells in run.section("data", "train").items():
        if isinstance(cells, Mapping):
            counts = ", ".join(f"{cell} {count:,}" for cell, count in cells.items() if isinstance(count, int))
            told.append(f"{stream}: {counts}")
    return "; ".join(told)


def _loss(run: Run) -> str:
    return _pairs(run.section("recipe", "loss"))


def _share(share: float, of: int) -> str:
    return f"{share:.1%} ({of:,})" if of else f"{MISSING} (none)"


def calibration(run: Run) -> str:
    """Return what the corrected rates of a run rest on; "" where there are none."""
    return "; ".join(
        f"{one.judge} on '{one.question}': right on {_share(one.sensitivity, one.yes)} of people's yes "
        f"and on {_share(one.specificity, one.no)} of their no, {one.answers:,} answers of "
        f"{', '.join(one.models)} in {one.labeled}"
        for one in run.results.calibration
    )


_FACTS: tuple[tuple[str, Callable[[Run], str]], ...] = (
    ("Model", lambda run: _text(run.results.model)),
    ("Made by", _command),
    ("Made at", lambda run: _time(run.record.get("created"))),
    ("Loss", _loss),
    ("Training pairs by cell", _pair_counts),
    ("Trained", _trained),
    ("Training seed", lambda run: _text(run.section("recipe", "trainer").get("seed"))),
    ("Training time", _seconds),
    ("Hardware", lambda run: _pairs(run.section("hardware"))),
    ("Versions", lambda run: _pairs(run.section("versions"))),
    ("Code revision", lambda run: _text(run.record.get("git_revision"))),
    ("Evaluated at", lambda run: _time(run.results.created)),
    ("Sampling", _sampling),
    ("Prompt template", lambda run: _text(run.results.template_policy)),
    ("Judges", _judges),
    ("Corrected by", calibration),
)
