"""Write docs/file-formats.md from the classes of the files' rows, so that the page and the program agree.

    python docs/make_file_formats_page.py

The tables are made of the fields of these classes, their types and their docstrings. A test compares the committed
page with what this script writes.
"""

import inspect
import re
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from bfpo.constraints.rounds import Round
from bfpo.core.certificate import Certificate
from bfpo.core.chain import GuidedAnswer
from bfpo.core.conversation import Message
from bfpo.core.file_rows import _SPARSE, Messages, TemplateKwargs, ToolCalls, Tools
from bfpo.core.samples import Completion, Prompt, Verdict
from bfpo.core.tools import FrozenJson
from bfpo.evaluation.preferences import PairwisePreference
from bfpo.evaluation.results import _DATA_KEYS, Results, TaskData
from bfpo.experiments.costs import Cost
from bfpo.generation.attack_outcomes import AttackOutcome
from bfpo.judging.annotations import Annotation
from bfpo.losses.dual import Dual
from bfpo.stats.intervals import Interval

PAGE = Path(__file__).resolve().parent / "file-formats.md"
LINES: dict[str, tuple[type, str]] = {
    "prompts.jsonl": (Prompt, "Written by `bfpo eval`, `bfpo redteam` and the testbed; read by `bfpo generate`."),
    "completions.jsonl": (
        Completion,
        "Written by `bfpo generate`, `bfpo eval` and `bfpo redteam`; read by `bfpo judge run`, `bfpo score apply` "
        "and `bfpo dual`.",
    ),
    "verdicts-NAME@REVISION.jsonl": (
        Verdict,
        "Written by `bfpo eval`, `bfpo redteam` and `bfpo judge run` (`verdicts.jsonl`); read by `bfpo dual`. "
        "`calibration-...` and `references-...` have the same columns.",
    ),
    "comparisons-NAME@REVISION.jsonl": (PairwisePreference, "Written by `bfpo eval` for win rates."),
    "annotations.jsonl": (
        Annotation,
        "Written by `bfpo judge annotate --out FILE`; read by `bfpo judge agreement`, `fit` and `eval`.",
    ),
    "guided.jsonl": (GuidedAnswer, "Written by `bfpo redteam` with a chain of steps; read by `bfpo sft`."),
    "conversations.jsonl": (AttackOutcome, "Written by `bfpo eval` for attacks of several turns, for each judge."),
}
OBJECTS: dict[str, tuple[type, str]] = {
    "results.json": (Results, "Written by `bfpo eval`; read by `bfpo report`, `bfpo card` and later evaluations."),
    "dual.json": (Dual, "Written by `bfpo dual`; read by `bfpo train`."),
    "certificate.json": (Certificate, "Written by `bfpo certify`; read by `bfpo report`."),
    "round.json": (Round, "Written by `bfpo train` with `outer:` for each round."),
    "cost.json": (Cost, "Written by `bfpo experiment` for each stage of a method."),
}
NAMES: dict[Any, str] = {
    str: "text",
    int: "whole number",
    float: "number",
    bool: "true, false",
    Any: "anything",
    Messages: "text or list of messages",
    Tools: "list of objects or null",
    TemplateKwargs: "object or null",
    ToolCalls: "list of objects",
    FrozenJson: "object",
    Message: "text or list of one message",
    Interval: "estimate, lower and upper bound, as a list",
}


def page() -> str:
    """Return the page."""
    parts = [INTRODUCTION, LINES_TEXT]
    for name, (kind, text) in LINES.items():
        parts += [f"### `{name}`", text, *described(kind)]
    parts.append(OBJECTS_TEXT)
    for name, (kind, text) in OBJECTS.items():
        parts += [f"### `{name}`", text, *described(kind)]
    nested = dict.fromkeys(part for kind, _ in (*LINES.values(), *OBJECTS.values()) for part in parts_of(kind))
    for kind in nested:
        parts += [f"### {heading(kind)}", *described(kind)]
    parts += [RUN_TEXT, files_table(RUN_FILES), "## Other files", files_table(OTHERS)]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def files_table(files: dict[str, str]) -> str:
    """Return a table of files and what they contain."""
    return "\n".join(["| file | content |", "|---|---|", *(f"| {name} | {text} |" for name, text in files.items())])


def described(kind: type) -> list[str]:
    """Return the first words of a class's docstring, and its fields as a table."""
    text = inspect.cleandoc(kind.__doc__ or "").partition("\n\n")[0]
    return [in_cell(text), table(kind)]


def heading(kind: type) -> str:
    """Return the heading of an object in a file."""
    return f"Object {kind.__name__}"


def parts_of(kind: type) -> Iterator[type]:
    """Yield the classes of the objects in a file, outer ones first."""
    found = [part for hint in get_type_hints(kind, include_extras=True).values() for part in classes_in(hint)]
    for part in found:
        yield part
        yield from parts_of(part)


def classes_in(annotation: Any) -> Iterator[type]:
    """Yield the classes in an annotation whose objects have a table."""
    if annotation in NAMES:
        return
    if isinstance(annotation, type) and is_dataclass(annotation):
        yield annotation
    for argument in get_args(annotation):
        yield from classes_in(argument)


