"""What a model wrote becomes reasoning, answer and tool calls; what only looks like a call stays text."""

import pytest

from bfpo.core.conversation import Message
from bfpo.core.tools import FrozenJson, ToolCall
from bfpo.generation.model_text import parse_model_text

CALL = ToolCall("weather", FrozenJson.freeze({"city": "Oslo"}))
JSON = '{"name": "weather", "arguments": {"city": "Oslo"}}'


@pytest.mark.parametrize(
    ("text", "content", "reasoning"),
    [
        (f"<tool_call>\n{JSON}\n</tool_call>", "", None),
        (f"<think>\nwhy\n</think>\n\nLet me see.\n<tool_call>\n{JSON}\n</tool_call>", "Let me see.", "why"),
        (f"<tool_call>\n{JSON}", "", None),
        (f'[TOOL_CALLS] [{JSON[:-1]}, "id": "a1b2c3d4e"}}]', "", None),
        ('[THINK]why[/THINK][TOOL_CALLS]weather[ARGS]{"city": "Oslo"}', "", "why"),
        ('{"name": "weather", "parameters": {"city": "Oslo"}}', "", None),
        ('<|python_tag|>{"name": "weather", "parameters": {"city": "Oslo"}}', "", None),
        ('{"type": "function", "name": "weather", "parameters": {"city": "Oslo"}}<|eom_id|>', "", None),
        (
            "<|channel|>analysis<|message|>why<|end|><|start|>assistant<|channel|>commentary to=functions.weather "
            '<|constrain|>json<|message|>{"city": "Oslo"}',
            "",
            "why",
        ),
    ],
)
def test_a_call_is_read_in_the_format_of_each_family(text, content, reasoning):
    message = parse_model_text(text, has_tools=True)
    assert [(call.name, call.arguments) for call in message.tool_calls] == [(CALL.name, CALL.arguments)]
    assert (message.content, message.reasoning) == (content, reasoning)


def test_several_calls_are_read_in_their_order():
    other = JSON.replace("Oslo", "Bergen")
    for text in (
        f"<tool_call>{JSON}</tool_call>\n<tool_call>{other}</tool_call>",
        f"[TOOL_CALLS][{JSON}, {other}]",
        '[TOOL_CALLS]weather[ARGS]{"city": "Oslo"}[TOOL_CALLS]weather[ARGS]{"city": "Bergen"}',
    ):
        calls = parse_model_text(text, has_tools=True).tool_calls
        assert [call.arguments.value["city"] for call in calls] == ["Oslo", "Bergen"]


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>not json</tool_call>",
        f"<tool_call>{JSON}</tool_call><tool_call>broken</tool_call>",
        "[TOOL_CALLS] soon",
        "[TOOL_CALLS]",
        '{"city": "Oslo"}',
        '{"name": "weather", "parameters": {"city": "Oslo"}} is how to call it',
        JSON,
    ],
)
def test_what_only_looks_like_a_call_stays_text(text):
    assert parse_model_text(text, has_tools=True) == Message("assistant", text)


def test_there_are_no_calls_without_tools():
    text = f"<tool_call>{JSON}</tool_call>"
    assert parse_model_text(text) == Message("assistant", text)


@pytest.mark.parametrize(
    ("text", "opened", "content", "reasoning"),
    [
        ("why\n</think>\n\nYes.", True, "Yes.", "why"),
        ("why and why", True, "", "why and why"),
        ("Yes.", False, "Yes.", None),
        (
            "<|channel|>analysis<|message|>why<|end|><|start|>assistant<|channel|>final<|message|>Yes.",
            False,
            "Yes.",
            "why",
        ),
        ("<|channel|>analysis<|message|>why and", False, "", "why and"),
        # A text that speaks of channels has none.
        ("The token <|channel|> begins a channel.", False, "The token <|channel|> begins a channel.", None),
    ],
)
def test_reasoning_is_split_off(text, opened, content, reasoning):
    assert parse_model_text(text, opened=opened) == Message("assistant", content, reasoning)


def test_special_tokens_are_removed_from_the_answer():
    assert parse_model_text("Yes.<|pad|>", special_tokens=["<|pad|>"]).content == "Yes."
