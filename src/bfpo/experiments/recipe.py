"""Recipe of `bfpo experiment`, and the settings of its variants."""

from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from bfpo.config.loading import check_recipe
from bfpo.config.recipes import Count, Section
from bfpo.core.files import parse_json
from bfpo.errors import RecipeError, did_you_mean
from bfpo.experiments.methods import METHODS, online_recipe, train_recipes
from bfpo.experiments.stages import Method, OnlineStage, Stage
from bfpo.testbed.world import WorldOptions

COMPARISON = "comparison.json"
"""File that an experiment writes, and that `tuning` names."""
DATA_DIALS = (
    "harmful_share",
    "both_unsafe",
    "safety_noise",
    "helpfulness_noise",
    "buffer_harmful_share",
    "safety_pairs",
    "helpful_pairs",
)
"""Options of a world that change its preference data, but neither its prompts nor its base model."""


class Variant(Section):
    """A method with changes: one row of the comparison."""

    method: str
    """A key of `bfpo.experiments.methods.METHODS`."""
    tuned: str | None = None
    """Variant in the comparison `tuning` whose chosen values are used, world by world."""
    changes: dict[str, Any] = Field(default_factory=dict)
    """Changes to the method by dotted name, such as `loss.alpha: 0.0` or `learning_rate: 2e-3`; applied after
    `tuned`."""
    dials: dict[str, Any] = Field(default_factory=dict)
    """Changes to the world's preference data, such as `safety_noise: 0.1`; names of `DATA_DIALS`."""
    vary: dict[str, Annotated[list[Any], Field(min_length=1)]] = Field(default_factory=dict)
    """Values to try by dotted name, one name at a time; the others keep their values of `changes`, the *center*."""


class ExperimentRecipe(Section):
    """`bfpo experiment`: methods × worlds × seeds."""

    out: str
    """Folder for all runs; recipes with the same folder share the runs that they have in common."""
    results: str | None = None
    """Folder for the results: comparison.json, comparison.md and, for a few variants, a figure for each world.
    Default: `out`."""
    variants: Annotated[dict[str, Variant], Field(min_length=1)]
    """Name → method."""
    worlds: Annotated[dict[str, WorldOptions], Field(min_length=1)]
    """Name → dials; `seeds` sets the seeds."""
    seeds: Annotated[list[Annotated[int, Field(ge=0, lt=2**32)]], Field(min_length=2)]
    """Seeds, two or more: each is a split, a base model, data and a training run of its own. The statistics are over
    seeds."""
    against: str
    """Variant that the others are compared with."""
    tuning: str | None = None
    """comparison.json that `tuned` reads."""
    steps: Count = 100
    """Number of optimizer steps of trainings on pairs; `online.steps` is that of reinforcement learning."""
    jobs: Count = 2
    """Number of worker processes, of one thread each."""


@dataclass(frozen=True, slots=True)
class Setting:
    """A variant with one set of values.

    Args:
        name: Name of the variant, with the value that differs from its center.
        values: Values of the names that the variant varies.
        method: The method.
        dials: Changes to the preference data.
    """

    name: str
    values: dict[str, Any]
    method: Method
    dials: dict[str, Any]


def all_settings(recipe: ExperimentRecipe) -> dict[str, dict[str, list[Setting]]]:
    """Return the settings of a recipe by world and variant.

    Raises:
        RecipeError: If a method or a tuned variant is unknown, or a change isn't possible.
    """
    tuned = _read_tuned_values(recipe)
    return {
        world: {
            name: _variant_settings(name, variant, tuned.get((world, name), {}))
            for name, variant in recipe.variants.items()
        }
        for world in recipe.worlds
    }


