"""SVG drawings, built element by element, so that every text is escaped.

Colors are CSS variables of a palette, so that a drawing on the page follows its light or dark theme; a standalone
file contains the light palette.
"""

import re
from collections.abc import Iterable, Sequence
from math import floor, log10
from typing import NamedTuple
from xml.etree.ElementTree import Element, SubElement, tostring

from markupsafe import Markup

LIGHT = {
    "paper": "#fcfbf8",
    "panel": "#ffffff",
    "ink": "#1f2226",
    "soft": "#5c626b",
    "line": "#d8d4ca",
    "grid": "#ece9e1",
    "good": "#0b6b4d",
    "bad": "#b3261e",
    "note": "#7d5200",
    "link": "#1f5fbf",
    "run-0": "#6a707a",
    "run-1": "#1f5fbf",
    "run-2": "#b4540a",
    "run-3": "#0f7b6c",
    "run-4": "#7a3fa0",
    "run-5": "#b0266f",
}
DARK = {
    "paper": "#15171a",
    "panel": "#1b1e22",
    "ink": "#e7e5df",
    "soft": "#a6aab2",
    "line": "#3b3f46",
    "grid": "#292c32",
    "good": "#5cc99a",
    "bad": "#ff8f85",
    "note": "#e3b457",
    "link": "#8ab6ff",
    "run-0": "#a8aeb8",
    "run-1": "#7fb0ff",
    "run-2": "#f0a05a",
    "run-3": "#4cc3ad",
    "run-4": "#c79bf0",
    "run-5": "#f08bbd",
}
COLORED_RUNS = 6
# Margin around the drawing in a standalone file.
EDGE = 10

STYLE = """
.plot{font-family:system-ui,-apple-system,"Segoe UI",Roboto,"Liberation Sans",sans-serif}
.plot text{font-size:13px;fill:var(--soft)}
.plot .name{font-weight:600;paint-order:stroke;stroke:var(--panel);stroke-width:4px;stroke-linejoin:round}
.plot .on-panel{paint-order:stroke;stroke:var(--panel);stroke-width:4px;stroke-linejoin:round}
.plot .title{fill:var(--ink)}
.plot .grid{stroke:var(--grid);stroke-width:1}
.plot .axis{stroke:var(--line);stroke-width:1;fill:none}
.plot .zero{stroke:var(--soft);stroke-width:1}
.plot .front{stroke:var(--soft);stroke-width:1.25;stroke-dasharray:2 4;stroke-linecap:round;fill:none}
.plot .target{stroke:var(--ink);stroke-width:1.25;stroke-dasharray:5 4;fill:none}
.plot .second{stroke:var(--soft);stroke-width:1.75;stroke-linejoin:round;fill:none}
.plot .arrow{stroke:var(--soft);stroke-width:1.5;fill:none}
.plot .head{fill:var(--soft)}
""" + "".join(
    f".plot .bar.r{index}{{stroke:var(--run-{index});stroke-width:2;fill:none}}"
    f".plot .dot.r{index}{{fill:var(--run-{index});stroke:var(--panel);stroke-width:1}}"
    f".plot .ring.r{index}{{fill:var(--panel);stroke:var(--run-{index});stroke-width:2}}"
    f".plot .curve.r{index}{{stroke:var(--run-{index});stroke-width:2;stroke-linejoin:round;fill:none}}"
    f".plot .name.r{index}{{fill:var(--run-{index})}}\n"
    for index in range(COLORED_RUNS)
)


def run_class(index: int) -> str:
    """Return the CSS class that colors a run; only the baseline is gray."""
    return f"r{index if index == 0 else (index - 1) % (COLORED_RUNS - 1) + 1}"


class Point(NamedTuple):
    """A point of a drawing, in the drawing's units, with y pointing down."""

    x: float
    y: float


