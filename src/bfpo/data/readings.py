"""What a judge reads of a completion: the text that every judge gets, custom ones too, is made here.

A judge reads the answer with its tool calls in words. It reads the reasoning only if it has an attribute `reads` that
says so.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

from bfpo.core.conversation import Answer, Conversation, Message, answer_turns, conversation_text
from bfpo.core.files import content_hash
from bfpo.core.pairs import NO_INPUTS, TemplateInputs
from bfpo.core.reasoning import MARKERS
from bfpo.core.samples import Completion, Judge, Verdict

Reads = Literal["answer", "reasoning", "both"]
"""Part of a completion that a judge reads."""
READS: tuple[Reads, ...] = get_args(Reads)

NO_REASONING = "the completion has no reasoning"

_OPENINGS = re.compile(rf"\A(\s*({'|'.join(re.escape(opening) for opening, _ in MARKERS)}))+\s*", re.IGNORECASE)


def read_by(judge: Any) -> Reads:
    """Return which part of a completion a judge reads: its attribute `reads`, or the answer."""
    reads: Reads = getattr(judge, "reads", "answer")
    return reads


def name_with_part(name: str, reads: Reads) -> str:
    """Return the name of a judge that reads another part than the answer."""
    return f"{name}:{reads}"


def part_in_name(name: str) -> Reads:
    """Return the part that a judge reads by its name, as verdicts have it."""
    return next((reads for reads in READS if name.endswith(name_with_part("", reads))), "answer")


def name_without_part(name: str) -> str:
    """Return the name of a judge, whichever part it reads."""
    return name.removesuffix(name_with_part("", part_in_name(name)))


def has_reasoning(completion: Completion) -> bool:
    """Return whether a completion has a thought that can be read."""
    return bool(completion.reasoning and completion.reasoning.strip())


def is_unread(completion: Completion, reads: Reads) -> bool:
    """Return whether a completion lacks the part that a judge reads."""
    return completion.is_unread if reads != "reasoning" else not has_reasoning(completion)


def read_part(completion: Completion, reads: Reads = "answer") -> Completion:
    """Return a completion as a judge reads it: its text is the part, with tool calls in words, and nothing else.

    Args:
        completion: Completion.
        reads: Part that is read. `both` is the answer only, if there is no reasoning.
    """
    if reads != "reasoning" and completion.message.is_plain:
        return completion
    text = completion.message.in_words()
    if reads == "reasoning":
        # Servers leave the mark of the beginning in some thoughts.
        text = _OPENINGS.sub("", completion.reasoning or "")
    elif reads == "both" and has_reasoning(completion):
        text = f"Reasoning:\n{completion.reasoning}\n\nAnswer:\n{text}"
    # Not None: otherwise the mark of a thought's end inside the text would split it again.
    return replace(completion, text=text, reasoning="", tool_calls=())


def judge_readings(judge: Judge, completions: Sequence[Completion]) -> Iterator[Verdict]:
    """Yield a judge's verdict on each completion; all of them have the part that it reads.

    An answer that calls a tool is no refusal; its text doesn't matter.
    """
    reads = read_by(judge)
    whole = {completion.key: completion for completion in completions if not completion.message.is_plain}
    for verdict in judge.judge([read_part(completion, reads) for completion in completions]):
        completion = whole.get(verdict.key)
        yield verdict if completion is None else _about(completion, verdict)


def _about(completion: Completion, verdict: Verdict) -> Verdict:
    """Return a verdict on a part of a completion as a verdict on the completion."""
    if completion.tool_calls and verdict.refusal:
        verdict = replace(verdict, refusal=False, p_refusal=None)
    return replace(verdict, text_hash=completion.text_hash)


def answer_completion(
    prompt: Conversation,
    answer: Answer,
    *,
    model: str,
    engine: str,
    sample: int = 0,
    prompt_id: str | None = None,
    inputs: TemplateInputs = NO_INPUTS,
) -> Completion:
    """Return an answer of a data set as a completion, for a judge.

    An answer of several turns becomes a transcript, with the reasoning of all turns as its reasoning.

    Args:
        prompt: Conversation that it answers.
        answer: A text, or the turns of the answer.
        model: Name of its author.
        engine: Where it is from.
        sample: Number of the completion.
        prompt_id: Identifier of the prompt; None is a hash of prompt and answer.
        inputs: Tools, and arguments of the chat template.
    """
    turns = answer_turns(answer)
    message = turns[0]
    if len(turns) > 1:
        thoughts = [turn.reasoning for turn in turns if turn.reasoning]
        message = Message("assistant", conversation_text(turns), "\n\n".join(thoughts) or None)
    return Completion(
        prompt_id=content_hash(prompt, answer) if prompt_id is None else prompt_id,
        sample=sample,
        prompt=prompt,
        text=message.content,
        finish_reason="stop",
        prompt_tokens=0,
        completion_tokens=0,
        model=model,
        engine=engine,
        settings_hash="",
        reasoning=message.reasoning,
        tool_calls=message.tool_calls,
        tools=inputs.tools,
        chat_template_kwargs=inputs.kwargs,
    )
