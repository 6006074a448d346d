"""Requests to servers that speak the OpenAI chat completions protocol."""

import json
from collections.abc import Collection
from typing import Any

from bfpo.core.conversation import Message
from bfpo.core.samples import Prompt, Sampling, sample_seed

# Parameters and keys of messages that a request can do without, and what that means.
OPTIONAL_KEYS = {
    "max_tokens": "sending `max_completion_tokens`",
    "seed": "asking without it, so completions can't be repeated",
    "chat_template_kwargs": "asking without it, so its own template decides",
    "reasoning_content": "leaving the key out of earlier turns",
    "reasoning": "leaving the key out of earlier turns",
}


def make_body(
    model: str, prompt: Prompt, sample: int, sampling: Sampling, without: Collection[str]
) -> dict[str, Any]:
    """Return the body of a request.

    Args:
        model: Name of the model on the server.
        prompt: Prompt.
        sample: Number of the completion.
        sampling: Sampling of the completion.
        without: Keys of `OPTIONAL_KEYS` that the server doesn't accept.
    """
    body: dict[str, Any] = {
        "model": model,
        "messages": [_message_to_row(message, without) for message in prompt.prompt],
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "max_completion_tokens" if "max_tokens" in without else "max_tokens": sampling.max_new_tokens,
    }
    if "seed" not in without:
        # 31 bits: servers store it in a signed int.
        body["seed"] = sample_seed(sampling.seed, prompt.prompt_id, sample) % 2**31
    if prompt.tools is not None:
        body["tools"] = prompt.tools.value
    if prompt.chat_template_kwargs is not None and "chat_template_kwargs" not in without:
        body["chat_template_kwargs"] = prompt.chat_template_kwargs.value
    return body


def _message_to_row(message: Message, without: Collection[str]) -> dict[str, Any]:
    """Return a message as servers read it: arguments of tool calls as JSON text, reasoning under both of its names.

    Args:
        message: Message.
        without: Keys that the server doesn't accept.
    """
    row = message.to_row()
    for call in row.get("tool_calls", ()):
        arguments = call["function"]["arguments"]
        if not isinstance(arguments, str):
            call["function"]["arguments"] = json.dumps(arguments, ensure_ascii=False)
    reasoning = row.pop("reasoning_content", None)
    if reasoning:
        # vLLM reads `reasoning`, DeepSeek and SGLang `reasoning_content`.
        row |= {key: reasoning for key in ("reasoning_content", "reasoning") if key not in without}
    return row
