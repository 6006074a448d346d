"""Messages: nothing of them is dropped, and what can't be read is refused by name."""

import json
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bfpo.core.conversation import Message, answer_text, as_answer, conversation_key, last_request, user_says
from bfpo.core.files import content_hash
from bfpo.core.pairs import CutAnswers, PreferencePair, SafetyLabels, TemplateInputs
from bfpo.core.read_messages import as_messages
from bfpo.core.reasoning import split_reasoning
from bfpo.core.samples import Completion, Prompt
from bfpo.core.tools import FrozenJson, ToolCall, as_template_kwargs
from bfpo.data.pair_formats import read_pair
from bfpo.data.rows import SourceRow
from bfpo.errors import DataError

WEATHER = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo", "days": 2}}}

texts = st.text(max_size=12)
words = st.text("abcdefgh _-", min_size=1, max_size=8).map(lambda text: f"w{text.strip()}")
values = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | texts,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(words, inner, max_size=2),
    max_leaves=4,
)
objects = st.dictionaries(words, values, max_size=3).map(FrozenJson.freeze)
calls = st.builds(ToolCall, words, objects, st.none() | words)
turns = {
    "system": st.builds(Message, st.sampled_from(["system", "developer"]), texts, name=st.none() | words),
    "user": st.builds(Message, st.just("user"), texts, name=st.none() | words),
    "tool": st.builds(Message, st.just("tool"), texts, tool_call_id=st.none() | words, name=st.none() | words),
    "assistant": st.builds(
        Message,
        st.just("assistant"),
        # A thought in a text is read as reasoning, so a text has none of its own.
        texts.filter(lambda text: split_reasoning(text).reasoning is None),
        st.none() | words,
        st.lists(calls, max_size=2).map(tuple),
    ),
}
asking = turns["user"] | turns["tool"]
histories = st.tuples(
    st.lists(turns["system"], max_size=1), st.lists(st.tuples(asking, turns["assistant"]), max_size=2), asking
).map(lambda parts: (*parts[0], *(turn for exchange in parts[1] for turn in exchange), parts[2]))
answers = st.one_of(
    turns["assistant"].map(lambda turn: (turn,)),
    st.tuples(turns["assistant"], turns["tool"], turns["assistant"]),
).map(as_answer)
inputs = st.builds(
    TemplateInputs,
    st.none() | st.just(FrozenJson.freeze([{"type": "function", "function": {"name": "weather"}}])),
    st.none() | st.just(FrozenJson.freeze({"enable_thinking": False})),
)
labels = st.none() | st.builds(SafetyLabels, st.booleans(), st.booleans())
cuts = st.builds(CutAnswers, st.booleans(), st.booleans())


@settings(max_examples=100)
@given(st.builds(PreferencePair, histories, answers, answers, inputs=inputs, reasoning_labels=labels, cut=cuts))
def test_any_pair_goes_through_its_file_and_comes_back_equal(pair):
    row = json.loads(json.dumps(pair.to_row()))
    again = read_pair(SourceRow(row, "here"))
    # Otherwise the common turns of both answers are read as turns of the prompt.
    if pair.chosen[:1] != pair.rejected[:1]:
        assert (again.prompt, again.chosen, again.rejected) == (pair.prompt, pair.chosen, pair.rejected)
        assert again.row_id == pair.row_id
    assert (again.inputs, again.reasoning_labels, again.cut) == (pair.inputs, pair.reasoning_labels, pair.cut)
    assert pair.swapped().cut == pair.cut[::-1]


@settings(max_examples=100)
@given(histories, turns["assistant"], inputs)
def test_any_prompt_and_completion_go_through_their_files_and_come_back_equal(history, answer, inputs):
    given_inputs = {"tools": inputs.tools, "chat_template_kwargs": inputs.kwargs, "language": "en"}
    prompt = Prompt("p", history, "harmful", **given_inputs)
    completion = Completion(
        "p",
        0,
        history,
        answer.content,
        "stop",
        3,
        4,
        "m",
        "e",
        "h",
        answer.reasoning,
        answer.tool_calls,
        **given_inputs,
    )
    for value in (prompt, completion):
        assert type(value).from_row(json.loads(json.dumps(value.to_row()))) == value
    assert completion.message == answer


