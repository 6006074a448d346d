"""Replies of servers of the OpenAI chat protocol: the parts of an answer, how it ended, and what an error means.

Servers differ: reasoning and finish reasons have several names, content filters come as a finish reason or as an
error, and refusals as a field of their own.
"""

import json
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

from bfpo.core.files import replace_lone_surrogates
from bfpo.core.reasoning import REASONING_KEYS
from bfpo.core.samples import FinishReason
from bfpo.core.tools import FrozenJson, ToolCall
from bfpo.errors import DataError

_FILTERED = frozenset(
    (
        "filtered",
        "content_filter",
        "content-filter",
        "refusal",
        "safety",
        "prohibited_content",
        "blocklist",
        "recitation",
        "spii",
    )
)
_CUT = frozenset(("length", "max_tokens", "model_length", "max_output_tokens"))
_TOOL_CALLS = frozenset(("tool_calls", "tool_call", "tool_use", "function_call"))
_READ_FIELDS = frozenset(
    (*REASONING_KEYS, "role", "content", "refusal", "reasoning_details", "tool_calls", "function_call")
)
# Names of an error's kind (`code`, `type`) that say that a filter rejected the prompt or the answer.
_FILTER_CODE = re.compile(
    r"content[_ -]?filter|content[_ -]?policy|content[_ -]?management|responsible_?ai|moderation|inspection_failed|"
    r"flagged",
    re.IGNORECASE,
)
# A message may repeat the prompt, so only what servers write there counts.
_FILTER_MESSAGE = re.compile(
    r"content management policy|ContentPolicyViolation|content_policy_violation|content_filter|requires moderation",
    re.IGNORECASE,
)
_UNKNOWN_PARAMETER = re.compile(
    r"un(supported|known|recognized|expected)|not (supported|permitted|allowed|recognized)|does(n't| not) support|"
    r"extra_forbidden|extra (inputs|fields)",
    re.IGNORECASE,
)
# Start of the reason why there is no reply, by which rubric judges count replies that were cut.
NO_TEXT = "no text: "
# Names by which an error can refer to a part of a request.
_PARAMETERS = frozenset(
    (
        "max_tokens",
        "seed",
        "temperature",
        "top_p",
        "messages",
        "tools",
        "chat_template_kwargs",
        "reasoning",
        "reasoning_content",
    )
)
# Longest message of a server that is shown.
_MAX_MESSAGE = 200


class Reply(NamedTuple):
    """A server's answer.

    Args:
        text: Text of the answer; of a refusal that the server reports, its text.
        finish_reason: How the answer ended.
        prompt_tokens: Length of the prompt; 0 if the server doesn't say.
        completion_tokens: Length of the answer with its reasoning; 0 if the server doesn't say.
        reasoning: Thought in front of the answer; "" if it isn't shown but used all tokens; None without one.
        tool_calls: Functions that the model calls.
        unread: Fields of the answer with a value that isn't read.
    """

    text: str
    finish_reason: FinishReason
    prompt_tokens: int = 0
    completion_tokens: int = 0
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    unread: tuple[str, ...] = ()

    def without_lone_surrogates(self) -> "Reply":
        """Return the reply with a question mark in place of each lone surrogate, which a file can't contain."""
        reasoning = None if self.reasoning is None else replace_lone_surrogates(self.reasoning)
        calls = tuple(
            ToolCall(
                replace_lone_surrogates(call.name),
                FrozenJson(replace_lone_surrogates(call.arguments.text)),
                None if call.id is None else replace_lone_surrogates(call.id),
            )
            for call in self.tool_calls
        )
        return self._replace(text=replace_lone_surrogates(self.text), reasoning=reasoning, tool_calls=calls)


class MalformedReply(Exception):
    """The response has no answer that can be read; another request may get one."""


