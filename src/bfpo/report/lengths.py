"""Answer length against win rate: whether answers win because they are long."""

from collections.abc import Sequence
from typing import NamedTuple

from bfpo.evaluation.results import MetricResult
from bfpo.report.run_files import Run
from bfpo.report.svg import Drawing, Point, run_class, shorten, ticks
from bfpo.report.words import format_interval, format_number

WIDTH, HEIGHT = 400.0, 240.0
LEFT, TOP, RIGHT, BOTTOM = 70.0, 14.0, 14.0, 50.0
MARK, CAP, MAX_NAME_LENGTH = 6.0, 4.0, 22


class WinRatePoint(NamedTuple):
    """Answer length and win rate of a run.

    Args:
        run_index: Index of the run on the page.
        name: Name of the run.
        length: Mean answer length, in tokens.
        win_rate: Win rate.
        controlled: Length-controlled win rate; None when it was not computed.
    """

    run_index: int
    name: str
    length: float
    win_rate: MetricResult
    controlled: MetricResult | None

    def describe(self) -> str:
        """Return the numbers as text."""
        win_rate = f"{format_number(self.win_rate.value)} {format_interval(self.win_rate.low, self.win_rate.high)}"
        text = f"{self.name}: {self.length:.0f} tokens, win rate {win_rate}"
        if self.controlled is not None:
            interval = format_interval(self.controlled.low, self.controlled.high)
            text += f", length-controlled {format_number(self.controlled.value)} {interval}"
        return text


class LengthFigure(NamedTuple):
    """Figure of one task and judge.

    Args:
        label: Task and judge.
        drawing: The drawing.
        lines: The numbers as text, one line per run.
    """

    label: str
    drawing: Drawing
    lines: list[str]


def length_figures(runs: Sequence[Run]) -> list[LengthFigure]:
    """Draw length against win rate for every task and judge with a win rate against reference outputs."""
    keys = dict.fromkeys(
        (metric.suite, metric.task, metric.judge)
        for run in runs
        for metric in run.results.metrics
        if metric.metric == "win_rate" and metric.value is not None
    )
    figures = []
    for index, (suite, task, judge) in enumerate(keys):
        points = _win_rate_points(runs, suite, task, judge)
        if points:
            lines = [point.describe() for point in points]
            drawing = _draw(f"lengths-{index}", points, lines)
            figures.append(LengthFigure(f"{suite}/{task} by {judge}", drawing, lines))
    return figures


def _win_rate_points(runs: Sequence[Run], suite: str, task: str, judge: str) -> list[WinRatePoint]:
    points = []
    for index, run in enumerate(runs):
        metrics = {
            (metric.metric, metric.judge): metric
            for metric in run.results.metrics
            if (metric.suite, metric.task, metric.category) == (suite, task, None)
        }
        win_rate, length = metrics.get(("win_rate", judge)), metrics.get(("tokens", ""))
        if win_rate and length and win_rate.value is not None and length.value is not None:
            controlled = metrics.get(("win_rate_length_controlled", judge)) or metrics.get(
                ("win_rate_length_controlled_approximate", judge)
            )
            points.append(WinRatePoint(index, run.name, length.value, win_rate, controlled))
    return points


def _draw(name: str, points: Sequence[WinRatePoint], lines: Sequence[str]) -> Drawing:
    size = LEFT + WIDTH + RIGHT, TOP + HEIGHT + BOTTOM
    drawing = Drawing(name, *size, title="Length of answers against win rate", description="; ".join(lines))
    max_length = max(point.length for point in points) * 1.15 or 1.0

    def locate(length: float, rate: float) -> Point:
        return Point(LEFT + WIDTH * length / max_length, TOP + HEIGHT * (1 - rate))

    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        drawing.path((locate(0, tick), locate(max_length, tick)), "zero" if tick == 0.5 else "grid")
        drawing.text(Point(LEFT - 8, locate(0, tick).y + 4.5), f"{tick:g}", anchor="end")
    for tick in ticks(0, max_length):
        drawing.text(Point(locate(tick, 0).x, TOP + HEIGHT + 18), f"{tick:g}", anchor="middle")
    drawing.path((locate(0, 1), locate(0, 0), locate(max_length, 0)), "axis")
    drawing.text(Point(LEFT + WIDTH / 2, TOP + HEIGHT + 41), "mean length in tokens →", "title", anchor="middle")
    drawing.text(Point(15, TOP + HEIGHT / 2), "win rate →", "title", anchor="middle", turned=True)
    for point in points:
        css, center = run_class(point.run_index), locate(point.length, point.win_rate.value or 0.0)
        if point.win_rate.low is not None and point.win_rate.high is not None:
            ends = locate(point.length, point.win_rate.low), locate(point.length, point.win_rate.high)
            drawing.path(ends, f"bar {css}")
            for end in ends:
                drawing.path((Point(end.x - CAP, end.y), Point(end.x + CAP, end.y)), f"bar {css}")
        if point.controlled is not None and point.controlled.value is not None:
            drawing.circle(locate(point.length, point.controlled.value), MARK - 2, f"ring {css}")
        drawing.circle(center, MARK, f"dot {css}")
        is_left = center.x < LEFT + 0.6 * WIDTH
        start = Point(center.x + (12 if is_left else -12), center.y - 8)
        anchor = "start" if is_left else "end"
        drawing.text(start, shorten(point.name, MAX_NAME_LENGTH), f"name {css}", anchor=anchor)
    return drawing
