"""Write docs/recipes.md from what recipes are checked with, so that the page and the program can't drift apart.

    python docs/make_recipes_page.py

The words are the docstrings of `bfpo.config.recipes` and of the losses, the names of `trainer:` that are refused, and
the first comment line of every shipped recipe. A test compares the committed page with what this makes.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import MISSING, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from bfpo.config.loading import RENAMED
from bfpo.config.recipes import Section, SftRecipe, TrainRecipe
from bfpo.evaluation.recipe import EvalRecipe
from bfpo.experiments.recipe import ExperimentRecipe
from bfpo.losses import LOSSES, PairLoss
from bfpo.redteam.recipe import RedteamRecipe
from bfpo.training.arguments import DECIDED, DEFAULTS

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "recipes.md"
KINDS: tuple[type[Section], ...] = (TrainRecipe, SftRecipe, RedteamRecipe, EvalRecipe, ExperimentRecipe)
BOUNDS = (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<"))
NAMES = {str: "text", int: "whole number", float: "number", bool: "true, false", Any: "anything"}
# Where a section stands that several keys of several recipes hold.
PLACES = {
    "Source": "an entry of `data:`, `buffer:`, `eval:`, `texts:`",
    "NewModel": "`model.new:`",
    "EngineSection": "`model:` of `bfpo redteam` and `bfpo eval`",
    "ServerSection": "`judge_server:`",
    "PromptSource": "an entry of `prompts:`",
    "EvalData": "an entry of `data:` of `bfpo eval`",
    "Bound": "an entry of `gate:`, and of a file of bounds",
    "Variant": "an entry of `variants:`",
    "WorldOptions": "an entry of `worlds:`",
}


def page() -> str:
    """Return the page."""
    parts = [INTRODUCTION, shipped(), COMMAND_LINE]
    for kind in KINDS:
        parts.append(f"## {kind.__doc__.partition(':')[0]}\n\n{table(kind)}")
    parts += [f"## {heading(name, kind)}\n\n{table(kind)}" for name, kind in sections()]
    parts += [losses(), trainer(), renamed()]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def sections() -> Iterator[tuple[str, type[Section]]]:
    """Yield every section of every recipe once, by the name of the key that holds it first."""
    seen: set[type[Section]] = set(KINDS)
    queue = list(KINDS)
    while queue:
        kind = queue.pop(0)
        for name, field in kind.model_fields.items():
            for inner in inner_sections(field.annotation):
                # `model:` of `bfpo sft` is a part of that of `bfpo train`.
                if inner not in seen and not any(issubclass(one, inner) for one in seen):
                    seen.add(inner)
                    queue.append(inner)
                    yield name, inner


def inner_sections(annotation: Any) -> Iterator[type[Section]]:
    """Yield the sections that an annotation speaks of."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for argument in get_args(annotation):
        yield from inner_sections(argument)


def heading(name: str, kind: type[Section]) -> str:
    """Return the heading of a section: where it stands."""
    return PLACES.get(kind.__name__, f"`{name}:`")


def table(kind: type[Section]) -> str:
    """Return the keys of a section as a table."""
    lines = ["| key | value | default | |", "|---|---|---|---|"]
    for name, field in kind.model_fields.items():
        lines.append(f"| `{name}` | {value_of(field)} | {default_of(field)} | {in_table(field.description)} |")
    return "\n".join(lines)


def in_table(text: str | None) -> str:
    """Return a docstring as a cell."""
    assert text, "a field of a recipe has no docstring"
    return " ".join(text.split()).replace("|", "/")


def value_of(field: FieldInfo) -> str:
    """Return what may stand behind a key."""
    return type_name(field.annotation) + bounds_of(field.metadata)


def bounds_of(metadata: Iterable[Any]) -> str:
    """Return the bounds that pydantic's metadata set on a number."""
    items = [inner for item in metadata for inner in (item, *getattr(item, "metadata", ()))]
    return "".join(
        f" {sign} {value:g}"
        for item in items
        for name, sign in BOUNDS
        if isinstance(value := getattr(item, name, None), int | float)
    )


