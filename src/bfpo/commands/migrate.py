"""The work of `bfpo migrate`."""

from pathlib import Path
from typing import Any

from bfpo.config.loading import check_recipe, dump_yaml, read_recipe
from bfpo.config.recipes import SftRecipe, TrainRecipe
from bfpo.core.files import write_text
from bfpo.core.terminal import say
from bfpo.errors import RecipeError
from bfpo.migration.convert import convert
from bfpo.migration.draft import Draft, DraftLine, Fate
from bfpo.migration.stacks import Kind, Stack, kind_of, stack_of

# As recipes are usually read.
ORDER = ("model", "data", "buffer", "eval", "holdout", "text", "loss", "train_only", "lora", "reference", "trainer")
HEADINGS: dict[Fate, str] = {
    "renamed": "Renamed",
    "computed": "Computed",
    "not needed": "Not needed any more",
    "unsupported": "Unsupported: the recipe doesn't do what these asked for",
}


def migrate(file: Path, overrides: list[str], out: Path, *, kind: str | None = None) -> None:
    """Write the recipe that an old file stands for, and show what became of its keys.

    Args:
        file: YAML of official BFPO, alignment-handbook, TRL or LLaMA-Factory.
        overrides: `key=value` of the old stack, as its launch script gives them.
        out: Recipe to write; must not exist.
        kind: `train` or `sft`; None to tell by the keys.

    Raises:
        RecipeError: If the file isn't one of those, `out` exists, or the result would not be a recipe.
    """
    if kind not in (None, "train", "sft"):
        raise RecipeError(f"--kind is '{kind}'; expected train or sft")
    if out.exists():
        raise RecipeError(f"--out '{out}' exists; name a file that doesn't")
    content = read_recipe(file, overrides)
    stack = stack_of(content, str(file))
    content, second = _with_data_file(content)
    chosen: Kind = "sft" if kind == "sft" else "train" if kind == "train" else kind_of(content, stack, str(file))
    try:
        draft = convert(content, stack, chosen, name=file.stem)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise RecipeError(f"{file}: a value hasn't the shape that {stack} gives it ({error!r})") from None
    draft.lines += second
    draft.recipe = {name: draft.recipe[name] for name in ORDER if name in draft.recipe}
    check_recipe(draft.recipe, SftRecipe if chosen == "sft" else TrainRecipe, f"{file}, migrated")
    write_text(out, _as_text(draft, file, stack, chosen))
    for fate, heading in HEADINGS.items():
        _show(heading, [line for line in draft.lines if line.fate == fate])
    say(f"\na recipe of {stack}, now {out}; look at it, then: bfpo {chosen} {out} --dry-run")


def _with_data_file(content: dict[str, Any]) -> tuple[dict[str, Any], list[DraftLine]]:
    """Lay the official `other_data_config` over the file, as the official parser does."""
    named = content.get("other_data_config")
    rest = {key: value for key, value in content.items() if key != "other_data_config"}
    if "other_data_config" not in content:
        return rest, []
    if named in (None, "None"):
        return rest, [DraftLine("not needed", "other_data_config", named, "", "names no file")]
    told = DraftLine("computed", "other_data_config", named, "data, buffer", "its keys replace those of the file")
    return rest | read_recipe(named), [told]


def _as_text(draft: Draft, file: Path, stack: Stack, kind: Kind) -> str:
    lines = [f"# Made by bfpo migrate from {file.name} ({stack}). To run it: bfpo {kind} THIS"]
    lines += [
        f"# Not carried over: {line.key or line.place}: {line.why}"
        for line in draft.lines
        if line.fate == "unsupported"
    ]
    return "\n".join(lines) + "\n\n" + dump_yaml(draft.recipe)


def _show(heading: str, lines: list[DraftLine]) -> None:
    if not lines:
        return
    say(f"\n{heading} ({len(lines)})")
    for line in lines:
        key = line.key or "by default"
        place = f" -> {line.place}" if line.place else ""
        say(f"  {key}: {_shown(line.value)}{place}{f'  ({line.why})' if line.why else ''}")


def _shown(value: Any) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 30 else f"{text[:27]}..."
