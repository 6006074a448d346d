"""The reasoning in front of an answer: where a text has its thought, and where the answer begins."""

import re
from typing import NamedTuple

MARKERS = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("◁think▷", "◁/think▷"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
)
"""Marks of the beginning and the end of a thought, by family; read in any case."""

_OPENING = re.compile(rf"\s*(?:{'|'.join(re.escape(opening) for opening, _ in MARKERS)})", re.IGNORECASE)
# Every mark begins with one of these: a text without them has no thought, which is cheap to see.
FIRST_CHARACTERS = tuple({mark[0] for marks in MARKERS for mark in marks})
"""Characters with which the marks begin."""
# The end of a line or of a sentence.
_ENDS = re.compile(r"(^|\n|[.!?\u2026\u3002\uff01\uff1f][\"'\u201d\u2019)\]*]*)[ \t]*$")


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
    if not any(character in text for character in FIRST_CHARACTERS):
        return ReasoningSplit(text.strip(), "") if opened else ReasoningSplit(None, text)
    lower = text.lower()
    if _OPENING.match(text):
        opening, closing = next(
            marks for marks in MARKERS if re.match(rf"\s*{re.escape(marks[0])}", text, re.IGNORECASE)
        )
        _, text = _cut(text, opening)
        thought, answer = _cut(text, closing)
        return ReasoningSplit(thought.strip(), answer.strip())
    for opening, closing in MARKERS:
        if closing.lower() in lower:
            thought, answer = _cut(text, closing)
            # The mark of an end alone on its line or after a sentence, and no mark of a beginning: otherwise an
            # answer speaks of them.
            is_mark = opened or _ENDS.search(thought) or re.match(r"[ \t]*(\n|$)", answer)
            if is_mark and opening.lower() not in thought.lower():
                return ReasoningSplit(thought.strip(), answer.strip())
    return ReasoningSplit(text.strip(), "") if opened else ReasoningSplit(None, text)


def _cut(text: str, mark: str) -> tuple[str, str]:
    """Return the text before and after a mark in any case; all of it and "" without one."""
    before, *after = re.split(re.escape(mark), text, maxsplit=1, flags=re.IGNORECASE)
    return before, "".join(after)


def join_reasoning(reasoning: str | None, text: str) -> ReasoningSplit:
    """Return reasoning that stands apart with the thoughts in front of a text, and the text after them.

    A thought that is in both places is kept once, because some servers send it apart and in the text.

    Args:
        reasoning: Reasoning that stands apart; None if there is none.
        text: Text that may begin with thoughts.
    """
    if reasoning is None:
        reasoning, text = split_reasoning(text)
    while _OPENING.match(text):
        thought, text = split_reasoning(text)
        if thought and thought != (reasoning or "").strip():
            reasoning = f"{reasoning}\n\n{thought}" if reasoning else thought
    return ReasoningSplit(reasoning, text)
