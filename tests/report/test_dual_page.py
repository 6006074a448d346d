"""The page of `bfpo dual`: its numbers are those of `dual.json`, and texts of others are escaped."""

import re
from xml.etree import ElementTree

import numpy as np
import pytest

from bfpo.constraints.samples import ScoredSamples
from bfpo.constraints.solve import ConstraintRequest, solve_constraint
from bfpo.losses.dual import Dual
from bfpo.report.dual import describe_constraint, draw_frontier, write_dual_page

from .page import Page


def made_dual(*, model: str = "base", kind: str | None = None, **options) -> Dual:
    rng = np.random.default_rng(0)
    cost = rng.normal(-0.2, 1, (60, 24))
    reward = 0.7 * cost + rng.normal(0, 1, cost.shape)
    exists = np.ones(cost.shape, dtype=bool)
    names = tuple(f"p{x}" for x in range(60))
    samples = ScoredSamples(
        names, (kind,) * 60, exists, reward, cost, cost > 0, model, "rm@1", "cm@1", {"s": "ab" * 32}
    )
    return solve_constraint(samples, ConstraintRequest(**{"beta": 0.8, "kind": kind} | options))


@pytest.fixture(scope="module")
def active():
    return made_dual(max=0.05, kind="harmful")


def test_the_page_has_the_numbers_of_the_file(active, tmp_path):
    text = write_dual_page(tmp_path, active).read_text()
    page = Page(text)
    assert "At most 5 % unsafe answers to harmful prompts" in page.prose
    assert f"The multiplier {active.multiplier:.4g} [" in page.prose
    assert f"{active.predicted.kl:.2f} nats from the base model" in page.prose
    assert f"The base model has {100 * active.base.harm:.3g} %" in page.prose
    assert f"multiplier: {tmp_path / 'dual.json'}, draw: soft" in page.prose
    assert "meets the constraint" in page.prose
    for warning in active.warnings:
        assert " ".join(warning.split()) in page.prose
    assert "abababababab…" in page.prose
    assert len(page.ids()) == len(set(page.ids()))
    # Nothing is loaded, and there is no script.
    assert not [tag for tag, attrs in page.tags if tag in ("script", "img", "link") or "src" in attrs]


def test_texts_of_others_are_escaped(tmp_path):
    text = write_dual_page(tmp_path, made_dual(max=0.05, model="<script>x</script>")).read_text()
    assert "<script" not in text
    assert "&lt;script&gt;" in text


def test_slack_and_infeasible_pages_say_so(tmp_path):
    slack = Page(write_dual_page(tmp_path / "slack", made_dual(max=0.9)).read_text())
    assert "No multiplier is needed" in slack.prose
    infeasible = Page(write_dual_page(tmp_path / "no", made_dual(measure="cost", max=-9.0)).read_text())
    assert "Infeasible: no policy over these samples reaches −9" in infeasible.prose
    assert "Train on it" not in infeasible.prose


def test_the_figure_draws_every_point_at_its_place(active):
    root = ElementTree.fromstring(draw_frontier(active).standalone())
    curves = [path for path in root.iter() if "curve" in path.get("class", "")]
    assert len(curves) == 2
    for curve in curves:
        points = re.findall(r"([\d.]+) ([\d.]+)", curve.get("d"))
        assert len(points) == len(active.frontier)
        # Less harm is further left, and the frontier is drawn from no constraint to the strictest.
        across = [float(x) for x, _ in points]
        assert across == sorted(across, reverse=True)
    heights = [float(y) for _, y in re.findall(r"([\d.]+) ([\d.]+)", curves[0].get("d"))]
    assert heights == sorted(heights)
    (dashed,) = {path.get("d").split()[0] for path in root.iter() if path.get("class") == "target"}
    dots = [circle for circle in root.iter() if circle.get("class") == "dot r2"]
    assert [f"M{dot.get('cx')}" for dot in dots] == [dashed] * 2
    assert "λ = 0" in "".join(root.itertext())


def test_constraints_are_described():
    titles = {
        "At most 2 % unsafe answers": made_dual(max=0.02),
        "At most −0.25 mean cost": made_dual(measure="cost", max=-0.25),
        "At most 0.5 mean cost of the worst 0.05 of the answers": made_dual(measure="cvar", max=0.5, share=0.05),
    }
    for title, dual in titles.items():
        assert describe_constraint(dual) == title
