"""The reasoning in front of an answer: where a text has its thought, and where the answer begins."""

import re
from typing import NamedTuple

MARKERS = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("◁think▷", "◁/think▷"),
)
"""Marks of the beginning and the end of a thought, by family."""


REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
"""Names of the reasoning in messages and replies: of DeepSeek, SGLang and `transformers serve`; of vLLM and
OpenRouter; and of Ollama."""


class ReasoningSplit(NamedTuple):
    """Parts of a text.

    Args:
        reasoning: Thought; None without one.
        answer: Text after the thought; "" if the thought doesn't end.
    """

    reasoning: str | None
    answer: str


def split_reasoning(text: str, *, opened: bool = False) -> ReasoningSplit:
    """Split a text into the thought at its beginning and the answer after it.

    A text that only has the mark of an end began inside its thought, because the prompt for generation opened it. A
    thought without an end is no answer. White space around both parts is removed; a text without a thought is
    returned unchanged.

    Args:
        text: Text that a model wrote.
        opened: Whether the prompt ends inside a thought.
    """
    start = text.lstrip()
    for opening, closing in MARKERS:
        if start.startswith(opening):
            thought, end, answer = start.removeprefix(opening).partition(closing)
            return ReasoningSplit(thought.strip(), answer.strip() if end else "")
        if closing in text:
            # The mark of an end alone on its line, and no mark of a beginning: otherwise an answer speaks of them.
            thought, _, answer = text.partition(closing)
            is_mark = opened or re.search(rf"(^|\n)[ \t]*{re.escape(closing)}|{re.escape(closing)}[ \t]*(\n|$)", text)
            if is_mark and opening not in thought:
                return ReasoningSplit(thought.strip(), answer.strip())
    return ReasoningSplit(text.strip(), "") if opened else ReasoningSplit(None, text)
