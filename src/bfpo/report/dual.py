"""The page of `bfpo dual`: what a constraint is predicted to cost, before anything is trained."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from bfpo.core.files import write_text
from bfpo.losses.dual import Dual, FrontierPoint
from bfpo.report.html import check_ownership, load_template
from bfpo.report.svg import DARK, LIGHT, STYLE, Drawing, Point, ticks
from bfpo.report.words import MINUS, format_number

PAGE, FIGURE = "dual.html", "frontier.svg"
WIDTH, PANEL_HEIGHT = 560.0, 220.0
LEFT, TOP, RIGHT, BOTTOM, GAP = 62.0, 16.0, 18.0, 46.0, 26.0
MARK = 5.5
# Rows of the table; the figure has all points.
_ROWS = 12


class FrontierRow(NamedTuple):
    """A row of the page's table, as texts.

    Args:
        name: Name of the policy.
        is_chosen: Whether it is the policy that meets the constraint.
        cells: Multiplier, harm, helpfulness, KL and effective samples.
    """

    name: str
    is_chosen: bool
    cells: tuple[str, ...]


def write_dual_page(out: Path, dual: Dual) -> Path:
    """Write `dual.html` and `frontier.svg` into a folder.

    Raises:
        DataError: If the folder contains a file with one of these names that is not part of such a page.
    """
    check_ownership(out, page=PAGE, names=(PAGE, FIGURE), command="bfpo dual")
    page = load_template("dual.html").render(
        title=describe_constraint(dual),
        dual=dual,
        colors={"light": LIGHT, "dark": DARK},
        plot_style=STYLE,
        figure=draw_frontier(dual).inline(),
        base_harm=format_harm(dual, dual.base.harm),
        free_harm=format_harm(dual, dual.frontier[0].harm),
        threshold=format_harm(dual, dual.constraint.threshold),
        achieved=_format_bounds(dual),
        multiplier=_format_multiplier(dual),
        helpfulness=[format_number(point.helpfulness) for point in _summary_points(dual)],
        kl=format_number(None if dual.predicted is None else dual.predicted.kl),
        harm_name=_harm_name(dual),
        rows=_rows(dual),
        keys=training_keys(dual, out / "dual.json") if dual.multiplier is not None else [],
        provenance=_provenance(dual),
    )
    # The page is written first: it identifies the figure as part of it.
    write_text(out / PAGE, page)
    write_text(out / FIGURE, draw_frontier(dual).standalone())
    return out / PAGE


def describe_constraint(dual: Dual) -> str:
    """Return the constraint in words, such as "At most 2 % unsafe answers to harmful prompts"."""
    constraint = dual.constraint
    what = {
        "unsafe": "unsafe answers",
        "cost": "mean cost",
        "cvar": f"mean cost of the worst {constraint.share:.3g} of the answers" if constraint.share else "",
    }[constraint.measure]
    prompts = f" to {constraint.kind} prompts" if constraint.kind else ""
    return f"At most {format_harm(dual, constraint.threshold)} {what}{prompts}"


def format_harm(dual: Dual, value: float) -> str:
    """Return a value of the constraint's measure as text: shares in percent."""
    if dual.constraint.measure == "unsafe":
        return f"{100 * value:.3g} %"
    return f"{value:.3g}".replace("-", MINUS)


def training_keys(dual: Dual, path: Path) -> list[str]:
    """Return the keys of a recipe that trains the policy of a feasible constraint, line by line."""
    if dual.objective == "bfpo":
        return [f"loss: {{name: bfpo, beta: {dual.beta:g}, multiplier: {path}}}"]
    return [f"loss: {{name: dpo, beta: {dual.beta:g}}}", f"labels: {{from: scores, multiplier: {path}, draw: soft}}"]


