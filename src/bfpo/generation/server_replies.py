"""Replies of servers of the OpenAI chat protocol: how an answer ended, and what an error means.

Servers differ: content filters come as a finish reason or as an error, refusals as a field of their own, and finish
reasons have several names.
"""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from bfpo.core.files import replace_lone_surrogates
from bfpo.core.samples import FinishReason

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
# Start of the reason why a model wrote no text within its tokens.
NO_TEXT = "no text: "
# Longest message of a server that is shown.
_MAX_MESSAGE = 200


class Reply(NamedTuple):
    """A server's answer.

    Args:
        text: Text of the answer; of a refusal that the server reports, its text.
        finish_reason: How the answer ended.
        prompt_tokens: Length of the prompt; 0 if the server doesn't say.
        completion_tokens: Length of the answer; 0 if the server doesn't say.
    """

    text: str
    finish_reason: FinishReason
    prompt_tokens: int = 0
    completion_tokens: int = 0


class MalformedReply(Exception):
    """The response has no answer that can be read; another request may get one."""


class NoText(Exception):
    """The model wrote no text, and would write none again."""


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

    def refuses(self, parameter: str) -> bool:
        """Return whether the server doesn't accept a parameter at all, whatever its value."""
        is_unknown = any(map(_UNKNOWN_PARAMETER.search, (self.message, *self.codes)))
        # The parameter that a message recommends instead comes later in it.
        names = re.findall(r"\w+", self.parameter or self.message)
        parameters = [name for name in names if name in ("max_tokens", "seed", "temperature", "top_p", "messages")]
        return is_unknown and parameters[:1] == [parameter]


def read_finish_reason(name: Any) -> FinishReason:
    """Return the finish reason that a server's name for it stands for; `stop` if the name isn't known."""
    lower = name.lower() if isinstance(name, str) else ""
    if lower in _FILTERED:
        return "filtered"
    return "length" if lower in _CUT else "stop"


def read_reply(content: Any, max_tokens: int) -> Reply:
    """Return the answer in a response.

    Args:
        content: Parsed JSON of the response.
        max_tokens: Maximum length that was requested.

    Raises:
        MalformedReply: If the response has another schema, or an error in place of an answer.
        NoText: If the model called a tool, or its reasoning was cut before it wrote a text.
    """
    if isinstance(content, dict) and "choices" not in content and ("error" in content or "message" in content):
        raise MalformedReply("an error in place of an answer")
    try:
        choice = content["choices"][0]
        message, name = choice["message"], choice.get("finish_reason")
        text, refusal = _text_of(message.get("content")), message.get("refusal")
        usage = content.get("usage") or {}
        tokens = int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0)
    except (TypeError, LookupError, ValueError, OverflowError, AttributeError):
        raise MalformedReply("wrong schema") from None
    reason, finish_reason = name.lower() if isinstance(name, str) else "", read_finish_reason(name)
    if finish_reason == "filtered":
        return Reply(text or "", "filtered", *tokens)
    if isinstance(refusal, str) and refusal.strip() and not (text or "").strip():
        return Reply(refusal.strip(), "refused", *tokens)
    if reason in _TOOL_CALLS or (text is None and message.get("tool_calls")):
        raise NoText("the model called a tool in place of an answer")
    if reason == "error":
        raise MalformedReply("an error in place of an answer")
    has_reasoning = any(message.get(key) for key in ("reasoning_content", "reasoning"))
    if finish_reason == "length":
        if text is None or (has_reasoning and not text.strip()):
            raise NoText(f"{NO_TEXT}{'the reasoning' if has_reasoning else 'the model'} used all {max_tokens} tokens")
        return Reply(text, "length", *tokens)
    # Servers have names of their own for the end of a turn ("eos", "end_turn", null): a text is an answer.
    if text is None or (reason != "stop" and not text.strip()):
        raise MalformedReply("wrong schema")
    return Reply(text, "stop", *tokens)


def _text_of(content: Any) -> str | None:
    """Return the text of a message: a string, null, or a list of parts of which those of text count."""
    if isinstance(content, list):
        return "".join(part["text"] for part in content if part["type"] == "text")
    if content is None or isinstance(content, str):
        return content
    raise TypeError


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
