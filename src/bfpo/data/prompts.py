"""Cited sets of prompts by name: where each is published, under which license, and how a row becomes a prompt.

No prompt is part of the program. A set is read from the hub at a pinned revision, or from a local file with the
columns that it is published with.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from bfpo.config.recipes import Count, Section, Source
from bfpo.core.files import content_hash, file_hash
from bfpo.core.pairs import Conversation, Message, as_messages, conversation_key
from bfpo.core.samples import Kind, Prompt
from bfpo.data.rows import SourceRow, read_rows
from bfpo.errors import DataError, RecipeError, did_you_mean


class Known(NamedTuple):
    """A cited set of prompts.

    Args:
        hub: Hub id; "" where the set is read from a file alone.
        license: Of the prompts.
        columns: Where the prompt may stand, the first that is there.
        kind: What the prompts are for; None where a row says it.
        config: Hub configuration.
        split: Hub split.
        category: Column with the kind of harm, or of request.
        revision: Commit on the hub; None where we could verify none, so that the user names one.
        file: Where the file is published, for those that are read from one.
        ids: Column that names a prompt; None where a hash of its text does.
    """

    hub: str
    license: str
    columns: tuple[str, ...]
    kind: Kind | None
    config: str | None = None
    split: str = "train"
    category: str | None = None
    revision: str | None = None
    file: str = ""
    ids: str | None = None


SOURCES = {
    "advbench": Known(
        "", "MIT", ("goal", "prompt"), "harmful", file="github.com/llm-attacks/llm-attacks: data/advbench"
    ),
    "harmbench": Known(
        "",
        "MIT",
        ("Behavior", "prompt"),
        "harmful",
        category="SemanticCategory",
        file="github.com/centerforaisafety/HarmBench@8e1604d1171fe8a48d8febecd22f600e462bdcdd: "
        "data/behavior_datasets/harmbench_behaviors_text_all.csv",
    ),
    "strongreject": Known(
        "",
        "MIT",
        ("forbidden_prompt", "prompt"),
        "harmful",
        category="category",
        file="github.com/alexandrasouly/strongreject@3432b2d696b428f242bd507df96d80f686571d5e: "
        "strongreject_dataset/strongreject_dataset.csv",
    ),
    "safe_rlhf": Known(
        "",
        "Apache-2.0",
        ("prompt",),
        "harmful",
        category="category",
        file="github.com/PKU-Alignment/safe-rlhf: problem.json of its GPT-4 evaluation",
    ),
    "beavertails": Known("PKU-Alignment/BeaverTails", "CC-BY-NC-4.0", ("prompt",), "harmful", split="330k_train"),
    "beavertails_evaluation": Known(
        "PKU-Alignment/BeaverTails-Evaluation",
        "CC-BY-NC-4.0",
        ("prompt",),
        "harmful",
        split="test",
        category="category",
    ),
    "pku": Known("PKU-Alignment/PKU-SafeRLHF", "CC-BY-NC-4.0", ("prompt",), "harmful"),
    "alert": Known(
        "Babelscape/ALERT", "CC-BY-NC-SA-4.0", ("prompt",), "harmful", "alert", "test", category="category"
    ),
    "alert_adversarial": Known(
        "Babelscape/ALERT",
        "CC-BY-NC-SA-4.0",
        ("prompt",),
        "harmful",
        "alert_adversarial",
        "test",
        category="category",
    ),
    "jailbreakbench": Known(
        "JailbreakBench/JBB-Behaviors",
        "MIT",
        ("Goal", "prompt"),
        "harmful",
        "behaviors",
        "harmful",
        category="Category",
        revision="886acc352a31533ffbcf4ef22c744658688086fc",
    ),
    "jailbreakbench_benign": Known(
        "JailbreakBench/JBB-Behaviors",
        "MIT",
        ("Goal", "prompt"),
        "lookalike",
        "behaviors",
        "benign",
        category="Category",
        revision="886acc352a31533ffbcf4ef22c744658688086fc",
    ),
    "wildjailbreak": Known("allenai/wildjailbreak", "ODC-BY", ("adversarial", "vanilla", "prompt"), None, "train"),
    "wildjailbreak_eval": Known("allenai/wildjailbreak", "ODC-BY", ("adversarial", "prompt"), None, "eval"),
    "or_bench": Known(
        "bench-llm/or-bench",
        "CC-BY-4.0",
        ("prompt",),
        "lookalike",
        "or-bench-hard-1k",
        category="category",
        revision="e36d8b80e81837c8a8f264bbb2a49f1b32c7e272",
    ),
    "xstest": Known(
        "walledai/XSTest",
        "CC-BY-4.0",
        ("prompt",),
        None,
        split="test",
        category="type",
        revision="f1d713187c61b6ae64e602d74f0b3d812cc2e8e8",
    ),
    "coconot_contrast": Known(
        "allenai/coconot",
        "ODC-BY",
        ("prompt",),
        "lookalike",
        "contrast",
        "test",
        category="category",
        revision="2cbe16aabf9069f17e48c8daad8aeabc29469eb7",
    ),
    "alpaca_eval": Known(
        "",
        "CC-BY-NC-4.0",
        ("instruction", "prompt"),
        "benign",
        category="dataset",
        file="huggingface.co/datasets/tatsu-lab/alpaca_eval: alpaca_eval_gpt4_baseline.json, or any model's "
        "model_outputs.json on its 805 instructions",
    ),
    "testbed": Known(
        "",
        "Apache-2.0",
        ("prompt",),
        None,
        category="category",
        file="`bfpo quickstart` writes one",
        ids="prompt_id",
    ),
    "file": Known("", "", ("prompt",), None, category="category"),
}


class PromptSource(Section):
    """A set of prompts."""

    name: str
    """A key of `bfpo.data.prompts.SOURCES`; `file` is one's own."""
    path: str | None = None
    """Local file of the same columns (or a .txt); default the hub."""
    revision: str | None = None
    """Hub revision; needed without `path` where `SOURCES` knows none."""
    kind: Literal["harmful", "benign", "lookalike"] | None = None
    """What the prompts are for; needed where the source doesn't say."""
    license: str | None = None
    """License of one's own file."""
    limit: Count | None = None
    """Prompts to take at most, the first ones."""


