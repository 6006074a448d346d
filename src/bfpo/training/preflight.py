"""Checks of a recipe against the shape of its model, before data are read or anything is trained."""

from bfpo.config.recipes import ScoreRecipe, SftRecipe, TrainRecipe
from bfpo.errors import ModelError, RecipeError
from bfpo.losses.build import make_loss
from bfpo.losses.pairwise import PairLoss
from bfpo.model.load import empty_model
from bfpo.model.lora import CausalLM, add_adapter, lora_config
from bfpo.model.selective import select_parameters
from bfpo.model.shared_adapter import check_same_base, find_shared
from bfpo.training.arguments import check_options, training_arguments, without_resume
from bfpo.training.reference_pass import resolve_reference


def check_training(recipe: TrainRecipe) -> PairLoss:
    """Check the loss and the arguments of a training, and what it trains of its model; see `check_against_model`.

    Returns:
        The loss.

    Raises:
        ModelError: If the model has nothing that the recipe trains.
        RecipeError: If a setting is wrong.
    """
    training_arguments(without_resume(recipe.trainer))
    loss = make_loss(recipe.loss.model_dump())
    check_against_model(recipe)
    return loss


def check_against_model(recipe: TrainRecipe | SftRecipe | ScoreRecipe) -> None:
    """Check everything in a recipe that depends on the model, with a model without weights.

    A start model that the recipe fine-tunes first (`model.sft`) is checked too, because it may take hours to train.

    Args:
        recipe: Recipe of a run.

    Raises:
        ModelError: If the model's configuration can't be loaded, a pattern of `train_only` matches no parameter, the
            model has none of the target modules of `lora`, it already has an adapter and `lora` is set, or
            `shared_adapter` isn't one of this model.
        RecipeError: If a pattern isn't a regular expression, quantized weights would be trained, the kind of
            reference would give wrong numbers, or a value in the nested recipe's `trainer` is wrong.
    """
    _trained_shape(recipe)
    if isinstance(recipe, SftRecipe) and recipe.shared_adapter is not None:
        check_same_base(find_shared(recipe.shared_adapter), recipe.model.path, recipe.model.revision)


def _trained_shape(recipe: TrainRecipe | SftRecipe | ScoreRecipe) -> CausalLM:
    """Return the model that a recipe trains, without weights, after checking what is trained."""
    section = recipe.model
    sft = recipe.model.sft if isinstance(recipe, TrainRecipe) else None
    if sft is None:
        model = empty_model(section)
    else:
        try:
            check_options(sft.trainer)
            model = _trained_shape(sft)
        except (ModelError, RecipeError) as error:
            raise type(error)(f"model.sft: {error}") from error
    if section.load_in_4bit and recipe.lora is None and not hasattr(model, "peft_config"):
        raise RecipeError(
            "model.load_in_4bit needs lora, or a path to an adapter: quantized weights can't be trained"
        )
    if recipe.lora is not None:
        model = add_adapter(model, lora_config(recipe.lora), seed=0)
    selection = select_parameters(model, recipe.train_only)
    if not selection.trained:
        raise RecipeError("train_only: the list is empty, so nothing would be trained; leave it out to train all")
    if isinstance(recipe, TrainRecipe):
        resolve_reference(
            recipe.reference,
            model,
            new_adapter=recipe.lora is not None,
            shards_weights=False,
            whole_vocabulary=make_loss(recipe.loss.model_dump()).divergence_share is not None,
        )
    return model
