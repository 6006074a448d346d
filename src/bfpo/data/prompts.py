"""Prompts of published sets and of local files, with the metadata that identifies them."""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from pydantic import Field

from bfpo.config.recipes import Count, Section, Source
from bfpo.core.conversation import Conversation, Message, conversation_key
from bfpo.core.file_rows import RENAMED_COLUMNS
from bfpo.core.files import content_hash, file_hash
from bfpo.core.pairs import COLUMNS, NO_INPUTS, TemplateInputs, check_asks
from bfpo.core.read_messages import as_messages
from bfpo.core.samples import Completion, Kind, Prompt
from bfpo.core.terminal import say
from bfpo.data.agent_prompts import read_agent_columns
from bfpo.data.pair_formats import read_inputs, refuse_unread_columns, with_system, without_aliases
from bfpo.data.prompt_sets import PromptSet, find_prompt_set
from bfpo.data.rows import SourceRow, read_prompts, read_rows, refuse_lone_surrogates
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
    ignore_columns: list[str] = Field(default=[])
    """Columns of your own file that are left out; without it, a text that isn't read is an error."""
    ignore_message_keys: list[str] = Field(default=[])
    """Keys of messages that are left out; without it, an unknown key is an error."""


# Columns with the conversation, the first one present.
PROMPT_COLUMNS = ("prompt", "messages", "conversations")
# Columns that are read, or that have answers to the prompt: pair files and files of completions have prompts, too.
_READ_COLUMNS = frozenset(
    (
        *COLUMNS,
        *Prompt.__dataclass_fields__,
        *Completion.__dataclass_fields__,
        "system",
        *RENAMED_COLUMNS,
        "completion",
        "response",
        "output",
        "target",
    )
)


class PromptContent(NamedTuple):
    """What a row has for the model.

    Args:
        messages: Conversation that the model continues.
        inputs: Tools, and arguments of the chat template.
        language: Language of the prompt; None if unknown.
    """

    messages: Conversation
    inputs: TemplateInputs = NO_INPUTS
    language: str | None = None

    @property
    def key(self) -> str:
        """Key of the prompt: that of the conversation, unless it has tools."""
        key = conversation_key(self.messages)
        return content_hash(key, *self.inputs.hashed) if self.inputs.hashed else key


class _RawPrompt(NamedTuple):
    """Prompt as a row has it, before duplicates are removed."""

    content: PromptContent
    kind: Kind
    category: str | None
    prompt_id: str | None
    # Further fields of `Prompt`.
    columns: Mapping[str, Any] = MappingProxyType({})


def read_prompt_content(row: SourceRow, columns: Sequence[str] = PROMPT_COLUMNS) -> PromptContent:
    """Return what a row has for the model: also its `system`, `tools`, `chat_template_kwargs` and `language`.

    Args:
        row: Row.
        columns: Columns that may have the conversation; the first one with a value is read.

    Raises:
        DataError: If none is present, or a column is malformed.
    """
    row = without_aliases(row)
    present = [name for name in columns if name in row.values]
    if not present:
        raise DataError(f"no column {' or '.join(map(repr, columns))}; the columns are {', '.join(row.values)}")
    messages = row.messages(next((name for name in present if row.values[name]), present[0]))
    language = row.values.get("language") or None
    if not isinstance(language, str | None):
        raise DataError(f"column 'language' is {language!r}; expected a string, or null")
    content = PromptContent(with_system(row, messages), read_inputs(row), language)
    # Also those in the JSON text of a cell, which the row doesn't have yet.
    texts = {"prompt": [message.to_row() for message in content.messages], **content.inputs.to_row()}
    refuse_lone_surrogates(SourceRow(dict(row.values) | texts, row.where))
    return content


def check_prompt_columns(row: SourceRow, other_columns: Collection[str] = ()) -> None:
    """Check that nothing in a row of a file of prompts could have been meant for the model and isn't read.

    Args:
        row: Row.
        other_columns: Columns that are read besides those of prompts.

    Raises:
        DataError: If a column could.
    """
    row = without_aliases(row)
    column = next((name for name in PROMPT_COLUMNS if row.values.get(name)), "prompt")
    refuse_unread_columns(row, {*_READ_COLUMNS, *other_columns, column}, can_rename=False)


def distinct_prompts(parts: Iterable[Iterable[Prompt]]) -> list[Prompt]:
    """Return the prompts of several sources, each once: where it is first. The number of the others is shown.

    Args:
        parts: Prompts of each source.

    Raises:
        DataError: If a prompt is harmful in one source and isn't in another, or two prompts have one id.
    """
    distinct: dict[tuple[str, TemplateInputs], Prompt] = {}
    count = 0
    for prompt in chain.from_iterable(parts):
        count += 1
        # As in a single source, case and white space don't make another prompt.
        first = distinct.setdefault((conversation_key(prompt.prompt), prompt.inputs), prompt)
        if None not in (first.kind, prompt.kind) and (first.kind == "harmful") != (prompt.kind == "harmful"):
            raise DataError(
                f"prompts: '{prompt.prompt_id}' is {prompt.kind} in {prompt.source}, and {first.kind} in "
                f"{first.source}; leave it out of one of them"
            )
    if len(distinct) < count:
        say(f"{count - len(distinct):,} of {count:,} prompts are in an earlier source, too, and are used once")
    _check_ids(distinct.values())
    return list(distinct.values())


