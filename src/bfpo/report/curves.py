"""Learning curves: the margin of each cell against its target, and the loss of the two streams."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from markupsafe import Markup

from bfpo.core.pairs import CELLS
from bfpo.evaluation.results import MetricResult
from bfpo.report.run_files import Run
from bfpo.report.svg import Drawing, Point, run_class, ticks
from bfpo.report.words import CELL_NAMES, MINUS, short

WIDTH, HEIGHT = 330.0, 190.0
LEFT, TOP, RIGHT, BOTTOM = 46.0, 10.0, 12.0, 28.0

Series = list[tuple[float, float]]


class Panel(NamedTuple):
    """A small picture with its heading.

    Args:
        heading: What it is about.
        picture: The drawing; None when there is nothing to draw.
    """

    heading: str
    picture: Markup | None


@dataclass(frozen=True, slots=True)
class Curves:
    """What a run's log shows.

    Args:
        run: Name of the run.
        css: Class that colors it.
        cells: One panel per cell.
        loss: Of the two streams.
        has_targets: Whether the loss aims at margins.
        has_held_out: Whether held-out margins are drawn.
    """

    run: str
    css: str
    cells: Sequence[Panel]
    loss: Panel
    has_targets: bool
    has_held_out: bool


class Frame:
    """A pair of axes to draw series in.

    Args:
        drawing: To draw on.
        x: First and last step.
        y: Lowest and highest value.
    """

    def __init__(self, drawing: Drawing, x: tuple[float, float], y: tuple[float, float]) -> None:
        self.drawing = drawing
        self._x, self._y = x, y
        for tick in ticks(*y, about=4):
            height = self.place(x[0], tick).y
            drawing.path((Point(LEFT, height), Point(WIDTH - RIGHT, height)), "zero" if tick == 0 else "grid")
            drawing.text(Point(LEFT - 6, height + 4.5), f"{tick:g}".replace("-", MINUS), anchor="end")
        for tick in ticks(*x, about=4):
            if tick == round(tick):
                at = self.place(tick, y[0])
                anchor = "end" if at.x > WIDTH - RIGHT - 14 else "middle"
                drawing.text(Point(at.x, HEIGHT - 8), f"{tick:,.0f}", anchor=anchor)

    def place(self, step: float, value: float) -> Point:
        """Return where a value stands."""
        (x0, x1), (y0, y1) = self._x, self._y
        across = (step - x0) / ((x1 - x0) or 1)
        up = (value - y0) / ((y1 - y0) or 1)
        return Point(LEFT + (WIDTH - LEFT - RIGHT) * across, TOP + (HEIGHT - TOP - BOTTOM) * (1 - up))

    def curve(self, series: Series, css: str) -> None:
        """Draw a series; one that has a single point is a dot."""
        points = [self.place(*one) for one in series]
        if len(points) == 1:
            self.drawing.circle(
                points[0], 3, css.replace("curve", "dot").replace("second", "head").replace("target", "head")
            )
        elif points:
            self.drawing.path(points, css)

    def name(self, height: float, text: str, *, above: bool) -> None:
        """Write a name at the right end of a line."""
        self.drawing.text(Point(WIDTH - RIGHT - 2, height + (-6 if above else 17)), text, "on-panel", anchor="end")


def curves(run: Run, index: int) -> Curves | None:
    """Return the curves of a run; None when it logged no margins."""
    margins = {cell: _series(run.log, f"bfpo/margin/{cell}") for cell in CELLS}
    if not any(margins.values()):
        return None
    targets = {cell: _targets(run.log, cell) for cell in CELLS}
    held_out = {cell: _series(run.log, f"eval_main_bfpo/margin/{cell}") for cell in CELLS}
    everything = [one for group in (margins, targets, held_out) for series in group.values() for one in series]
    steps = (0.0, max(step for step, _ in everything))
    low, high = min(0.0, *(value for _, value in everything)), max(0.0, *(value for _, value in everything))
    room = 0.12 * ((high - low) or 1)
    panels = []
    for cell in CELLS:
        heading = f"{cell}: {CELL_NAMES[cell]}"
        if not margins[cell]:
            panels.append(Panel(heading, None))
            continue
        name = f"curve-{index}-{cell}"
        said = f"ends at {short(margins[cell][-1][1])} nats"
        if targets[cell]:
            said += f"; its target is {short(targets[cell][-1][1])}"
        title = f"{run.name}: margin of the pairs with {CELL_NAMES[cell]} over the steps"
        frame = Frame(Drawing(name, WIDTH, HEIGHT, title=title, description=said), steps, (low - room, high + room))
        if targets[cell]:
            frame.curve(targets[cell], "target")
            value = targets[cell][-1][1]
            # On the side of the line that the curve doesn't come from.
            frame.name(frame.place(0, value).y, f"target {short(value)}", above=value >= 0)
        frame.curve(margins[cell], f"curve {run_class(index)}")
        for step, value in held_out[cell]:
            frame.drawing.circle(frame.place(step, value), 3.5, f"ring {run_class(index)}")
        panels.append(Panel(heading, frame.drawing.inline()))
    return Curves(
        run.name, run_class(index), panels, _loss(run, index), any(targets.values()), any(held_out.values())
    )


def _loss(run: Run, index: int) -> Panel:
    heading = "loss of each stream"
    streams = {name: _series(run.log, f"stream/{name}/loss") for name in ("main", "buffer")}
    streams = {name: series for name, series in streams.items() if series}
    if not streams:
        return Panel(heading, None)
    last = max(step for series in streams.values() for step, _ in series)
    values = [value for series in streams.values() for _, value in series]
    ends = ", ".join(f"{name} ends at {series[-1][1]:.4g}" for name, series in streams.items())
    title = f"{run.name}: loss of each stream over the steps"
    drawing = Drawing(f"curve-{index}-loss", WIDTH, HEIGHT, title=title, description=ends)
    frame = Frame(drawing, (0.0, last), (min(0.0, *values), (max(0.0, *values) or 1) * 1.08))
    for name, series in streams.items():
        frame.curve(series, "second" if name == "buffer" else f"curve {run_class(index)}")
    return Panel(heading, drawing.inline())


def strip(name: str, metrics: Sequence[MetricResult | None]) -> Markup | None:
    """Draw a metric of several runs on a line from 0 to 1; None when none has a value there."""
    shown = [(index, one) for index, one in enumerate(metrics) if one is not None and one.value is not None]
    bounds = [bound for _, one in shown for bound in (one.value, one.low, one.high) if bound is not None]
    if not bounds or min(bounds) < 0 or max(bounds) > 1:
        return None
    pad, step, length = 6.0, 11.0, 120.0
    height = step * len(metrics) + 4
    drawing = Drawing(name, length + 2 * pad, height, title="The same numbers on a line from 0 to 1")
    for edge in (0.0, 0.5, 1.0):
        drawing.path((Point(pad + edge * length, 0), Point(pad + edge * length, height)), "grid")
    for index, one in shown:
        y = 2 + step * (index + 0.5)
        if one.low is not None and one.high is not None:
            ends = (Point(pad + one.low * length, y), Point(pad + one.high * length, y))
            drawing.path(ends, f"bar {run_class(index)}")
        center = Point(pad + (one.value or 0.0) * length, y)
        drawing.circle(center, 3, f"{'ring' if index == 0 else 'dot'} {run_class(index)}")
    return drawing.inline()


def _series(log: Sequence[Mapping[str, Any]], name: str) -> Series:
    return [(line["step"], line[name]) for line in log if line.get(name) is not None]


def _targets(log: Sequence[Mapping[str, Any]], cell: str) -> Series:
    margin, gap = f"bfpo/margin/{cell}", f"bfpo/target_gap/{cell}"
    both = [line for line in log if line.get(margin) is not None and line.get(gap) is not None]
    return [(line["step"], line[margin] - line[gap]) for line in both]


def last_margin(run: Run, cell: str) -> float | None:
    """Return the mean margin of a cell in the log's last line that has one, nats."""
    series = _series(run.log, f"bfpo/margin/{cell}")
    return series[-1][1] if series else None