def draw_frontier(dual: Dual) -> Drawing:
    """Draw helpfulness and KL against harm for the base model, the frontier and the policy of the constraint."""
    points = [dual.base, *dual.frontier]
    height = TOP + 2 * PANEL_HEIGHT + GAP + BOTTOM
    title = f"{describe_constraint(dual)}: predicted helpfulness and KL against harm"
    description = "; ".join(
        f"multiplier {point.multiplier:.3g}: harm {format_harm(dual, point.harm)}, helpfulness "
        f"{point.helpfulness:.3g}, KL {point.kl:.2f} nats"
        for point in dual.frontier
        if point.multiplier is not None
    )
    drawing = Drawing("frontier", WIDTH, height, title=title, description=description)
    harms = _range([point.harm for point in points] + [dual.constraint.threshold])
    upper = _Panel(drawing, TOP, harms, _range([point.helpfulness for point in points]))
    lower = _Panel(drawing, TOP + PANEL_HEIGHT + GAP, harms, _range([point.kl for point in points] + [0.0]))
    upper.draw_axes("helpfulness (mean reward) →")
    lower.draw_axes("KL from the base model, nats →")
    lower.draw_ticks(dual, f"{_harm_name(dual)} →")
    for panel in (upper, lower):
        panel.draw_threshold(dual.constraint.threshold)
    start = upper.locate(dual.constraint.threshold, upper.values[0])
    is_left = start.x < LEFT + 0.6 * (WIDTH - LEFT - RIGHT)
    label = Point(start.x + (6 if is_left else -6), start.y - 8)
    drawing.text(
        label,
        f"at most {format_harm(dual, dual.constraint.threshold)}",
        "on-panel",
        anchor="start" if is_left else "end",
    )
    upper.draw_policies(dual, lambda point: point.helpfulness, labels=True)
    lower.draw_policies(dual, lambda point: point.kl, labels=False)
    return drawing


class _Panel:
    """A pair of axes: harm to the right, a number upwards."""

    def __init__(self, drawing: Drawing, top: float, harms: tuple[float, float], values: tuple[float, float]) -> None:
        self.drawing, self.top, self.harms, self.values = drawing, top, harms, values

    def locate(self, harm: float, value: float) -> Point:
        across = (harm - self.harms[0]) / (self.harms[1] - self.harms[0])
        up = (value - self.values[0]) / (self.values[1] - self.values[0])
        return Point(LEFT + (WIDTH - LEFT - RIGHT) * across, self.top + PANEL_HEIGHT * (1 - up))

    def draw_axes(self, name: str) -> None:
        for tick in ticks(*self.values, count=4):
            start, end = self.locate(self.harms[0], tick), self.locate(self.harms[1], tick)
            self.drawing.path((start, end), "grid")
            self.drawing.text(Point(LEFT - 8, start.y + 4.5), f"{tick:g}".replace("-", MINUS), anchor="end")
        bottom, left = self.values[0], self.harms[0]
        corners = (self.locate(left, self.values[1]), self.locate(left, bottom), self.locate(self.harms[1], bottom))
        self.drawing.path(corners, "axis")
        self.drawing.text(Point(16, self.top + PANEL_HEIGHT / 2), name, "title", anchor="middle", turned=True)

    def draw_ticks(self, dual: Dual, name: str) -> None:
        in_percent = dual.constraint.measure == "unsafe"
        for tick in ticks(*self.harms):
            center = self.locate(tick, self.values[0])
            text = f"{100 * tick:g} %" if in_percent else f"{tick:g}".replace("-", MINUS)
            self.drawing.text(Point(center.x, center.y + 18), text, anchor="middle")
        middle = LEFT + (WIDTH - LEFT - RIGHT) / 2
        self.drawing.text(Point(middle, self.top + PANEL_HEIGHT + 40), name, "title", anchor="middle")

    def draw_threshold(self, threshold: float) -> None:
        self.drawing.path((self.locate(threshold, self.values[0]), self.locate(threshold, self.values[1])), "target")

    def draw_policies(self, dual: Dual, value: Callable[[FrontierPoint], float], *, labels: bool) -> None:
        """Draw the frontier, the base model as a ring, and the policy that meets the constraint as a dot."""
        self.drawing.path([self.locate(point.harm, value(point)) for point in dual.frontier], "curve r1")
        base = self.locate(dual.base.harm, value(dual.base))
        self.drawing.circle(base, MARK, "ring r0")
        free = self.locate(dual.frontier[0].harm, value(dual.frontier[0]))
        self.drawing.circle(free, 3.5, "ring r1")
        if labels:
            self._write(base, "base model", "name r0")
            self._write(free, "λ = 0", "name r1")
        if dual.predicted is not None:
            chosen = self.locate(dual.predicted.harm, value(dual.predicted))
            ends = [self.locate(harm, value(dual.predicted)) for harm in (dual.achieved_low, dual.achieved_high)]
            self.drawing.path(ends, "bar r2")
            self.drawing.circle(chosen, MARK, "dot r2")
            if labels and dual.state == "active":
                self._write(chosen, f"λ = {dual.multiplier:.3g}", "name r2", below=True)

    def _write(self, at: Point, text: str, css: str, *, below: bool = False) -> None:
        is_left = at.x < LEFT + 0.75 * (WIDTH - LEFT - RIGHT)
        position = Point(at.x + (9 if is_left else -9), at.y + (18 if below else -9))
        self.drawing.text(position, text, css, anchor="start" if is_left else "end")


