"""The work of `bfpo experiment`: run what isn't done, write what was found, show it."""

import time
from pathlib import Path

from bfpo.experiments.recipe import CompareRecipe
from bfpo.experiments.results import collect, show_comparison, write_comparison
from bfpo.experiments.units import run_units, units_of
from bfpo.training.manifest import hardware, versions


def compare(recipe: CompareRecipe, *, command: str) -> None:
    """Compare methods over seeds.

    Args:
        recipe: What to compare.
        command: As it was called, for the results.

    Raises:
        RecipeError: If a variant isn't possible, or another comparison works in the folder.
        TrainingError: If a run fails; what is done stays.
        Stopped: On Ctrl-C.
    """
    units = units_of(recipe)
    began = time.monotonic()
    count = run_units(units, Path(recipe.out), jobs=recipe.jobs)
    took = {"runs": count, "of": len(units), "seconds": round(time.monotonic() - began), "jobs": recipe.jobs}
    lines = collect(recipe, units)
    facts = {"command": command, "versions": versions(), "hardware": hardware(), "took": took}
    write_comparison(Path(recipe.results or recipe.out), recipe, lines, facts)
    show_comparison(recipe, lines)
