"""Draw docs/readme.svg: DPO and BFPO on the safety-helpfulness plane, in both worlds of the testbed.

    python docs/make_readme_figure.py

The values are those of `benchmarks/results/testbed/sixteen/comparison.json`; a test compares the committed figure.
"""

import json
import re
from pathlib import Path

import numpy as np

from bfpo.experiments.results import mean_ellipse
from bfpo.report.plane import PlanePoint, draw_plane
from bfpo.stats.intervals import Interval

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results/testbed/sixteen/comparison.json"
FIGURE = ROOT / "docs" / "readme.svg"
WORLDS = {"shared": "shared skills", "separate": "separate skills"}
VARIANTS = {"base": "base", "bfpo": "BFPO", "dpo_h": "DPO, helpful", "dpo_mix": "DPO, mix"}
SIZE = r'<svg [^>]*width="([\d.]+)" height="([\d.]+)"'
HEADING, GAP = 30, 10


def figure() -> str:
    """Return the figure as SVG."""
    lines = json.loads(RESULTS.read_text(encoding="utf-8"))["lines"]
    panels, left = [], 0.0
    for world, title in WORLDS.items():
        panel = _panel({(line["variant"], line["metric"]): line for line in lines if line["world"] == world})
        width, height = (float(value) for value in re.search(SIZE, panel).groups())
        heading = f'<text x="{left + width / 2:g}" y="20" text-anchor="middle" class="heading">{title}</text>'
        panels += [heading, panel.replace("<svg ", f'<svg x="{left:g}" y="{HEADING}" ', 1)]
        left += width + GAP
    style = "<style>.heading{font:600 16px system-ui,sans-serif;fill:#444}</style>"
    background = '<rect width="100%" height="100%" fill="#fff"/>'
    box = f'viewBox="0 0 {left - GAP:g} {height + HEADING:g}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {box} role="img">{style}{background}{"".join(panels)}</svg>\n'


def _panel(lines: dict[tuple[str, str], dict]) -> str:
    points = []
    for index, (variant, name) in enumerate(VARIANTS.items()):
        helpful, safe = lines[variant, "benign/helpfulness"], lines[variant, "harmful/safety"]
        outline = mean_ellipse(np.stack([helpful["values"], safe["values"]], axis=1))
        corners = [(float(x), float(y)) for x, y in outline]
        points.append(PlanePoint(index, name, Interval(*helpful["mean"]), Interval(*safe["mean"]), corners))
    return draw_plane(points, arrows=False).standalone()


if __name__ == "__main__":
    FIGURE.write_text(figure(), encoding="utf-8")