class ServerError(NamedTuple):
    """Content of an error response.

    Args:
        message: The server's message, in one line; empty if it has none.
        codes: Names of the error's kind.
        parameter: Name of the parameter that the error is about; empty if it isn't stated.
    """

    message: str = ""
    codes: tuple[str, ...] = ()
    parameter: str = ""

    @property
    def is_filter(self) -> bool:
        """Whether a content filter rejected the prompt or the answer."""
        return any(map(_FILTER_CODE.search, self.codes)) or bool(_FILTER_MESSAGE.search(self.message))

    def refuses(self, parameter: str, sent: Collection[str]) -> bool:
        """Return whether the server doesn't accept a parameter at all, whatever its value.

        Args:
            parameter: Name of a parameter, or of a key of messages.
            sent: Names in the request; others are words of the message.
        """
        is_unknown = any(map(_UNKNOWN_PARAMETER.search, (self.message, *self.codes)))
        # The parameter that a message recommends instead comes later in it. A path ends with the name of a key.
        names = re.findall(r"\w+", self.parameter)[::-1] or re.findall(r"\w+", self.message)
        return (
            is_unknown and next((name for name in names if name in _PARAMETERS and name in sent), None) == parameter
        )


def read_finish_reason(name: Any) -> FinishReason:
    """Return the finish reason that a server's name for it stands for; `stop` if the name isn't known."""
    lower = name.lower() if isinstance(name, str) else ""
    if lower in _FILTERED:
        return "filtered"
    return "length" if lower in _CUT else "stop"


def read_reply(content: Any) -> Reply:
    """Return the answer in a response.

    An answer that was cut before its text began is a reply without text, and so is one of tool calls alone.

    Args:
        content: Parsed JSON of the response.

    Raises:
        MalformedReply: If the response has another schema, or an error in place of an answer.
    """
    if isinstance(content, dict) and "choices" not in content and ("error" in content or "message" in content):
        raise MalformedReply("an error in place of an answer")
    try:
        choice = content["choices"][0]
        message, name = choice["message"], choice.get("finish_reason")
        parts = _read_content(message.get("content"))
        refusal = message.get("refusal") or parts.refusal
        reasoning = _read_reasoning(message, parts.reasoning)
        calls, unread = _read_calls(message)
        usage = content.get("usage") or {}
        tokens = int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0)
    except (TypeError, LookupError, ValueError, OverflowError, AttributeError, RecursionError):
        raise MalformedReply("wrong schema") from None
    reason, finish_reason = name.lower() if isinstance(name, str) else "", read_finish_reason(name)
    text = parts.text
    has_text = bool((text or "").strip())
    if isinstance(refusal, str) and refusal.strip() and finish_reason != "filtered" and not has_text and not calls:
        return Reply(refusal.strip(), "refused", *tokens, reasoning, unread=unread)
    if finish_reason == "length" and not text and not calls and reasoning is None:
        # The server doesn't show the reasoning.
        reasoning = ""
    reply = Reply(text or "", finish_reason, *tokens, reasoning, calls, unread)
    if finish_reason in ("filtered", "length"):
        return reply
    if reason == "error":
        raise MalformedReply("an error in place of an answer")
    if reason in _TOOL_CALLS and not calls:
        raise MalformedReply("no tool call, but a finish reason of one")
    # Servers have names of their own for the end of a turn ("eos", "end_turn", null): a text is an answer.
    if not (has_text or calls or reasoning or (reason == "stop" and text is not None)):
        raise MalformedReply("wrong schema")
    return reply


class _Content(NamedTuple):
    """Parts of a message's content; None for what it lacks."""

    text: str | None
    reasoning: str | None = None
    refusal: str | None = None


