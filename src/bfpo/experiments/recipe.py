"""What `bfpo experiment` may be asked: the recipe, and the methods with their values that it tries."""

from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from bfpo.config.loading import check_recipe
from bfpo.config.recipes import Count, Section
from bfpo.core.files import parse_json
from bfpo.errors import RecipeError, did_you_mean
from bfpo.experiments.methods import METHODS, Method
from bfpo.testbed.world import WorldOptions

# What changes a world's preference data and leaves its prompts and its base as they are.
DATA_DIALS = (
    "harmful_share",
    "both_unsafe",
    "safety_noise",
    "helpfulness_noise",
    "buffer_harmful_share",
    "safety_pairs",
    "helpful_pairs",
)


class Variant(Section):
    """A method as a comparison runs it: one of `METHODS`, with what is changed."""

    method: str
    """A key of `bfpo.experiments.methods.METHODS`."""
    tuned: str | None = None
    """Name of the variant in the comparison `tuning` whose chosen values are taken, world by world."""
    changes: dict[str, Any] = Field(default_factory=dict)
    """Changes to the method by dotted name, such as `loss.alpha: 0.0` or `learning_rate: 2e-3`; after `tuned`."""
    dials: dict[str, Any] = Field(default_factory=dict)
    """Changes to the world's preference data, such as `safety_noise: 0.1`; names of `DATA_DIALS`."""
    vary: dict[str, Annotated[list[Any], Field(min_length=1)]] = Field(default_factory=dict)
    """Values to try by dotted name, one name at a time: the others stay as `changes` leaves them, the *center*."""


class CompareRecipe(Section):
    """`bfpo experiment`: which methods, in which worlds, on which seeds."""

    out: str
    """Folder for all runs; recipes that share it share the runs that they have in common."""
    results: str | None = None
    """Folder for what was found: comparison.json, comparison.md and, of a few variants, a figure for each world.
    Default: `out`."""
    variants: Annotated[dict[str, Variant], Field(min_length=1)]
    """Name → method."""
    worlds: Annotated[dict[str, WorldOptions], Field(min_length=1)]
    """Name → dials; the seeds are set by `seeds`."""
    seeds: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=2)]
    """Each is a split, a base model, data and a training run of its own; two or more, because they are what the
    statistics are about."""
    against: str
    """The variant that the others are compared with."""
    tuning: str | None = None
    """The comparison.json that `tuned` reads."""
    steps: Count = 100
    """Optimizer steps."""
    jobs: Count = 2
    """Worker processes, of one thread each."""


@dataclass(frozen=True, slots=True)
class Tried:
    """A variant with the values that it tries.

    Args:
        name: The variant's, with the value that differs from its center.
        values: Of what the variant varies, by dotted name.
        method: How to train.
        dials: Of the preference data.
    """

    name: str
    values: dict[str, Any]
    method: Method
    dials: dict[str, Any]


def all_tried(recipe: CompareRecipe) -> dict[str, dict[str, list[Tried]]]:
    """Return what is run, by world and variant.

    Raises:
        RecipeError: If a method or a tuned variant is unknown, or a change isn't possible.
    """
    values = _tuned_values(recipe)
    return {
        world: {
            name: _tried(name, variant, values.get((world, name), {})) for name, variant in recipe.variants.items()
        }
        for world in recipe.worlds
    }


def _tuned_values(recipe: CompareRecipe) -> dict[tuple[str, str], dict[str, Any]]:
    """Return the values taken from tuning, by world and variant."""
    wanted = {name: variant.tuned for name, variant in recipe.variants.items() if variant.tuned is not None}
    if not wanted:
        return {}
    if recipe.tuning is None:
        raise RecipeError(f"variants.{next(iter(wanted))}.tuned: needs 'tuning', the comparison.json to read it from")
    try:
        content = parse_json(Path(recipe.tuning).read_text(encoding="utf-8"))
        there = {(one["world"], one["variant"]): dict(one["values"]) for one in content["chosen"]}
    except FileNotFoundError:
        raise RecipeError(
            f"tuning: there is no {recipe.tuning}; `bfpo experiment` with the tuning recipe makes it"
        ) from None
    except (ValueError, KeyError, TypeError):
        raise RecipeError(f"tuning: {recipe.tuning} isn't the comparison.json of a comparison with 'vary'") from None
    found = {}
    for name, tuned in wanted.items():
        for world in recipe.worlds:
            if (world, tuned) not in there:
                known = sorted({variant for place, variant in there if place == world})
                said = did_you_mean(tuned, known) if known else f"it has no world '{world}'"
                raise RecipeError(f"variants.{name}.tuned '{tuned}' isn't in {recipe.tuning}; {said}")
            found[world, name] = there[world, tuned]
    return found


def _tried(name: str, variant: Variant, tuned: dict[str, Any]) -> list[Tried]:
    """Return a variant's center, then one for each other value that it tries."""
    from bfpo.losses.build import make_loss

    if variant.method not in METHODS:
        raise RecipeError(f"variants.{name}.method '{variant.method}'; {did_you_mean(variant.method, [*METHODS])}")
    content = changed(METHODS[variant.method].model_dump(), tuned | variant.changes)
    center = {key: value_at(content, key) for key in variant.vary}
    if unset := [key for key, value in center.items() if value is None]:
        raise RecipeError(f"variants.{name}.vary: what is the center of {unset[0]}? Say it under 'changes'")
    steps: list[dict[str, Any]] = [{}]
    for key, values in variant.vary.items():
        others = [value for place, value in enumerate(values) if value not in (center[key], *values[:place])]
        steps += [{key: value} for value in others]
    found = []
    for step in steps:
        method = check_recipe(changed(content, step), Method, f"variants.{name}")
        make_loss(method.loss)
        label = "".join(f" {key.rpartition('.')[2]}={value}" for key, value in step.items())
        found.append(Tried(name + label, center | step, method, variant.dials))
    return found


def changed(content: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return a method's content with values replaced, by dotted name.

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
    """Return a method's value by dotted name; None if it isn't there."""
    value: Any = content
    for name in key.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value
