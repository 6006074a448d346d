"""Drawings: the plane, its front and regions, axis ticks, colors, and the formatting of numbers."""

import re
from xml.etree import ElementTree

import numpy as np
import pytest

from bfpo.evaluation.results import MetricResult
from bfpo.report.plane import PlanePoint, draw_plane, front, region
from bfpo.report.svg import DARK, LIGHT, STYLE, Drawing, Point, ticks
from bfpo.report.words import MISSING, format_exact, format_number, format_signed
from bfpo.stats.intervals import Interval, wilson


def test_the_figure_is_a_standalone_file(two_runs):
    text = (two_runs.folder / "pareto.svg").read_text()
    root = ElementTree.fromstring(text)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert "var(" not in text
    assert re.findall(r"https?://[^\"]+", text) == ["http://www.w3.org/2000/svg"]


def test_no_run_dominates_a_run_on_the_front():
    assert front([(0.2, 0.9), (0.8, 0.3), (0.1, 0.8), (0.5, 0.5)]) == [0, 3, 1]
    assert front([(0.5, 0.5), (0.5, 0.5), (0.4, 0.9)]) == [2, 0, 1]
    assert front([(0.5, 0.5), (0.5, 0.6)]) == [1]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (-24, 24, [-20, -10, 0, 10, 20]), (0, 0, [0]), (0, 7, [0, 2, 4, 6])],
)
def test_ticks_are_round(low, high, expected):
    assert ticks(low, high) == expected


def test_numbers_are_readable():
    numbers = (format_number(None), format_number(-0.041), format_number(15.234), format_number(12345.6))
    assert numbers == (MISSING, "−0.04", "15.2", "12,346")
    differences = (format_signed(0.571), format_signed(-0.571), format_exact(50.0), format_exact(-0.5))
    assert differences == ("+0.57", "−0.57", "+50", "−0.5")


def test_drawings_escape_their_texts():
    drawing = Drawing("x", 10, 10, title="<b>&", description="\x00\ud800")
    drawing.text(Point(1, 2), "</svg><script>")
    assert "<script>" not in drawing.inline()
    ElementTree.fromstring(drawing.standalone())


def contrast(color: str, other: str) -> float:
    def luminance(color: str) -> float:
        channels = (int(color[index : index + 2], 16) / 255 for index in (1, 3, 5))
        linear = [
            channel / 12.92 if channel <= 0.04045 else ((channel + 0.055) / 1.055) ** 2.4 for channel in channels
        ]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    bright, dark = sorted((luminance(color), luminance(other)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


def test_the_legend_of_many_runs_is_inside_the_drawing():
    rate = Interval(0.5, 0.4, 0.6)
    points = [PlanePoint(index, f"{index} " + "long" * 20, rate, rate) for index in range(40)]
    drawing = ElementTree.fromstring(draw_plane(points, legend=True).inline())
    _, _, width, height = map(float, drawing.attrib["viewBox"].split())
    entries = [text for text in drawing.iter("text") if "long" in text.text]
    assert len(entries) == 40
    # A bold letter of 13 px is 8 px wide on average.
    assert all(float(entry.get("x")) + 8 * len(entry.text) < width for entry in entries)
    assert all(float(entry.get("y")) < height for entry in entries)
    numbers = ElementTree.fromstring(draw_plane(points, numbers=True).inline())
    assert not any("long" in text.text for text in numbers.iter("text"))


@pytest.mark.parametrize("palette", [LIGHT, DARK])
def test_texts_contrast_with_their_background(palette):
    assert set(re.findall(r"var\(--([\w-]+)\)", STYLE)) <= set(palette)
    for name in set(palette) - {"paper", "panel", "line", "grid"}:
        # WCAG 2 requires 4.5 for text (level AA).
        assert min(contrast(palette[name], palette[background]) for background in ("paper", "panel")) >= 4.5, name


def test_the_region_on_the_plane_contains_both_numbers_95_times_of_100():
    rng, n, truth, inside = np.random.default_rng(0), 250, (0.75, 0.9), 0
    for successes in rng.binomial(n, truth, (1500, 2)):
        metrics = []
        for name, count in zip(("helpfulness", "safety"), successes, strict=True):
            interval = wilson(int(count), n)
            metrics.append(MetricResult("s", "t", name, *interval, n, 0, "Wilson", True))
        outline = region(*metrics)
        right, top, left, bottom = (outline[len(outline) * quarter // 4] for quarter in range(4))
        dx, dy = truth[0] - metrics[0].value, truth[1] - metrics[1].value
        horizontal, vertical = right[0] if dx > 0 else left[0], top[1] if dy > 0 else bottom[1]
        inside += (dx / (horizontal - metrics[0].value)) ** 2 + (dy / (vertical - metrics[1].value)) ** 2 <= 1
    assert 0.935 < inside / 1500 < 0.965
