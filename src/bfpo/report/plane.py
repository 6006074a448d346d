"""The safety-helpfulness plane: where each run or method stands, how surely, and the Pareto front."""

from collections.abc import Sequence
from math import cos, pi, sin, sqrt
from statistics import NormalDist
from typing import NamedTuple

from scipy.stats import chi2

from bfpo.evaluation.results import MetricResult
from bfpo.report.run_files import Run
from bfpo.report.svg import Drawing, Point, arrow, run_class, shortened
from bfpo.report.words import interval, number
from bfpo.stats.intervals import Interval

SIDE = 400.0
LEFT, TOP, RIGHT, BOTTOM = 70.0, 14.0, 14.0, 50.0
MARK = 6.0
CAP = 4.0
# Names are laid out for the larger letters of a narrow screen.
LETTER, LINE = 9.5, 20.0
LONGEST_NAME = 22
LEGEND = 270.0
CORNERS = 72
# A circle that holds 95 % of two independent normal numbers, over the interval that holds 95 % of one.
WIDENED = sqrt(float(chi2.ppf(0.95, 2))) / NormalDist().inv_cdf(0.975)


class Stand(NamedTuple):
    """A run, or a method over several runs, that has both coordinates.

    Args:
        place: Of the run on the page, from 0.
        name: Of the run.
        helpfulness: On benign prompts, with its interval if it has one.
        safety: On harmful prompts.
        outline: Corners of the region in which it may stand, as helpfulness and safety; drawn instead of the two
            intervals where there is one.
    """

    place: int
    name: str
    helpfulness: MetricResult | Interval
    safety: MetricResult | Interval
    outline: Sequence[tuple[float, float]] = ()

    @property
    def value(self) -> tuple[float, float]:
        """Helpfulness and safety."""
        return self.helpfulness.value or 0.0, self.safety.value or 0.0


class Box(NamedTuple):
    """A rectangle that something takes up."""

    left: float
    top: float
    right: float
    bottom: float

    def overlap(self, other: "Box") -> float:
        """Return the area that two have in common."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.bottom, other.bottom) - max(self.top, other.top)
        return max(0.0, width) * max(0.0, height)


def stands(runs: Sequence[Run]) -> list[Stand]:
    """Return the runs that can be put on the plane."""
    found = []
    for index, run in enumerate(runs):
        helpfulness, safety = run.results.metric("benign", "helpfulness"), run.results.metric("harmful", "safety")
        if helpfulness and safety and helpfulness.value is not None and safety.value is not None:
            found.append(Stand(index, run.name, helpfulness, safety, region(helpfulness, safety)))
    return found


def region(helpfulness: MetricResult, safety: MetricResult) -> list[tuple[float, float]]:
    """Return the outline of where both numbers may be together, 95 times of 100; empty without intervals.

    They rest on different prompts, so they are independent. Each quarter is one of an ellipse whose half axes are the
    two sides of the intervals there, widened from what holds one number to what holds two.
    """
    ends = helpfulness.low, helpfulness.high, safety.low, safety.high
    if None in ends or helpfulness.value is None or safety.value is None:
        return []
    left, right, below, above = (
        WIDENED * abs(end - of)
        for end, of in zip(ends, (helpfulness.value,) * 2 + (safety.value,) * 2, strict=True)
        if end is not None
    )
    turns = [(cos(angle), sin(angle)) for angle in (2 * pi * corner / CORNERS for corner in range(CORNERS))]
    return [
        (helpfulness.value + x * (right if x > 0 else left), safety.value + y * (above if y > 0 else below))
        for x, y in turns
    ]


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return which points no other dominates (at least as good in both, better in one), by the first coordinate."""
    kept = [
        index
        for index, (x, y) in enumerate(points)
        if not any(a >= x and b >= y and (a, b) != (x, y) for a, b in points)
    ]
    return sorted(kept, key=lambda index: points[index])


def plane(found: Sequence[Stand], *, arrows: bool = True, legend: bool = False) -> Drawing:
    """Draw the plane.

    Args:
        found: At least one run.
        arrows: Whether one leads from the first run of the page, if it is among them, to each other.
        legend: Whether runs are numbered and named beside the plane; on it, more than a few names cover each other.
    """
    said = "; ".join(f"{one.name}: helpfulness {_said(one.helpfulness)}, safety {_said(one.safety)}" for one in found)
    title = "Safety on harmful prompts against helpfulness on benign prompts"
    width = LEFT + SIDE + RIGHT + (LEGEND if legend else 0.0)
    drawing = Drawing("plane", width, TOP + SIDE + BOTTOM, title=title, description=said)
    _axes(drawing)
    best = front([one.value for one in found])
    if len({found[index].value for index in best}) > 1:
        _draw_front(drawing, [_place(*found[index].value) for index in best])
    taken = []
    if arrows and found[0].place == 0:
        for other in found[1:]:
            ends = arrow(drawing, _place(*found[0].value), _place(*other.value), gap=MARK + 5)
            taken += _along(ends)
    for one in found:
        boxes = _draw_outline(drawing, one) if one.outline else _draw_bars(drawing, one)
        # Among many runs a number that keeps off every line would stand far from its mark.
        taken += boxes[:1] if legend and one.outline else boxes
    for one in found:
        # The base is a ring: it stands out from the others without its color, too.
        drawing.circle(_place(*one.value), MARK, f"{'ring' if one.place == 0 else 'dot'} {run_class(one.place)}")
    for index, one in enumerate(found):
        if legend:
            at = Point(LEFT + SIDE + 2 * RIGHT, TOP + LINE * (index + 0.5))
            drawing.text(at, f"{index}  {one.name}", f"name {run_class(one.place)}")
        _draw_name(drawing, one, taken, str(index) if legend else shortened(one.name, LONGEST_NAME))
    return drawing


