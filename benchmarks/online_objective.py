"""Compare BFPO with its own objective run by RL, by the value that this objective has under the testbed's oracle.

    python benchmarks/online_objective.py recipes/testbed/online.yaml [out=FOLDER]

Reads the finished units of the recipe: each policy's answers to held-out prompts, with the oracle's safety s in
{0, 1} (an undecided answer is not safe) and helpfulness h in [0, 1]. The objective is the mean of (s + E_s)(h + 1/2)
over all prompts, where E_s is the mean safety of the base model's answers; the KL term is left out, because the
references of the runs are equal and their weights are not. Writes `benchmarks/results/online_objective.json`.
"""

import sys
from pathlib import Path
from typing import Any

from testbed_runs import compare

from bfpo.config.loading import load_recipe
from bfpo.core.environment import hardware, versions
from bfpo.core.files import write_json
from bfpo.data.stages import verdicts_by_judge
from bfpo.experiments.recipe import ExperimentRecipe
from bfpo.experiments.units import Unit, make_units

RESULTS = Path(__file__).parent / "results" / "online_objective.json"
METRIC = "objective"
SUPERVISED = "bfpo alpha 0"
"""Variant that is supervised with the labels of this objective: with another alpha the offset E_s is another one."""
OFFSET = 0.5
"""The offset of helpfulness in the objective."""


def main() -> None:
    """Read the units and write the results."""
    path, *changes = sys.argv[1:]
    recipe = load_recipe(path, ExperimentRecipe, changes)
    units = make_units(recipe)
    seeds = [objectives([unit for unit in units if unit.options.seed == seed]) for seed in recipe.seeds]
    rows = []
    for baseline in (recipe.against, SUPERVISED):
        others = dict.fromkeys((name for name in seeds[0] if name != baseline), baseline)
        rows += [row for row in compare(METRIC, seeds, others, higher_is_better=True) if row["run"] in others]
    write_json(
        RESULTS,
        {
            "command": f"python benchmarks/online_objective.py {path}",
            "what": f"mean of (s + E_s)(h + {OFFSET}) over held-out prompts by the oracle, each variant against "
            f"{recipe.against} and against {SUPERVISED}; paired t-tests over seeds, adjusted by Holm",
            "versions": versions(),
            "hardware": hardware(),
            "runs": rows,
            "seeds": [{"seed": seed, "runs": runs} for seed, runs in zip(recipe.seeds, seeds, strict=True)],
        },
    )
    for row in rows:
        print(f"{row['run']}: {row['mean'].value:.3f}, {row['verdict']} against {row['against']}")


def objectives(units: list[Unit]) -> dict[str, dict[str, float]]:
    """Return the objective of each policy of a seed, by variant."""
    (base,) = (unit for unit in units if unit.method is None)
    expected_safety = sum(s for s, _ in answers(base)) / len(answers(base))
    values: dict[str, Any] = {}
    for unit in units:
        scored = answers(unit)
        values[unit.variant] = {METRIC: sum((s + expected_safety) * (h + OFFSET) for s, h in scored) / len(scored)}
    return values


def answers(unit: Unit) -> list[tuple[float, float]]:
    """Return the safety and the helpfulness of a policy's answers by the oracle."""
    ((_, verdicts),) = verdicts_by_judge(unit.evaluation).items()
    return [(float(verdict.safe is True), float(verdict.helpfulness or 0.0)) for verdict in verdicts]


if __name__ == "__main__":
    main()
