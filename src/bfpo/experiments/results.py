"""Results of an experiment: means over seeds with intervals, paired differences, and verdicts."""

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
from bfpo.experiments.cost_table import COST_COLUMNS, VariantCost, cost_rows
from bfpo.experiments.recipe import COMPARISON, ExperimentRecipe, all_settings
from bfpo.experiments.units import Unit
from bfpo.report.plane import PlanePoint, draw_plane
from bfpo.report.svg import Drawing
from bfpo.stats.intervals import Interval, Values, holm, mean_ellipse, t_interval
from bfpo.stats.paired import paired_means

PRIMARY = ("all", "harmonic_mean")
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
"""Task and metric → whether higher is better."""
# Maximum number of variants on one figure; a tuning has too many settings.
MAX_DRAWN = 20
# Columns of the table after the primary metric, safety and helpfulness.
_FURTHER = ("harmful/severity", "lookalike/over_refusal", "harmful/malformed", "benign/malformed")
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
    "verdict",
)

_COST_TITLE = "Cost of a run, mean over seeds, without base model and evaluation"


@dataclass(frozen=True, slots=True)
class VariantResult:
    """One metric of one variant in one world.

    Args:
        world: Name of the world.
        variant: Name of the variant.
        metric: `task/metric`.
        values: One value per seed, in the order of the recipe's seeds.
        mean: Mean over seeds, with Student's 95 % interval.
        difference: Difference from the variant compared with, seed by seed; None for that variant itself.
        p_value: P-value of the paired t-test, adjusted by Holm over the variants of this world and metric.
        verdict: Verdict on the difference at 5 %.
    """

    world: str
    variant: str
    metric: str
    values: list[float]
    mean: Interval
    difference: Interval | None
    p_value: float | None
    verdict: DifferenceVerdict | None


def collect_results(recipe: ExperimentRecipe, units: Sequence[Unit]) -> list[VariantResult]:
    """Read the results of all units and compare the variants; the statistics are over seeds.

    Args:
        recipe: Recipe with at least two seeds.
        units: Units, all of them done.

    Raises:
        DataError: If results of one world are by different revisions of the judge.
    """
    values: dict[tuple[str, str], list[dict[tuple[str, str], float]]] = {}
    judges: dict[str, tuple[Path, list[dict[str, str]]]] = {}
    for unit in sorted(units, key=lambda unit: recipe.seeds.index(unit.options.seed)):
        results = read_results(unit.evaluation)
        first_folder, first_judges = judges.setdefault(unit.world, (unit.evaluation, results.judges))
        if results.judges != first_judges:
            raise DataError(
                f"{unit.evaluation} was judged by {_names(results.judges)}, {first_folder} by "
                f"{_names(first_judges)}; they can't be compared, `bfpo experiment` judges outdated ones again"
            )
        by_key = {
            (metric.task, metric.metric): metric.value for metric in results.metrics if metric.value is not None
        }
        values.setdefault((unit.world, unit.variant), []).append(by_key)
    variant_results = []
    for world in recipe.worlds:
        variants = [variant for variant_world, variant in values if variant_world == world]
        for metric, higher_is_better in METRICS.items():
            by_variant = {
                variant: np.array([of_seed[metric] for of_seed in values[world, variant]]) for variant in variants
            }
            variant_results += _compare_variants(
                world, "/".join(metric), by_variant, recipe.against, higher_is_better
            )
    return variant_results


def _names(judges: Sequence[dict[str, str]]) -> str:
    return ", ".join(f"{judge['name']}@{judge['revision']}" for judge in judges) or "no judge"


def _compare_variants(
    world: str, metric: str, by_variant: dict[str, Values], against: str, higher_is_better: bool
) -> list[VariantResult]:
    baseline = by_variant[against]
    others = [variant for variant in by_variant if variant != against]
    compared = {variant: paired_means(by_variant[variant], baseline) for variant in others}
    p_values = holm([p_value for _, p_value in compared.values()])
    adjusted = dict(zip(others, p_values, strict=True))
    results = []
    for variant, values in by_variant.items():
        difference = compared[variant][0] if variant != against else None
        verdict: DifferenceVerdict | None = None
        if difference is not None:
            verdict = verdict_on(difference, higher_is_better=higher_is_better, p_value=adjusted[variant])
        results.append(
            VariantResult(
                world,
                variant,
                metric,
                [round(float(value), 5) for value in values],
                t_interval(values),
                difference,
                adjusted.get(variant),
                verdict,
            )
        )
    return results


def choose_settings(recipe: ExperimentRecipe, results: Sequence[VariantResult]) -> list[dict[str, Any]]:
    """Choose the setting of each varied variant with the largest mean minus spread of the primary metric.

    Returns:
        World, variant, the chosen values, the score, the number of settings tried, and the names whose chosen value
        is at an edge of the values tried, so that the best one may lie beyond.
    """
    scores = {
        (result.world, result.variant): float(np.mean(result.values) - np.std(result.values, ddof=1))
        for result in results
        if result.metric == "/".join(PRIMARY)
    }
    settings_of = all_settings(recipe)
    rows = []
    for world in recipe.worlds:
        for name, variant in recipe.variants.items():
            if not variant.vary:
                continue
            settings = settings_of[world][name]
            best = max(settings, key=lambda setting: scores[world, setting.name])
            edges = []
            for key in variant.vary:
                tried = [setting.values[key] for setting in settings]
                # Other values than numbers have no edge.
                has_edges = all(isinstance(value, int | float) and not isinstance(value, bool) for value in tried)
                if has_edges and best.values[key] in (min(tried), max(tried)):
                    edges.append(key)
            score = round(scores[world, best.name], 4)
            row = {"world": world, "variant": name, "values": best.values, "score": score}
            rows.append(row | {"tried": len(settings), "edges": edges})
    return rows


