"""The command `bfpo migrate`."""

from pathlib import Path
from typing import Any

from bfpo.config.loading import check_recipe, dump_yaml, read_recipe
from bfpo.config.recipes import SftRecipe, TrainRecipe
from bfpo.core.files import write_text
from bfpo.core.terminal import say
from bfpo.errors import RecipeError
from bfpo.migration.convert import convert
from bfpo.migration.draft import Draft, KeyOutcome, Outcome
from bfpo.migration.stacks import RecipeKind, Stack, detect_kind, detect_stack

# The usual order of a recipe's sections.
ORDER = (
    "model",
    "data",
    "buffer",
    "eval",
    "holdout",
    "text",
    "loss",
    "train_only",
    "lora",
    "router_aux_loss_coef",
    "reference",
    "trainer",
)
HEADINGS: dict[Outcome, str] = {
    "renamed": "Renamed",
    "computed": "Computed",
    "not needed": "Not needed",
    "unsupported": "Unsupported: the recipe lacks these settings",
}


def migrate(file: Path, overrides: list[str], out: Path, *, kind: str | None = None) -> None:
    """Convert a file of another training stack to a recipe, and show the outcome of every key.

    Args:
        file: YAML file of official BFPO, alignment-handbook, TRL or LLaMA-Factory.
        overrides: `key=value` of the old stack, as in its launch script.
        out: Recipe to write; must not exist.
        kind: `train` or `sft`; None to detect it from the keys.

    Raises:
        RecipeError: If the file is not of one of these stacks, `out` exists, or the result is not a valid recipe.
    """
    if kind not in (None, "train", "sft"):
        raise RecipeError(f"--kind is '{kind}'; expected train or sft")
    if out.exists():
        raise RecipeError(f"--out '{out}' exists; name a file that does not exist")
    content = read_recipe(file, overrides)
    stack = detect_stack(content, str(file))
    content, data_file = _merge_data_file(content)
    recipe_kind = _recipe_kind(kind, content, stack, file)
    try:
        draft = convert(content, stack, recipe_kind, name=file.stem)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise RecipeError(f"{file}: a value does not have the structure that {stack} expects ({error!r})") from None
    draft.outcomes += data_file
    draft.recipe = {section: draft.recipe[section] for section in ORDER if section in draft.recipe}
    check_recipe(draft.recipe, SftRecipe if recipe_kind == "sft" else TrainRecipe, f"{file}, migrated")
    write_text(out, _format_recipe(draft, file, stack, recipe_kind))
    for outcome, heading in HEADINGS.items():
        _show(heading, [key_outcome for key_outcome in draft.outcomes if key_outcome.outcome == outcome])
    say(f"\nconverted from {stack} to {out}; review it, then run: bfpo {recipe_kind} {out} --dry-run")


def _recipe_kind(kind: str | None, content: dict[str, Any], stack: Stack, file: Path) -> RecipeKind:
    if kind is not None:
        return "sft" if kind == "sft" else "train"
    detected = detect_kind(content, stack, str(file))
    if detected is None:
        raise RecipeError(
            f"{file}: its keys do not show whether it fine-tunes or trains on preferences; add --kind sft or "
            "--kind train"
        )
    return detected


def _merge_data_file(content: dict[str, Any]) -> tuple[dict[str, Any], list[KeyOutcome]]:
    """Replace keys by those of the official `other_data_config`, as the official parser does."""
    if "other_data_config" not in content:
        return content, []
    path = content["other_data_config"]
    rest = {key: value for key, value in content.items() if key != "other_data_config"}
    if path in (None, "None"):
        return rest, [KeyOutcome("not needed", "other_data_config", path, "", "names no file")]
    if not isinstance(path, str):
        raise RecipeError(f"other_data_config is {path!r}; expected the name of a file")
    reason = "its keys replace those of the file"
    return rest | read_recipe(path), [KeyOutcome("computed", "other_data_config", path, "data, buffer", reason)]


def _format_recipe(draft: Draft, file: Path, stack: Stack, kind: RecipeKind) -> str:
    lines = [f"# Converted by bfpo migrate from {file.name} ({stack}). Run it with: bfpo {kind} THIS_FILE"]
    lines += [
        f"# Not carried over: {key_outcome.key or key_outcome.recipe_key}: {key_outcome.reason}"
        for key_outcome in draft.outcomes
        if key_outcome.outcome == "unsupported"
    ]
    return "\n".join(lines) + "\n\n" + dump_yaml(draft.recipe)


def _show(heading: str, key_outcomes: list[KeyOutcome]) -> None:
    if not key_outcomes:
        return
    say(f"\n{heading} ({len(key_outcomes)})")
    for _, key, value, recipe_key, reason in key_outcomes:
        target = f" -> {recipe_key}" if recipe_key else ""
        say(f"  {key or 'by default'}: {_shorten(value)}{target}{f'  ({reason})' if reason else ''}")


def _shorten(value: Any) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 30 else f"{text[:27]}..."
