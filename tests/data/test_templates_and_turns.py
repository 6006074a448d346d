"""What is scored of answers with reasoning, tool calls and several turns, and what a template may not leave out."""

import numpy as np
import pytest

from bfpo.config.recipes import Source, TextSection
from bfpo.core.conversation import Message, user_says
from bfpo.core.pairs import PreferencePair, SafetyLabels, TemplateInputs
from bfpo.core.tools import FrozenJson, ToolCall, as_template_kwargs
from bfpo.data.chat_format import ChatFormat
from bfpo.data.load import SourceReport
from bfpo.data.table import token_ids
from bfpo.data.tokenize import Encoder
from bfpo.errors import DataError, ModelError

START = "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
END = "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
PLAIN = START + "{{ message['content'] }}<|im_end|>" + END
KEY = (
    START
    + "{% if message.KEY %}<think>\n{{ message.KEY }}\n</think>\n\n{% endif %}{{ message['content'] }}<|im_end|>"
    + END
)
# DeepSeek-R1: reasoning is cut off, and the prompt for generation opens it.
OPENED = (
    START
    + "{{ message['content'].split('</think>')[-1] }}<|im_end|>"
    + END.replace("assistant\n", "assistant\n<think>\n")
)
PARTS = START + "{% for part in message['content'] %}{{ part['text'] }}{% endfor %}<|im_end|>" + END
CALLS = (
    START + "{{ message['content'] }}{% for call in message.tool_calls %}<tool_call>{{ call.function | tojson }}"
    "</tool_call>{% endfor %}<|im_end|>" + END
)
TOOLS = "{% for tool in tools or [] %}{{ tool.function.name }} {% endfor %}" + CALLS

CALL = ToolCall("lamp", FrozenJson.freeze({"door": "green box"}))
ASKED = user_says("near which")
INPUTS = TemplateInputs(tools=FrozenJson.freeze([{"type": "function", "function": {"name": "lamp"}}]))


def thoughtful(content="a red box", reasoning="under the lamp", **others):
    return (Message("assistant", content, reasoning, **others),)


def pair(chosen="a red box", rejected="green door", prompt=ASKED, **others):
    return PreferencePair(prompt, chosen, rejected, SafetyLabels(True, False), **others)


def encode(tokenizer, *pairs, template=PLAIN, max_dropped=None, **text):
    report = SourceReport("toy", Source(path="toy.jsonl"), read=len(pairs), taken=len(pairs))
    encoder = Encoder(tokenizer, TextSection(chat_template=template, **text))
    _, examples = encoder.encode(pairs, report)
    if max_dropped is not None:
        report.check_cap(max_dropped)
    counts = {reason.text: count for table in (report.dropped, report.noted) for reason, count in table.items()}
    return examples, counts


def seen(tokenizer, example, side=0):
    """Return what the model reads after the prompt, and the part that is scored."""
    marked = example.completions[side]
    return tokenizer.decode(token_ids(marked)), tokenizer.decode(marked[marked >= 0])


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "inline"])
def test_reasoning_is_scored_read_or_removed_where_the_template_reads_it(tokenizer, key):
    template = PLAIN + "{# <think> </think> #}" if key == "inline" else KEY.replace("KEY", key)
    assert ChatFormat(tokenizer, template).reasoning_form == ("inline" if key == "inline" else "key")
    end = tokenizer.eos_token
    whole = f"<think>\nunder the lamp\n</think>\n\na red box{end}"
    examples = {}
    for thinking in (None, "score", "context", "drop"):
        (examples[thinking],), counts = encode(tokenizer, pair(thoughtful()), template=template, thinking=thinking)
        notes = {"drop": "reasoning left out", "context": "reasoning read, not scored"}
        use = thinking or "score"
        assert counts == {f"{notes.get(use, 'reasoning in the loss')} (text.thinking: {use})": 1}
    assert seen(tokenizer, examples["score"]) == (whole, whole)
    assert seen(tokenizer, examples[None]) == (whole, whole)
    assert seen(tokenizer, examples["context"]) == (whole, f"a red box{end}")
    assert seen(tokenizer, examples["drop"]) == (f"a red box{end}", f"a red box{end}")
    # The other answer has no reasoning and is scored whole.
    assert {seen(tokenizer, example, 1) for example in examples.values()} == {(f"green door{end}",) * 2}