class Drawing:
    """An SVG drawing.

    Args:
        name: Name that is unique on its page; prefix of the element ids.
        width: Width in the drawing's units.
        height: Height in the drawing's units.
        title: Title for screen readers.
        description: The numbers that the drawing shows, for screen readers; "" for none.
    """

    def __init__(self, name: str, width: float, height: float, *, title: str, description: str = "") -> None:
        labels = f"{name}-title {name}-desc" if description else f"{name}-title"
        box = f"0 0 {_short(width)} {_short(height)}"
        self._size = (width, height)
        self._root = Element("svg", {"class": "plot", "viewBox": box, "role": "img", "aria-labelledby": labels})
        SubElement(self._root, "title", {"id": f"{name}-title"}).text = _printable(title)
        if description:
            SubElement(self._root, "desc", {"id": f"{name}-desc"}).text = _printable(description)

    def path(self, points: Iterable[Point], css: str, *, closed: bool = False) -> None:
        """Draw a polyline."""
        steps = " L".join(f"{_short(x)} {_short(y)}" for x, y in points)
        SubElement(self._root, "path", {"class": css, "d": f"M{steps}{'Z' if closed else ''}"})

    def circle(self, center: Point, radius: float, css: str) -> None:
        """Draw a circle."""
        geometry = {"cx": _short(center.x), "cy": _short(center.y), "r": _short(radius)}
        SubElement(self._root, "circle", {"class": css, **geometry})

    def text(self, at: Point, text: str, css: str = "", *, anchor: str = "start", turned: bool = False) -> None:
        """Write a line of text; with `turned` it runs upwards."""
        geometry = {"x": _short(at.x), "y": _short(at.y), "text-anchor": anchor}
        if turned:
            geometry["transform"] = f"rotate(-90 {geometry['x']} {geometry['y']})"
        SubElement(self._root, "text", {"class": css, **geometry} if css else geometry).text = _printable(text)

    def inline(self) -> Markup:
        """Return the drawing for a page that contains `STYLE` and the palette."""
        return Markup(tostring(self._root, encoding="unicode"))

    def standalone(self) -> str:
        """Return the drawing as the text of an SVG file with a light background."""
        width, height = (_short(side + 2 * EDGE) for side in self._size)
        box = f"{-EDGE} {-EDGE} {width} {height}"
        attributes = {"xmlns": "http://www.w3.org/2000/svg", "viewBox": box, "width": width, "height": height}
        root = Element("svg", {**self._root.attrib, **attributes})
        style = re.sub(r"var\(--([\w-]+)\)", lambda match: LIGHT[match[1]], STYLE)
        SubElement(root, "style").text = style
        background = {"x": str(-EDGE), "y": str(-EDGE), "width": width, "height": height, "fill": LIGHT["panel"]}
        SubElement(root, "rect", background)
        root.extend(self._root)
        return tostring(root, encoding="unicode") + "\n"


def ticks(low: float, high: float, *, count: int = 5) -> list[float]:
    """Return about `count` round numbers from `low` to `high`."""
    if high <= low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** floor(log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = -floor(-low / step + 1e-9), floor(high / step + 1e-9)
    return [round(index * step, 10) for index in range(first, last + 1)]


def shorten(text: str, max_length: int) -> str:
    """Return a text of at most `max_length` characters."""
    return text if len(text) <= max_length else text[: max_length - 1] + "…"


def draw_arrow(drawing: Drawing, start: Point, end: Point, *, gap: float) -> Sequence[Point]:
    """Draw an arrow between two marks, `gap` away from each, and return its ends; () if it does not fit."""
    dx, dy = end.x - start.x, end.y - start.y
    length = (dx**2 + dy**2) ** 0.5
    if length < 2 * gap + 14:
        return ()
    ux, uy = dx / length, dy / length
    tail, tip = Point(start.x + gap * ux, start.y + gap * uy), Point(end.x - gap * ux, end.y - gap * uy)
    foot = Point(tip.x - 9 * ux, tip.y - 9 * uy)
    drawing.path((tail, foot), "arrow")
    sides = (Point(foot.x - 4.5 * uy, foot.y + 4.5 * ux), Point(foot.x + 4.5 * uy, foot.y - 4.5 * ux))
    drawing.path((sides[0], tip, sides[1]), "head", closed=True)
    return tail, tip


def _short(value: float) -> str:
    text = f"{value:.2f}".rstrip("0").rstrip(".")
    return "0" if text == "-0" else text


def _printable(text: str) -> str:
    """Return a text in which characters that XML cannot contain are spaces."""
    return "".join(char if char.isprintable() else " " for char in text)