def _read_tuned_values(recipe: ExperimentRecipe) -> dict[tuple[str, str], dict[str, Any]]:
    """Return the values that variants take from tuning, by world and variant."""
    tuned_names = {name: variant.tuned for name, variant in recipe.variants.items() if variant.tuned is not None}
    if not tuned_names:
        return {}
    if recipe.tuning is None:
        name = next(iter(tuned_names))
        raise RecipeError(f"variants.{name}.tuned: needs 'tuning', the comparison.json to read it from")
    try:
        content = parse_json(Path(recipe.tuning).read_text(encoding="utf-8"))
        chosen = {(str(row["world"]), str(row["variant"])): dict(row["values"]) for row in content["chosen"]}
    except FileNotFoundError:
        raise RecipeError(
            f"tuning: there is no {recipe.tuning}; run `bfpo experiment` with the tuning recipe first"
        ) from None
    except (ValueError, KeyError, TypeError):
        raise RecipeError(f"tuning: {recipe.tuning} isn't the comparison.json of an experiment with 'vary'") from None
    values = {}
    for name, tuned in tuned_names.items():
        for world in recipe.worlds:
            if (world, tuned) not in chosen:
                variants = sorted({variant for chosen_world, variant in chosen if chosen_world == world})
                hint = did_you_mean(tuned, variants) if variants else f"it has no world '{world}'"
                raise RecipeError(f"variants.{name}.tuned '{tuned}' isn't in {recipe.tuning}; {hint}")
            values[world, name] = chosen[world, tuned]
    return values


def _variant_settings(name: str, variant: Variant, tuned: dict[str, Any]) -> list[Setting]:
    """Return the center of a variant, then one setting for each other value to try."""
    if variant.method not in METHODS:
        raise RecipeError(f"variants.{name}.method '{variant.method}'; {did_you_mean(variant.method, [*METHODS])}")
    if METHODS[variant.method].online is not None:
        unread = Stage.model_fields.keys() - {"loss"}
        of_pairs = [key for key in (*variant.changes, *variant.vary) if key.partition(".")[0] in unread]
        if of_pairs:
            raise RecipeError(
                f"variants.{name}: '{of_pairs[0]}' is an option of trainings on pairs, and '{variant.method}' has "
                f"none; the options of 'online' are {', '.join(OnlineStage.model_fields)}"
            )
    content = change_values(METHODS[variant.method].model_dump(), tuned | variant.changes)
    center = {key: value_at(content, key) for key in variant.vary}
    if unset := [key for key, value in center.items() if value is None]:
        raise RecipeError(f"variants.{name}.vary: there is no center of {unset[0]}; set it under 'changes'")
    changes: list[dict[str, Any]] = [{}]
    for key, values in variant.vary.items():
        others = [value for index, value in enumerate(values) if value not in (center[key], *values[:index])]
        changes += [{key: value} for value in others]
    settings = []
    for change in changes:
        method = check_recipe(change_values(content, change), Method, f"variants.{name}")
        # Checks the losses and the combiner too.
        train_recipes(method, world=Path(), base=Path(), out=Path(), seed=0, where=f"variants.{name}")
        if method.online is not None:
            online_recipe(
                method.online, prompts=Path(), heads=Path(), base=Path(), out=Path(), seed=0, where=f"variants.{name}"
            )
        label = "".join(f" {key.rpartition('.')[2]}={value}" for key, value in change.items())
        settings.append(Setting(name + label, center | change, method, variant.dials))
    return settings


def change_values(content: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return the content of a method with values replaced by dotted name.

    Raises:
        RecipeError: If a name leads through a value that isn't a section.
    """
    result = deepcopy(content)
    for key, value in changes.items():
        *sections, last = key.split(".")
        section = result
        for name in sections:
            section = section.setdefault(name, {})
            if not isinstance(section, dict):
                raise RecipeError(f"change '{key}': '{name}' is {section!r}, not a section")
        section[last] = value
    return result


def value_at(content: dict[str, Any], key: str) -> Any:
    """Return a value of a method by dotted name; None if it isn't set."""
    value: Any = content
    for name in key.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value
