"""Checks of all trainings of an experiment or a quickstart before the first of them begins."""

from collections.abc import Iterable
from pathlib import Path

from bfpo.config.losses import BFPOSection
from bfpo.config.recipes import TrainModel, TrainRecipe
from bfpo.errors import ModelError, RecipeError
from bfpo.experiments.methods import train_recipes
from bfpo.experiments.steps import BASE_SHAPE
from bfpo.experiments.units import Unit
from bfpo.testbed.world import World, with_reward_margin
from bfpo.training.preflight import check_training as check_run


def check_trainings(units: Iterable[Unit]) -> None:
    """Check the trainings of units: their loss, their arguments, and what they train of the base model.

    Args:
        units: Units that are to be run; each method is checked once.

    Raises:
        RecipeError: If a training isn't possible; the message names the variant.
    """
    checked = []
    for unit in units:
        if unit.method is None or unit.method in checked:
            continue
        checked.append(unit.method)
        recipes = train_recipes(
            unit.method, world=Path("world"), base=Path("base"), out=Path("out"), seed=0, steps=unit.steps, save=False
        )
        try:
            for recipe in recipes:
                check_training(recipe, World(unit.options))
        except (ModelError, RecipeError) as error:
            raise RecipeError(f"variants.{unit.variant}: {error}") from None


def check_training(recipe: TrainRecipe, world: World) -> None:
    """Check a training on the testbed.

    Raises:
        ModelError: If the base model has nothing that the recipe trains.
        RecipeError: If the loss or an argument is wrong, or the world's pairs lack what the loss needs.
    """
    if isinstance(recipe.loss, BFPOSection):
        # The file of a multiplier doesn't exist yet.
        recipe = recipe.model_copy(update={"loss": recipe.loss.model_copy(update={"multiplier": None})})
    model = TrainModel.model_validate({"new": BASE_SHAPE})
    loss = check_run(recipe.model_copy(update={"model": model}))
    signals = with_reward_margin(next(iter(world.safety_set()))).signals
    # Whether a pair is judged follows from the source of its labels.
    given = {"judged"} | (
        {"categories"} if Path(str(recipe.data[0].path)).stem == "safety_with_categories" else set()
    )
    columns = [name for name in loss.needs if name not in given]
    if missing := [name for name in columns if getattr(signals, name, None) is None]:
        raise RecipeError(f"loss.name: {type(loss).__name__} needs {' and '.join(missing)}, which worlds don't have")
