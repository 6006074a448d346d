"""What a chat template does with a conversation: probed once, so that nothing it leaves out is trained on or asked.

Templates differ in where they read reasoning (a key of the message, a `<think>` block in the text, or nowhere), in
whether they read texts or lists of parts, and in whether the prompt for generation opens a thought.
"""

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from jinja2.exceptions import TemplateSyntaxError

from bfpo.core.conversation import Conversation, Message, user_says
from bfpo.core.pairs import NO_INPUTS, TemplateInputs
from bfpo.core.reasoning import MARKERS
from bfpo.core.template_errors import TEMPLATE_ERRORS
from bfpo.errors import BfpoError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ReasoningForm = Literal["key", "inline", "opened"]
"""Where a template reads reasoning. `key`: a key of the message, `reasoning_content` or `thinking`; `inline`: a
`<think>` block in the text; `opened`: nowhere, but the prompt for generation opens a thought."""

# Words that no template has, and that no template changes.
_USER, _ANSWER, _THOUGHT = "Quartzlantern", "Velvetharbor", "Copperthicket"


class RenderedAnswer(NamedTuple):
    """Text of a conversation with its answer.

    Args:
        text: The whole text.
        unscored: Characters from the first of a turn's reasoning to that of its answer, which are read and not
            scored, for each turn with such reasoning.
    """

    text: str
    unscored: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class ChatFormat:
    """How the chat template of a tokenizer is used.

    Args:
        tokenizer: Tokenizer.
        template: Template; None for the tokenizer's.
        thinking: What becomes of the reasoning in front of an answer; None for the default, see `TextSection`.

    Raises:
        ModelError: On use, if the template can't be parsed, or leaves out the text of user turns.
    """

    tokenizer: "PreTrainedTokenizerBase"
    template: str | None = None
    thinking: Literal["score", "context", "drop"] | None = None

    @cached_property
    def takes_parts(self) -> bool:
        """Whether the template reads lists of parts, and would leave out a text."""
        is_refused = True
        for parts in (False, True):
            text = self._try([_row(user_says(_USER)[0], None, parts=parts)], add_generation_prompt=True)
            is_refused &= text is None
            # Python writes a list of parts where the template expects a text.
            if text is not None and _USER in text and "'text'" not in text:
                return parts
        if is_refused:
            # A user turn alone: each conversation shows whether it is refused, too.
            return False
        raise ModelError(
            f"{self.tokenizer.name_or_path}: the chat template leaves out the text of user turns; set "
            "`text.chat_template`, or save the tokenizer with another template"
        )

    @cached_property
    def header(self) -> str:
        """Text that the prompt for generation has after the last turn; "" if there is none."""
        rows = [_row(user_says(_USER)[0], None, parts=self.takes_parts)]
        with_header, without = self._try(rows, add_generation_prompt=True) or "", self._try(rows) or ""
        return with_header.removeprefix(without) if with_header.startswith(without) else ""

    @cached_property
    def end_of_answer(self) -> str:
        """Text after the last answer; "" if the template refuses a chat without a system turn."""
        try:
            text = self.render_answer((*user_says(_USER), Message("assistant", _ANSWER))).text
        except BfpoError:
            raise
        except TEMPLATE_ERRORS:
            return ""
        return text.rpartition(_ANSWER)[2]

    @cached_property
    def _developer_role(self) -> str:
        """Role by which the template reads the developer's turn: older ones know only `system`."""
        turns = (Message("developer", _ANSWER), Message("user", _USER))
        text = self._try([_row(turn, None, parts=self.takes_parts) for turn in turns]) or ""
        return "developer" if _ANSWER in text else "system"

    @cached_property
    def marks(self) -> tuple[str, str]:
        """Marks of the beginning and the end of a thought: those in the template or the vocabulary, or `<think>`."""
        template = self.template or str(self.tokenizer.chat_template)
        vocabulary = self.tokenizer.get_added_vocab()
        known = (marks for marks in MARKERS if marks[1] in template or marks[1] in vocabulary)
        return next(known, MARKERS[0])

    @cached_property
    def opened(self) -> str:
        """End of the prompt for generation that opens a thought, with its white space; "" if it opens none."""
        prompt = (
            self._try([_row(user_says(_USER)[0], None, parts=self.takes_parts)], add_generation_prompt=True) or ""
        )
        text = prompt.rstrip()
        opening = next((opening for opening, _ in MARKERS if text.endswith(opening)), None)
        return "" if opening is None else prompt[len(text) - len(opening) :]

    @cached_property
    def reasoning_form(self) -> ReasoningForm | None:
        """Where the template reads the reasoning of the last turn; None if it renders none in any form."""
        answer = Message("assistant", _ANSWER, _THOUGHT)
        forms: tuple[ReasoningForm, ...] = ("key", "inline")
        for form in forms:
            rows = [_row(user_says(_USER)[0], None), _row(answer, form, marks=self.marks)]
            text = self._try([_with_parts(row) for row in rows] if self.takes_parts else rows) or ""
            if -1 < text.find(_THOUGHT) < text.find(_ANSWER):
                return form
        return "opened" if self.opened else None

    @cached_property
    def is_thinking(self) -> bool:
        """Whether the template or the vocabulary knows reasoning, so that the model is likely to reason."""
        if self.reasoning_form in (None, "inline"):
            template = self.template or str(self.tokenizer.chat_template)
            return any(mark in template or mark in self.tokenizer.get_added_vocab() for _, mark in MARKERS)
        return True

    @property
    def reasoning_use(self) -> Literal["score", "context", "drop"]:
        """What becomes of the reasoning in front of an answer."""
        return self.thinking or ("score" if self.is_thinking and self.reasoning_form else "drop")

    def describe_reasoning(self) -> str:
        """Return a line on how reasoning is rendered and used."""
        forms = {
            "key": "the chat template renders it from the message",
            "inline": f"it is written in the text, in {self.marks[0]} and {self.marks[1]}",
            "opened": f"the prompt for generation opens it with {self.marks[0]}",
            None: "the chat template has no place for it",
        }
        uses = {"score": "it is part of the loss", "context": "it is read and not scored", "drop": "it is removed"}
        return f"{forms[self.reasoning_form]}; {uses[self.reasoning_use]} (text.thinking: {self.reasoning_use})"

    def check_reasoning(self) -> None:
        """Check that the template renders reasoning, if it is to be read.

        Raises:
            ModelError: If it doesn't.
        """
        if self.thinking in ("score", "context") and self.reasoning_form is None:
            raise ModelError(
                f"text.thinking is {self.thinking}, but the chat template of {self.tokenizer.name_or_path} renders "
                "no reasoning; set `text.thinking: drop`, or `text.chat_template` to one that does"
            )

    def render_prompt(self, prompt: Conversation, inputs: TemplateInputs = NO_INPUTS) -> str:
        """Return the text of a prompt for generation.

        Raises:
            TemplateError: If the template refuses the conversation.
        """
        return self._apply(prompt, inputs, add_generation_prompt=True)

    def without_dropped_reasoning(self, conversation: Conversation, imitated: Collection[int]) -> Conversation:
        """Return a conversation without the reasoning of turns that are imitated, if reasoning is dropped.

        Args:
            conversation: The conversation.
            imitated: Indices of the turns.
        """
        if self.reasoning_use != "drop":
            return conversation
        return tuple(
            replace(turn, reasoning=None) if turn.reasoning is not None and index in imitated else turn
            for index, turn in enumerate(conversation)
        )

    def render_answer(
        self, conversation: Conversation, inputs: TemplateInputs = NO_INPUTS, imitated: Sequence[int] = ()
    ) -> RenderedAnswer:
        """Return the text of a conversation that ends with an answer.

        Earlier turns are rendered as the template does: most leave out their reasoning.

        Args:
            conversation: The conversation.
            inputs: Tools, and arguments of the template.
            imitated: Indices of the turns that are imitated; the last one always is.

        Raises:
            TemplateError: If the template refuses the conversation.
        """
        *history, last = conversation
        if last.reasoning is not None:
            self.check_reasoning()
        conversation = self.without_dropped_reasoning(conversation, {*imitated, len(history)})
        last = conversation[-1]
        text = self._apply(conversation, inputs)
        if self.opened:
            prompt = self.render_prompt(tuple(history), inputs)
            before = prompt.removesuffix(self.opened)
            if not text.startswith(prompt) and text.startswith(before):
                # What the model is asked to continue begins inside a thought, which the template leaves out.
                thought = f"{last.reasoning}\n" if last.reasoning else ""
                line = "" if prompt.endswith("\n") else "\n"
                text = f"{prompt}{line}{thought}{self._closing}\n\n{text[len(before) :].lstrip()}"
        if self.reasoning_use != "context":
            return RenderedAnswer(text)
        turns = sorted({*imitated, len(history)})
        starts = [_common_length(self.render_prompt(conversation[:turn], inputs), text) for turn in turns]
        ranges = []
        for turn, start, end in zip(turns, starts, [*starts[1:], len(text)], strict=True):
            thought = (conversation[turn].reasoning or "").strip()
            # Templates leave out the reasoning of some earlier turns.
            if thought and thought in text[start:end]:
                ranges.append((start, self._find_answer(text, conversation[turn], start)))
        return RenderedAnswer(text, tuple(ranges))

    def find_omission(
        self, text: str, conversation: Conversation, first_answer: int, inputs: TemplateInputs
    ) -> str | None:
        """Return what a template left out of a conversation's text; None if nothing is missing.

        The reasoning of earlier turns may be missing.

        Args:
            text: Text of the conversation.
            conversation: The conversation.
            first_answer: Index of the first turn of the answer; the number of turns without an answer.
            inputs: Tools, whose names must be in the text.
        """
        rendered = _RenderedText(text)
        for tool in inputs.tools.value if inputs.tools else ():
            name = tool.get("function", tool).get("name")
            if isinstance(name, str) and name not in rendered:
                return "the chat template leaves out the tools"
        for index, message in enumerate(conversation):
            if message.content not in rendered:
                kind = "the text of an answer" if index >= first_answer else f"a {message.role} turn"
                return f"the chat template leaves out {kind}"
            if not all(part in rendered for call in message.tool_calls for part in _leaves(call.to_row())):
                return "the chat template leaves out a tool call"
        last = conversation[-1].reasoning if first_answer < len(conversation) else None
        if last is not None and self.reasoning_use != "drop" and last not in rendered:
            return "the chat template leaves out the reasoning of an answer"
        return None

    def find_unread(self, text: str, conversation: Conversation, inputs: TemplateInputs) -> Iterator[str]:
        """Yield what a template didn't read, without a change of the meaning: arguments, and names of speakers.

        Args:
            text: Text of the conversation.
            conversation: The conversation.
            inputs: Tools, and arguments of the template.
        """
        template = self.template or str(self.tokenizer.chat_template)
        for name in inputs.kwargs.value if inputs.kwargs else ():
            if not re.search(rf"\b{re.escape(name)}\b", template):
                yield f"the chat template doesn't read its argument '{name}'"
        if any(message.name and message.role != "tool" and message.name not in text for message in conversation):
            yield "the chat template leaves out the name of a speaker"

    @property
    def _closing(self) -> str:
        return next(closing for opening, closing in MARKERS if self.opened.startswith(opening))

    def _find_answer(self, text: str, answer: Message, first: int) -> int:
        """Return the index of the answer in a text whose reasoning begins at `first` or later."""
        thought, content = (answer.reasoning or "").strip(), answer.content.strip()
        end = text.find(thought, first) + len(thought)
        if content:
            return text.find(content, end)
        rest = text[end:].lstrip()
        closing = next((mark for _, mark in MARKERS if rest.startswith(mark)), "")
        return len(text) - len(rest.removeprefix(closing).lstrip())

    def _apply(self, conversation: Conversation, inputs: TemplateInputs, **options: Any) -> str:
        # A thought in the text of an earlier turn would be new to a model that doesn't reason.
        is_dropped = self.reasoning_use == "drop" and not self.is_thinking
        form = None if is_dropped else self.reasoning_form
        rows = [_row(message, form, parts=self.takes_parts, marks=self.marks) for message in conversation]
        for row in rows:
            if row["role"] == "developer":
                row["role"] = self._developer_role
        return str(
            self.tokenizer.apply_chat_template(
                rows,
                chat_template=self.template,
                tokenize=False,
                tools=inputs.tools.value if inputs.tools else None,
                **{"add_generation_prompt": False, **options, **(inputs.kwargs.value if inputs.kwargs else {})},
            )
        )

    def _try(self, rows: list[dict[str, Any]], **options: Any) -> str | None:
        """Return the text of a probe; None if the template refuses it."""
        options = {"add_generation_prompt": False, **options}
        try:
            return str(
                self.tokenizer.apply_chat_template(rows, chat_template=self.template, tokenize=False, **options)
            )
        except TemplateSyntaxError as error:
            raise ModelError(f"chat template: line {error.lineno}: {error.message}") from None
        except TEMPLATE_ERRORS:
            return None


