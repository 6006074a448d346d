"""Write docs/recipes.md from the classes that check recipes, so that the page and the program agree.

    python docs/make_recipes_page.py

The page is made of the docstrings of the recipes' fields, the names of `trainer:` that are refused, and the start
of the comment of every shipped recipe. A test compares the committed page with what this script writes.
"""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from bfpo.certificates.recipe import CertifyRecipe
from bfpo.config.combine import COMBINE_SECTIONS, CustomCombinerSection
from bfpo.config.loading import DEPRECATED, RENAMED
from bfpo.config.losses import LOSS_SECTIONS, CustomLossSection, LabelTableSection, PairLossSection
from bfpo.config.per_token import PerTokenRecipe
from bfpo.config.recipes import ScoreRecipe, Section, SftRecipe, TrainRecipe
from bfpo.evaluation.recipe import EvalRecipe
from bfpo.experiments.recipe import ExperimentRecipe
from bfpo.online.arguments import DEFAULTS as ONLINE_DEFAULTS
from bfpo.online.arguments import REFUSED
from bfpo.online.recipe import OnlineRecipe
from bfpo.redteam.recipe import RedteamRecipe
from bfpo.training.arguments import DECIDED, DEFAULTS

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "recipes.md"
KINDS: tuple[type[Section], ...] = (
    TrainRecipe,
    SftRecipe,
    ScoreRecipe,
    PerTokenRecipe,
    OnlineRecipe,
    RedteamRecipe,
    EvalRecipe,
    CertifyRecipe,
    ExperimentRecipe,
)
BOUNDS = (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<"))
NAMES = {str: "text", int: "whole number", float: "number", bool: "true, false", Any: "anything"}
# Headings of sections that are the value of several keys, or of the same key of several recipes.
PLACES = {
    "Source": "an entry of `data:`, `buffer:`, `eval:`, `texts:`",
    "NewModel": "`model.new:`",
    "EngineSection": "`model:` of `bfpo redteam`, `bfpo eval` and `attack:`",
    "ScoreLabelsSection": "`labels:` with `from: scores`",
    "SafeFirstSection": "`labels:` with `from: safety`",
    "AttackedSuite": "an entry of `suites:` under attack",
    "FirstSafeSection": "`guard: {kind: first_safe}` of `bfpo redteam` and `bfpo eval`, and of the file of `--guard`",
    "FactorSection": "`guard: {kind: factor}`",
    "ProjectSection": "`guard: {kind: project}`",
    "StatesModelSection": "`model:` of `bfpo certify`",
    "BoxesSection": "`boxes:` of `bfpo certify`",
    "RepairSection": "`repair:` of `bfpo certify`",
    "JudgeServerSection": "`judge_server:`",
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
    parts += [
        named_sections(LOSS, LOSS_SECTIONS.values(), PairLossSection),
        named_sections(COMBINE, COMBINE_SECTIONS.values()),
        trainer(),
        online_trainer(),
        renamed(),
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def sections() -> Iterator[tuple[str, type[Section]]]:
    """Yield every section of every recipe once, with the first key whose value it is."""
    # The losses and the combiners have tables of their own.
    seen: set[type[Section]] = {*KINDS, *LOSS_SECTIONS.values(), CustomLossSection, LabelTableSection}
    seen |= {*COMBINE_SECTIONS.values(), CustomCombinerSection}
    queue = list(KINDS)
    while queue:
        kind = queue.pop(0)
        for name, field in kind.model_fields.items():
            for inner in inner_sections(field.annotation):
                # `model:` of `bfpo sft` is a part of `model:` of `bfpo train`.
                if inner not in seen and not any(issubclass(other, inner) for other in seen):
                    seen.add(inner)
                    queue.append(inner)
                    yield name, inner


def inner_sections(annotation: Any) -> Iterator[type[Section]]:
    """Yield the sections in an annotation."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for argument in get_args(annotation):
        yield from inner_sections(argument)


def heading(name: str, kind: type[Section]) -> str:
    """Return the heading of a section."""
    return PLACES.get(kind.__name__, f"`{name}:`")


def table(kind: type[Section]) -> str:
    """Return the keys of a section as a table."""
    lines = ["| key | value | default | |", "|---|---|---|---|"]
    # `from` is a key, but no name in Python.
    lines += [row(field.alias or name, field) for name, field in kind.model_fields.items()]
    return "\n".join(lines)


def row(key: str, field: FieldInfo) -> str:
    """Return a key as a row of a table."""
    return f"| `{key}` | {value_of(field)} | {default_of(field)} | {in_table(field.description)} |"


def in_table(text: str | None) -> str:
    """Return a docstring as a cell."""
    assert text, "a field of a recipe has no docstring"
    return " ".join(text.split()).replace("|", "/")


def value_of(field: FieldInfo) -> str:
    """Return the allowed values of a key."""
    return type_name(field.annotation) + bounds_of(field.metadata)


def bounds_of(metadata: Iterable[Any]) -> str:
    """Return the bounds that pydantic's metadata set for a number."""
    constraints = [inner for outer in metadata for inner in (outer, *getattr(outer, "metadata", ()))]
    return "".join(
        f" {sign} {value:g}"
        for constraint in constraints
        for name, sign in BOUNDS
        if isinstance(value := getattr(constraint, name, None), int | float)
    )


def type_name(annotation: Any) -> str:
    """Return an annotation in words."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation in NAMES:
        return NAMES[annotation]
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return "recipe" if annotation in KINDS else "section"
    if origin is Literal:
        # As YAML has them.
        return ", ".join(f"`{str(value).lower() if isinstance(value, bool) else value}`" for value in arguments)
    if origin in (Union, UnionType):
        # The sections of all losses are one "section".
        names = dict.fromkeys(type_name(argument) for argument in arguments if argument is not NoneType)
        return " or ".join(names)
    if origin is list:
        return f"list of {plural(type_name(arguments[0]))}"
    if origin is dict:
        return "names and values"
    # Annotated[type, bounds]
    return type_name(arguments[0]) + bounds_of(arguments[1:])


def plural(words: str) -> str:
    """Return the plural of the name of a type."""
    return re.sub(r"^(text|section|number|whole number)", r"\1s", words)


def default_of(field: FieldInfo) -> str:
    """Return the default of a key."""
    if field.is_required():
        return "required"
    default = field.get_default(call_default_factory=True) if field.default is PydanticUndefined else field.default
    if isinstance(default, Section):
        return "as below"
    if default is None or default in ([], {}):
        return "none"
    return f"`{shown(default)}`"


def shown(value: Any) -> str:
    """Return a value as in YAML."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {shown(inner)}" for key, inner in value.items()) + "}"
    return str(value).lower() if isinstance(value, bool) else str(value)


def shipped() -> str:
    """Return a table of the recipes of the project, each with the first sentences of its comment."""
    lines = ["## Shipped recipes", "", "| recipe | |", "|---|---|"]
    for file in sorted((ROOT / "recipes").rglob("*.yaml")):
        name = file.relative_to(ROOT).as_posix()
        lines.append(f"| [{name}](../{name}) | {first_sentences(file.read_text(encoding='utf-8'))} |")
    return "\n".join(lines)


def first_sentences(recipe: str) -> str:
    """Return the comment at the start of a recipe, up to the first line that ends a sentence."""
    words = []
    for line in recipe.splitlines():
        words.append(line.removeprefix("#").strip())
        if words[-1].endswith("."):
            break
    return " ".join(words)


def named_sections(text: str, kinds: Iterable[type[Section]], common: type[Section] = Section) -> str:
    """Return a table of the sections of which a key has one, by its name: losses, combiners.

    Args:
        text: Text above the table.
        kinds: The sections.
        common: Section of the keys that all of them have; they come first.
    """
    lines = [text, "", table(common)]
    for section in kinds:
        own = {key: field for key, field in section.model_fields.items() if key not in common.model_fields}
        name = own.pop("name")
        lines.append(f"| **`name: {name.default}`** | | | **{in_table(name.description)}** |")
        lines += [row(key, field) for key, field in own.items()]
    return "\n".join(lines)


def trainer() -> str:
    """Return the section on `trainer:`, with a table of the names that are refused."""
    defaults = ", ".join(f"`{name}: {value}`" for name, value in DEFAULTS.items())
    lines = [TRAINER.format(defaults=defaults), "", "| refused | because |", "|---|---|"]
    return "\n".join([*lines, *(f"| `{name}` | {why} |" for name, why in DECIDED.items())])


def online_trainer() -> str:
    """Return the section on `trainer:` of online recipes, with the names that are refused there only."""
    defaults = ", ".join(f"`{name}: {value}`" for name, value in ONLINE_DEFAULTS.items())
    lines = [ONLINE_TRAINER.format(defaults=defaults), "", "| refused | because |", "|---|---|"]
    refused = {name: why for name, why in REFUSED.items() if DECIDED.get(name) != why}
    return "\n".join([*lines, *(f"| `{name}` | {why} |" for name, why in refused.items())])


def renamed() -> str:
    """Return the section on deprecated keys, with a table of the keys of older stacks."""
    former = ", ".join(f"`{name}` (now `{current}`)" for name, current in DEPRECATED.items())
    lines = [OLDER.format(former=former), "", "| key | use |", "|---|---|"]
    return "\n".join([*lines, *(f"| `{name}` | {use} |" for name, use in RENAMED.items())])


INTRODUCTION = """
<!-- Made by docs/make_recipes_page.py from the code; don't edit this page by hand. -->
# Recipes

One YAML file, one command, one model. Unknown keys are refused with the most similar known key, keys of older stacks
with what to use instead; `bfpo migrate FILE` converts a whole file of another stack into a recipe.
Paths are relative to the folder that the command is started in, not to the file.
"""
COMMAND_LINE = """
## On the command line

`key.sub=value` after the recipe overrides a key; the value is YAML, and `data.0.limit=100` reaches into lists.
Relative paths start at the working directory. `--dry-run` does everything except training.
"""
LOSS = """
## `loss:`

The `name` of a loss (default `bfpo`) and its hyperparameters; those before the first name are hyperparameters of all
losses. `name: package.module:Class` is your own subclass of `bfpo.losses.PairLoss`, with its fields as keys. The
equations are in [method.md](method.md). For `bfpo` the four labels can be given directly,
`table: {ss: 0.5, su: 1.0, us: -1.0, uu: -0.5}`, or by name: `table: helpful_ties` is (0.5, 1, -0.5, 0.5);
[testbed.md](testbed.md) compares it with the default.
""".strip()
TRAINER = """
## `trainer:`

Only names of `transformers.TrainingArguments`. `output_dir` is required. Defaults that differ from transformers:
{defaults}. `warmup_steps` below 1 is a share of all steps. `resume_from_checkpoint: true` resumes from the newest
complete checkpoint in `output_dir`; see [training.md](training.md).
""".strip()
COMBINE = """
## `combine:`

How `bfpo online` combines reward and cost. `name: package.module:Class` is your own subclass of
`bfpo.losses.combine.Combiner`, with its fields as keys. [online.md](online.md) says what each of them prefers.
""".strip()
ONLINE_TRAINER = """
## `trainer:` of `bfpo online`

Names of `trl.RLOOConfig`. `output_dir` is required. Defaults that differ from TRL: {defaults}. What is refused above
is refused here too, and also:
""".strip()
OLDER = """
## Former keys, and keys of older stacks

Former keys of `bfpo` are accepted with a warning: {former}.
Keys of older stacks, which most public DPO recipes have, are refused anywhere in a recipe:
""".strip()

if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
