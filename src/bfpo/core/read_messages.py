"""Messages of data, read into conversations. Nothing of a message is dropped: a key that isn't known is an error.

Only text can be read; images and audio are refused.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from bfpo.core.conversation import ROLES, Conversation, Message, Role, user_says
from bfpo.core.files import parse_json
from bfpo.core.reasoning import REASONING_KEYS, join_reasoning
from bfpo.core.tools import as_tool_calls, shorten
from bfpo.errors import DataError

# Keys of a message.
_KEYS = ("role", "content", *REASONING_KEYS, "tool_calls", "tool_call_id", "name")
# Types of parts with reasoning: of Anthropic and Mistral.
_THINKING_PARTS = ("thinking", "reasoning")
# ShareGPT: {"from": .., "value": ..}.
_SHAREGPT_ROLES: Mapping[str, Role] = {
    "system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
    "function_call": "assistant", "observation": "tool", "tool": "tool",
}  # fmt: skip


def as_messages(value: object, column: str = "prompt", *, ignore: Collection[str] = ()) -> Conversation:
    """Return a conversation from a string (one user turn) or a list of chat messages.

    A string that is the JSON text of a list of messages, as in a cell of a CSV file, is read as that list. Messages
    of ShareGPT (`from`, `value`) are read, too. A `<think>` block in front of an answer becomes its reasoning.

    Args:
        value: Value of the column.
        column: Name of the column, for errors.
        ignore: Keys of messages that are left out.

    Raises:
        DataError: If it is neither, is empty, or a turn is malformed: an unknown role or key, no text, or an image.
    """
    if isinstance(value, str):
        messages = _messages_in_text(value)
        if messages is None:
            return user_says(value)
        value = messages
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, Sequence) or not value:
        raise DataError(f"column '{column}' is {shorten(value)}; expected a string or a list of messages")
    return tuple(_read_message(turn, column, ignore) for turn in value)


def _messages_in_text(text: str) -> list[Any] | None:
    """Return the list of messages that a JSON text contains; None if it is another text."""
    if not text.lstrip().startswith("[{") and not text.lstrip().startswith("[ {"):
        return None
    try:
        value = parse_json(text)
    except ValueError:
        return None
    is_messages = isinstance(value, list) and all(
        isinstance(turn, Mapping) and ("role" in turn or {"from", "value"} <= turn.keys()) for turn in value
    )
    return value if is_messages else None


def _read_message(turn: object, column: str, ignore: Collection[str]) -> Message:
    if not isinstance(turn, Mapping):
        raise DataError(f"column '{column}': turn {shorten(turn)}; expected {{'role': .., 'content': text}}")
    # A table has a key for every turn, and null where a turn lacks it.
    values = {key: value for key, value in turn.items() if value is not None and key not in ignore}
    if "from" in values and "value" in values and "role" not in values:
        values = _from_sharegpt(values, column)
    if unknown := sorted(str(key) for key in values if key not in _KEYS):
        raise DataError(
            f"column '{column}': unknown key '{unknown[0]}' of a message ({shorten(turn)}); the keys are "
            f"{', '.join(_KEYS)}; set `ignore_message_keys: [{', '.join(unknown)}]` (of `text:`, or of a source of "
            "prompts) to leave it out"
        )
    role = values.get("role")
    if role not in ROLES:
        raise DataError(f"column '{column}': role is {role!r}; expected {', '.join(ROLES)}")
    try:
        calls = as_tool_calls(values.get("tool_calls"))
    except DataError as error:
        raise DataError(f"column '{column}': {str(error).removeprefix('column ')}") from None
    parts, thought = _split_thinking_parts(values.get("content"), column, ignore)
    texts = (thought, *(values.get(key) for key in REASONING_KEYS))
    thoughts = {text for text in texts if isinstance(text, str) and text}
    for key in (*REASONING_KEYS, "tool_call_id", "name"):
        if not isinstance(values.get(key, ""), str):
            raise DataError(f"column '{column}': {key} is {shorten(values[key])}; expected a string")
    if len(thoughts) > 1:
        raise DataError(f"column '{column}': a turn has two different texts of reasoning; keep one")
    if role != "assistant" and (calls or thoughts):
        raise DataError(f"column '{column}': a {role} turn has tool calls or reasoning; only assistant turns can")
    content = _read_content(parts, turn, column, ignore, may_be_empty=bool(calls))
    reasoning = next(iter(thoughts), None)
    if role == "assistant":
        reasoning, content = join_reasoning(reasoning, content)
    return Message(role, content, reasoning, calls, values.get("tool_call_id") or None, values.get("name") or None)


def _from_sharegpt(values: Mapping[str, Any], column: str) -> dict[str, Any]:
    speaker, text = values["from"], values["value"]
    if not isinstance(speaker, str) or speaker not in _SHAREGPT_ROLES:
        raise DataError(f"column '{column}': from is {speaker!r}; expected {', '.join(_SHAREGPT_ROLES)}")
    others = {key: value for key, value in values.items() if key not in ("from", "value")}
    if "content" in others:
        raise DataError(f"column '{column}': a turn has 'value' and 'content' ({shorten(values)}); keep one")
    if speaker != "function_call":
        return others | {"role": _SHAREGPT_ROLES[speaker], "content": text}
    try:
        calls = parse_json(text) if isinstance(text, str) else text
    except ValueError as error:
        raise DataError(f"column '{column}': function_call {shorten(text)} is not JSON ({error})") from None
    return others | {
        "role": "assistant", "content": "", "tool_calls": calls if isinstance(calls, list) else [calls],
    }  # fmt: skip


def _split_thinking_parts(content: object, column: str, ignore: Collection[str]) -> tuple[object, str]:
    """Return the content of a message without its parts of reasoning, and their text."""
    if not isinstance(content, list | tuple):
        return content, ""
    is_thinking = [isinstance(part, Mapping) and part.get("type") in _THINKING_PARTS for part in content]
    texts = []
    for part, is_thought in zip(content, is_thinking, strict=True):
        if not is_thought:
            continue
        _check_part(part, column, {"type", "text", *_THINKING_PARTS, "closed", "signature", *ignore})
        # Mistral: a list of parts again.
        text = part.get(part["type"], part.get("text"))
        texts += [text] if isinstance(text, str) else [_read_part(inner, column, ignore) for inner in text or [text]]
    return [part for part, is_thought in zip(content, is_thinking, strict=True) if not is_thought], "".join(texts)


def _read_content(content: object, turn: object, column: str, ignore: Collection[str], *, may_be_empty: bool) -> str:
    if isinstance(content, str):
        return content
    if content is None and may_be_empty:
        return ""
    if isinstance(content, Sequence) and (content or may_be_empty):
        return "".join(_read_part(part, column, ignore) for part in content)
    raise DataError(f"column '{column}': turn {shorten(turn)}; expected {{'role': .., 'content': text}}")


def _read_part(part: object, column: str, ignore: Collection[str]) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, Mapping) else None
    text = part.get("text") if isinstance(part, Mapping) else None
    if isinstance(part, Mapping) and kind in ("text", None, "input_text", "output_text") and isinstance(text, str):
        _check_part(part, column, {"type", "text", *ignore})
        return text
    hint = "; calls belong in `tool_calls`" if kind in ("tool_use", "tool_call") else ""
    raise DataError(
        f"column '{column}': a part of a message is {shorten(kind or part)}; only text is supported, "
        f"not images, audio or files{hint}"
    )


def _check_part(part: Mapping[str, Any], column: str, keys: Collection[str]) -> None:
    # A table has the keys of all parts, and lists of annotations are mostly empty.
    if unknown := sorted(str(key) for key, value in part.items() if key not in keys and value not in (None, [], {})):
        raise DataError(
            f"column '{column}': unknown key '{unknown[0]}' of a part of a message ({shorten(part)}); set "
            f"`ignore_message_keys: [{', '.join(unknown)}]` (of `text:`, or of a source of prompts) to leave it out"
        )