def test_a_template_without_reasoning_drops_it_and_says_so(tokenizer):
    (example,), counts = encode(tokenizer, pair(thoughtful()))
    assert seen(tokenizer, example)[0] == f"a red box{tokenizer.eos_token}"
    assert counts == {"reasoning left out (text.thinking: drop)": 1}


@pytest.mark.parametrize(
    ("thinking", "chosen", "rejected"),
    [
        ("score", "under the lamp\n</think>\n\na red box", "</think>\n\ngreen door"),
        ("drop", "</think>\n\na red box", "</think>\n\ngreen door"),
    ],
)
def test_an_answer_continues_a_prompt_that_opens_the_thought(tokenizer, thinking, chosen, rejected):
    assert ChatFormat(tokenizer, OPENED).reasoning_form == "opened"
    (example,), counts = encode(tokenizer, pair(thoughtful()), template=OPENED, thinking=thinking)
    assert "prompt is not a prefix of the conversation" not in counts
    assert tokenizer.decode(example.prompt_ids).endswith("assistant\n<think>\n")
    assert seen(tokenizer, example, 0)[0] == f"{chosen}{tokenizer.eos_token}"
    assert seen(tokenizer, example, 1)[0] == f"{rejected}{tokenizer.eos_token}"


def test_reasoning_that_no_template_form_renders_is_refused_when_it_is_required(tokenizer):
    stripped = OPENED.replace("<think>\n{% endif %}", "{% endif %}")
    with pytest.raises(
        ModelError, match=r"text.thinking is context, but the chat template of .* renders no reasoning"
    ):
        encode(tokenizer, pair(thoughtful()), template=stripped, thinking="context")


def test_reasoning_of_earlier_turns_is_left_to_the_template_and_that_is_noted(tokenizer):
    asked = (*ASKED, *thoughtful("small lamp", "blue door"), *user_says("and under"))
    _, counts = encode(tokenizer, pair(prompt=asked), template=PLAIN)
    assert counts == {"reasoning of earlier turns left out by the chat template": 1}
    (example,), counts = encode(tokenizer, pair(prompt=asked), template=KEY.replace("KEY", "thinking"))
    assert counts == {}
    assert "<think>\nblue door\n</think>\n\nsmall lamp" in tokenizer.decode(example.prompt_ids)


def test_arguments_and_names_that_the_template_does_not_read_are_noted(tokenizer):
    kwargs = as_template_kwargs({"enable_thinking": False, "add_generation_prompt_": True})
    asked = (Message("user", "small lamp", name="Ada"),)
    template = PLAIN + "{% if enable_thinking %}{% endif %}"
    (_,), counts = encode(tokenizer, pair(prompt=asked, inputs=TemplateInputs(kwargs=kwargs)), template=template)
    assert counts == {
        "the chat template doesn't read its argument 'add_generation_prompt_'": 1,
        "the chat template leaves out the name of a speaker": 1,
    }


@pytest.mark.parametrize(
    ("use", "seen_thoughts", "scored_thoughts"), [("score", 2, 2), ("context", 2, 0), ("drop", 0, 0)]
)
def test_every_thought_of_an_answer_of_several_turns_is_used_as_set(tokenizer, use, seen_thoughts, scored_thoughts):
    turns = (*thoughtful("small lamp", "blue door"), *user_says("and under"), *thoughtful("a red box", "blue door"))
    other = (*thoughtful("large lamp", "blue door"), *user_says("and under"), *thoughtful("a red ball", "blue door"))
    template = KEY.replace("KEY", "reasoning_content")
    (example,), counts = encode(tokenizer, pair(turns, other), template=template, thinking=use)
    whole, scored = seen(tokenizer, example)
    assert (whole.count("blue door"), scored.count("blue door")) == (seen_thoughts, scored_thoughts)
    assert "small lamp" in scored
    assert "a red box" in scored
    assert "and under" not in scored
    notes = {"drop": "reasoning left out", "context": "reasoning read, not scored"}
    assert counts == {f"{notes.get(use, 'reasoning in the loss')} (text.thinking: {use})": 1}


@pytest.mark.parametrize(
    "before", ["", "{% if messages[0]['content'] is string %}{{ raise_exception('parts only') }}{% endif %}"]
)
def test_a_template_of_parts_gets_parts(tokenizer, before):
    (example,), counts = encode(tokenizer, pair(), template=before + PARTS)
    assert counts == {}
    assert "near which" in tokenizer.decode(example.prompt_ids)
    assert seen(tokenizer, example)[0] == f"a red box{tokenizer.eos_token}"


