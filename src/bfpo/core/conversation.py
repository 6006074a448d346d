"""Conversations with tools and reasoning, as chat templates and servers read them.

Nothing of a message is dropped: a key that isn't known is an error. Only text can be read; images and audio are
refused.
"""

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, get_args
from unicodedata import is_normalized, normalize

from bfpo.core.files import content_hash, parse_json
from bfpo.core.reasoning import REASONING_KEYS, join_reasoning
from bfpo.errors import DataError

Role = Literal["system", "developer", "user", "assistant", "tool"]
ROLES: tuple[Role, ...] = get_args(Role)
# Roles of the last turn of a prompt.
ASKING_ROLES = ("user", "tool")

# Keys of a message.
_KEYS = ("role", "content", *REASONING_KEYS, "tool_calls", "tool_call_id", "name")
# Types of parts with reasoning: of Anthropic and Mistral.
_THINKING_PARTS = ("thinking", "reasoning")
# Arguments of `apply_chat_template` that aren't the row's to set.
_RESERVED_KWARGS = frozenset(
    (
        *("messages", "conversation", "tools", "chat_template", "add_generation_prompt", "continue_final_message"),
        *("tokenize", "tokenizer_kwargs", "return_assistant_tokens_mask", "return_dict", "return_tensors"),
    )
)
# ShareGPT: {"from": .., "value": ..}.
_SHAREGPT_ROLES: Mapping[str, Role] = {
    "system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
    "function_call": "assistant", "observation": "tool", "tool": "tool",
}  # fmt: skip


CALL_OPENING = "The assistant calls the tool "
"""How a line with a tool call in words begins."""


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
            raise DataError(f"{_shorten(value)} is not JSON ({error})") from None

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
            raise DataError(f"tool call {_shorten(value)}; expected an object")
        call = {key: content for key, content in value.items() if content is not None}
        outer = ("type", "id", "index")
        function = call.get("function", {key: content for key, content in call.items() if key not in outer})
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
            raise DataError(f"tool call {_shorten(value)}; expected {{'function': {{'name': .., 'arguments': ..}}}}")
        unknown = [key for key in function if key not in ("name", "arguments", "parameters")]
        if "function" in call:
            unknown += [key for key in call if key not in ("function", *outer)]
        if unknown:
            raise DataError(f"tool call {_shorten(value)}: unknown key '{unknown[0]}'")
        if call.get("type", "function") != "function":
            raise DataError(f"tool call {_shorten(value)}: type is {call['type']!r}; only functions can be called")
        call_id = call.get("id")
        if call_id is not None and not isinstance(call_id, str):
            raise DataError(f"tool call {_shorten(value)}: id is {call_id!r}; expected a string")
        values = [function[key] for key in ("arguments", "parameters") if function.get(key) is not None]
        if len(values) > 1:
            raise DataError(f"tool call {_shorten(value)}: it has 'arguments' and 'parameters'; keep one")
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


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation.

    Args:
        role: Role of the speaker.
        content: Text; "" for a turn of tool calls alone.
        reasoning: Thought of the model before its answer; None without one.
        tool_calls: Functions that the model calls.
        tool_call_id: Identifier of the call that a `tool` turn answers.
        name: Name of the speaker, or of the function that a `tool` turn answers for.
    """

    role: Role
    content: str
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        # An empty thought, which a model writes in its mode without reasoning, is none.
        object.__setattr__(self, "reasoning", self.reasoning or None)

    @property
    def is_plain(self) -> bool:
        """Whether the message has a role and a text and nothing else."""
        return self.reasoning is None and not self.tool_calls and self.tool_call_id is None and self.name is None

    @property
    def is_empty(self) -> bool:
        """Whether an assistant says and calls nothing."""
        return not self.content.strip() and not self.tool_calls

    def to_row(self) -> dict[str, Any]:
        """Return the message as an object of JSON; keys without a value are left out."""
        optional = {
            "reasoning_content": self.reasoning,
            "tool_calls": [call.to_row() for call in self.tool_calls] or None,
            "tool_call_id": self.tool_call_id,
            "name": self.name,
        }
        return {"role": self.role, "content": self.content} | {
            key: value for key, value in optional.items() if value is not None
        }

    def to_hash(self) -> object:
        """Return what `content_hash` hashes; a plain message is its role and its text."""
        plain: list[object] = [self.role, self.content]
        return plain if self.is_plain else [*plain, self.reasoning, self.tool_calls, self.tool_call_id, self.name]

    def in_words(self) -> str:
        """Return the text and the calls as a text, without the reasoning."""
        return "\n".join(part for part in (self.content, *(call.in_words() for call in self.tool_calls)) if part)

    def texts(self) -> Iterator[str]:
        """Yield every text of the message."""
        yield self.content
        yield from (text for text in (self.reasoning, self.tool_call_id, self.name) if text is not None)
        for call in self.tool_calls:
            yield from (call.name, call.arguments.text, call.id or "")


Conversation = tuple[Message, ...]
Answer = str | Conversation
"""A text, or the turns of an answer if it has reasoning, tool calls or several turns; see `as_answer`."""


def user_says(text: str) -> Conversation:
    """Return the conversation of one user turn."""
    return (Message("user", text),)


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
        raise DataError(f"column '{column}' is {_shorten(value)}; expected a string or a list of messages")
    return tuple(_read_message(turn, column, ignore) for turn in value)


def as_answer(answer: Answer) -> Answer:
    """Return an answer in its canonical form: a text if it is one plain turn, else its turns.

    A `<think>` block in front of a text becomes the reasoning of its turn.

    Raises:
        DataError: If turns don't begin and end with an assistant turn.
    """
    if isinstance(answer, str):
        reasoning, content = join_reasoning(None, answer)
        if reasoning is None:
            return answer
        return as_answer((Message("assistant", content, reasoning),))
    if not answer or answer[0].role != "assistant" or answer[-1].role != "assistant":
        roles = ", ".join(message.role for message in answer) or "none"
        raise DataError(f"the turns of an answer are {roles}; expected them to begin and end with an assistant turn")
    return answer[0].content if len(answer) == 1 and answer[0].is_plain else answer


def answer_turns(answer: Answer) -> Conversation:
    """Return the turns of an answer in its canonical form."""
    return (Message("assistant", answer),) if isinstance(answer, str) else answer


def answer_text(answer: Answer) -> str:
    """Return the visible text of an answer: its last turn with tool calls in words, without reasoning."""
    return answer_turns(answer)[-1].in_words()


def in_nfc(messages: Conversation) -> Conversation:
    """Return a conversation with its texts in the canonical composition of Unicode, for comparisons and hashes."""
    return tuple(
        message if all(is_normalized("NFC", text) for text in message.texts()) else _compose(message)
        for message in messages
    )


def _compose(message: Message) -> Message:
    calls = tuple(
        replace(call, arguments=FrozenJson(normalize("NFC", call.arguments.text))) for call in message.tool_calls
    )
    reasoning = None if message.reasoning is None else normalize("NFC", message.reasoning)
    return replace(message, content=normalize("NFC", message.content), reasoning=reasoning, tool_calls=calls)


def last_request(prompt: Conversation) -> str:
    """Return the text of the last user turn."""
    return prompt[last_user_index(prompt)].content


def last_user_index(prompt: Conversation) -> int:
    """Return the index of the last user turn; of the last turn if no user speaks."""
    users = [index for index, message in enumerate(prompt) if message.role == "user"]
    return users[-1] if users else len(prompt) - 1


def prompt_key(text: str) -> str:
    """Return a hash of a prompt's words that ignores case, white space, and how accents are encoded."""
    # Canonical caseless matching of the Unicode Standard (D145): decomposed before the case is folded.
    return content_hash(" ".join(normalize("NFC", normalize("NFD", text).casefold()).split()))


