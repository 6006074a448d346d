"""Replies of the OpenAI chat protocol: a whole answer, or the chunks of a stream."""

import json
import secrets
import time
from dataclasses import dataclass, field
from typing import Any

from bfpo.core.samples import Completion
from bfpo.deployment.guarded_model import GuardedAnswer

OUTCOME_HEADER = "X-Guard-Outcome"


@dataclass(frozen=True, slots=True)
class Replies:
    """What all replies to a request have in common.

    Args:
        model: Name of the model.
        reply_id: Identifier of the reply.
        created: When it was made, in seconds.
    """

    model: str
    reply_id: str = field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, answer: GuardedAnswer) -> dict[str, Any]:
        """Return the reply with a whole answer."""
        choice = {
            "index": 0,
            "message": message_of(answer),
            "logprobs": None,
            "finish_reason": _finish_reason(answer),
        }
        return {
            **self._common("chat.completion"),
            "choices": [choice],
            "usage": _usage(answer.completion),
            "guard": _guard(answer),
        }

    def chunk(self, delta: dict[str, Any], answer: GuardedAnswer | None = None) -> str:
        """Return an event of a stream.

        Args:
            delta: What it adds to the message.
            answer: The whole answer, for its last event.
        """
        finish_reason = None if answer is None else _finish_reason(answer)
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        last = {} if answer is None else {"guard": _guard(answer)}
        return event({**self._common("chat.completion.chunk"), "choices": [choice], **last})

    def usage(self, answer: GuardedAnswer) -> str:
        """Return the event of a stream with the numbers of tokens."""
        return event({**self._common("chat.completion.chunk"), "choices": [], "usage": _usage(answer.completion)})

    def _common(self, kind: str) -> dict[str, Any]:
        return {"id": self.reply_id, "object": kind, "created": self.created, "model": self.model}


def message_of(answer: GuardedAnswer) -> dict[str, Any]:
    """Return an answer as a message; a refusal that a server reports is in a field of its own."""
    is_refusal = answer.completion.finish_reason == "refused"
    texts = {"content": None, "refusal": answer.text} if is_refusal else {"content": answer.text, "refusal": None}
    reasoning = {} if answer.reasoning is None else {"reasoning_content": answer.reasoning}
    return {"role": "assistant", **texts, **reasoning}


def event(content: dict[str, Any]) -> str:
    """Return a JSON object as a server-sent event."""
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


END = "data: [DONE]\n\n"
"""Last event of a stream."""


def _finish_reason(answer: GuardedAnswer) -> str:
    if answer.outcome != "passed" or answer.completion.finish_reason == "filtered":
        return "content_filter"
    return "length" if answer.completion.finish_reason == "length" else "stop"


def _usage(completion: Completion) -> dict[str, int]:
    prompt, answer = completion.prompt_tokens, completion.completion_tokens
    return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}


def _guard(answer: GuardedAnswer) -> dict[str, Any]:
    counts = answer.completion.guard
    drawn = {} if counts is None else {"samples": counts.samples, "judge_calls": counts.judge_calls}
    return {"outcome": answer.outcome, **drawn}