def test_the_tokens_of_a_call_are_scored(tokenizer):
    chosen, rejected = thoughtful("", None, tool_calls=(CALL,)), "I can't."
    (example,), counts = encode(tokenizer, pair(chosen, rejected, inputs=INPUTS), template=TOOLS)
    assert counts == {}
    scored = seen(tokenizer, example)[1]
    assert '"name": "lamp"' in scored
    assert "green box" in scored


@pytest.mark.parametrize(
    ("template", "record", "reason"),
    [
        (PLAIN, {"chosen": thoughtful("", None, tool_calls=(CALL,))}, "the chat template leaves out a tool call"),
        (PLAIN, {"inputs": INPUTS}, "the chat template leaves out the tools"),
        (
            PLAIN.replace("{{ message['content'] }}", "{{ message['content'][:15] }}"),
            {"rejected": "a red box, a green door"},
            None,
        ),
        (
            "{% for m in messages if m.role != 'system' %}{{ m.content }}<|im_end|>{% endfor %}",
            {"prompt": (Message("system", "small"), *user_says("near"))},
            "the chat template leaves out a system turn",
        ),
        (PLAIN.replace("content'] }}", "content'] | replace(' box', '') }}"), {"rejected": "a red"}, None),
    ],
)
def test_what_a_template_leaves_out_drops_the_pair_and_stops_the_run(tokenizer, template, record, reason):
    if reason is None:
        reason = "the chat template leaves out "
    examples, counts = encode(tokenizer, pair(**record), template=template)
    assert examples == []
    assert [text.startswith(reason) for text in counts] == [True]
    with pytest.raises(DataError, match=reason):
        encode(tokenizer, pair(**record), template=template, max_dropped=0.1)


def test_a_template_that_renders_no_text_is_refused(tokenizer):
    with pytest.raises(ModelError, match="the chat template leaves out the text of user turns"):
        encode(tokenizer, pair(), template="{% for message in messages %}{{ message.body }}{% endfor %}")


def test_answers_that_are_equal_after_the_template_are_dropped(tokenizer):
    trimmed = PLAIN.replace("message['content']", "message['content'].split() | join(' ')")
    _, counts = encode(tokenizer, pair("a  red box", "a red box"), template=trimmed)
    assert counts == {"identical answers after the chat template": 1}


def test_prompts_that_generation_never_sees_stop_the_run(tokenizer):
    other = PLAIN.replace("assistant\n{% endif %}", "assistant\nsmall lamp{% endif %}")
    with pytest.raises(DataError, match="in 1 of 1 pairs the chat template renders the prompt for generation"):
        encode(tokenizer, pair(), template=other, max_dropped=0.1)


def trajectory(call=CALL, last="a red box"):
    return (*thoughtful("", None, tool_calls=(call,)), Message("tool", "small lamp"), Message("assistant", last))


def test_every_assistant_turn_of_a_trajectory_is_scored_and_no_result_of_a_tool(tokenizer):
    other = ToolCall("door", CALL.arguments)
    (example,), counts = encode(tokenizer, pair(trajectory(), trajectory(other, "green door")), template=CALLS)
    assert counts == {}
    for side, name, last in ((0, "lamp", "a red box"), (1, "door", "green door")):
        marked = example.completions[side]
        runs = [run for run in np.split(marked, np.flatnonzero(np.diff(marked < 0)) + 1) if run[0] >= 0]
        call, answer = map(tokenizer.decode, runs)
        assert f'"name": "{name}"' in call
        assert call.endswith(tokenizer.eos_token)
        assert answer == f"{last}{tokenizer.eos_token}"
        assert "small lamp" in tokenizer.decode(token_ids(marked))


def test_template_arguments_of_a_row_reach_the_template(tokenizer):
    template = "{% if loud %}small lamp{% endif %}" + PLAIN
    loud = TemplateInputs(kwargs=FrozenJson.freeze({"loud": True}))
    examples, _ = encode(tokenizer, pair(inputs=loud), pair(), template=template)
    assert ["small lamp" in tokenizer.decode(example.prompt_ids) for example in examples] == [True, False]
