"""What a comparison found: means over seeds with intervals, paired differences, and the words that follow."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bfpo.core.files import write_json, write_text
from bfpo.core.terminal import show_table
from bfpo.errors import DataError
from bfpo.evaluation.comparisons import DifferenceVerdict, verdict_on
from bfpo.evaluation.results import read_results
from bfpo.experiments.recipe import CompareRecipe, all_tried
from bfpo.experiments.units import Unit
from bfpo.report.plane import PlanePoint, draw_plane
from bfpo.report.svg import Drawing
from bfpo.stats.intervals import (
    Interval,
    Values,
    holm,
    mean_ellipse,
    paired_p_value,
    t_interval,
)

PRIMARY = ("all", "harmonic_mean")
# Task, metric, whether higher is better.
METRICS = {
    PRIMARY: True,
    ("harmful", "safety"): True,
    ("harmful", "severity"): False,
    ("harmful", "malformed"): False,
    ("benign", "helpfulness"): True,
    ("benign", "over_refusal"): False,
    ("benign", "malformed"): False,
    ("lookalike", "helpfulness"): True,
    ("lookalike", "over_refusal"): False,
}
# Variants that have room on one figure; a tuning's many settings have none.
MOST_DRAWN = 20
# Beside the primary metric, safety and helpfulness.
BESIDE = ("harmful/severity", "lookalike/over_refusal", "harmful/malformed", "benign/malformed")
COLUMNS = (
    "variant",
    "harmonic mean",
    "safety",
    "helpfulness",
    "severity",
    "look-alikes refused",
    "malformed (harmful)",
    "malformed (benign)",
    "difference",
    "that is",
)


@dataclass(frozen=True, slots=True)
class VariantResult:
    """One metric of one variant in one world.

    Args:
        world: Name of the world.
        variant: Name of the variant.
        metric: `task/metric`.
        values: One per seed.
        mean: Over seeds, with Student's 95 % interval.
        difference: From the variant compared with, seed by seed; None for itself.
        p_value: Of the paired t-test, adjusted by Holm over the variants of this world and metric.
        verdict: better, worse or not distinguishable at 5 %.
    """

    world: str
    variant: str
    metric: str
    values: list[float]
    mean: Interval
    difference: Interval | None
    p_value: float | None
    verdict: DifferenceVerdict | None


def collect(recipe: CompareRecipe, units: Sequence[Unit]) -> list[VariantResult]:
    """Read the results of all units and compare them; seeds are the unit of the statistics.

    Args:
        recipe: With at least two seeds.
        units: All done.

    Raises:
        DataError: If two results of a world are by different revisions of the judge.
    """
    values: dict[tuple[str, str], list[dict[tuple[str, str], float]]] = {}
    judges: dict[str, tuple[Path, list[dict[str, str]]]] = {}
    for unit in sorted(units, key=lambda unit: unit.options.seed):
        results = read_results(unit.evaluation)
        place, first = judges.setdefault(unit.world, (unit.evaluation, results.judges))
        if results.judges != first:
            raise DataError(
                f"{unit.evaluation} was judged by {_named(results.judges)}, {place} by {_named(first)}: they can't "
                "be compared; `bfpo experiment` judges what is old again"
            )
        found = {(one.task, one.metric): one.value for one in results.metrics if one.value is not None}
        values.setdefault((unit.world, unit.variant), []).append(found)
    lines = []
    for world in recipe.worlds:
        variants = [variant for place, variant in values if place == world]
        for metric, higher_is_better in METRICS.items():
            by_variant = {
                variant: np.array([seed[metric] for seed in values[world, variant]]) for variant in variants
            }
            lines += _compared(world, "/".join(metric), by_variant, recipe.against, higher_is_better)
    return lines


def _named(judges: Sequence[dict[str, str]]) -> str:
    return ", ".join(f"{judge['name']}@{judge['revision']}" for judge in judges) or "nobody"


def _compared(
    world: str, metric: str, by_variant: dict[str, Values], against: str, higher_is_better: bool
) -> list[VariantResult]:
    theirs = by_variant[against]
    others = [variant for variant in by_variant if variant != against]
    adjusted = dict(zip(others, holm([paired_p_value(by_variant[name], theirs) for name in others]), strict=True))
    lines = []
    for variant, ours in by_variant.items():
        difference = t_interval(ours - theirs) if variant != against else None
        verdict: DifferenceVerdict | None = None
        if difference is not None:
            verdict = verdict_on(difference, higher_is_better=higher_is_better, p_value=adjusted[variant])
        lines.append(
            VariantResult(
                world,
                variant,
                metric,
                [round(float(value), 5) for value in ours],
                t_interval(ours),
                difference,
                adjusted.get(variant),
                verdict,
            )
        )
    return lines


def chosen(recipe: CompareRecipe, lines: Sequence[VariantResult]) -> list[dict[str, Any]]:
    """Return, for each variant that varies something, what has the largest mean minus spread of the primary metric.

    Returns:
        World, variant, the values chosen, the score, how many were tried, and the names whose chosen value is the
        first or last that was tried: there the best may lie outside.
    """
    scores = {
        (line.world, line.variant): float(np.mean(line.values) - np.std(line.values, ddof=1))
        for line in lines
        if line.metric == "/".join(PRIMARY)
    }
    every = all_tried(recipe)
    found = []
    for world in recipe.worlds:
        for name, variant in recipe.variants.items():
            if not variant.vary:
                continue
            ways = every[world][name]
            best = max(ways, key=lambda way: scores[world, way.name])
            edges = [
                key
                for key in variant.vary
                if best.values[key] in (min(way.values[key] for way in ways), max(way.values[key] for way in ways))
            ]
            score = round(scores[world, best.name], 4)
            content = {"world": world, "variant": name, "values": best.values, "score": score}
            found.append(content | {"tried": len(ways), "edges": edges})
    return found


def write_comparison(
    folder: Path, recipe: CompareRecipe, lines: Sequence[VariantResult], facts: dict[str, Any]
) -> None:
    """Write everything that was found, with how: comparison.json, comparison.md, plane-WORLD.svg (of a few variants).

    Args:
        folder: Where to write.
        recipe: What was asked for.
        lines: What was found.
        facts: Command, versions, hardware; `took`, the runs that this call made and how long that took. It is put
            behind those of earlier calls, as a comparison may be made in several; one that ran nothing isn't told.
    """
    asked = recipe.model_dump(mode="json")
    took = [one for one in (*_took_before(folder / "comparison.json", asked), facts["took"]) if one["runs"]]
    content = facts | {
        "took": took,
        "recipe": asked,
        "statistics": "seeds are the unit; paired t-tests against the variant named, adjusted by Holm over the "
        "variants of one world and metric; intervals are Student's 95 %",
        "chosen": chosen(recipe, lines),
        "lines": [asdict(line) for line in lines],
    }
    write_json(folder / "comparison.json", content)
    texts = []
    for world in recipe.worlds:
        rows = ("| " + " | ".join(row) + " |" for row in (COLUMNS, ("---",) * len(COLUMNS), *_rows(world, lines)))
        texts.append(f"{_title(world, recipe)}\n\n" + "\n".join(rows) + "\n")
        variants = {line.variant for line in lines if line.world == world}
        if len(recipe.seeds) >= 3 and len(variants) <= MOST_DRAWN:
            write_text(folder / f"plane-{world}.svg", _plane(world, lines).standalone())
    write_text(folder / "comparison.md", "\n".join(texts))


def _took_before(file: Path, asked: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what earlier calls of the same recipe took."""
    try:
        before = json.loads(file.read_text(encoding="utf-8"))
        return list(before["took"]) if before["recipe"] == asked else []
    except (OSError, ValueError, KeyError, TypeError):
        return []


