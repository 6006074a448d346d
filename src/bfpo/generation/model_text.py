"""What a model wrote, with its special tokens: reasoning, answer and tool calls.

Formats of calls: `<tool_call>` with JSON (Hermes, Qwen), `[TOOL_CALLS]` (Mistral), a JSON object alone (Llama 3) and
the channels of gpt-oss. Text that looks like a call and isn't one stays text.
"""

import json
import re
from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import Any

from bfpo.core.conversation import Message
from bfpo.core.files import parse_json
from bfpo.core.reasoning import split_reasoning
from bfpo.core.samples import Completion
from bfpo.core.tools import ToolCall
from bfpo.errors import DataError

_HERMES = re.compile(r"<tool_call>\s*(.*?)\s*(?:</tool_call>|$)", re.DOTALL)
_MISTRAL = "[TOOL_CALLS]"
_MISTRAL_NAMED = re.compile(r"\s*([\w.-]+)(?:\[CALL_ID\][\w-]+)?\[ARGS\]")
# Around the call, where a server doesn't remove special tokens.
_LLAMA_MARKS = re.compile(r"\A\s*<\|python_tag\|>|<\|(?:eom_id|eot_id)\|>\s*\Z")
# gpt-oss: each message of a turn has a channel, and perhaps the function that it goes to.
_CHANNEL = re.compile(
    r"(?:<\|start\|>assistant)?(?: to=(?P<to_first>[\w.]+))?<\|channel\|>(?P<channel>\w+)(?: to=(?P<to>[\w.]+))?[^<]*"
    r"(?:<\|constrain\|>\w+\s*)?<\|message\|>(?P<text>.*?)(?:<\|end\|>|<\|call\|>|<\|return\|>|$)",
    re.DOTALL,
)

_CHANNEL_START = re.compile(r"\s*(<\|start\|>assistant)?( to=[\w.]+)?<\|channel\|>")


def parse_model_text(
    text: str, *, opened: bool = False, has_tools: bool = False, special_tokens: Collection[str] = ()
) -> Message:
    """Return what a model wrote as an assistant turn.

    Args:
        text: Text with special tokens, up to the end of the turn.
        opened: Whether the prompt ends inside a thought.
        has_tools: Whether the model was given tools; without them there are no calls.
        special_tokens: Tokens that are removed from the answer.
    """
    if has_channels(text):
        return _parse_channels(text, has_tools, special_tokens)
    reasoning, answer = split_reasoning(text, opened=opened)
    calls: list[ToolCall] = []
    if has_tools:
        calls, answer = _split_calls(answer)
    return Message("assistant", _without(answer, special_tokens), reasoning, tuple(calls))


def has_channels(text: str) -> bool:
    """Return whether a text begins with a channel of gpt-oss; one that only speaks of channels doesn't."""
    return _CHANNEL_START.match(text) is not None


def read_parts_in_text(completion: Completion) -> Completion:
    """Return a completion with the tool calls, and the channels of gpt-oss, that a server left in its text.

    A thought in the text follows another one that the server sent apart.
    """
    message = parse_model_text(completion.text, has_tools=completion.tools is not None)
    if completion.tool_calls or not (message.tool_calls or has_channels(completion.text)):
        return completion
    thoughts = dict.fromkeys(thought for thought in (completion.reasoning, message.reasoning) if thought)
    reasoning = "\n\n".join(thoughts) if thoughts else completion.reasoning
    return replace(completion, text=message.content, reasoning=reasoning, tool_calls=message.tool_calls)


def _parse_channels(text: str, has_tools: bool, special_tokens: Collection[str]) -> Message:
    thoughts, answers, calls = [], [], []
    for match in _CHANNEL.finditer(text):
        to, content = match["to"] or match["to_first"], match["text"]
        if match["channel"] == "analysis":
            thoughts.append(content.strip())
        elif to and has_tools:
            calls.append(_read_call({"name": to.removeprefix("functions."), "arguments": content}))
        else:
            answers.append(content)
    read = [call for call in calls if call is not None]
    answer = _without("\n".join(answers), special_tokens)
    return Message("assistant", answer, "\n".join(thoughts) if thoughts else None, tuple(read))


def _split_calls(text: str) -> tuple[list[ToolCall], str]:
    """Return the calls in an answer, and the text without them."""
    if "<tool_call>" in text:
        calls = [_read_call(_parse(match[1])) for match in _HERMES.finditer(text)]
        if all(calls):
            return [call for call in calls if call], _HERMES.sub("", text).strip()
    elif _MISTRAL in text:
        before, _, after = text.partition(_MISTRAL)
        values = list(_mistral_calls(after))
        calls = [_read_call(value) for value in values]
        if calls and all(calls):
            return [call for call in calls if call], before.strip()
    else:
        value = _parse(_LLAMA_MARKS.sub("", text).strip())
        # Llama 3 names the arguments `parameters`, and some prompts ask for a type.
        keys = value.keys() - {"type"} if isinstance(value, dict) and value.get("type") in (None, "function") else ()
        if keys == {"name", "parameters"} and (call := _read_call(value)):
            return [call], ""
    return [], text


def _mistral_calls(text: str) -> Iterator[Any]:
    """Yield the calls of `[{"name": .., "arguments": ..}]`, or of `NAME[ARGS]{..}[TOOL_CALLS]NAME[ARGS]{..}`."""
    for part in text.split(_MISTRAL):
        if named := _MISTRAL_NAMED.match(part):
            yield {"name": named[1], "arguments": _parse(part[named.end() :])}
        else:
            value = _parse(part)
            yield from value if isinstance(value, list) else [value]


def _parse(text: str) -> Any:
    try:
        return parse_json(text)
    except ValueError:
        return None


def _read_call(value: Any) -> ToolCall | None:
    if isinstance(value, dict):
        value = {key: content for key, content in value.items() if key in ("name", "arguments", "parameters", "id")}
    try:
        json.dumps(value, allow_nan=False)
        return ToolCall.from_row(value)
    except (DataError, ValueError):
        return None


def _without(text: str, special_tokens: Collection[str]) -> str:
    for token in special_tokens:
        text = text.replace(token, "")
    return text
