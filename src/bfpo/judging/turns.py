"""Turns of a prompt in roles that the chat templates of judges accept."""

from bfpo.core.conversation import Conversation, Message

_TO_USER = ("tool", "developer")


def spoken_turns(prompt: Conversation) -> list[tuple[str, str]]:
    """Return role and text of the turns of a prompt, with tool calls in words.

    Templates of judges accept users, assistants and mostly a system message. Results of tools and messages of
    developers are part of the user's turn beside them.
    """
    turns: list[tuple[str, str]] = []
    was_joined = False
    for message in prompt:
        joins = message.role in _TO_USER
        text = _tool_result(message) if message.role == "tool" else message.in_words()
        role = "user" if joins else message.role
        # Two turns of users stay two: a template may refuse them.
        if turns and role == turns[-1][0] == "user" and (joins or was_joined):
            turns[-1] = ("user", f"{turns[-1][1]}\n\n{text}")
        else:
            turns.append((role, text))
        was_joined = joins
    return turns


def _tool_result(message: Message) -> str:
    name = f" {message.name}" if message.name else ""
    return f"Result of the tool{name}: {message.content}"
