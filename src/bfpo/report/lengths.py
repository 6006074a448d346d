"""Length against win rate: whether answers win because they are long."""

from collections.abc import Sequence
from typing import NamedTuple

from bfpo.evaluation.results import MetricResult
from bfpo.report.run_files import Run
from bfpo.report.svg import Drawing, Point, run_class, shortened, ticks
from bfpo.report.words import interval, number

WIDTH, HEIGHT = 400.0, 240.0
LEFT, TOP, RIGHT, BOTTOM = 70.0, 14.0, 14.0, 50.0
MARK, CAP, LONGEST_NAME = 6.0, 4.0, 22


class Winner(NamedTuple):
    """A run with its win rate.

    Args:
        place: Of the run on the page, from 0.
        name: Of the run.
        length: Mean length of its answers, in tokens.
        rate: Win rate.
        controlled: Win rate at equal lengths; None where it wasn't told.
    """

    place: int
    name: str
    length: float
    rate: MetricResult
    controlled: MetricResult | None


class Lengths(NamedTuple):
    """A figure of one task by one judge.

    Args:
        label: Which task, by which judge.
        drawing: The figure.
        runs: What it says, a line a run.
    """

    label: str
    drawing: Drawing
    runs: list[str]


def lengths(runs: Sequence[Run]) -> list[Lengths]:
    """Draw length against win rate, for every task and judge that runs were compared with given outputs by."""
    rated = {
        (one.suite, one.task, one.judge): None
        for run in runs
        for one in run.results.metrics
        if one.metric == "win_rate" and one.value is not None
    }
    found = []
    for number_, (suite, task, judge) in enumerate(rated):
        winners = _winners(runs, suite, task, judge)
        if winners:
            lines = [_said(one) for one in winners]
            found.append(Lengths(f"{suite}/{task} by {judge}", _draw(f"lengths-{number_}", winners, lines), lines))
    return found


def _winners(runs: Sequence[Run], suite: str, task: str, judge: str) -> list[Winner]:
    found = []
    for place, run in enumerate(runs):
        of = {
            (one.metric, one.judge): one
            for one in run.results.metrics
            if (one.suite, one.task, one.category) == (suite, task, None)
        }
        rate, length = of.get(("win_rate", judge)), of.get(("tokens", ""))
        if rate and length and rate.value is not None and length.value is not None:
            controlled = of.get(("win_rate_length_controlled", judge))
            found.append(Winner(place, run.name, length.value, rate, controlled))
    return found


def _said(one: Winner) -> str:
    told = f"{one.name}: {one.length:.0f} tokens, win rate {number(one.rate.value)}"
    told += f" {interval(one.rate.low, one.rate.high)}"
    if one.controlled is not None:
        told += f", at equal lengths {number(one.controlled.value)}"
        told += f" {interval(one.controlled.low, one.controlled.high)}"
    return told


def _draw(name: str, winners: Sequence[Winner], lines: Sequence[str]) -> Drawing:
    size = LEFT + WIDTH + RIGHT, TOP + HEIGHT + BOTTOM
    drawing = Drawing(name, *size, title="Length of answers against win rate", description="; ".join(lines))
    most = max(one.length for one in winners) * 1.15 or 1.0

    def at(length: float, rate: float) -> Point:
        return Point(LEFT + WIDTH * length / most, TOP + HEIGHT * (1 - rate))

    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        drawing.path((at(0, tick), at(most, tick)), "zero" if tick == 0.5 else "grid")
        drawing.text(Point(LEFT - 8, at(0, tick).y + 4.5), f"{tick:g}", anchor="end")
    for tick in ticks(0, most):
        drawing.text(Point(at(tick, 0).x, TOP + HEIGHT + 18), f"{tick:g}", anchor="middle")
    drawing.path((at(0, 1), at(0, 0), at(most, 0)), "axis")
    drawing.text(Point(LEFT + WIDTH / 2, TOP + HEIGHT + 41), "mean length in tokens →", "title", anchor="middle")
    drawing.text(Point(15, TOP + HEIGHT / 2), "win rate →", "title", anchor="middle", turned=True)
    for one in winners:
        css, place = run_class(one.place), at(one.length, one.rate.value or 0.0)
        if one.rate.low is not None and one.rate.high is not None:
            ends = at(one.length, one.rate.low), at(one.length, one.rate.high)
            drawing.path(ends, f"bar {css}")
            for end in ends:
                drawing.path((Point(end.x - CAP, end.y), Point(end.x + CAP, end.y)), f"bar {css}")
        if one.controlled is not None and one.controlled.value is not None:
            drawing.circle(at(one.length, one.controlled.value), MARK - 2, f"ring {css}")
        drawing.circle(place, MARK, f"dot {css}")
        on_left = place.x < LEFT + 0.6 * WIDTH
        beside = Point(place.x + (12 if on_left else -12), place.y - 8)
        called, anchor = shortened(one.name, LONGEST_NAME), "start" if on_left else "end"
        drawing.text(beside, called, f"name {css}", anchor=anchor)
    return drawing
