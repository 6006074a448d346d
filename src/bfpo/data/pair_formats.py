"""Generic row formats: our pair file, TRL's preference formats, and demonstrations."""

from collections.abc import Mapping
from typing import Any

from bfpo.core.pairs import (
    SIGNALS,
    Conversation,
    Demonstration,
    PairSignals,
    PreferencePair,
    Provenance,
    SafetyLabels,
    as_messages,
    user_says,
)
from bfpo.data.rows import SourceRow
from bfpo.errors import DataError

_ALIASES = {
    "is_reject_safe": "is_rejected_safe",  # the official README
    "chosen_safe": "is_chosen_safe",
    "rejected_safe": "is_rejected_safe",
}


class SkipRow(Exception):
    """A row has no pair.

    Args:
        reason: Short reason, by which skipped rows are counted.
        fault: Whether the row counts against `max_dropped`.
    """

    def __init__(self, reason: str, *, fault: bool) -> None:
        super().__init__(reason)
        self.reason, self.fault = reason, fault


def read_pair(row: SourceRow) -> PreferencePair:
    """Read a row of our pair file, or of TRL's preference formats (explicit or implicit prompt, text or messages).

    Raises:
        DataError: If a column is missing or malformed.
        SkipRow: If the conversations before the two answers differ.
    """
    values = _without_aliases(row.values)
    row = SourceRow(values, row.where)
    prompt, chosen, rejected = read_comparison(row)
    present = [name for name in ("is_chosen_safe", "is_rejected_safe") if name in values]
    if len(present) == 1:
        missing = "is_rejected_safe" if present == ["is_chosen_safe"] else "is_chosen_safe"
        raise DataError(f"column '{missing}' is missing, but '{present[0]}' is not; give both, or neither")
    labels = SafetyLabels(row.label("is_chosen_safe"), row.label("is_rejected_safe")) if present else None
    stream = values.get("stream") or None
    if stream not in (None, "main", "buffer"):
        raise DataError(f"column 'stream' is {stream!r}; expected main or buffer")
    label_source = values.get("safety_label_source") or ("dataset" if labels else None)
    harms = values.get("harm_categories") or []
    if not isinstance(harms, str | list | tuple):
        raise DataError(f"column 'harm_categories' is {harms!r}; expected a list of names")
    return PreferencePair(
        prompt,
        chosen,
        rejected,
        labels,
        PairSignals(**{name: row.number(name) for name in SIGNALS}),
        harm_categories=(harms,) if isinstance(harms, str) else tuple(map(str, harms)),
        provenance=Provenance(str(values.get("dataset_name") or ""), label_source, stream),
    )


def read_demonstration(row: SourceRow) -> Demonstration:
    """Read a row with `prompt` and `completion`, or with `messages`, all of whose answers are imitated.

    Raises:
        DataError: If a column is missing or malformed.
    """
    if "messages" in row.values:
        *history, last = as_messages(row.value("messages"), "messages")
        if last.role != "assistant" or not history:
            raise DataError("column 'messages' doesn't end with an assistant turn after a user turn")
        return Demonstration(tuple(history), last.content, every_turn=True)
    prompt = as_messages(row.value("prompt"), "prompt")
    completion = row.value("completion")
    if isinstance(completion, str):
        return Demonstration(prompt, completion)
    history_of_answer, answer = _split_answer(completion, "completion")
    if history_of_answer:
        raise DataError("column 'completion' has turns before the answer; they belong at the end of 'prompt'")
    return Demonstration(prompt, answer)


def read_comparison(row: SourceRow) -> tuple[Conversation, str, str]:
    """Return prompt, chosen and rejected of a row in any of TRL's preference formats.

    Raises:
        DataError: If a column is missing or malformed.
        SkipRow: If the conversations before the two answers differ.
    """
    chosen, rejected = row.value("chosen"), row.value("rejected")
    prompt = as_messages(row.values["prompt"], "prompt") if "prompt" in row.values else None
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise DataError("columns 'chosen' and 'rejected': one is a string, the other isn't")
    if isinstance(chosen, str):
        return _split_common_prefix(chosen, rejected) if prompt is None else (prompt, chosen, rejected)
    chosen_history, chosen_text = _split_answer(chosen, "chosen")
    rejected_history, rejected_text = _split_answer(rejected, "rejected")
    history = shared_history(chosen_history, rejected_history)
    return _join_prompt(prompt, history), chosen_text, rejected_text


def shared_history(chosen: Conversation, rejected: Conversation) -> Conversation:
    """Return the conversation before both answers.

    Raises:
        SkipRow: If they have different ones.
    """
    if chosen != rejected:
        raise SkipRow("histories differ", fault=True)
    return chosen


def _without_aliases(values: Mapping[str, Any]) -> dict[str, Any]:
    renamed = dict(values)
    for alias, name in _ALIASES.items():
        if alias in renamed:
            if name in renamed:
                raise DataError(f"columns '{alias}' and '{name}' are the same label; keep one")
            renamed[name] = renamed.pop(alias)
    return renamed


def _join_prompt(prompt: Conversation | None, history: Conversation) -> Conversation:
    """Join the prompt column with the turns before the answers in `chosen` and `rejected`."""
    if prompt is None or history[-len(prompt) :] == prompt or history[: len(prompt)] == prompt:
        joined = history
    elif not history or history[0].role == "assistant":
        joined = prompt + history
    else:
        raise DataError("column 'prompt' differs from the turns before the answer in 'chosen'")
    if not joined:
        raise DataError("no column 'prompt', and 'chosen' has no turn before the answer")
    return joined


def _split_answer(messages: object, column: str) -> tuple[Conversation, str]:
    *history, last = as_messages(messages, column)
    if last.role != "assistant":
        raise DataError(f"column '{column}' ends with a {last.role} turn; expected an assistant turn")
    return tuple(history), last.content


def _split_common_prefix(chosen: str, rejected: str) -> tuple[Conversation, str, str]:
    """Split TRL's implicit prompt off two strings: their common prefix up to its last space."""
    letters = enumerate(zip(chosen, rejected, strict=False))
    length = next((index for index, (ours, theirs) in letters if ours != theirs), min(len(chosen), len(rejected)))
    space = chosen.rfind(" ", 0, length)
    if not chosen[: max(space, 0)].strip():
        raise DataError("no column 'prompt', and 'chosen' and 'rejected' don't begin with the same words")
    return user_says(chosen[:space]), chosen[space:], rejected[space:]
