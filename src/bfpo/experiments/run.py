"""`bfpo experiment`: run missing units, write and show the comparison."""

import time
from pathlib import Path

from bfpo.core.environment import hardware, versions
from bfpo.experiments.cost_table import collect_costs
from bfpo.experiments.preflight import check_trainings
from bfpo.experiments.recipe import ExperimentRecipe
from bfpo.experiments.results import collect_results, show_comparison, write_comparison
from bfpo.experiments.units import make_units, run_units


def run_experiment(recipe: ExperimentRecipe, *, command: str) -> None:
    """Compare methods over seeds.

    Args:
        recipe: The recipe.
        command: Command line, for the results.

    Raises:
        RecipeError: If a variant isn't possible, or another experiment is running in the folder.
        TrainingError: If a run fails; finished runs are kept.
        Stopped: On Ctrl-C.
    """
    units = make_units(recipe)
    check_trainings(unit for unit in units if not unit.has_results)
    start = time.monotonic()
    count = run_units(units, Path(recipe.out), jobs=recipe.jobs)
    took = {"runs": count, "of": len(units), "seconds": round(time.monotonic() - start), "jobs": recipe.jobs}
    results, costs = collect_results(recipe, units), collect_costs(units)
    metadata = {"command": command, "versions": versions(), "hardware": hardware(), "took": took}
    write_comparison(Path(recipe.results or recipe.out), recipe, results, costs, metadata)
    show_comparison(recipe, results, costs)
