"""Generic row formats: our pair file, TRL's and ShareGPT's preference formats, and demonstrations."""

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from itertools import zip_longest
from typing import Literal

from bfpo.config.recipes import Source
from bfpo.core.conversation import Answer, Conversation, Message, user_says
from bfpo.core.files import parse_json
from bfpo.core.pairs import (
    COLUMNS,
    NOT_CUT,
    SIGNALS,
    CutAnswers,
    Demonstration,
    PairSignals,
    PreferencePair,
    Provenance,
    SafetyLabels,
    TemplateInputs,
)
from bfpo.core.tools import as_template_kwargs, as_tools
from bfpo.data.rows import SourceRow
from bfpo.errors import DataError

_ALIASES = {
    "is_reject_safe": "is_rejected_safe",  # the official README
    "chosen_safe": "is_chosen_safe",
    "rejected_safe": "is_rejected_safe",
    "system_prompt": "system",
    "conversations": "prompt",  # ShareGPT
}
_PAIR_COLUMNS = (*COLUMNS, "system")
_LABELS = ("is_chosen_safe", "is_rejected_safe")
_REASONING_LABELS = ("is_chosen_reasoning_safe", "is_rejected_reasoning_safe")
# Columns that are meant for the model in published sets, whatever is in them.
_CONTENT_COLUMNS = frozenset(
    (
        *("input", "context", "system", "system_message", "sys", "developer", "history", "documents", "functions"),
        *("image", "images", "audio", "video", "reasoning", "reasoning_content", "thinking", "tool_calls"),
        *("chosen_reasoning", "rejected_reasoning", "chosen_thinking", "rejected_thinking"),
    )
)
# Letters of scripts that have no spaces between words: Thai to Lao, Myanmar, Khmer, kana, Han.
_UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]")
_MAX_NAME = 6
_NO_CONTENT: tuple[object, ...] = (None, "", [], {})
_DEMONSTRATION_COLUMNS = ("prompt", "completion", "messages", "system", "tools", "chat_template_kwargs")

Turns = Literal["last", "all", "each"]


class SkipRow(Exception):
    """A row has no pair.

    Args:
        reason: Short reason, by which skipped rows are counted.
        fault: Whether the row counts against `max_dropped`.
    """

    def __init__(self, reason: str, *, fault: bool) -> None:
        super().__init__(reason)
        self.reason, self.fault = reason, fault


def read_pair_rows(rows: Iterable[SourceRow], source: Source) -> Iterator[PreferencePair | SkipRow]:
    """Read rows of our pair file, or of TRL's preference formats (explicit or implicit prompt, text or messages).

    With `turns: each` a row has a pair for each answer of its conversations.

    Raises:
        DataError: If a column is missing or malformed, or a column with text isn't read.
    """
    for row in rows:
        pairs: list[PreferencePair] | list[SkipRow]
        with row.locate_errors():
            try:
                pairs = _read_row(row, source.turns)
            except SkipRow as skip:
                pairs = [skip]
        yield from pairs


def read_pair(row: SourceRow, turns: Turns = "last") -> PreferencePair:
    """Read a row of our pair file, or of TRL's preference formats, that has one pair.

    Raises:
        DataError: If a column is missing or malformed, or a column with text isn't read.
        SkipRow: If the conversations before the two answers differ.
    """
    (pair,) = _read_row(row, turns)
    return pair


def read_demonstration(row: SourceRow) -> Demonstration:
    """Read a row with `prompt` and `completion`, or with `messages`, all of whose answers are imitated.

    Raises:
        DataError: If a column is missing or malformed, or a column with text isn't read.
    """
    row = without_aliases(row)
    demonstration = _read_demonstration(row)
    unread = ("completion",) if "messages" in row.values else ()
    refuse_unread_columns(row, [column for column in _DEMONSTRATION_COLUMNS if column not in unread])
    return demonstration


