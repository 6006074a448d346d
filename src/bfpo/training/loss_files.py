"""What a training recipe's loss reads from files: multipliers of constraints, the errors of the labeling judge."""

from dataclasses import asdict
from typing import Any, NamedTuple

from bfpo.config.losses import BFPOSection, LabelErrorsSection
from bfpo.config.recipes import ScoreLabelsSection, TrainRecipe
from bfpo.core.files import file_hash
from bfpo.core.terminal import say
from bfpo.data.score_labels import Draw
from bfpo.errors import RecipeError
from bfpo.losses.baselines import SoftLabels
from bfpo.losses.build import make_loss
from bfpo.losses.dual import Dual, check_beta, dual_path, feasible_multiplier, read_dual
from bfpo.losses.pairwise import BFPO, PairLoss


class ScoreLabels(NamedTuple):
    """Preferences from scores, as a recipe asks for them.

    Args:
        dual: Constraint with a multiplier.
        draw: How preferences follow from scores.
        seed: Seed of drawn orders.
        metadata: Path, hash and multiplier, for `data_manifest.json`.
    """

    dual: Dual
    draw: Draw
    seed: int
    metadata: dict[str, Any]


def resolve_loss_files(recipe: TrainRecipe) -> TrainRecipe:
    """Return the recipe with the numbers from the files of the loss; its record then doesn't need them.

    Raises:
        DataError: If a file is missing or malformed.
        RecipeError: If its multiplier isn't one for the loss, or its judge may be no better than chance.
    """
    section = recipe.loss
    if not isinstance(section, BFPOSection) or (section.multiplier is None and section.label_errors is None):
        return recipe
    loss = make_loss(section.model_dump())
    assert isinstance(loss, BFPO)
    changes: dict[str, Any] = {}
    if section.multiplier is not None:
        say(f"loss.multiplier: safety_weight {loss.safety_weight:.6g} from {section.multiplier}")
        changes |= {"multiplier": None, "safety_weight": loss.safety_weight}
    if loss.label_errors is not None:
        errors = loss.label_errors
        source = f" from {section.label_errors}" if isinstance(section.label_errors, str) else ""
        say(
            f"loss.label_errors: sensitivity {errors.sensitivity:.3g}, specificity {errors.specificity:.3g}{source}; "
            f"labels vary {1 / errors.youden:.3g} times as much with the judge's verdicts"
        )
        changes["label_errors"] = LabelErrorsSection(**asdict(errors))
    return recipe.model_copy(update={"loss": section.model_copy(update=changes)})


def read_score_labels(recipe: TrainRecipe) -> ScoreLabels | None:
    """Return the preferences from scores that `labels` asks for; None if it doesn't.

    Raises:
        DataError: If the file of the multiplier is missing or malformed.
        RecipeError: If its multiplier isn't one for the scores of pairs, or for the beta of the loss.
    """
    section = recipe.labels
    if not isinstance(section, ScoreLabelsSection):
        return None
    where = f"labels.multiplier: {section.multiplier}"
    dual = read_dual(section.multiplier)
    multiplier = feasible_multiplier(dual, where)
    if dual.objective == "bfpo":
        raise RecipeError(
            f"{where} was computed for BFPO's own objective, not for rewards; use it as loss.multiplier, or run "
            "`bfpo dual` with a recipe of another loss"
        )
    check_beta(dual, make_loss(recipe.loss.model_dump()).beta, where)
    path = dual_path(section.multiplier)
    metadata = {**section.model_dump(), "sha256": file_hash(path), "lambda": multiplier}
    return ScoreLabels(dual, section.draw, section.seed, metadata)


def build_loss(recipe: TrainRecipe, labels: ScoreLabels | None) -> PairLoss:
    """Return the loss of a recipe, on soft labels if it asks for them."""
    loss = make_loss(recipe.loss.model_dump())
    return SoftLabels(loss.beta, loss) if labels is not None and labels.draw == "soft" else loss
