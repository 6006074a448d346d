"""Tools and calls of tools, and what else chat templates get besides messages."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from bfpo.core.files import parse_json
from bfpo.errors import DataError

CALL_OPENING = "The assistant calls the tool "
"""How a line with a tool call in words begins."""
# Arguments of `apply_chat_template` that aren't the row's to set.
_RESERVED_KWARGS = frozenset(
    (
        *("messages", "conversation", "tools", "chat_template", "add_generation_prompt", "continue_final_message"),
        *("tokenize", "tokenizer_kwargs", "return_assistant_tokens_mask", "return_dict", "return_tensors"),
    )
)


@dataclass(frozen=True)
class FrozenJson:
    """JSON value that can be hashed and compared, the order of keys included.

    Args:
        text: JSON text of the value.
    """

    text: str

    @classmethod
    def freeze(cls, value: object) -> "FrozenJson":
        """Return the frozen form of a JSON value.

        Raises:
            DataError: If JSON can't represent it.
        """
        try:
            return cls(json.dumps(value, ensure_ascii=False, allow_nan=False))
        except (TypeError, ValueError, RecursionError) as error:
            raise DataError(f"{shorten(value)} is not JSON ({error})") from None

    @cached_property
    def value(self) -> Any:
        """The value; not to be changed."""
        return json.loads(self.text)

    def to_hash(self) -> object:
        """Return what `content_hash` hashes."""
        return self.text


@dataclass(frozen=True, slots=True)
class ToolCall:
    """Call of a function by the model.

    Args:
        name: Name of the function.
        arguments: Arguments, normally an object; a text if the model wrote something that isn't JSON.
        id: Identifier, by which a `tool` message answers it.
    """

    name: str
    arguments: FrozenJson
    id: str | None = None

    @classmethod
    def from_row(cls, value: object) -> "ToolCall":
        """Return a call from `{"function": {"name": .., "arguments": ..}}`, or from its inner object alone.

        Arguments can be an object or its JSON text.

        Raises:
            DataError: If it has no name, or a key that isn't known.
        """
        if not isinstance(value, Mapping):
            raise DataError(f"tool call {shorten(value)}; expected an object")
        call = {key: content for key, content in value.items() if content is not None}
        outer = ("type", "id", "index")
        function = call.get("function", {key: content for key, content in call.items() if key not in outer})
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
            raise DataError(f"tool call {shorten(value)}; expected {{'function': {{'name': .., 'arguments': ..}}}}")
        unknown = [key for key in function if key not in ("name", "arguments", "parameters")]
        if "function" in call:
            unknown += [key for key in call if key not in ("function", *outer)]
        if unknown:
            raise DataError(f"tool call {shorten(value)}: unknown key '{unknown[0]}'")
        if call.get("type", "function") != "function":
            raise DataError(f"tool call {shorten(value)}: type is {call['type']!r}; only functions can be called")
        call_id = call.get("id")
        if call_id is not None and not isinstance(call_id, str):
            raise DataError(f"tool call {shorten(value)}: id is {call_id!r}; expected a string")
        values = [function[key] for key in ("arguments", "parameters") if function.get(key) is not None]
        if len(values) > 1:
            raise DataError(f"tool call {shorten(value)}: it has 'arguments' and 'parameters'; keep one")
        arguments = _parse_arguments(values[0]) if values else {}
        return cls(function["name"], FrozenJson.freeze(arguments), call_id or None)

    def to_row(self) -> dict[str, Any]:
        """Return the call as an object of JSON, as chat templates read it."""
        call: dict[str, Any] = {"type": "function"}
        if self.id is not None:
            call["id"] = self.id
        return call | {"function": {"name": self.name, "arguments": self.arguments.value}}

    def to_hash(self) -> object:
        """Return what `content_hash` hashes."""
        return [self.name, self.arguments.text, self.id]

    def in_words(self) -> str:
        """Return the call as a sentence, for judges and people."""
        arguments = self.arguments.value
        if isinstance(arguments, Mapping):
            values = ", ".join(
                f"{name} = {value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}"
                for name, value in arguments.items()
            )
        else:
            values = str(arguments)
        return f"{CALL_OPENING}{self.name}" + (f" with {values}." if values else " without arguments.")


def as_tool_calls(value: object) -> tuple[ToolCall, ...]:
    """Return the tool calls of a list of objects, or of its JSON text; none for null.

    Raises:
        DataError: If it isn't a list, or a call is malformed.
    """
    if isinstance(value, str) and (not value.strip() or value.lstrip().startswith("[")):
        value = _parse_if_text(value, "tool_calls")
    if value is None:
        return ()
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise DataError(f"column 'tool_calls' is {shorten(value)}; expected a list")
    return tuple(map(ToolCall.from_row, value))


def as_tools(value: object) -> FrozenJson | None:
    """Return the tools of a row: a list of JSON schemas of functions, or its JSON text; None without tools.

    Raises:
        DataError: If it is anything else.
    """
    value = _parse_if_text(value, "tools")
    if value is None or value == []:
        return None
    if not isinstance(value, Sequence) or not all(isinstance(tool, Mapping) and tool for tool in value):
        raise DataError(f"column 'tools' is {shorten(value)}; expected a list of JSON schemas of functions")
    for tool in value:
        function = tool.get("function", tool)
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise DataError(
                f"column 'tools': {shorten(tool)} has no name of a function; expected "
                "{'type': 'function', 'function': {'name': .., 'parameters': ..}}"
            )
    return FrozenJson.freeze(list(value))


def as_template_kwargs(value: object) -> FrozenJson | None:
    """Return the arguments of a row for its chat template: an object, or its JSON text; None without any.

    Raises:
        DataError: If it is anything else, or names an argument that isn't the row's to set.
    """
    value = _parse_if_text(value, "chat_template_kwargs")
    if value is None or value == {}:
        return None
    if not isinstance(value, Mapping):
        raise DataError(f"column 'chat_template_kwargs' is {shorten(value)}; expected an object")
    if taken := sorted(_RESERVED_KWARGS & value.keys()):
        raise DataError(f"column 'chat_template_kwargs' sets '{taken[0]}', which is not an argument of the template")
    return FrozenJson.freeze(dict(value))


def _parse_if_text(value: object, column: str) -> object:
    if not isinstance(value, str) or not value.strip():
        return None if value == "" or isinstance(value, str) else value
    try:
        return parse_json(value)
    except ValueError as error:
        raise DataError(f"column '{column}' is {shorten(value)}; it is not JSON ({error})") from None


def _parse_arguments(arguments: object) -> object:
    """Return the arguments of a call; a text that isn't a JSON object stays a text."""
    if not isinstance(arguments, str):
        return arguments
    try:
        value = parse_json(arguments) if arguments.strip() else {}
        json.dumps(value, allow_nan=False)
    except ValueError:
        return arguments
    return value if isinstance(value, dict) else arguments


def shorten(value: object) -> str:
    """Return a value as text for a message, of at most about 200 characters."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]} ..."