@given(histories)
def test_a_conversation_of_plain_turns_has_the_hash_of_earlier_versions(history):
    plain = tuple(Message(turn.role, turn.content) for turn in history)
    assert content_hash(plain) == content_hash([[turn.role, turn.content] for turn in plain])
    pair = PreferencePair(plain, "yes", "no")
    in_nfc = [[turn.role, unicodedata.normalize("NFC", turn.content)] for turn in plain]
    assert pair.row_id == content_hash(in_nfc, "yes", "no")


def test_pairs_that_differ_only_in_a_call_reasoning_or_tools_have_other_ids():
    call = ToolCall.from_row(WEATHER)
    variants = [
        PreferencePair(user_says("a"), "b", "c"),
        PreferencePair(user_says("a"), (Message("assistant", "b", tool_calls=(call,)),), "c"),
        PreferencePair(user_says("a"), (Message("assistant", "b", "thought"),), "c"),
        PreferencePair(user_says("a"), "b", "c", inputs=TemplateInputs(tools=FrozenJson.freeze([WEATHER]))),
    ]
    assert len({pair.row_id for pair in variants}) == 4


def test_a_call_is_read_from_every_published_spelling():
    inner = {"name": "weather", "arguments": {"city": "Oslo", "days": 2}}
    as_text = {"name": "weather", "arguments": json.dumps(inner["arguments"])}
    spellings = [WEATHER, {"function": inner}, inner, {"type": "function", "function": as_text}]
    spellings.append({"name": "weather", "parameters": inner["arguments"]})
    # A table has a key for every call, and null where a call lacks it.
    spellings.append({"function": {**spellings[-1], "arguments": None}, "index": 0})
    spellings.append({**spellings[1]["function"], "index": 0})
    assert len({ToolCall.from_row(spelling) for spelling in spellings}) == 1
    assert ToolCall.from_row(WEATHER).to_row() == WEATHER
    assert ToolCall.from_row(WEATHER).in_words() == "The assistant calls the tool weather with city = Oslo, days = 2."
    # A model can write arguments that aren't JSON: they stay what they are.
    broken = ToolCall.from_row({"name": "weather", "arguments": '{"city": '})
    assert broken.to_row()["function"]["arguments"] == '{"city": '