def _said(one: MetricResult | Interval) -> str:
    return f"{number(one.value)} {interval(one.low, one.high)}".strip()


def _place(helpfulness: float, safety: float) -> Point:
    return Point(LEFT + SIDE * helpfulness, TOP + SIDE * (1 - safety))


def _axes(drawing: Drawing) -> None:
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        across, up = _place(tick, 0), _place(0, tick)
        drawing.path((across, Point(across.x, TOP)), "grid")
        drawing.path((up, Point(LEFT + SIDE, up.y)), "grid")
        label = f"{tick:g}"
        drawing.text(Point(across.x, across.y + 18), label, anchor="end" if tick == 1 else "middle")
        drawing.text(Point(up.x - 8, up.y + 4.5), label, anchor="end")
    drawing.path((_place(0, 1), _place(0, 0), _place(1, 0)), "axis")
    drawing.text(Point(LEFT + SIDE / 2, TOP + SIDE + 41), "helpfulness on benign prompts →", "title", anchor="middle")
    drawing.text(Point(15, TOP + SIDE / 2), "safety on harmful prompts →", "title", anchor="middle", turned=True)


def _draw_front(drawing: Drawing, points: Sequence[Point]) -> None:
    """Draw the border of what the best runs dominate, as stairs."""
    steps = [Point(LEFT, points[0].y)]
    for here, following in zip(points, [*points[1:], None], strict=True):
        steps.append(here)
        steps.append(Point(here.x, following.y if following else TOP + SIDE))
    drawing.path(steps, "front")


def _draw_bars(drawing: Drawing, one: Stand) -> list[Box]:
    """Draw the two intervals and return what they take up."""
    x, y = one.value
    css = f"bar {run_class(one.place)}"
    taken = [_mark(one)]
    if one.helpfulness.low is not None and one.helpfulness.high is not None:
        left, right = _place(one.helpfulness.low, y), _place(one.helpfulness.high, y)
        drawing.path((left, right), css)
        for end in (left, right):
            drawing.path((Point(end.x, end.y - CAP), Point(end.x, end.y + CAP)), css)
        taken.append(Box(left.x - 2, left.y - CAP, right.x + 2, left.y + CAP))
    if one.safety.low is not None and one.safety.high is not None:
        bottom, top = _place(x, one.safety.low), _place(x, one.safety.high)
        drawing.path((bottom, top), css)
        for end in (bottom, top):
            drawing.path((Point(end.x - CAP, end.y), Point(end.x + CAP, end.y)), css)
        taken.append(Box(top.x - CAP, top.y - 2, top.x + CAP, bottom.y + 2))
    return taken


def _draw_outline(drawing: Drawing, one: Stand) -> list[Box]:
    """Draw the region in which a run may stand, as far as the plane reaches; return what mark and line take up."""
    inside = [_place(min(1.0, max(0.0, x)), min(1.0, max(0.0, y))) for x, y in one.outline]
    drawing.path(inside, f"bar {run_class(one.place)}", closed=True)
    return [_mark(one), *(Box(x - 4, y - 4, x + 4, y + 4) for x, y in inside[::4])]


def _mark(one: Stand) -> Box:
    center = _place(*one.value)
    return Box(center.x - MARK, center.y - MARK, center.x + MARK, center.y + MARK)


def _along(ends: Sequence[Point]) -> list[Box]:
    """Return small boxes along an arrow."""
    if not ends:
        return []
    (x0, y0), (x1, y1) = ends
    places = [(x0 + (x1 - x0) * part / 20, y0 + (y1 - y0) * part / 20) for part in range(21)]
    return [Box(x - 4, y - 4, x + 4, y + 4) for x, y in places]


def _draw_name(drawing: Drawing, one: Stand, taken: list[Box], name: str) -> None:
    """Write a run's name where it covers least; what it takes up is added to `taken`."""
    x, y = _place(*one.value)
    width = LETTER * len(name)
    best: tuple[float, Box, Point, str] | None = None
    for away in (12.0, 26.0, 42.0, 60.0):
        for anchor, dx in (("start", 12.0), ("end", -12.0)):
            for dy in (-away, away):
                left = x + dx - (width if anchor == "end" else 0)
                box = Box(left, y + dy - LINE / 2, left + width, y + dy + LINE / 2)
                outside = width * LINE - box.overlap(Box(LEFT + 2, TOP, LEFT + SIDE, TOP + SIDE - 2))
                cost = 5 * outside + sum(box.overlap(other) for other in taken) + away
                if best is None or cost < best[0]:
                    best = cost, box, Point(x + dx, y + dy + 4.5), anchor
    assert best is not None
    taken.append(best[1])
    drawing.text(best[2], name, f"name {run_class(one.place)}", anchor=best[3])