def type_name(annotation: Any) -> str:
    """Return an annotation in words."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation in NAMES:
        return NAMES[annotation]
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return "recipe" if annotation in KINDS else "section"
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (Union, UnionType):
        return " or ".join(type_name(argument) for argument in arguments if argument is not NoneType)
    if origin is list:
        return f"list of {plural(type_name(arguments[0]))}"
    if origin is dict:
        return "names and values"
    # Annotated[type, bounds]
    return type_name(arguments[0]) + bounds_of(arguments[1:])


def plural(words: str) -> str:
    """Return the name of a type, several of them."""
    return re.sub(r"^(text|section|number|whole number)", r"\1s", words)


def default_of(field: FieldInfo) -> str:
    """Return a key's default."""
    if field.is_required():
        return "needed"
    default = field.get_default(call_default_factory=True) if field.default is PydanticUndefined else field.default
    if isinstance(default, Section):
        return "as below"
    if default is None or default in ([], {}):
        return "none"
    return f"`{shown(default)}`"


def shown(value: Any) -> str:
    """Return a value as YAML writes it."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {shown(inner)}" for key, inner in value.items()) + "}"
    return str(value).lower() if isinstance(value, bool) else str(value)


def shipped() -> str:
    """Return the recipes that come with the project, each with its first comment line."""
    lines = ["## What is shipped", "", "| recipe | |", "|---|---|"]
    for file in sorted((ROOT / "recipes").rglob("*.yaml")):
        first = file.read_text(encoding="utf-8").splitlines()[0]
        name = file.relative_to(ROOT).as_posix()
        lines.append(f"| [{name}](../{name}) | {first.removeprefix('#').strip()} |")
    return "\n".join(lines)


def losses() -> str:
    """Return the losses with their hyper-parameters."""
    lines = [LOSS, "", "| loss | key | default | |", "|---|---|---|---|"]
    for name, loss in LOSSES.items():
        for field in fields(loss):
            told = argument_of(loss, field.name) or argument_of(PairLoss, field.name)
            default = (
                "needed" if field.default is MISSING else "none" if field.default is None else f"`{field.default}`"
            )
            lines.append(f"| `{name}` | `{field.name}` | {default} | {in_table(told)} |")
    return "\n".join(lines)


def argument_of(loss: type[PairLoss], name: str) -> str | None:
    """Return what a class's docstring says of an argument."""
    found = re.search(rf"^    {name}: (.*?)(?=^    \w+: |\n\n|\Z)", trimmed(loss), flags=re.DOTALL | re.MULTILINE)
    return found and found[1]


def trimmed(loss: type[PairLoss]) -> str:
    """Return a class's docstring without the indentation of the class."""
    return re.sub(r"^    ", "", loss.__doc__ or "", flags=re.MULTILINE)


def trainer() -> str:
    """Return what may not stand under `trainer:`, and why."""
    defaults = ", ".join(f"`{name}: {value}`" for name, value in DEFAULTS.items())
    lines = [TRAINER.format(defaults=defaults), "", "| refused | because |", "|---|---|"]
    return "\n".join([*lines, *(f"| `{name}` | {why} |" for name, why in DECIDED.items())])


def renamed() -> str:
    """Return the keys of older stacks that are refused with their new name."""
    lines = [OLDER, "", "| key | use |", "|---|---|"]
    return "\n".join([*lines, *(f"| `{name}` | {use} |" for name, use in RENAMED.items())])


INTRODUCTION = """
<!-- Made by docs/make_recipes_page.py from the code; don't edit this page by hand. -->
# Recipes

One YAML file, one command, one model. Unknown keys are refused with the nearest known one, keys of older stacks with
their new name; `bfpo migrate FILE` turns a whole file of another stack into a recipe.
"""
COMMAND_LINE = """
## On the command line

`key.sub=value` after the recipe overrides it; `data.0.limit=100` reaches into lists, and the value is YAML. Relative
paths start at the working directory. `--dry-run` does and shows everything but the training.
"""
LOSS = """
## `loss:`

`name` and the fields of that loss, or `package.module:Class` for your own subclass of `bfpo.losses.PairLoss`. The
equations stand in [method.md](method.md). For `bfpo` the four labels can be given directly:
`table: {ss: 0.5, su: 1.0, us: -1.0, uu: -0.5}`, or by a name: `table: helpful_ties` is (0.5, 1, -0.5, 0.5); what it
was better at, and what it costs, stands in [testbed.md](testbed.md).
""".strip()
TRAINER = """
## `trainer:`

The names of `transformers.TrainingArguments`, and nothing else. `output_dir` is needed; other defaults than
those of transformers: {defaults}. `warmup_steps` below 1 is a share of all steps.
`resume_from_checkpoint: true` goes on from the newest whole checkpoint in `output_dir`; see
[training.md](training.md).
""".strip()
OLDER = """
## Keys of older stacks

They stand in most public DPO recipes, and are refused wherever they stand.
""".strip()

if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
