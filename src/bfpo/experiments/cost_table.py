"""The costs of the variants of an experiment, as means over seeds, and what each of them learns from."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bfpo.experiments.costs import Cost, read_cost
from bfpo.experiments.units import Unit

COST_COLUMNS = ("variant", "policy samples", "scorer and judge calls", "CPU seconds", "sees")
_NOT_RECORDED = "not recorded"


@dataclass(frozen=True, slots=True)
class VariantCost:
    """What one variant costs in one world, besides its base model and its evaluation, and what it learns from.

    Args:
        world: Name of the world.
        variant: Name of the variant.
        sees: What the method learns from; no method sees the oracle that evaluates it.
        samples: Number of samples of the policy or its base, mean over seeds; None if an earlier version ran it.
        calls: Number of answers that scorers and judges read.
        cpu_seconds: Time of the processor, in seconds. That of a stage that variants share counts for each of them.
    """

    world: str
    variant: str
    sees: list[str]
    samples: float | None
    calls: float | None
    cpu_seconds: float | None


def collect_costs(units: Sequence[Unit]) -> list[VariantCost]:
    """Return the costs of all variants, in the order of the recipe; the base model has none.

    Args:
        units: Units, all of them done.

    Raises:
        DataError: If a file of costs is malformed.
    """
    by_variant: dict[tuple[str, str], list[Unit]] = {}
    for unit in units:
        if unit.method is not None:
            by_variant.setdefault((unit.world, unit.variant), []).append(unit)
    rows = []
    for (world, variant), of_variant in by_variant.items():
        costs = [cost for unit in of_variant if (cost := read_cost(unit.folder)) is not None]
        is_complete = len(costs) == len(of_variant)
        method = of_variant[0].method
        assert method is not None
        rows.append(VariantCost(world, variant, method.sees, *(_means(costs) if is_complete else (None, None, None))))
    return rows


def _means(costs: Sequence[Cost]) -> tuple[float, float, float]:
    samples, calls, seconds = np.mean([(cost.samples, cost.calls, cost.cpu_seconds) for cost in costs], axis=0)
    return float(samples), float(calls), round(float(seconds), 2)


def cost_rows(world: str, costs: Sequence[VariantCost]) -> list[tuple[str, ...]]:
    """Return the table of the costs in a world, with the columns `COST_COLUMNS`."""
    return [
        (
            cost.variant,
            *(
                _NOT_RECORDED if number is None else f"{number:,.0f}"
                for number in (cost.samples, cost.calls, cost.cpu_seconds)
            ),
            ", ".join(cost.sees),
        )
        for cost in costs
        if cost.world == world
    ]
