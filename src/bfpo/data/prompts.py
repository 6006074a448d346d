"""Prompts of published sets and of local files, with the metadata that identifies them."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from bfpo.config.recipes import Count, Section, Source
from bfpo.core.conversation import Conversation, Message, as_messages, conversation_key
from bfpo.core.files import content_hash, file_hash
from bfpo.core.samples import Kind, Prompt
from bfpo.data.agent_prompts import read_agent_columns
from bfpo.data.prompt_sets import PromptSet, find_prompt_set
from bfpo.data.rows import SourceRow, read_rows
from bfpo.errors import DataError, RecipeError


class PromptSource(Section):
    """Set of prompts."""

    name: str
    """A key of `bfpo.data.prompt_sets.PROMPT_SETS`; `file` is your own file."""
    path: str | None = None
    """Local file with the columns of the published set, or a .txt file; default the hub."""
    revision: str | None = None
    """Hub revision; needed without `path` if `PROMPT_SETS` has none."""
    kind: Kind | None = None
    """What the prompts test; needed if neither the set nor its rows say it."""
    license: str | None = None
    """License of your own file."""
    limit: Count | None = None
    """Maximum number of prompts; the first ones are taken."""


class _RawPrompt(NamedTuple):
    """Prompt as a row has it, before duplicates are removed."""

    text: str
    kind: Kind
    category: str | None
    prompt_id: str | None
    # Further fields of `Prompt`.
    columns: Mapping[str, Any] = MappingProxyType({})


def read_prompt_source(
    source: PromptSource, *, where: Mapping[str, str] | None = None, system: str | None = None
) -> tuple[list[Prompt], dict[str, Any]]:
    """Read the prompts of a source, and its metadata.

    Args:
        source: Set of prompts.
        where: Values by column that select rows; a file without such a column is taken whole.
        system: System message in front of each prompt.

    Returns:
        The prompts without duplicates, and the name, origin, license, hashes and size of the set.

    Raises:
        RecipeError: If the source is unknown, has neither a file nor a pinned revision, or doesn't say what its
            prompts test.
        DataError: If the source can't be read or has no prompts.
    """
    prompt_set = find_prompt_set(source.name)
    revision = source.revision or prompt_set.revision
    if source.path is None and not prompt_set.hub:
        place = f" ({prompt_set.file})" if prompt_set.file else ""
        raise RecipeError(f"prompts: '{source.name}' is published as a file{place}; get it and set path:")
    if source.path is None and revision is None:
        raise RecipeError(
            f"prompts: '{source.name}' needs revision: (a commit of {prompt_set.hub}), or path: of a file"
        )
    license = source.license or prompt_set.license
    prompts: dict[str, Prompt] = {}
    for raw in _read_raw_prompts(source, prompt_set, revision, where or {}):
        if not raw.text.strip():
            continue
        messages = _with_system(raw.text, system)
        key = conversation_key(messages)
        if key not in prompts:
            prompt_id = raw.prompt_id or f"{source.name}-{key[:12]}"
            prompt = Prompt(prompt_id, messages, raw.kind, raw.category, source.name, license)
            prompts[key] = replace(prompt, **raw.columns)
        if len(prompts) == source.limit:
            break
    if not prompts:
        raise DataError(f"prompts: {source.name} has none")
    return list(prompts.values()), {
        "name": source.name,
        "from": source.path or f"{prompt_set.hub}@{revision}",
        "license": license or None,
        "file_sha256": file_hash(Path(source.path)) if source.path else None,
        "prompts": len(prompts),
        "prompts_hash": content_hash([prompt.prompt for prompt in prompts.values()]),
    }


class ReferenceOutput(NamedTuple):
    """Answer that is part of a set of prompts.

    Args:
        text: Text of the answer.
        generator: Author of the answer, from the column `generator`; "" if unknown.
    """

    text: str
    generator: str


def read_reference_outputs(
    source: PromptSource, column: str, *, where: Mapping[str, str] | None = None, system: str | None = None
) -> dict[str, ReferenceOutput]:
    """Return the reference outputs of a source, by the key of the conversation that they answer.

    Args:
        source: Set of prompts; not a .txt file.
        column: Column with the outputs.
        where: As for `read_prompt_source`.
        system: As for `read_prompt_source`.

    Raises:
        DataError: If the set can't be read, a row has no text in the column, or a prompt has two outputs.
    """
    prompt_set = find_prompt_set(source.name)
    outputs: dict[str, ReferenceOutput] = {}
    for text, row in _read_texts(source, prompt_set, source.revision or prompt_set.revision, where or {}):
        if not isinstance(output_text := row.values.get(column), str):
            raise DataError(f"{row.where}: no text in column '{column}', which has the reference outputs")
        output = ReferenceOutput(output_text, str(row.values.get("generator") or ""))
        if outputs.setdefault(conversation_key(_with_system(text, system)), output) != output:
            raise DataError(f"{row.where}: a second reference output for the same prompt; expected one for each")
    return outputs


def _with_system(text: str, system: str | None) -> Conversation:
    messages = as_messages(text.strip())
    return messages if system is None else (Message("system", system), *messages)


def _read_raw_prompts(
    source: PromptSource, prompt_set: PromptSet, revision: str | None, where: Mapping[str, str]
) -> Iterator[_RawPrompt]:
    if source.path and not Path(source.path).is_file():
        raise DataError(f"prompts: {source.name}: no file {source.path}")
    if source.path and source.path.endswith(".txt"):
        try:
            text = Path(source.path).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{source.path}: not UTF-8 text ({error})") from None
        for line in text.splitlines():
            if line.strip():
                yield _RawPrompt(line, _kind_of(source, prompt_set, {}), None, None)
        return
    for text, row in _read_texts(source, prompt_set, revision, where):
        category, prompt_id = (
            str(row.values.get(column) or "") or None if column else None
            for column in (prompt_set.category_column, prompt_set.id_column)
        )
        with row.locate_errors():
            columns = read_agent_columns(row, prompt_set, source.name)
        yield _RawPrompt(text, _kind_of(source, prompt_set, row.values), category, prompt_id, columns)


def _read_texts(
    source: PromptSource, prompt_set: PromptSet, revision: str | None, where: Mapping[str, str]
) -> Iterator[tuple[str, SourceRow]]:
    """Yield the prompt of each row, and the row."""
    table = Source(
        path=source.path or prompt_set.hub,
        name=prompt_set.config,
        split=prompt_set.split,
        revision=revision,
        field=prompt_set.field,
    )
    try:
        for row in read_rows(table):
            if any(str(row.values.get(column, value)) != value for column, value in where.items()):
                continue
            column = next((name for name in prompt_set.prompt_columns if row.values.get(name)), None)
            if column is None:
                raise DataError(f"{row.where}: no column {' or '.join(prompt_set.prompt_columns)}")
            value = row.values[column]
            yield (value if isinstance(value, str) else as_messages(value)[-1].content), row
    except DataError as error:
        if source.path:
            raise
        raise DataError(
            f"{error}; if the hub can't be reached, set path: to a local file with the same columns"
        ) from None


def _kind_of(source: PromptSource, prompt_set: PromptSet, row: Mapping[str, Any]) -> Kind:
    kind: Kind | None = source.kind or prompt_set.kind
    if kind is None and source.name == "xstest" and row.get("type"):
        kind = "harmful" if str(row["type"]).startswith("contrast_") else "lookalike"
    if kind is None and source.name.startswith("wildjailbreak") and row.get("data_type"):
        kind = "harmful" if str(row["data_type"]).endswith("harmful") else "lookalike"
    kind = kind or row.get("kind")
    if kind is None:
        raise RecipeError(f"prompts: '{source.name}' doesn't say what its prompts test; set kind:")
    return kind