def _read_demonstration(row: SourceRow) -> Demonstration:
    inputs = read_inputs(row)
    if "messages" in row.values:
        *history, last = row.messages("messages")
        if last.role != "assistant" or not history:
            raise DataError("column 'messages' doesn't end with an assistant turn after a user turn")
        return Demonstration(with_system(row, tuple(history)), (last,), every_turn=True, inputs=inputs)
    prompt = row.messages("prompt")
    completion = read_side(row, "completion")
    if not isinstance(completion, str) and completion[-1].role != "assistant":
        raise DataError(f"column 'completion' ends with a {completion[-1].role} turn; expected an assistant turn")
    if not isinstance(completion, str) and completion[0].role != "assistant":
        raise DataError("column 'completion' has turns before the answer; they belong at the end of 'prompt'")
    return Demonstration(with_system(row, prompt), completion, inputs=inputs)


def read_comparison(row: SourceRow, turns: Turns = "last") -> tuple[Conversation, Answer, Answer]:
    """Return prompt, chosen and rejected of a row in any of TRL's preference formats.

    Args:
        row: Row with the columns `chosen` and `rejected`, and perhaps `prompt`.
        turns: `last` to compare the last turns, after one history; `all` to compare all turns after the common ones,
            as always if there is a column `prompt`.

    Raises:
        DataError: If a column is missing or malformed.
        SkipRow: If the conversations before the two answers differ.
    """
    prompt = row.messages("prompt") if "prompt" in row.values else None
    if isinstance(row.value("chosen"), str) != isinstance(row.value("rejected"), str):
        raise DataError("columns 'chosen' and 'rejected': one is a string, the other isn't")
    chosen, rejected = (read_side(row, column) for column in ("chosen", "rejected"))
    if isinstance(chosen, str) and isinstance(rejected, str):
        return _split_common_prefix(chosen, rejected) if prompt is None else (prompt, chosen, rejected)
    # One of two texts can be the JSON of messages.
    if isinstance(chosen, str) or isinstance(rejected, str):
        raise DataError("columns 'chosen' and 'rejected': one is a text, the other is a list of messages")
    for column, messages in (("chosen", chosen), ("rejected", rejected)):
        if messages[-1].role != "assistant":
            raise DataError(f"column '{column}' ends with a {messages[-1].role} turn; expected an assistant turn")
    if prompt is None and turns == "last":
        return _checked(shared_history(chosen[:-1], rejected[:-1])), chosen[-1:], rejected[-1:]
    return split_trajectories(_join_prompt(prompt, chosen), _join_prompt(prompt, rejected))


def shared_history(chosen: Conversation, rejected: Conversation) -> Conversation:
    """Return the conversation before both answers.

    Raises:
        SkipRow: If they have different ones.
    """
    if chosen != rejected:
        raise SkipRow("histories differ", fault=True)
    return chosen


def read_inputs(row: SourceRow) -> TemplateInputs:
    """Return the tools of a row, and the arguments of its chat template."""
    return TemplateInputs(
        as_tools(row.values.get("tools")), as_template_kwargs(row.values.get("chat_template_kwargs"))
    )


def _read_row(row: SourceRow, turns: Turns) -> list[PreferencePair]:
    row = without_aliases(row)
    if turns == "each":
        pairs = _read_each_turn(row)
    else:
        prompt, chosen, rejected = read_comparison(row, turns)
        labels, reasoning = _read_labels(row, *_LABELS), _read_labels(row, *_REASONING_LABELS)
        pairs = [_make_pair(row, with_system(row, prompt), chosen, rejected, labels, reasoning)]
    # Last: a row of another format lacks a column, and that message says how it is read.
    refuse_unread_columns(row, _PAIR_COLUMNS)
    return pairs


def _read_each_turn(row: SourceRow) -> list[PreferencePair]:
    """Return a pair for each answer: after the history of the more helpful conversation, with a label for each."""
    prompt, chosen, rejected = read_comparison(row, "all")
    if isinstance(chosen, str) or isinstance(rejected, str):
        raise DataError("`turns: each` needs conversations in 'chosen' and 'rejected', not strings")
    history = with_system(row, prompt)
    compared: list[tuple[Conversation, Message, Message]] = []
    for turn, other in zip_longest(chosen, rejected):
        if turn is None or other is None or (turn.role != "assistant" and turn != other) or turn.role != other.role:
            raise SkipRow("the turns between the answers differ", fault=True)
        if turn.role == "assistant":
            compared.append((history, turn, other))
        history = (*history, turn)
    pairs = []
    for index, (before, turn, other) in enumerate(compared):
        labels = _read_labels(row, *_LABELS, index, len(compared))
        reasoning = _read_labels(row, *_REASONING_LABELS, index, len(compared))
        # Where both conversations have the same answer, there is nothing to compare.
        if turn != other:
            pair = _make_pair(row, before, (turn,), (other,), labels, reasoning)
            # What was cut is the end of the conversation.
            pairs.append(pair if index == len(compared) - 1 else replace(pair, cut=NOT_CUT))
    if not pairs:
        raise SkipRow("no turn has two different answers", fault=False)
    return pairs