def write_comparison(
    folder: Path,
    recipe: ExperimentRecipe,
    results: Sequence[VariantResult],
    costs: Sequence[VariantCost],
    metadata: dict[str, Any],
) -> None:
    """Write comparison.json, comparison.md and, for a few variants, plane-WORLD.svg.

    Args:
        folder: Output folder.
        recipe: The recipe.
        results: Results of all variants.
        costs: Costs of all variants.
        metadata: Command, versions, hardware; `took`: the runs of this call and their duration. It is appended to
            those of earlier calls with the same recipe, unless this call ran nothing.
    """
    recipe_content = recipe.model_dump(mode="json")
    took = [call for call in (*_read_took(folder / COMPARISON, recipe_content), metadata["took"]) if call["runs"]]
    content = metadata | {
        "took": took,
        "recipe": recipe_content,
        "statistics": "seeds are the unit; paired t-tests against the variant named, adjusted by Holm over the "
        "variants of one world and metric; intervals are Student's 95 %",
        "chosen": choose_settings(recipe, results),
        "lines": [asdict(result) for result in results],
        "costs": [asdict(cost) for cost in costs],
    }
    write_json(folder / COMPARISON, content)
    texts = []
    for world in recipe.worlds:
        texts.append(f"{_title(world, recipe)}\n\n{_table(COLUMNS, _rows(world, results))}")
        texts.append(f"{_COST_TITLE}\n\n{_table(COST_COLUMNS, cost_rows(world, costs))}")
        variants = {result.variant for result in results if result.world == world}
        plane = folder / f"plane-{world}.svg"
        if len(recipe.seeds) >= 3 and len(variants) <= MAX_DRAWN:
            write_text(plane, _plane(world, results).standalone())
        else:
            # That of an earlier comparison would be of other runs.
            plane.unlink(missing_ok=True)
    write_text(folder / "comparison.md", "\n".join(texts))


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "".join("| " + " | ".join(row) + " |\n" for row in (columns, ("---",) * len(columns), *rows))


def _read_took(file: Path, recipe_content: dict[str, Any]) -> list[dict[str, Any]]:
    """Return `took` of earlier calls with the same recipe."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        return list(content["took"]) if content["recipe"] == recipe_content else []
    except (OSError, ValueError, KeyError, TypeError):
        return []


def show_comparison(recipe: ExperimentRecipe, results: Sequence[VariantResult], costs: Sequence[VariantCost]) -> None:
    """Print the metrics of every variant, sorted by the primary metric, their costs, and what tuning chose."""
    for world in recipe.worlds:
        show_table(_title(world, recipe), COLUMNS, _rows(world, results))
        show_table(_COST_TITLE, COST_COLUMNS, cost_rows(world, costs))
    rows = [
        (
            chosen["world"],
            chosen["variant"],
            ", ".join(f"{name}={value}" for name, value in chosen["values"].items()),
            f"{chosen['score']:.2f}",
            ", ".join(chosen["edges"]),
        )
        for chosen in choose_settings(recipe, results)
    ]
    if rows:
        show_table("Chosen: largest mean minus spread", ("world", "variant", "values", "score", "on the edge"), rows)


def _title(world: str, recipe: ExperimentRecipe) -> str:
    return f"World '{world}', {len(recipe.seeds)} seeds, against {recipe.against}"


def _rows(world: str, results: Sequence[VariantResult]) -> list[tuple[str, ...]]:
    """Return the table of a world, best variant first."""
    by_key = {(result.variant, result.metric): result for result in results if result.world == world}
    primary = [result for result in by_key.values() if result.metric == "/".join(PRIMARY)]
    return [
        (
            result.variant,
            format_interval(result.mean),
            *(
                format_interval(by_key[result.variant, name].mean)
                for name in ("harmful/safety", "benign/helpfulness")
            ),
            *(f"{by_key[result.variant, name].mean.value:.2f}" for name in _FURTHER),
            "" if result.difference is None else format_interval(result.difference, "+.2f"),
            result.verdict or "",
        )
        for result in sorted(primary, key=lambda result: -result.mean.value)
    ]


def _plane(world: str, results: Sequence[VariantResult]) -> Drawing:
    """Draw the variants of a world on the plane, each with the ellipse of its mean over seeds."""
    by_key = {(result.variant, result.metric): result for result in results if result.world == world}
    stands = []
    for index, variant in enumerate(dict.fromkeys(variant for variant, _ in by_key)):
        helpful, safe = by_key[variant, "benign/helpfulness"], by_key[variant, "harmful/safety"]
        outline = mean_ellipse(np.stack([helpful.values, safe.values], axis=1))
        stands.append(PlanePoint(index, variant, helpful.mean, safe.mean, [(float(x), float(y)) for x, y in outline]))
    return draw_plane(stands, arrows=False, legend=True)


def format_interval(interval: Interval, style: str = ".2f") -> str:
    """Return an interval as text."""
    return f"{interval.value:{style}} [{interval.low:{style}}, {interval.high:{style}}]"