def test_sharegpt_messages_are_read():
    call = json.dumps({"name": "weather", "arguments": {"city": "Oslo"}})
    speakers = [
        ("system", "Be brief."),
        ("human", "Cold?"),
        ("function_call", call),
        ("observation", "4"),
        ("gpt", "Yes."),
    ]
    messages = as_messages([{"from": speaker, "value": text} for speaker, text in speakers])
    assert [message.role for message in messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert messages[2].tool_calls[0].arguments.value == {"city": "Oslo"}


def test_a_text_of_messages_is_read_as_messages_and_another_text_is_not():
    assert as_messages('[{"role": "user", "content": "Hi"}]') == user_says("Hi")
    for text in ('[{"id": 3}]', "[{", '[{"role"', "[]"):
        assert as_messages(text) == user_says(text)
    # A pair whose prompt is such a text is written as messages, so that it comes back as it was.
    prompt = (Message("user", '[{"role": "user", "content": "Hi"}]'),)
    row = PreferencePair(prompt, "a", "b").to_row()
    assert read_pair(SourceRow(row, "here")).prompt == prompt
    # So is one with such an answer.
    pair = PreferencePair(user_says("Show me a chat."), prompt[0].content, "No.")
    again = read_pair(SourceRow(json.loads(json.dumps(pair.to_row())), "here"))
    assert (again.answers, again.row_id) == (pair.answers, pair.row_id)


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        ({"role": "user", "content": "a", "weight": 1}, "unknown key 'weight' of a message"),
        ({"role": "user", "content": "a", "weight": 1}, "ignore_message_keys: \\[weight\\]"),
        ({"role": "assistant", "content": None}, "expected {'role': .., 'content': text}"),
        ({"role": "user", "content": [{"type": "image"}]}, "only text is supported, not images"),
        ({"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}, "only text is supported"),
        ({"role": "user", "content": "a", "tool_calls": [WEATHER]}, "only assistant turns can"),
        ({"role": "user", "content": "a", "reasoning_content": "b"}, "only assistant turns can"),
        ({"role": "assistant", "content": "a", "tool_calls": "b"}, "tool_calls' is 'b'; expected a list"),
        ({"role": "assistant", "content": "a", "tool_calls": [{"function": {}}]}, "tool call {'function': {}}"),
        ({"role": "assistant", "content": "a", "tool_calls": [{**WEATHER, "cache": 1}]}, "unknown key 'cache'"),
        ({"role": "assistant", "content": "a", "tool_calls": [{**WEATHER, "type": "code"}]}, "only functions can"),
        (
            {"role": "assistant", "tool_calls": [{"name": "a", "arguments": {"b": 1}, "parameters": {"c": 2}}]},
            "it has 'arguments' and 'parameters'; keep one",
        ),
        ({"role": "assistant", "content": "a", "reasoning_content": "b", "thinking": "c"}, "two different texts"),
        ({"role": "assistant", "content": "a", "reasoning_content": 3}, "reasoning_content is 3; expected a string"),
        ({"role": "robot", "content": "a"}, "role is 'robot'"),
        ({"from": "robot", "value": "a"}, "from is 'robot'; expected system, human"),
        ({"from": "human", "value": "a", "content": "b"}, "has 'value' and 'content'"),
        (
            {"role": "user", "content": [{"type": "text", "text": "a", "image": "b.png"}]},
            "unknown key 'image' of a part",
        ),
        ({"role": "user", "content": [{"text": "a", "image_url": "b.png"}]}, "ignore_message_keys: \\[image_url\\]"),
        ({"role": "user", "content": [{"type": "thinking", "thinking": "a"}, "b"]}, "only assistant turns can"),
        ({"role": "assistant", "content": [{"type": "tool_use", "name": "f"}]}, "calls belong in `tool_calls`"),
        (
            {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"a": 1}, "parameters": {"b": 1}}]},
            "has 'arguments' and 'parameters'; keep one",
        ),
        ("a", "turn 'a'; expected"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(turn, message):
    with pytest.raises(DataError, match=message):
        as_messages([turn])


def test_ignored_keys_are_left_out_and_null_keys_are_no_keys():
    turn = {"role": "user", "content": "a", "weight": 1, "name": None, "tool_calls": None, "loss": None}
    assert as_messages([turn], ignore=["weight"]) == user_says("a")


def test_a_thought_that_is_in_a_key_and_in_the_text_is_read_once():
    turn = {"role": "assistant", "content": "<think>\nWhy.\n</think>\n\nYes.", "reasoning_content": "Why.\n"}
    assert as_messages([turn]) == (Message("assistant", "Yes.", "Why.\n"),)
    # Another thought in the text is kept behind the first.
    other = as_messages([turn | {"reasoning_content": "Because."}])
    assert other == (Message("assistant", "Yes.", "Because.\n\nWhy."),)


@pytest.mark.parametrize("name", ["tools", "tokenize", "continue_final_message", "return_dict"])
def test_arguments_that_are_not_the_rows_to_set_are_refused(name):
    with pytest.raises(DataError, match=f"sets '{name}', which is not an argument of the template"):
        as_template_kwargs({name: True})


def test_an_empty_thought_is_none():
    empty = "<think>\n\n</think>\n\nYes."
    assert as_answer(empty) == "Yes."
    assert as_messages([{"role": "assistant", "content": empty}]) == (Message("assistant", "Yes."),)
    assert as_messages([{"role": "assistant", "content": "Yes.", "reasoning_content": ""}])[0].is_plain
    completion = Completion("p", 0, user_says("1?"), "<think></think>", "length", 1, 1, "m", "e", "h")
    assert completion.lacks_answer


def test_text_parts_are_joined():
    parts = [{"type": "text", "text": "red "}, {"type": "text", "text": "box"}]
    assert as_messages([{"role": "user", "content": parts}]) == user_says("red box")


@pytest.mark.parametrize(
    ("text", "opened", "expected"),
    [
        ("<think>\nwhy\n</think>\n\nIt is 1.", False, ("why", "It is 1.")),
        ("\n[THINK]why[/THINK]It is 1.", False, ("why", "It is 1.")),
        ("◁think▷why◁/think▷It is 1.", False, ("why", "It is 1.")),
        ("<think>\n\n</think>\n\nIt is 1.", False, ("", "It is 1.")),
        ("why\n</think>\n\nIt is 1.", False, ("why", "It is 1.")),
        ("why</think> It is 1.", True, ("why", "It is 1.")),
        ("<think>why and why", False, ("why and why", "")),
        ("<THINK>why</Think>It is 1.", False, ("why", "It is 1.")),
        ("<thought>why</thought>It is 1.", False, ("why", "It is 1.")),
        ("<reasoning>why</reasoning>\nIt is 1.", False, ("why", "It is 1.")),
        ("<|START_THINKING|>why<|END_THINKING|>It is 1.", False, ("why", "It is 1.")),
        ("<|begin_of_thought|>\nwhy\n<|end_of_thought|>\nIt is 1.", False, ("why", "It is 1.")),
        # Without a beginning and without a line of its own, but after a sentence.
        ("I can't help.</think>It is 1.", False, ("I can't help.", "It is 1.")),
        # Letters that are equal to ASCII only without case.
        ("<rea\u017foning>why</reasoning>It is 1.", False, ("why", "It is 1.")),
        ("why and why", True, ("why and why", "")),
        ("It is 1.", False, (None, "It is 1.")),
        # An answer that speaks of the marks has no thought.
        ("Close it with </think> and go on.", False, (None, "Close it with </think> and go on.")),
        ("Write <think>\na\n</think>\nhere.", False, (None, "Write <think>\na\n</think>\nhere.")),
        (" It is 1. ", False, (None, " It is 1. ")),
    ],
)
def test_a_thought_is_split_off_the_answer(text, opened, expected):
    assert split_reasoning(text, opened=opened) == expected


@pytest.mark.parametrize(
    ("content", "reasoning", "expected"),
    [
        ("<think>why</think>Yes.", "why", "why"),
        ("<think>why</think>Yes.", "because", "because\n\nwhy"),
        ("<think>why</think><think>and</think>Yes.", None, "why\n\nand"),
        ([{"type": "thinking", "thinking": "why"}, {"type": "text", "text": "Yes."}], None, "why"),
        (
            [{"type": "thinking", "thinking": [{"type": "text", "text": "why"}], "closed": True}, {"text": "Yes."}],
            None,
            "why",
        ),
    ],
)
def test_no_thought_stays_in_the_text_of_a_turn(content, reasoning, expected):
    turn = {"role": "assistant", "content": content, "reasoning_content": reasoning}
    assert as_messages([turn]) == (Message("assistant", "Yes.", expected),)


def test_the_compositions_of_a_text_have_one_id():
    call = ToolCall("pay", FrozenJson.freeze({"to": "Zo\u00eb"}))
    pair = PreferencePair(user_says("caf\u00e9"), "d\u00e9j\u00e0", (Message("assistant", "", "\u00e9", (call,)),))
    other_call = ToolCall("pay", FrozenJson.freeze({"to": "Zoe\u0308"}))
    other = PreferencePair(
        user_says("cafe\u0301"), "de\u0301ja\u0300", (Message("assistant", "", "e\u0301", (other_call,)),)
    )
    assert pair != other
    assert pair.row_id == other.row_id


def test_a_text_with_a_thought_is_an_answer_with_reasoning_everywhere():
    turn = Message("assistant", "It is 1.", "why")
    text = "<think>why</think>It is 1."
    assert PreferencePair(user_says("1?"), text, "2").chosen == (turn,)
    assert as_messages([{"role": "assistant", "content": text}]) == (turn,)
    completion = Completion("p", 0, user_says("1?"), text, "stop", 1, 1, "m", "e", "h")
    assert (completion.text, completion.reasoning) == ("It is 1.", "why")


@pytest.mark.parametrize(
    ("text", "ending", "lacks_answer", "is_blocked"),
    [
        ("<think>why and why", "length", True, False),
        ("<think>why</think>", "stop", True, False),
        ("<think>why</think>Yes.", "stop", False, False),
        ("", "stop", False, False),
        ("", "filtered", False, True),
        ("<think>why", "filtered", False, True),
    ],
)
def test_a_thought_without_an_answer_is_no_answer(text, ending, lacks_answer, is_blocked):
    completion = Completion("p", 0, user_says("1?"), text, ending, 1, 1, "m", "e", "h")
    assert (completion.lacks_answer, completion.is_blocked) == (lacks_answer, is_blocked)
    assert completion.is_unread is (lacks_answer or is_blocked)


def test_the_request_is_the_last_user_turn():
    prompt = (Message("user", "Cold?"), Message("assistant", "", tool_calls=(ToolCall.from_row(WEATHER),)))
    prompt = (*prompt, Message("tool", "4 C", name="weather"))
    assert last_request(prompt) == "Cold?"
    assert answer_text((Message("assistant", "See:", "why", (ToolCall.from_row(WEATHER),)),)).startswith("See:\nThe ")


def test_prompts_are_compared_without_case_white_space_and_composition():
    assert conversation_key(user_says("Le  CAFÉ")) == conversation_key(user_says("le cafe\u0301"))