def _read_content(content: Any) -> _Content:
    """Return the parts of a message's content: a string, null, or a list of parts."""
    if content is None or isinstance(content, str):
        return _Content(content)
    if not isinstance(content, list):
        raise TypeError
    texts: dict[str, list[str]] = {"text": [], "reasoning": [], "refusal": []}
    for part in content:
        kind = "text" if isinstance(part, str) else part["type"]
        if kind in ("text", "output_text"):
            texts["text"].append(part if isinstance(part, str) else part["text"])
        elif kind in ("thinking", "reasoning"):
            # Mistral: a list of parts again.
            texts["reasoning"].append(_read_content(part.get(kind, part.get("text"))).text or "")
        elif kind == "refusal":
            texts["refusal"].append(part["refusal"])
        else:
            raise MalformedReply(f"a part of type {str(kind)[:40]!r} in the answer")
    joined = {kind: "".join(parts) if parts else None for kind, parts in texts.items()}
    return _Content(**joined)


def _read_reasoning(message: Mapping[str, Any], part: str | None) -> str | None:
    """Return the reasoning of a message, from its fields and from a part of its content; None without any."""
    thoughts = [_read_content(message.get(field) or None).text for field in REASONING_KEYS]
    present = {thought.strip(): thought for thought in (*thoughts, part) if thought and thought.strip()}
    if not present:
        # OpenRouter: texts, summaries, and encrypted reasoning, which can't be read.
        details = [detail.get("text") or detail.get("summary") for detail in message.get("reasoning_details") or ()]
        return "\n".join(detail for detail in details if detail) or None
    if len(present) > 1:
        raise MalformedReply("two different texts of reasoning")
    return next(iter(present))


def _read_calls(message: Mapping[str, Any]) -> tuple[tuple[ToolCall, ...], tuple[str, ...]]:
    """Return the tool calls of a message, and the names of fields with a value that isn't read."""
    rows = list(message.get("tool_calls") or ())
    if not rows and message.get("function_call"):
        rows = [{"function": message["function_call"]}]
    unread = {name for name, value in message.items() if value and name not in _READ_FIELDS}
    calls = []
    for row in rows:
        unread |= {name for name, value in row.items() if value and name not in ("id", "type", "function", "index")}
        try:
            calls.append(ToolCall.from_row({name: row.get(name) for name in ("id", "type", "function")}))
        except DataError:
            raise MalformedReply("a malformed tool call") from None
    return tuple(calls), tuple(sorted(map(str, unread)))


def read_error(content: bytes, secret: str) -> ServerError:
    """Return the error in the body of a response; empty if it has none that can be read.

    Args:
        content: Body of the response.
        secret: Key of the server; a message that repeats it or a header isn't shown.
    """
    try:
        error = json.loads(content)
    except (ValueError, RecursionError):
        return ServerError()
    if not isinstance(error, Mapping):
        return ServerError()
    error = error.get("error", error)
    if isinstance(error, str):
        return ServerError(_clean(error, secret))
    if not isinstance(error, Mapping):
        return ServerError()
    message, parameter = error.get("message"), error.get("param")
    detail = error.get("detail")
    if isinstance(detail, list) and detail and isinstance(detail[0], Mapping):
        # FastAPI: a list of the fields that were refused.
        place = detail[0].get("loc")
        parameter = str(place[-1]) if isinstance(place, list) and place else parameter
        message = f"{parameter}: {detail[0].get('msg')} ({detail[0].get('type')})"
    elif not isinstance(message, str):
        message = detail
    return ServerError(
        _clean(message if isinstance(message, str) else "", secret),
        tuple(_codes(error)),
        parameter if isinstance(parameter, str) else "",
    )


def _codes(error: Mapping[str, Any], depth: int = 2) -> Iterator[str]:
    for key in ("code", "type"):
        if isinstance(error.get(key), str):
            yield error[key]
    for key in ("innererror", "metadata"):
        inner = error.get(key)
        if isinstance(inner, Mapping) and depth:
            yield from _codes(inner, depth - 1)
            if "flagged_input" in inner:
                yield "flagged"


def _clean(message: str, secret: str) -> str:
    """Return a message in one line of limited length; empty if it repeats the key."""
    line = " ".join(replace_lone_surrogates(message).split())
    if (secret and secret in line) or "bearer " in line.lower():
        return ""
    return line if len(line) <= _MAX_MESSAGE else f"{line[: _MAX_MESSAGE - 3]}..."
