"""Requests of the OpenAI chat protocol. A field that would change the answer and isn't honored is refused."""

import json
import math
import secrets
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from bfpo.core.conversation import Conversation
from bfpo.core.files import parse_json
from bfpo.core.pairs import TemplateInputs
from bfpo.core.read_messages import as_messages
from bfpo.core.samples import Prompt, Sampling, prompt_id
from bfpo.core.tools import as_template_kwargs, shorten
from bfpo.errors import DataError

Value = TypeVar("Value")

HONORED = (
    "model",
    "messages",
    "temperature",
    "top_p",
    "max_tokens",
    "max_completion_tokens",
    "seed",
    "stream",
    "stream_options",
    "chat_template_kwargs",
)
"""Fields that are honored."""
WITHOUT_EFFECT = ("user", "metadata", "store", "safety_identifier", "prompt_cache_key", "service_tier")
"""Fields that are accepted with any value: they don't change an answer."""
# Fields that are accepted with values that ask for nothing.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "n": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "stop": ([],),
}


class RefusedRequest(Exception):
    """A request that gets an error in place of an answer.

    Args:
        message: What is wrong, for the client.
        status: HTTP status.
        param: Field that is wrong.
        code: Name of the error.
    """

    def __init__(self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message, self.status, self.param, self.code = message, status, param, code

    def to_row(self) -> dict[str, Any]:
        """Return the error as OpenAI's object."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """A request for an answer.

    Args:
        prompt: What is answered.
        sampling: How it is sampled.
        streams: Whether the answer is streamed.
        includes_usage: Whether the stream ends with the numbers of tokens.
    """

    prompt: Prompt
    sampling: Sampling
    streams: bool
    includes_usage: bool


def read_request(content: bytes, *, model: str, max_new_tokens: int) -> ChatRequest:
    """Read the body of a request.

    Args:
        content: The body.
        model: Name of the only model.
        max_new_tokens: Maximum length of an answer if the request has none, in tokens.

    Raises:
        RefusedRequest: If it is malformed, or asks for what isn't done.
    """
    fields = _read_fields(content)
    _check_fields(fields, model)
    messages = _read_messages(fields.get("messages"))
    with_template = TemplateInputs(None, _read(fields, "chat_template_kwargs", as_template_kwargs))
    prompt = _make_prompt(messages, with_template)
    sampling = Sampling(
        temperature=_number(fields, "temperature", 1.0, "from 0 to 2", lambda value: 0 <= value <= 2),
        top_p=_number(fields, "top_p", 1.0, "above 0, at most 1", lambda value: 0 < value <= 1),
        max_new_tokens=_read_limit(fields, max_new_tokens),
        seed=_integer(
            fields, "seed", secrets.randbelow(2**31), "an integer of 64 bits", lambda value: abs(value) < 2**63
        ),
    )
    options = fields.get("stream_options") or {}
    if not isinstance(options, dict) or not options.keys() <= {"include_usage"}:
        raise RefusedRequest(
            f"stream_options is {shorten(options)}; only include_usage is supported", param="stream_options"
        )
    return ChatRequest(prompt, sampling, _flag(fields, "stream"), _flag(options, "include_usage"))


def _read_fields(content: bytes) -> dict[str, Any]:
    try:
        fields = parse_json(content)
        # A lone surrogate, which JSON can escape, is no text.
        json.dumps(fields, ensure_ascii=False).encode("utf-8")
    except ValueError:
        raise RefusedRequest("the body isn't JSON in UTF-8") from None
    if not isinstance(fields, dict):
        raise RefusedRequest("the body isn't a JSON object")
    return {name: value for name, value in fields.items() if value is not None}


def _check_fields(fields: Mapping[str, Any], model: str) -> None:
    asked = fields.get("model")
    if asked != model:
        raise RefusedRequest(
            f"model is {shorten(asked)}; this server has '{model}' only",
            status=404,
            param="model",
            code="model_not_found",
        )
    for name, value in fields.items():
        if name in HONORED or name in WITHOUT_EFFECT or value in _NEUTRAL.get(name, ()):
            continue
        what = (
            f"{name} is {shorten(value)}, which isn't supported here" if name in _NEUTRAL else f"unknown field {name}"
        )
        raise RefusedRequest(
            f"{what}; leave it out, because it can't be honored", param=name, code="unsupported_parameter"
        )


def _read_messages(value: Any) -> Conversation:
    if not isinstance(value, list) or not value:
        raise RefusedRequest("messages is missing or empty; expected a list of messages", param="messages")
    return _read({"messages": value}, "messages", lambda messages: as_messages(messages, "messages")) or ()


def _make_prompt(messages: Conversation, inputs: TemplateInputs) -> Prompt:
    name = prompt_id(messages, inputs)
    try:
        return Prompt(name, messages, chat_template_kwargs=inputs.kwargs)
    except DataError as error:
        raise RefusedRequest(str(error).replace(f"prompt {name}", "messages"), param="messages") from None


def _read(fields: Mapping[str, Any], name: str, read: Callable[[Any], Value]) -> Value | None:
    try:
        return read(fields[name]) if name in fields else None
    except DataError as error:
        # The rest of the message names keys of recipes.
        message = str(error).replace(f"column '{name}'", name).partition("; set `")[0]
        raise RefusedRequest(message, param=name) from None


def _read_limit(fields: Mapping[str, Any], default: int) -> int:
    names = [name for name in ("max_completion_tokens", "max_tokens") if name in fields]
    limits = [_integer(fields, name, default, "at least 1", lambda value: value >= 1) for name in names]
    if len(set(limits)) > 1:
        raise RefusedRequest("max_tokens and max_completion_tokens differ; send one of them", param=names[0])
    return limits[0] if limits else default


def _number(
    fields: Mapping[str, Any], name: str, default: float, allowed: str, is_allowed: Callable[[float], bool]
) -> float:
    value = fields.get(name, default)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    # An integer may be too large for a float, and is then as little allowed as infinity.
    if not is_number or abs(value) > sys.float_info.max or math.isnan(value) or not is_allowed(value):
        raise RefusedRequest(f"{name} is {shorten(value)}; expected {allowed}", param=name)
    return float(value)


def _integer(
    fields: Mapping[str, Any], name: str, default: int, allowed: str, is_allowed: Callable[[int], bool]
) -> int:
    value = fields.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool) or not is_allowed(value):
        raise RefusedRequest(f"{name} is {shorten(value)}; expected {allowed}", param=name)
    return value


def _flag(fields: Mapping[str, Any], name: str) -> bool:
    value = fields.get(name, False)
    if not isinstance(value, bool):
        raise RefusedRequest(f"{name} is {shorten(value)}; expected true or false", param=name)
    return value