def _row(
    message: Message, form: ReasoningForm | None, *, parts: bool = False, marks: tuple[str, str] = MARKERS[0]
) -> dict[str, Any]:
    """Return a message as the template reads it, with its reasoning in the form that it renders."""
    row = message.to_row()
    reasoning = row.pop("reasoning_content", None)
    if reasoning is not None and form == "key":
        # transformers passes it under the other names, too.
        row["reasoning_content"] = reasoning
    elif reasoning is not None and form == "inline":
        row["content"] = f"{marks[0]}\n{reasoning}\n{marks[1]}\n\n{message.content}"
    return _with_parts(row) if parts else row


def _with_parts(row: dict[str, Any]) -> dict[str, Any]:
    return row | {"content": [{"type": "text", "text": row["content"]}]}


def _common_length(first: str, second: str) -> int:
    """Return the length of the common beginning of two texts."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((index for index, (ours, theirs) in pairs if ours != theirs), min(len(first), len(second)))


@dataclass(frozen=True)
class _RenderedText:
    """Text that a template wrote. It contains other texts as they are or inside JSON; white space doesn't count."""

    text: str

    def __contains__(self, text: str) -> bool:
        # Most texts are found as they are; removing white space takes much longer.
        if text.strip() in self.text:
            return True
        return any(_squeeze(form) in self._squeezed for form in (text, json.dumps(text, ensure_ascii=False)[1:-1]))

    @cached_property
    def _squeezed(self) -> str:
        return _squeeze(self.text)


def _squeeze(text: str) -> str:
    return "".join(text.split())


def _leaves(value: object) -> Iterator[str]:
    """Yield the texts of a tool call: its name, and the texts in its arguments."""
    if isinstance(value, Mapping):
        for key, content in value.items():
            if key not in ("type", "id"):
                yield from _leaves(content)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for content in value:
            yield from _leaves(content)
    elif isinstance(value, str):
        yield value
