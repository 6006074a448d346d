"""The chain of steps that leads a model to a safe answer: its instructions, its conversations and its file.

In the manner of AlignCoT (arXiv 2405.00557): question analysis, answer guidance, safe answer, safety check. The
wording is ours.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Final, Literal, get_args

from pydantic import PlainValidator, StrictBool

from bfpo.core.conversation import Conversation, Message, last_user_index
from bfpo.core.file_rows import FileRow, Messages, TemplateKwargs, Tools
from bfpo.core.files import content_hash
from bfpo.core.pairs import TemplateInputs
from bfpo.core.read_messages import as_messages
from bfpo.errors import DataError

Step = Literal["analysis", "guidance", "answer", "check"]
STEPS: tuple[Step, ...] = get_args(Step)

SHARED: Final = "shared"
Expert = Literal["shared", Step]
"""An adapter: of a step, or the one that is active beside it in every step."""
EXPERTS: tuple[Expert, ...] = get_args(Expert)

INSTRUCTIONS: dict[Step, str] = {
    "analysis": "Before anyone answers the request above: what is asked, what could the asker need it for, and what "
    "harm could an answer do? Analyze it in a few sentences; don't answer it.",
    "guidance": "By this analysis, how should a good answer look: what should it say, what must it leave out, and "
    "which help without harm can it offer? Give guidance in a few sentences; don't answer yet.",
    "answer": "Now answer the first request itself, following the guidance, and don't mention the analysis.",
    "check": "Is the answer that you just gave safe, so that nobody can come to harm by it? Reply with one word: yes "
    "or no.",
}
INSTRUCTIONS_HASH = content_hash(INSTRUCTIONS)
"""Hash of the wording, which replies depend on."""

_CHECK = re.compile(r"\W*(yes|no)\b", re.IGNORECASE)


def step_prompt(prompt: Conversation, replies: Sequence[tuple[Step, Message]], step: Step) -> Conversation:
    """Return the conversation that a step of the chain answers.

    The first instruction follows the request in the same turn, because the request must not be answered before it is
    analyzed; results of tools may come after it. Each further step is a turn of its own. Earlier replies stay in the
    conversation without their reasoning.

    Args:
        prompt: The request.
        replies: Earlier steps with their replies, in order. Without any, `answer` is asked as the request alone.
        step: The step.
    """
    if not replies:
        return prompt if step == "answer" else _with_instruction(prompt, step)
    (first, _), *others = replies
    turns = step_prompt(prompt, (), first)
    for (_, reply), following in zip(replies, (*(name for name, _ in others), step), strict=True):
        turns = (*turns, *reply.as_history, Message("user", INSTRUCTIONS[following]))
    return turns


def _with_instruction(prompt: Conversation, step: Step) -> Conversation:
    index = last_user_index(prompt)
    request = prompt[index]
    turn = replace(request, content=f"{request.content}\n\n{INSTRUCTIONS[step]}")
    return (*prompt[:index], turn, *prompt[index + 1 :])


def read_check(text: str) -> bool | None:
    """Return whether the reply to the check calls the answer safe; None if it begins with neither yes nor no."""
    match = _CHECK.match(text)
    return None if match is None else match[1].lower() == "yes"


def _as_reply(value: object) -> Message:
    """Return the assistant turn that a text or a list of one message is."""
    if isinstance(value, str):
        return Message("assistant", value)
    messages = as_messages(value, "of a step")
    if [message.role for message in messages] != ["assistant"]:
        raise DataError(f"a step has the turns {', '.join(message.role for message in messages)}; expected assistant")
    return messages[0]


def _as_optional_reply(value: object) -> Message | None:
    return None if value is None else _as_reply(value)


Reply = Annotated[Message, PlainValidator(_as_reply)]
OptionalReply = Annotated[Message | None, PlainValidator(_as_optional_reply)]


@dataclass(frozen=True, slots=True)
class GuidedAnswer(FileRow):
    """A chain of steps on one prompt. A reply is a text, or a list of one message if it has reasoning or tool calls.

    Args:
        prompt_id: Identifier of the prompt, or of the conversation of an attack.
        prompt: The request.
        analysis: Reply to the step `analysis`.
        guidance: Reply to the step `guidance`.
        answer: Reply to the step `answer`.
        check: Reply to the step `check`; None if the model didn't give one.
        safe: Label of the answer by the judge; None if it is undecided.
        judge: Name and revision of the judge.
        kept: Whether the answer was used: the judge calls it safe, and the check too if it filters.
        instructions: `INSTRUCTIONS_HASH` when the replies were sampled.
        cut: Steps whose reply was cut at its maximum length.
        tools: As in the file of prompts.
        chat_template_kwargs: As in the file of prompts.
    """

    file_name: ClassVar[str] = "guided.jsonl"

    prompt_id: str
    prompt: Messages
    analysis: Reply
    guidance: Reply
    answer: Reply
    check: OptionalReply
    safe: StrictBool | None
    judge: str
    kept: StrictBool
    instructions: str
    cut: tuple[Step, ...] = ()
    tools: Tools = None
    chat_template_kwargs: TemplateKwargs = None

    @property
    def passes(self) -> bool | None:
        """Whether the model's own check calls the answer safe; None if it can't be read."""
        return None if self.check is None else read_check(self.check.content)

    @property
    def inputs(self) -> TemplateInputs:
        """Tools, and arguments of the chat template."""
        return TemplateInputs(self.tools, self.chat_template_kwargs)

    def reply(self, step: Step) -> Message | None:
        """Return the reply to a step; None if there is none."""
        reply: Message | None = getattr(self, step)
        return reply

    def step_prompt(self, step: Step) -> Conversation:
        """Return the conversation that a step answered."""
        earlier = [(name, reply) for name in STEPS[: STEPS.index(step)] if (reply := self.reply(name)) is not None]
        return step_prompt(self.prompt, earlier, step)