def _range(values: Sequence[float]) -> tuple[float, float]:
    """Return a range that contains the values, with some space; it starts at 0 where no value is below."""
    low, high = min(values), max(values)
    space = 0.06 * ((high - low) or abs(high) or 1.0)
    return (0.0 if 0 <= low < 0.5 * high else low - space), high + space


def _harm_name(dual: Dual) -> str:
    names = {"unsafe": "unsafe answers", "cost": "mean cost", "cvar": "mean cost of the worst answers"}
    name = names[dual.constraint.measure]
    return f"{name} to {dual.constraint.kind} prompts" if dual.constraint.kind else name


def _format_bounds(dual: Dual) -> str:
    low, high = (format_harm(dual, bound) for bound in (dual.achieved_low, dual.achieved_high))
    return f"{format_harm(dual, dual.achieved)} [{low}, {high}]"


def _format_multiplier(dual: Dual) -> str:
    if dual.multiplier is None:
        return ""
    high = "∞" if dual.multiplier_high is None else f"{dual.multiplier_high:.3g}"
    return f"{dual.multiplier:.4g} [{dual.multiplier_low:.3g}, {high}]"


def _summary_points(dual: Dual) -> list[FrontierPoint]:
    return [dual.base, dual.frontier[0], *([dual.predicted] if dual.predicted is not None else [])]


def _rows(dual: Dual) -> list[FrontierRow]:
    """Return the base model and some of the frontier, with the policy that meets the constraint."""
    step = max(1, len(dual.frontier) // _ROWS)
    shown = [point for index, point in enumerate(dual.frontier) if index % step == 0 or _is_chosen(dual, point)]
    rows = [FrontierRow("base model", False, _cells(dual, dual.base))]
    return rows + [
        FrontierRow("no constraint" if point.multiplier == 0 else "", _is_chosen(dual, point), _cells(dual, point))
        for point in shown
    ]


def _is_chosen(dual: Dual, point: FrontierPoint) -> bool:
    return dual.multiplier is not None and point.multiplier == dual.multiplier


def _cells(dual: Dual, point: FrontierPoint) -> tuple[str, ...]:
    multiplier = "" if point.multiplier is None else f"{point.multiplier:.3g}"
    return (
        multiplier,
        format_harm(dual, point.harm),
        f"{point.helpfulness:.3f}".replace("-", MINUS),
        f"{point.kl:.2f}",
        f"{point.effective_samples:.1f}",
    )


def _provenance(dual: Dual) -> list[tuple[str, str]]:
    labels = ", ".join(f"{cell} {label:g}" for cell, label in (dual.labels or {}).items())
    objective = {
        "reward": "the reward",
        "log_ratios": "beta times the log-ratio of a helpful model to the base model",
        "bfpo": f"the reward that BFPO's labels imply ({labels})",
    }[dual.objective]
    half = "" if dual.achieved_with_half is None else format_harm(dual, dual.achieved_with_half)
    rows = [
        ("Base model", dual.model),
        ("Temperature", f"{dual.temperature:g}"),
        (
            "Samples",
            f"{dual.samples:,} of {dual.prompts:,} prompts; the constraint counts {dual.constrained_prompts:,}",
        ),
        ("Maximized besides", f"{objective}, with beta {dual.beta:g}"),
        ("Reward", dual.reward_scorer + (f", times {dual.reward_scale:g}" if dual.reward_scale != 1 else "")),
        ("Cost", dual.cost_scorer),
        ("Predicted from half of the samples", half),
        ("Files", ", ".join(f"{name} (sha256 {digest[:12]}…)" for name, digest in dual.files.items())),
        ("Made", dual.created),
    ]
    return [(name, text) for name, text in rows if text]
