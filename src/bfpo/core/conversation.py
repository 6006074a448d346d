"""Conversations with tools and reasoning, as chat templates and servers read them."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args
from unicodedata import is_normalized, normalize

from bfpo.core.files import content_hash
from bfpo.core.reasoning import join_reasoning
from bfpo.core.tools import FrozenJson, ToolCall
from bfpo.errors import DataError

Role = Literal["system", "developer", "user", "assistant", "tool"]
ROLES: tuple[Role, ...] = get_args(Role)
# Roles of the last turn of a prompt.
ASKING_ROLES = ("user", "tool")


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation.

    Args:
        role: Role of the speaker.
        content: Text; "" for a turn of tool calls alone.
        reasoning: Thought of the model before its answer; None without one.
        tool_calls: Functions that the model calls.
        tool_call_id: Identifier of the call that a `tool` turn answers.
        name: Name of the speaker, or of the function that a `tool` turn answers for.
    """

    role: Role
    content: str
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        # An empty thought, which a model writes in its mode without reasoning, is none.
        object.__setattr__(self, "reasoning", self.reasoning or None)

    @property
    def is_plain(self) -> bool:
        """Whether the message has a role and a text and nothing else."""
        return self.reasoning is None and not self.tool_calls and self.tool_call_id is None and self.name is None

    @property
    def is_empty(self) -> bool:
        """Whether an assistant says and calls nothing."""
        return not self.content.strip() and not self.tool_calls

    @property
    def as_history(self) -> "Conversation":
        """The message as turns of a longer conversation: without its reasoning, each tool call with an empty result.

        Chat templates leave out the reasoning of earlier turns, and servers refuse a call without a result.
        """
        results = (Message("tool", "(no result)", tool_call_id=call.id, name=call.name) for call in self.tool_calls)
        return (replace(self, reasoning=None), *results)

    def to_row(self) -> dict[str, Any]:
        """Return the message as an object of JSON; keys without a value are left out."""
        optional = {
            "reasoning_content": self.reasoning,
            "tool_calls": [call.to_row() for call in self.tool_calls] or None,
            "tool_call_id": self.tool_call_id,
            "name": self.name,
        }
        return {"role": self.role, "content": self.content} | {
            key: value for key, value in optional.items() if value is not None
        }

    def to_hash(self) -> object:
        """Return what `content_hash` hashes; a plain message is its role and its text."""
        plain: list[object] = [self.role, self.content]
        return plain if self.is_plain else [*plain, self.reasoning, self.tool_calls, self.tool_call_id, self.name]

    def in_words(self) -> str:
        """Return the text and the calls as a text, without the reasoning."""
        return "\n".join(part for part in (self.content, *(call.in_words() for call in self.tool_calls)) if part)

    def texts(self) -> Iterator[str]:
        """Yield every text of the message."""
        yield self.content
        yield from (text for text in (self.reasoning, self.tool_call_id, self.name) if text is not None)
        for call in self.tool_calls:
            yield from (call.name, call.arguments.text, call.id or "")


Conversation = tuple[Message, ...]
Answer = str | Conversation
"""A text, or the turns of an answer if it has reasoning, tool calls or several turns; see `as_answer`."""


def user_says(text: str) -> Conversation:
    """Return the conversation of one user turn."""
    return (Message("user", text),)


def as_answer(answer: Answer) -> Answer:
    """Return an answer in its canonical form: a text if it is one plain turn, else its turns.

    A `<think>` block in front of a text becomes the reasoning of its turn.

    Raises:
        DataError: If turns don't begin and end with an assistant turn.
    """
    if isinstance(answer, str):
        reasoning, content = join_reasoning(None, answer)
        if reasoning is None:
            return answer
        return as_answer((Message("assistant", content, reasoning),))
    if not answer or answer[0].role != "assistant" or answer[-1].role != "assistant":
        roles = ", ".join(message.role for message in answer) or "none"
        raise DataError(f"the turns of an answer are {roles}; expected them to begin and end with an assistant turn")
    return answer[0].content if len(answer) == 1 and answer[0].is_plain else answer


def answer_turns(answer: Answer) -> Conversation:
    """Return the turns of an answer in its canonical form."""
    return (Message("assistant", answer),) if isinstance(answer, str) else answer


def answer_text(answer: Answer) -> str:
    """Return the visible text of an answer: its last turn with tool calls in words, without reasoning."""
    return answer_turns(answer)[-1].in_words()


def in_nfc(answer: Answer) -> Answer:
    """Return a text or a conversation in the canonical composition of Unicode, for comparisons and hashes."""
    if isinstance(answer, str):
        return answer if answer.isascii() else normalize("NFC", answer)
    if all(map(_is_composed, answer)):
        return answer
    return tuple(message if _is_composed(message) else _compose(message) for message in answer)


def _is_composed(message: Message) -> bool:
    texts = (message.content,) if message.is_plain else message.texts()
    return all(text.isascii() or is_normalized("NFC", text) for text in texts)


def _compose(message: Message) -> Message:
    calls = tuple(
        replace(call, arguments=FrozenJson(normalize("NFC", call.arguments.text))) for call in message.tool_calls
    )
    reasoning = None if message.reasoning is None else normalize("NFC", message.reasoning)
    return replace(message, content=normalize("NFC", message.content), reasoning=reasoning, tool_calls=calls)


def last_request(prompt: Conversation) -> str:
    """Return the text of the last user turn."""
    return prompt[last_user_index(prompt)].content


def last_user_index(prompt: Conversation) -> int:
    """Return the index of the last user turn; of the last turn if no user speaks."""
    users = [index for index, message in enumerate(prompt) if message.role == "user"]
    return users[-1] if users else len(prompt) - 1


def prompt_key(text: str) -> str:
    """Return a hash of a prompt's words that ignores case, white space, and how accents are encoded."""
    # Canonical caseless matching of the Unicode Standard (D145): decomposed before the case is folded.
    return content_hash(" ".join(normalize("NFC", normalize("NFD", text).casefold()).split()))


def conversation_key(prompt: Conversation) -> str:
    """Return the key of a conversation; with a single turn, it is the key of the text."""
    return prompt_key(conversation_text(prompt))


def conversation_text(prompt: Conversation) -> str:
    """Return a conversation as text, with the roles if there is more than one turn."""
    if len(prompt) == 1:
        return prompt[0].in_words()
    return "\n".join(f"{message.role}: {message.in_words()}" for message in prompt)
