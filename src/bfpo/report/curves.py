"""Learning curves: the margin of each cell against its target, and the loss of the two streams."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from markupsafe import Markup

from bfpo.core.pairs import CELLS
from bfpo.evaluation.results import MetricResult
from bfpo.report.run_files import Run
from bfpo.report.svg import Drawing, Point, run_class, ticks
from bfpo.report.words import CELL_NAMES, MINUS, format_exact

WIDTH, HEIGHT = 330.0, 190.0
LEFT, TOP, RIGHT, BOTTOM = 46.0, 10.0, 12.0, 28.0

Series = list[tuple[float, float]]


class CurvePanel(NamedTuple):
    """A small drawing with its heading.

    Args:
        heading: Heading.
        drawing: The drawing; None when there is no data.
    """

    heading: str
    drawing: Markup | None


@dataclass(frozen=True, slots=True)
class LearningCurves:
    """Learning curves of one run.

    Args:
        run: Name of the run.
        css: CSS class that colors the run.
        cells: One panel per cell.
        loss: Panel of the loss of the two streams.
        has_targets: Whether the loss has target margins.
        has_held_out: Whether margins on held-out pairs are drawn.
    """

    run: str
    css: str
    cells: Sequence[CurvePanel]
    loss: CurvePanel
    has_targets: bool
    has_held_out: bool


class Axes:
    """A pair of axes on a drawing.

    Args:
        drawing: Drawing to draw on.
        steps: First and last step.
        values: Lowest and highest value.
    """

    def __init__(self, drawing: Drawing, steps: tuple[float, float], values: tuple[float, float]) -> None:
        self.drawing = drawing
        self._steps, self._values = steps, values
        for tick in ticks(*values, count=4):
            height = self.locate(steps[0], tick).y
            drawing.path((Point(LEFT, height), Point(WIDTH - RIGHT, height)), "zero" if tick == 0 else "grid")
            drawing.text(Point(LEFT - 6, height + 4.5), f"{tick:g}".replace("-", MINUS), anchor="end")
        for tick in ticks(*steps, count=4):
            if tick == round(tick):
                center = self.locate(tick, values[0])
                anchor = "end" if center.x > WIDTH - RIGHT - 14 else "middle"
                drawing.text(Point(center.x, HEIGHT - 8), f"{tick:,.0f}", anchor=anchor)

    def locate(self, step: float, value: float) -> Point:
        """Return the point of a step and a value."""
        (first, last), (low, high) = self._steps, self._values
        across = (step - first) / ((last - first) or 1)
        up = (value - low) / ((high - low) or 1)
        return Point(LEFT + (WIDTH - LEFT - RIGHT) * across, TOP + (HEIGHT - TOP - BOTTOM) * (1 - up))

    def draw_series(self, series: Series, css: str) -> None:
        """Draw a series as a line; a single point as a dot."""
        points = [self.locate(step, value) for step, value in series]
        if len(points) == 1:
            dot = css.replace("curve", "dot").replace("second", "head").replace("target", "head")
            self.drawing.circle(points[0], 3, dot)
        elif points:
            self.drawing.path(points, css)

    def write_name(self, height: float, text: str, *, above: bool) -> None:
        """Write a name at the right end of a line."""
        self.drawing.text(Point(WIDTH - RIGHT - 2, height + (-6 if above else 17)), text, "on-panel", anchor="end")


def learning_curves(run: Run, index: int) -> LearningCurves | None:
    """Return the learning curves of a run; None when it logged no margins.

    Args:
        run: The run.
        index: Index of the run on the page.
    """
    margins = {cell: _read_series(run.log, f"bfpo/margin/{cell}") for cell in CELLS}
    if not any(margins.values()):
        return None
    targets = {cell: _read_targets(run.log, cell) for cell in CELLS}
    held_out = {cell: _read_series(run.log, f"eval_main_bfpo/margin/{cell}") for cell in CELLS}
    steps, values = _ranges(series for by_cell in (margins, targets, held_out) for series in by_cell.values())
    panels = []
    for cell in CELLS:
        heading = f"{cell}: {CELL_NAMES[cell]}"
        if not margins[cell]:
            panels.append(CurvePanel(heading, None))
            continue
        final_margin = margins[cell][-1][1]
        final_target = targets[cell][-1][1] if targets[cell] else None
        description = f"ends at {format_exact(final_margin)} nats"
        if final_target is not None:
            description += f"; its target is {format_exact(final_target)}"
        title = f"{run.name}: margin of the pairs with {CELL_NAMES[cell]} over the steps"
        drawing = Drawing(f"curve-{index}-{cell}", WIDTH, HEIGHT, title=title, description=description)
        axes = Axes(drawing, steps, values)
        if final_target is not None:
            axes.draw_series(targets[cell], "target")
            # The curve approaches the target from 0, so the name is on the other side of the line.
            height = axes.locate(0, final_target).y
            axes.write_name(height, f"target {format_exact(final_target)}", above=final_target >= 0)
        axes.draw_series(margins[cell], f"curve {run_class(index)}")
        for step, value in held_out[cell]:
            drawing.circle(axes.locate(step, value), 3.5, f"ring {run_class(index)}")
        panels.append(CurvePanel(heading, drawing.inline()))
    loss = _loss_panel(run, index)
    return LearningCurves(run.name, run_class(index), panels, loss, any(targets.values()), any(held_out.values()))


def _ranges(curves: Iterable[Series]) -> tuple[tuple[float, float], tuple[float, float]]:
    """Return the ranges of steps and of values, which all panels of a run share."""
    points = [point for series in curves for point in series]
    low = min(0.0, *(value for _, value in points))
    high = max(0.0, *(value for _, value in points))
    padding = 0.12 * ((high - low) or 1)
    return (0.0, max(step for step, _ in points)), (low - padding, high + padding)


def _loss_panel(run: Run, index: int) -> CurvePanel:
    heading = "loss of each stream"
    streams = {name: _read_series(run.log, f"stream/{name}/loss") for name in ("main", "buffer")}
    streams = {name: series for name, series in streams.items() if series}
    if not streams:
        return CurvePanel(heading, None)
    last = max(step for series in streams.values() for step, _ in series)
    values = [value for series in streams.values() for _, value in series]
    description = ", ".join(f"{name} ends at {series[-1][1]:.4g}" for name, series in streams.items())
    title = f"{run.name}: loss of each stream over the steps"
    drawing = Drawing(f"curve-{index}-loss", WIDTH, HEIGHT, title=title, description=description)
    axes = Axes(drawing, (0.0, last), (min(0.0, *values), (max(0.0, *values) or 1) * 1.08))
    for name, series in streams.items():
        axes.draw_series(series, "second" if name == "buffer" else f"curve {run_class(index)}")
    return CurvePanel(heading, drawing.inline())


def draw_strip(name: str, metrics: Sequence[MetricResult | None]) -> Markup | None:
    """Draw a metric of several runs on a line from 0 to 1; None when no run has a value in that range.

    Args:
        name: Name of the drawing, unique on its page.
        metrics: One per run.
    """
    shown = [
        (index, metric) for index, metric in enumerate(metrics) if metric is not None and metric.value is not None
    ]
    bounds = [bound for _, metric in shown for bound in (metric.value, metric.low, metric.high) if bound is not None]
    if not bounds or min(bounds) < 0 or max(bounds) > 1:
        return None
    pad, row_height, length = 6.0, 11.0, 120.0
    height = row_height * len(metrics) + 4
    drawing = Drawing(name, length + 2 * pad, height, title="The same numbers on a line from 0 to 1")
    for edge in (0.0, 0.5, 1.0):
        drawing.path((Point(pad + edge * length, 0), Point(pad + edge * length, height)), "grid")
    for index, metric in shown:
        y = 2 + row_height * (index + 0.5)
        if metric.low is not None and metric.high is not None:
            ends = (Point(pad + metric.low * length, y), Point(pad + metric.high * length, y))
            drawing.path(ends, f"bar {run_class(index)}")
        center = Point(pad + (metric.value or 0.0) * length, y)
        drawing.circle(center, 3, f"{'ring' if index == 0 else 'dot'} {run_class(index)}")
    return drawing.inline()


def _read_series(log: Sequence[Mapping[str, Any]], name: str) -> Series:
    return [(line["step"], line[name]) for line in log if line.get(name) is not None]


def _read_targets(log: Sequence[Mapping[str, Any]], cell: str) -> Series:
    margin, gap = f"bfpo/margin/{cell}", f"bfpo/target_gap/{cell}"
    return [
        (line["step"], line[margin] - line[gap])
        for line in log
        if line.get(margin) is not None and line.get(gap) is not None
    ]


def last_margin(run: Run, cell: str) -> float | None:
    """Return the last logged mean margin of a cell, in nats; None when there is none."""
    series = _read_series(run.log, f"bfpo/margin/{cell}")
    return series[-1][1] if series else None