def _check_ids(prompts: Iterable[Prompt]) -> None:
    counts = Counter(prompt.prompt_id for prompt in prompts)
    duplicates = [name for name, count in counts.items() if count > 1]
    if duplicates:
        raise DataError(f"prompts: two prompts have the id '{duplicates[0]}'; the id of a prompt must be unique")


def read_prompt_source(
    source: PromptSource,
    *,
    where: Mapping[str, str] | None = None,
    system: str | None = None,
    other_columns: Collection[str] = (),
) -> tuple[list[Prompt], dict[str, Any]]:
    """Read the prompts of a source, and its metadata.

    Args:
        source: Set of prompts.
        where: Values by column that select rows; a file without such a column is taken whole.
        system: System message in front of each prompt.
        other_columns: Columns of your own file that are read elsewhere.

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
    for raw in _read_raw_prompts(source, prompt_set, revision, where or {}, system, other_columns):
        key = raw.content.key
        prompt = _make_prompt(raw, source.name, license)
        first = prompts.setdefault(key, prompt)
        if source.name == "file" and first.kind != prompt.kind:
            raise DataError(
                f"{source.path}: '{first.prompt_id}' is there as {first.kind} and as {prompt.kind}; keep one of them"
            )
        if len(prompts) == source.limit:
            break
    if not prompts:
        raise DataError(f"prompts: {source.name} has none")
    _check_ids(prompts.values())
    return list(prompts.values()), {
        "name": source.name,
        "from": source.path or f"{prompt_set.hub}@{revision}",
        "license": license or None,
        "file_sha256": file_hash(Path(source.path)) if source.path else None,
        "prompts": len(prompts),
        "prompts_hash": content_hash([_to_hash(prompt) for prompt in prompts.values()]),
    }


def _make_prompt(raw: _RawPrompt, name: str, license: str) -> Prompt:
    prompt = Prompt(
        raw.prompt_id or f"{name}-{raw.content.key[:12]}",
        raw.content.messages,
        raw.kind,
        raw.category,
        name,
        license,
        raw.content.inputs.tools,
        raw.content.inputs.kwargs,
        raw.content.language,
    )
    return replace(prompt, **raw.columns)


def _to_hash(prompt: Prompt) -> object:
    return [prompt.prompt, prompt.inputs] if prompt.inputs.hashed else prompt.prompt


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
    revision = source.revision or prompt_set.revision
    for content, row in _read_contents(source, prompt_set, revision, where or {}, system, (column, "generator")):
        if not isinstance(output_text := row.values.get(column), str):
            raise DataError(f"{row.where}: no text in column '{column}', which has the reference outputs")
        output = ReferenceOutput(output_text, str(row.values.get("generator") or ""))
        if outputs.setdefault(conversation_key(content.messages), output) != output:
            raise DataError(f"{row.where}: a second reference output for the same prompt; expected one for each")
    return outputs


def _add_system(content: PromptContent, system: str | None) -> PromptContent:
    """Return a prompt after a system message, and a single turn without white space around it."""
    messages = content.messages
    if len(messages) == 1:
        messages = (replace(messages[0], content=messages[0].content.strip()),)
    if system is None:
        return content._replace(messages=messages)
    if messages[0].role in ("system", "developer"):
        raise DataError("the prompt begins with a system message, and `system` sets another one")
    return content._replace(messages=(Message("system", system), *messages))


def _read_raw_prompts(
    source: PromptSource,
    prompt_set: PromptSet,
    revision: str | None,
    where: Mapping[str, str],
    system: str | None,
    other_columns: Collection[str],
) -> Iterator[_RawPrompt]:
    if source.path and not Path(source.path).is_file():
        raise DataError(f"prompts: {source.name}: no file {source.path}")
    if source.path and source.path.endswith(".txt"):
        for line in read_prompts(source.path):
            content = _add_system(PromptContent(as_messages(line)), system)
            yield _RawPrompt(content, _kind_of(source, prompt_set, {}), None, None)
        return
    for content, row in _read_contents(source, prompt_set, revision, where, system, other_columns):
        category, prompt_id = (
            str(row.values.get(column) or "") or None if column else None
            for column in (prompt_set.category_column, prompt_set.id_column)
        )
        with row.locate_errors():
            columns = read_agent_columns(row, prompt_set, source.name)
        yield _RawPrompt(content, _kind_of(source, prompt_set, row.values), category, prompt_id, columns)


def _read_contents(
    source: PromptSource,
    prompt_set: PromptSet,
    revision: str | None,
    where: Mapping[str, str],
    system: str | None,
    other_columns: Collection[str],
) -> Iterator[tuple[PromptContent, SourceRow]]:
    """Yield the prompt of each row that has one, and the row."""
    table = Source(
        path=source.path or prompt_set.hub,
        name=prompt_set.config,
        split=prompt_set.split,
        revision=revision,
        ignore_columns=source.ignore_columns,
        field=prompt_set.field,
    )
    try:
        for row in read_rows(table, source.ignore_message_keys):
            if any(str(row.values.get(column, value)) != value for column, value in where.items()):
                continue
            with row.locate_errors():
                content = _add_system(read_prompt_content(row, prompt_set.prompt_columns), system)
                # The columns of published sets are known.
                if source.name == "file":
                    check_prompt_columns(row, {*where, *other_columns})
                check_asks(content.messages)
            if content.messages[-1].content.strip() or content.messages[-1].role == "tool":
                yield content, row
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