def known_source(name: str) -> Known:
    """Return a set by its name.

    Raises:
        RecipeError: If there is none of that name.
    """
    if name not in SOURCES:
        raise RecipeError(f"prompts: name is '{name}'; {did_you_mean(name, list(SOURCES))}")
    return SOURCES[name]


def read_prompt_source(
    source: PromptSource, *, where: Mapping[str, str] | None = None, system: str | None = None
) -> tuple[list[Prompt], dict[str, Any]]:
    """Read the prompts of a source, and what names them: license, hash, size.

    Args:
        source: Which set.
        where: Column → value of the rows that are taken; a file without the column is taken whole.
        system: A system message to put before each prompt.

    Raises:
        RecipeError: If the source is unknown, or neither a file nor a pinned revision is named.
        DataError: If it can't be read, or says of no prompt what it is for.
    """
    known = known_source(source.name)
    revision = source.revision or known.revision
    if source.path is None and not known.hub:
        place = f" ({known.file})" if known.file else ""
        raise RecipeError(f"prompts: '{source.name}' is published as a file{place}; get it and name it as path:")
    if source.path is None and revision is None:
        raise RecipeError(f"prompts: '{source.name}' needs revision: (a commit of {known.hub}), or path: of a file")
    found: dict[str, Prompt] = {}
    before: Conversation = () if system is None else (Message("system", system),)
    for text, kind, category, own in _texts(source, known, revision, where or {}):
        if not text.strip():
            continue
        messages = (*before, *as_messages(text.strip()))
        key = conversation_key(messages)
        if key not in found:
            identity = own or f"{source.name}-{key[:12]}"
            found[key] = Prompt(identity, messages, kind, category, source.name, source.license or known.license)
        if len(found) == source.limit:
            break
    if not found:
        raise DataError(f"prompts: {source.name} holds none")
    prompts = list(found.values())
    return prompts, {
        "name": source.name,
        "from": source.path or f"{known.hub}@{revision}",
        "license": source.license or known.license or None,
        "file_sha256": file_hash(Path(source.path)) if source.path else None,
        "prompts": len(prompts),
        "prompts_hash": content_hash([prompt.prompt for prompt in prompts]),
    }


