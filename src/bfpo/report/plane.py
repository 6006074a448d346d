"""The safety-helpfulness plane: each run or method with its confidence region, and the Pareto front."""

from collections.abc import Sequence
from math import cos, log, pi, sin, sqrt
from statistics import NormalDist
from typing import NamedTuple

from bfpo.evaluation.results import MetricResult
from bfpo.report.run_files import Run
from bfpo.report.svg import Drawing, Point, draw_arrow, run_class, shorten
from bfpo.report.words import format_interval, format_number
from bfpo.stats.intervals import Interval

SIDE = 400.0
LEFT, TOP, RIGHT, BOTTOM = 70.0, 14.0, 14.0, 50.0
MARK = 6.0
CAP = 4.0
# Names are laid out for the larger letters of a narrow screen.
LETTER, LINE = 9.5, 20.0
MAX_NAME_LENGTH = 22
LEGEND = 270.0
MAX_LEGEND_LENGTH = 27
CORNERS = 72
# Radius that contains 95 % of two independent normal variables (the root of a chi-squared quantile with two degrees
# of freedom), over the half-width that contains 95 % of one.
WIDENING = sqrt(-2 * log(0.05)) / NormalDist().inv_cdf(0.975)


class PlanePoint(NamedTuple):
    """A run, or a method over several seeds, on the plane.

    Args:
        run_index: Index of the run on the page.
        name: Name of the run.
        helpfulness: Helpfulness on benign prompts, in [0, 1].
        safety: Safety on harmful prompts, in [0, 1].
        outline: Corners of the confidence region, as (helpfulness, safety); if empty, the two intervals are drawn
            instead.
    """

    run_index: int
    name: str
    helpfulness: MetricResult | Interval
    safety: MetricResult | Interval
    outline: Sequence[tuple[float, float]] = ()

    @property
    def coordinates(self) -> tuple[float, float]:
        """Helpfulness and safety."""
        return self.helpfulness.value or 0.0, self.safety.value or 0.0

    @property
    def center(self) -> Point:
        """Position on the drawing."""
        return _locate(*self.coordinates)

    @property
    def css(self) -> str:
        """CSS class that colors the run."""
        return run_class(self.run_index)