def _make_pair(
    row: SourceRow,
    prompt: Conversation,
    chosen: Answer,
    rejected: Answer,
    labels: SafetyLabels | None,
    reasoning_labels: SafetyLabels | None,
) -> PreferencePair:
    stream = row.values.get("stream") or None
    if stream not in (None, "main", "buffer"):
        raise DataError(f"column 'stream' is {stream!r}; expected main or buffer")
    label_source = row.values.get("safety_label_source") or ("dataset" if labels else None)
    harms = row.values.get("harm_categories") or []
    if not isinstance(harms, str | list | tuple):
        raise DataError(f"column 'harm_categories' is {harms!r}; expected a list of names")
    return PreferencePair(
        prompt,
        chosen,
        rejected,
        labels,
        PairSignals(**{name: row.number(name) for name in SIGNALS}),
        harm_categories=(harms,) if isinstance(harms, str) else tuple(map(str, harms)),
        provenance=Provenance(
            str(row.values.get("dataset_name") or ""),
            label_source,
            stream,
            *(str(row.values[name]) if row.values.get(name) else None for name in ("reward_scorer", "cost_scorer")),
        ),
        inputs=read_inputs(row),
        reasoning_labels=reasoning_labels,
        cut=CutAnswers(*(_read_flag(row, column) for column in ("is_chosen_cut", "is_rejected_cut"))),
    )


def _read_flag(row: SourceRow, column: str) -> bool:
    """Return the value of a column of true and false; false without one."""
    value = row.values.get(column)
    if value is None or value == "":
        return False
    if str(value).lower() not in ("true", "false"):
        raise DataError(f"column '{column}' is {value!r}; expected true or false")
    return str(value).lower() == "true"


def _read_labels(
    row: SourceRow, chosen: str, rejected: str, index: int | None = None, count: int = 0
) -> SafetyLabels | None:
    """Return the labels of two columns; with an index, a column is a list with a label for each turn."""
    present = [name for name in (chosen, rejected) if name in row.values]
    if len(present) == 1:
        missing = rejected if present == [chosen] else chosen
        raise DataError(f"column '{missing}' is missing, but '{present[0]}' is not; give both, or neither")
    if not present:
        return None
    if index is None:
        return SafetyLabels(row.label(chosen), row.label(rejected))
    labels = []
    for column in (chosen, rejected):
        values = row.value(column)
        if isinstance(values, str):
            # JSON text of a list, as in a CSV file.
            with suppress(ValueError):
                values = parse_json(values)
        if not isinstance(values, list | tuple) or len(values) != count:
            raise DataError(
                f"column '{column}' is {values!r}; with `turns: each`, expected a list with the label of each of the "
                f"{count} answers"
            )
        labels.append(SourceRow({column: values[index]}, row.where).label(column))
    return SafetyLabels(*labels)


def read_side(row: SourceRow, column: str) -> Conversation | str:
    """Return the text of an answer, or its turns."""
    value = row.value(column)
    if not isinstance(value, str):
        return row.messages(column)
    messages = row.messages(column)
    # A text of messages, as in a CSV file, is read as messages.
    return value if messages == user_says(value) else messages


def with_system(row: SourceRow, prompt: Conversation) -> Conversation:
    """Return a prompt with the system message of the row's column `system`, if there is one."""
    system = row.values.get("system")
    if system is None or system == "":
        return prompt
    if prompt[0].role in ("system", "developer"):
        raise DataError("column 'system' has a system message, and the conversation begins with another one")
    return (Message("system", row.text("system")), *prompt)