def conversation_key(prompt: Conversation) -> str:
    """Return the key of a conversation; with a single turn, it is the key of the text."""
    return prompt_key(conversation_text(prompt))


def conversation_text(prompt: Conversation) -> str:
    """Return a conversation as text, with the roles if there is more than one turn."""
    if len(prompt) == 1:
        return prompt[0].in_words()
    return "\n".join(f"{message.role}: {message.in_words()}" for message in prompt)


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
        raise DataError(f"column 'tool_calls' is {_shorten(value)}; expected a list")
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
        raise DataError(f"column 'tools' is {_shorten(value)}; expected a list of JSON schemas of functions")
    for tool in value:
        function = tool.get("function", tool)
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise DataError(
                f"column 'tools': {_shorten(tool)} has no name of a function; expected "
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
        raise DataError(f"column 'chat_template_kwargs' is {_shorten(value)}; expected an object")
    if taken := sorted(_RESERVED_KWARGS & value.keys()):
        raise DataError(f"column 'chat_template_kwargs' sets '{taken[0]}', which is not an argument of the template")
    return FrozenJson.freeze(dict(value))


def _parse_if_text(value: object, column: str) -> object:
    if not isinstance(value, str) or not value.strip():
        return None if value == "" or isinstance(value, str) else value
    try:
        return parse_json(value)
    except ValueError as error:
        raise DataError(f"column '{column}' is {_shorten(value)}; it is not JSON ({error})") from None


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
        raise DataError(f"column '{column}': turn {_shorten(turn)}; expected {{'role': .., 'content': text}}")
    # A table has a key for every turn, and null where a turn lacks it.
    values = {key: value for key, value in turn.items() if value is not None and key not in ignore}
    if "from" in values and "value" in values and "role" not in values:
        values = _from_sharegpt(values, column)
    if unknown := sorted(str(key) for key in values if key not in _KEYS):
        raise DataError(
            f"column '{column}': unknown key '{unknown[0]}' of a message ({_shorten(turn)}); the keys are "
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
            raise DataError(f"column '{column}': {key} is {_shorten(values[key])}; expected a string")
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
        raise DataError(f"column '{column}': a turn has 'value' and 'content' ({_shorten(values)}); keep one")
    if speaker != "function_call":
        return others | {"role": _SHAREGPT_ROLES[speaker], "content": text}
    try:
        calls = parse_json(text) if isinstance(text, str) else text
    except ValueError as error:
        raise DataError(f"column '{column}': function_call {_shorten(text)} is not JSON ({error})") from None
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
    raise DataError(f"column '{column}': turn {_shorten(turn)}; expected {{'role': .., 'content': text}}")


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
        f"column '{column}': a part of a message is {_shorten(kind or part)}; only text is supported, "
        f"not images, audio or files{hint}"
    )


def _check_part(part: Mapping[str, Any], column: str, keys: Collection[str]) -> None:
    # A table has the keys of all parts, and lists of annotations are mostly empty.
    if unknown := sorted(str(key) for key, value in part.items() if key not in keys and value not in (None, [], {})):
        raise DataError(
            f"column '{column}': unknown key '{unknown[0]}' of a part of a message ({_shorten(part)}); set "
            f"`ignore_message_keys: [{', '.join(unknown)}]` (of `text:`, or of a source of prompts) to leave it out"
        )


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


def _shorten(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]} ..."