class GivenOutput(NamedTuple):
    """An answer that a set of prompts brings with it.

    Args:
        text: The answer.
        generator: Who gave it, as the row's column `generator` says; "" where it says nothing.
    """

    text: str
    generator: str


def read_given_outputs(
    source: PromptSource, column: str, *, where: Mapping[str, str] | None = None, system: str | None = None
) -> dict[str, GivenOutput]:
    """Return the outputs that a source gives, by the key of the conversation that asks for them.

    Args:
        source: Which set; not a .txt.
        column: That holds the outputs.
        where: As for `read_prompt_source`.
        system: As for `read_prompt_source`.

    Raises:
        DataError: If the set can't be read, a row has no text in the column, or one prompt has two outputs.
    """
    known = known_source(source.name)
    before: Conversation = () if system is None else (Message("system", system),)
    found: dict[str, GivenOutput] = {}
    for text, row in _rows(source, known, source.revision or known.revision, where or {}):
        if not isinstance(output := row.values.get(column), str):
            raise DataError(f"{row.where}: no text in column '{column}', which holds the outputs to compare with")
        key = conversation_key((*before, *as_messages(text.strip())))
        given = GivenOutput(output, str(row.values.get("generator") or ""))
        if found.setdefault(key, given) != given:
            raise DataError(f"{row.where}: another output to a prompt that has one; expected one of each")
    return found


def _texts(
    source: PromptSource, known: Known, revision: str | None, where: Mapping[str, str]
) -> Iterator[tuple[str, Kind, str | None, str | None]]:
    """Yield the text of each row, what it is for, its category, and its own id."""
    if source.path and not Path(source.path).is_file():
        raise DataError(f"prompts: {source.name}: no file {source.path}")
    if source.path and source.path.endswith(".txt"):
        for line in Path(source.path).read_text(encoding="utf-8").splitlines():
            if line.strip():
                yield line, _kind(source, known, {}), None, None
        return
    for text, row in _rows(source, known, revision, where):
        category, own = (row.values.get(name) if name else None for name in (known.category, known.ids))
        yield text, _kind(source, known, row.values), str(category or "") or None, str(own or "") or None


def _rows(
    source: PromptSource, known: Known, revision: str | None, where: Mapping[str, str]
) -> Iterator[tuple[str, SourceRow]]:
    """Yield the text of each row, and the row."""
    table = Source(path=source.path or known.hub, name=known.config, split=known.split, revision=revision)
    try:
        for row in read_rows(table):
            if any(str(row.values.get(column, value)) != value for column, value in where.items()):
                continue
            column = next((name for name in known.columns if row.values.get(name)), None)
            if column is None:
                raise DataError(f"{row.where}: no column {' or '.join(known.columns)}")
            value = row.values[column]
            yield (value if isinstance(value, str) else as_messages(value)[-1].content), row
    except DataError as error:
        if source.path:
            raise
        raise DataError(
            f"{error}; where the hub is out of reach, name a local file of the same columns: path:"
        ) from None


def _kind(source: PromptSource, known: Known, row: Mapping[str, Any]) -> Kind:
    said: Kind | None = source.kind or known.kind
    if said is None and source.name == "xstest" and row.get("type"):
        said = "harmful" if str(row["type"]).startswith("contrast_") else "lookalike"
    if said is None and source.name.startswith("wildjailbreak") and row.get("data_type"):
        said = "harmful" if str(row["data_type"]).endswith("harmful") else "lookalike"
    said = said or row.get("kind")
    if said is None:
        raise RecipeError(f"prompts: '{source.name}' doesn't say what its prompts are for; set kind:")
    return said