def table(kind: type) -> str:
    """Return the fields of a class as a table."""
    hints, texts = get_type_hints(kind, include_extras=True), arguments(kind)
    lines = ["| key | value | |", "|---|---|---|"]
    for field in fields(kind):
        name = _DATA_KEYS.get(field.name, field.name) if kind is TaskData else field.name
        lines.append(
            f"| `{name}`{when(field, kind)} | {type_name(hints[field.name])} | {texts.get(field.name, '')} |"
        )
    return "\n".join(lines)


def when(field: Field[Any], kind: type) -> str:
    """Return a mark of a column that a row may lack."""
    is_row = kind in [row for row, _ in LINES.values()]
    may_lack = field.name in _SPARSE or field.default is not MISSING or field.default_factory is not MISSING
    return " (optional)" if is_row and may_lack else ""


def arguments(kind: type) -> dict[str, str]:
    """Return what a class's docstring says of each field."""
    text = inspect.cleandoc(kind.__doc__ or "").partition("Args:\n")[2].partition("\n\n")[0]
    return {
        name: in_cell(said) for name, said in re.findall(r"^    (\w+): (.*(?:\n     .*)*)", text, flags=re.MULTILINE)
    }


def in_cell(text: str) -> str:
    """Return a text as a cell of a table."""
    return re.sub(r"\bNone\b", "null", " ".join(text.split())).replace("|", "/")


def type_name(annotation: Any) -> str:
    """Return an annotation in words."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if annotation in NAMES:
        return NAMES[annotation]
    if annotation is NoneType:
        return "null"
    if isinstance(annotation, type) and is_dataclass(annotation):
        return f"[object](#{heading(annotation).lower().replace(' ', '-')})"
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in inner)
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(map(type_name, inner)))
    if origin in (list, tuple):
        name = type_name(inner[0])
        return f"list of {name}s" if name in ("text", "whole number", "number", "object") else f"list of {name}"
    if origin is dict:
        return "object"
    # Annotated[type, constraints]
    return type_name(inner[0])


INTRODUCTION = """
<!-- Made by docs/make_file_formats_page.py from the code; don't edit this page by hand. -->
# File formats

Every file that `bfpo` reads or writes. Files are UTF-8; a `.jsonl` file has one JSON object per line. Files are
written to a temporary name and renamed. A long stage appends to `NAME.unfinished` and writes `NAME` when nothing is
missing, so a killed one resumes. Unknown columns of the program's own files are ignored; those of
[pair files](data.md#pair-files) and [files of prompts](generation.md#files-of-prompts) that could have been meant for
the model are errors.

**`pairs.jsonl`**, the pairs of a training, has the columns of [pair files](data.md#pair-files). **Recipes** are YAML:
[all keys](recipes.md).
"""
LINES_TEXT = """
## Lines

Optional columns are left out or null if there is no value.
"""
OBJECTS_TEXT = """
## Objects

One JSON object. `schema` is the version of the format; what changed between versions is in [upgrading](upgrading.md).
"""
RUN_TEXT = """
## Folder of a run

`bfpo train`, `bfpo sft`, `bfpo online` and `bfpo score train` write a checkpoint that transformers loads, or a folder
for each head, and beside it:
"""
RUN_FILES = {
    "`recipe.resolved.yaml`": "the recipe with all defaults",
    "`run.json`": "`schema`, `command`, `created`, `git_revision`, `versions`, `hardware`, `recipe`, `model`, `data` "
    "(counts by stream and cell), `start_check`, `trained` (`parameters`, `of`), `steps`, `train_loss`, "
    "`evaluation`, `probe`, `wall_seconds`, `cpu_seconds`; a command leaves out what it doesn't have",
    "`metrics.jsonl`": "a line for each logged step: `step`, `loss` and the metrics of the trainer",
    "`data_manifest.json`": "`schema`, `sources` (path, hash, rows, what was dropped and why), `label_sources`, "
    "`train` and `eval` (counts by stream and cell)",
    "`README.md`": "model card",
    "`checkpoint-STEP/`": "state to resume from; it counts only with `complete.json`: `step`, `threads`, `run` "
    "(settings that a resumed run must share), `files` (sizes), `sha256`, `checksum`",
    "`multiplier.json`": "in the checkpoints of `bfpo online`: `combiner` (what changes of it, such as "
    "`multiplier`), `samples`, `scorer_calls`, `missing`, `watched`",
}
OTHERS = {
    "`report.html`, `report.md`": "by `bfpo report`, `bfpo quickstart`: the page, readable alone "
    "([reports](report.md))",
    "`comparison.json`, `comparison.md`": "by `bfpo experiment`: results by world, variant and metric, over seeds "
    "([testbed](testbed.md))",
    "`judge.npz`, `judge.card.json`": "by `bfpo judge fit`: a linear judge, and its card ([judging](judging.md))",
    "`judge-eval.json`": "by `bfpo judge eval`: confusion, calibration and agreement of judges with human labels",
    "`label.json`": "by `bfpo label`, beside `pairs.jsonl`: judges, conflicts and counts",
    "`degrade.json`": "by `bfpo data degrade`, beside `pairs.jsonl`: counts of graded pairs",
    "`scored.jsonl`": "by `bfpo score apply`: the rows that were read, with [rewards and costs](scores.md)",
    "`cost-head.safetensors`": "by `bfpo score train` with `per_token: true`: a head for [guards](guards.md)",
    "`repaired-head.safetensors`": "by `bfpo certify` with `repair:`: the head after the [repair](certificates.md)",
}

if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