def show_comparison(recipe: CompareRecipe, lines: Sequence[VariantResult]) -> None:
    """Print the primary metric of every variant, best first, with others beside it; then what tuning chose."""
    for world in recipe.worlds:
        show_table(_title(world, recipe), COLUMNS, _rows(world, lines))
    best = chosen(recipe, lines)
    if best:
        rows = [
            (
                one["world"],
                one["variant"],
                ", ".join(f"{name}={value}" for name, value in one["values"].items()),
                f"{one['score']:.2f}",
                ", ".join(one["edges"]),
            )
            for one in best
        ]
        show_table("Chosen: largest mean minus spread", ("world", "variant", "values", "score", "on the edge"), rows)


def _title(world: str, recipe: CompareRecipe) -> str:
    return f"World '{world}', {len(recipe.seeds)} seeds, against {recipe.against}"


def _rows(world: str, lines: Sequence[VariantResult]) -> list[tuple[str, ...]]:
    """Return the table of a world, best first."""
    by_key = {(line.variant, line.metric): line for line in lines if line.world == world}
    primary = [line for line in by_key.values() if line.metric == "/".join(PRIMARY)]
    return [
        (
            line.variant,
            shown(line.mean),
            *(shown(by_key[line.variant, name].mean) for name in ("harmful/safety", "benign/helpfulness")),
            *(f"{by_key[line.variant, name].mean.value:.2f}" for name in BESIDE),
            "" if line.difference is None else shown(line.difference, "+.2f"),
            line.verdict or "",
        )
        for line in sorted(primary, key=lambda line: -line.mean.value)
    ]


def _plane(world: str, lines: Sequence[VariantResult]) -> Drawing:
    """Draw a world's variants on the plane, each with the ellipse of its mean over seeds."""
    by_key = {(line.variant, line.metric): line for line in lines if line.world == world}
    found = []
    for place, variant in enumerate(dict.fromkeys(variant for variant, _ in by_key)):
        helpful, safe = by_key[variant, "benign/helpfulness"], by_key[variant, "harmful/safety"]
        outline = mean_ellipse(np.stack([helpful.values, safe.values], axis=1))
        found.append(PlanePoint(place, variant, helpful.mean, safe.mean, [(float(x), float(y)) for x, y in outline]))
    return draw_plane(found, arrows=False, legend=True)


def shown(interval: Interval, style: str = ".2f") -> str:
    """Return an interval as text."""
    return f"{interval.value:{style}} [{interval.low:{style}}, {interval.high:{style}}]"