class Box(NamedTuple):
    """An occupied rectangle of a drawing."""

    left: float
    top: float
    right: float
    bottom: float

    def overlap(self, other: "Box") -> float:
        """Return the area of the intersection with another box."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.bottom, other.bottom) - max(self.top, other.top)
        return max(0.0, width) * max(0.0, height)


def plane_points(runs: Sequence[Run]) -> list[PlanePoint]:
    """Return the points of the runs that have both safety and helpfulness: of the first suite with both."""
    points = []
    for index, run in enumerate(runs):
        safety, helpfulness = (_by_suite(run, *name) for name in (("harmful", "safety"), ("benign", "helpfulness")))
        suite = next((suite for suite in safety if suite in helpfulness), None)
        if suite is not None:
            both = helpfulness[suite], safety[suite]
            points.append(PlanePoint(index, run.name, *both, region(*both)))
    return points


def _by_suite(run: Run, task: str, name: str) -> dict[str, MetricResult]:
    """Return a metric over all prompts of a task, by suite: of the first judge that has it."""
    metrics: dict[str, MetricResult] = {}
    for metric in run.results.metrics:
        if (metric.task, metric.metric, metric.category) == (task, name, None) and metric.value is not None:
            metrics.setdefault(metric.suite, metric)
    return metrics


def region(helpfulness: MetricResult, safety: MetricResult) -> list[tuple[float, float]]:
    """Return the outline of the joint 95 % confidence region of both metrics; empty without intervals.

    The two metrics are measured on different prompts, so they are independent. Each quadrant is a quarter of an
    ellipse whose semi-axes are the two sides of the intervals there, widened from one metric to two.
    """
    horizontal, vertical = _semi_axes(helpfulness), _semi_axes(safety)
    if horizontal is None or vertical is None:
        return []
    (x, left, right), (y, down, up) = horizontal, vertical
    directions = [(cos(angle), sin(angle)) for angle in (2 * pi * corner / CORNERS for corner in range(CORNERS))]
    return [(x + dx * (right if dx > 0 else left), y + dy * (up if dy > 0 else down)) for dx, dy in directions]


def _semi_axes(metric: MetricResult) -> tuple[float, float, float] | None:
    """Return a metric's value and the widened lower and upper sides of its interval."""
    if metric.value is None or metric.low is None or metric.high is None:
        return None
    return metric.value, WIDENING * abs(metric.low - metric.value), WIDENING * abs(metric.high - metric.value)


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the indices of the points that no other point dominates, ordered by the first coordinate.

    A point dominates another if it is at least as good in both coordinates and better in one.
    """
    best = [
        index
        for index, (x, y) in enumerate(points)
        if not any(other_x >= x and other_y >= y and (other_x, other_y) != (x, y) for other_x, other_y in points)
    ]
    return sorted(best, key=lambda index: points[index])


def draw_plane(
    points: Sequence[PlanePoint], *, arrows: bool = True, numbers: bool = False, legend: bool = False
) -> Drawing:
    """Draw the plane.

    Args:
        points: At least one run.
        arrows: Whether an arrow leads from the baseline, if it is on the plane, to each other run.
        numbers: Whether runs are numbered, because many names would cover each other.
        legend: Whether runs are numbered, with their names in a legend beside the plane.
    """
    numbers = numbers or legend
    description = "; ".join(
        f"{point.name}: helpfulness {_describe(point.helpfulness)}, safety {_describe(point.safety)}"
        for point in points
    )
    title = "Safety on harmful prompts against helpfulness on benign prompts"
    width, height = LEFT + SIDE + RIGHT, TOP + SIDE + BOTTOM
    if legend:
        width, height = width + LEGEND, max(height, TOP + LINE * len(points))
    drawing = Drawing("plane", width, height, title=title, description=description)
    _draw_axes(drawing)
    best = [points[index] for index in front([point.coordinates for point in points])]
    if len({point.coordinates for point in best}) > 1:
        _draw_front(drawing, [point.center for point in best])
    taken = []
    if arrows and points[0].run_index == 0:
        for point in points[1:]:
            taken += _boxes_along(draw_arrow(drawing, points[0].center, point.center, gap=MARK + 5))
    for point in points:
        boxes = _draw_outline(drawing, point) if point.outline else _draw_bars(drawing, point)
        # With many runs, a number that avoids every line would end up far from its mark.
        taken += boxes[:1] if numbers and point.outline else boxes
    for point in points:
        # The baseline is a ring, so that it can be recognized without color.
        drawing.circle(point.center, MARK, f"{'ring' if point.run_index == 0 else 'dot'} {point.css}")
    for number, point in enumerate(points):
        if legend:
            start = Point(LEFT + SIDE + 2 * RIGHT, TOP + LINE * (number + 0.5))
            drawing.text(start, f"{number}  {shorten(point.name, MAX_LEGEND_LENGTH)}", f"name {point.css}")
        _draw_name(drawing, point, taken, str(number) if numbers else shorten(point.name, MAX_NAME_LENGTH))
    return drawing


def _describe(metric: MetricResult | Interval) -> str:
    return f"{format_number(metric.value)} {format_interval(metric.low, metric.high)}".strip()


def _locate(helpfulness: float, safety: float) -> Point:
    return Point(LEFT + SIDE * helpfulness, TOP + SIDE * (1 - safety))


def _draw_axes(drawing: Drawing) -> None:
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        bottom, left = _locate(tick, 0), _locate(0, tick)
        drawing.path((bottom, Point(bottom.x, TOP)), "grid")
        drawing.path((left, Point(LEFT + SIDE, left.y)), "grid")
        label = f"{tick:g}"
        drawing.text(Point(bottom.x, bottom.y + 18), label, anchor="end" if tick == 1 else "middle")
        drawing.text(Point(left.x - 8, left.y + 4.5), label, anchor="end")
    drawing.path((_locate(0, 1), _locate(0, 0), _locate(1, 0)), "axis")
    drawing.text(Point(LEFT + SIDE / 2, TOP + SIDE + 41), "helpfulness on benign prompts →", "title", anchor="middle")
    drawing.text(Point(15, TOP + SIDE / 2), "safety on harmful prompts →", "title", anchor="middle", turned=True)


def _draw_front(drawing: Drawing, centers: Sequence[Point]) -> None:
    """Draw the boundary of the region that the best runs dominate, as a staircase."""
    steps = [Point(LEFT, centers[0].y)]
    for center, following in zip(centers, [*centers[1:], None], strict=True):
        steps.append(center)
        steps.append(Point(center.x, following.y if following else TOP + SIDE))
    drawing.path(steps, "front")


def _draw_bars(drawing: Drawing, point: PlanePoint) -> list[Box]:
    """Draw the two intervals and return the boxes that mark and intervals occupy."""
    x, y = point.coordinates
    css = f"bar {point.css}"
    taken = [_mark_box(point)]
    if point.helpfulness.low is not None and point.helpfulness.high is not None:
        left, right = _locate(point.helpfulness.low, y), _locate(point.helpfulness.high, y)
        drawing.path((left, right), css)
        for end in (left, right):
            drawing.path((Point(end.x, end.y - CAP), Point(end.x, end.y + CAP)), css)
        taken.append(Box(left.x - 2, left.y - CAP, right.x + 2, left.y + CAP))
    if point.safety.low is not None and point.safety.high is not None:
        bottom, top = _locate(x, point.safety.low), _locate(x, point.safety.high)
        drawing.path((bottom, top), css)
        for end in (bottom, top):
            drawing.path((Point(end.x - CAP, end.y), Point(end.x + CAP, end.y)), css)
        taken.append(Box(top.x - CAP, top.y - 2, top.x + CAP, bottom.y + 2))
    return taken


def _draw_outline(drawing: Drawing, point: PlanePoint) -> list[Box]:
    """Draw the confidence region, clipped to the plane, and return the boxes that mark and outline occupy."""
    corners = [_locate(min(1.0, max(0.0, x)), min(1.0, max(0.0, y))) for x, y in point.outline]
    drawing.path(corners, f"bar {point.css}", closed=True)
    return [_mark_box(point), *(Box(x - 4, y - 4, x + 4, y + 4) for x, y in corners[::4])]


def _mark_box(point: PlanePoint) -> Box:
    x, y = point.center
    return Box(x - MARK, y - MARK, x + MARK, y + MARK)


def _boxes_along(ends: Sequence[Point]) -> list[Box]:
    """Return small boxes along an arrow."""
    if not ends:
        return []
    (x0, y0), (x1, y1) = ends
    centers = [(x0 + (x1 - x0) * step / 20, y0 + (y1 - y0) * step / 20) for step in range(21)]
    return [Box(x - 4, y - 4, x + 4, y + 4) for x, y in centers]


def _draw_name(drawing: Drawing, point: PlanePoint, taken: list[Box], name: str) -> None:
    """Write a run's name where it covers least, and add its box to `taken`."""
    x, y = point.center
    width = LETTER * len(name)
    best: tuple[float, Box, Point, str] | None = None
    for distance in (12.0, 26.0, 42.0, 60.0):
        for anchor, dx in (("start", 12.0), ("end", -12.0)):
            for dy in (-distance, distance):
                left = x + dx - (width if anchor == "end" else 0)
                box = Box(left, y + dy - LINE / 2, left + width, y + dy + LINE / 2)
                outside = width * LINE - box.overlap(Box(LEFT + 2, TOP, LEFT + SIDE, TOP + SIDE - 2))
                cost = 5 * outside + sum(box.overlap(other) for other in taken) + distance
                if best is None or cost < best[0]:
                    best = cost, box, Point(x + dx, y + dy + 4.5), anchor
    assert best is not None
    _, box, start, anchor = best
    taken.append(box)
    drawing.text(start, name, f"name {point.css}", anchor=anchor)