def without_aliases(row: SourceRow) -> SourceRow:
    """Return a row with our names of columns for their other names.

    Raises:
        DataError: If a column has both names.
    """
    renamed = dict(row.values)
    for alias, name in _ALIASES.items():
        if alias in renamed and (alias != "conversations" or "chosen" in renamed):
            if name in renamed:
                kind = "label" if name.startswith("is_") else "column"
                raise DataError(f"columns '{alias}' and '{name}' are the same {kind}; keep one")
            renamed[name] = renamed.pop(alias)
    return SourceRow(renamed, row.where, row.ignored_keys)


def find_unread_columns(row: SourceRow, columns: Iterable[str]) -> list[str]:
    """Return other columns that could have been meant for the model: texts of several words, lists and objects.

    Numbers, names and ids describe a row; without them its meaning is the same. A column such as `input` is meant for
    the model in any case.
    """
    others = ((str(name), value) for name, value in row.values.items() if name not in columns)
    return [
        name
        for name, value in others
        if _is_content(value) or (name.lower() in _CONTENT_COLUMNS and value not in _NO_CONTENT)
    ]


def refuse_unread_columns(row: SourceRow, columns: Iterable[str], *, can_rename: bool = True) -> None:
    """Refuse columns that could have been meant for the model, see `find_unread_columns`.

    Args:
        row: Row.
        columns: Columns that are read.
        can_rename: Whether the source has a key that renames columns.

    Raises:
        DataError: If the row has one.
    """
    if unread := ", ".join(find_unread_columns(row, columns)):
        rename = "rename them with `columns: {OURS: THEIRS}`, or set" if can_rename else "set"
        raise DataError(
            f"columns not read: {unread}; {rename} `ignore_columns: [{unread}]` of the source to leave them out"
        )


def _is_content(value: object) -> bool:
    if isinstance(value, str):
        return len(value.split()) > 1 or len(_UNSPACED.findall(value)) > _MAX_NAME
    return isinstance(value, Mapping | list | tuple) and len(value) > 0


def _join_prompt(prompt: Conversation | None, messages: Conversation) -> Conversation:
    """Join the prompt column with the turns in `chosen` or `rejected`, which may begin with it."""
    if prompt is None:
        return messages
    history = messages[:-1]
    if history[: len(prompt)] == prompt:
        return messages
    if messages[0].role == "assistant":
        return prompt + messages
    if history[-len(prompt) :] == prompt:
        return messages
    raise DataError("column 'prompt' differs from the turns before the answer in 'chosen'")


def _checked(history: Conversation) -> Conversation:
    if not history:
        raise DataError("no column 'prompt', and 'chosen' has no turn before the answer")
    return history


def split_trajectories(
    chosen: Conversation, rejected: Conversation
) -> tuple[Conversation, Conversation, Conversation]:
    """Split two conversations into their common beginning, up to a turn that asks, and the turns after it."""
    if chosen[:-1] == rejected[:-1]:
        return _checked(chosen[:-1]), chosen[-1:], rejected[-1:]
    pairs = enumerate(zip(chosen, rejected, strict=False))
    length = next((index for index, (turn, other) in pairs if turn != other), min(len(chosen), len(rejected)))
    while length and (
        chosen[length - 1].role == "assistant"
        or any(len(side) <= length or side[length].role != "assistant" for side in (chosen, rejected))
    ):
        length -= 1
    if length == 0:
        raise SkipRow("histories differ", fault=True)
    return chosen[:length], chosen[length:], rejected[length:]


def _split_common_prefix(chosen: str, rejected: str) -> tuple[Conversation, str, str]:
    """Split TRL's implicit prompt off two strings: their common prefix up to its last space."""
    letters = enumerate(zip(chosen, rejected, strict=False))
    length = next((index for index, (ours, theirs) in letters if ours != theirs), min(len(chosen), len(rejected)))
    space = chosen.rfind(" ", 0, length)
    if not chosen[: max(space, 0)].strip():
        raise DataError(
            "no column 'prompt', and 'chosen' and 'rejected' don't begin with the same words; if another column has "
            "the prompts, name it in the recipe: columns: {prompt: NAME}"
        )
    return user_says(chosen[:space]), chosen[space:], rejected[space:]
