"""What is scored of tool calls, reasoning and trajectories through the templates of ten families."""

import copy
from pathlib import Path

import numpy as np
import pytest

from bfpo.config.recipes import Source, TextSection
from bfpo.core.conversation import Message, user_says
from bfpo.core.pairs import PreferencePair, SafetyLabels, TemplateInputs
from bfpo.core.tools import FrozenJson, ToolCall
from bfpo.data.chat_format import ChatFormat
from bfpo.data.load import SourceReport
from bfpo.data.table import token_ids
from bfpo.data.tokenize import Encoder

FOLDER = Path(__file__).parent
TEMPLATES = sorted(path.stem for path in FOLDER.glob("*.jinja"))
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Return the temperature.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "Name."}}},
    },
}
INPUTS = TemplateInputs(tools=FrozenJson.freeze([TOOL]))
CALL = ToolCall("weather", FrozenJson.freeze({"city": "Oslo"}), "call00001")
CALLS = (Message("assistant", "", tool_calls=(CALL,)),)
REASONING = (Message("assistant", "It is cold.", "Oslo lies in the north."),)
LEFT_OUT = {
    "gemma3": "the chat template leaves out the tools",
    "smollm2": "the chat template leaves out the tools",
    "smollm3": "the chat template leaves out a tool call",
    "deepseek_r1_distill": "the chat template leaves out the tools",
}
FORMS = {
    "qwen3": "key",
    "gptoss": "key",
    "magistral": "key",
    "deepseek_r1_distill": "opened",
    # They write a text as it is, so a thought can be written in it; but they know none.
    **dict.fromkeys(("gemma3", "hermes", "llama3", "mistral", "smollm2", "smollm3"), "inline"),
}
THINKING = {"qwen3", "gptoss", "magistral", "deepseek_r1_distill", "smollm3"}


@pytest.fixture
def load(tokenizer):
    def load(name):
        loaded = copy.deepcopy(tokenizer)
        loaded.bos_token = loaded.eos_token
        loaded.add_special_tokens({"additional_special_tokens": ["<|eot_id|>", "<|end|>", "<|call|>"]})
        loaded.chat_template = (FOLDER / f"{name}.jinja").read_text()
        return loaded

    return load


def pair(chosen, rejected="I can't.", prompt="Is it cold?", inputs=INPUTS):
    return PreferencePair(user_says(prompt), chosen, rejected, SafetyLabels(True, True), inputs=inputs)


def encode(tokenizer, record, **text):
    report = SourceReport("toy", Source(path="toy.jsonl"))
    _, examples = Encoder(tokenizer, TextSection(max_length=8000, **text)).encode([record], report)
    return examples, [reason.text for reason in report.dropped], [reason.text for reason in report.noted]


def scored(tokenizer, example, side=0):
    marked = example.completions[side]
    return tokenizer.decode(marked[marked >= 0])


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_tokens_of_a_call_are_scored_or_the_pair_is_refused(load, name):
    tokenizer = load(name)
    examples, dropped, _ = encode(tokenizer, pair(CALLS))
    if name in LEFT_OUT:
        assert (examples, dropped) == ([], [LEFT_OUT[name]])
        return
    assert dropped == []
    text = scored(tokenizer, examples[0])
    assert "weather" in text
    assert "Oslo" in text
    assert "weather" in tokenizer.decode(examples[0].prompt_ids)
    assert "I can't." in scored(tokenizer, examples[0], 1)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("thinking", [None, "score", "context", "drop"])
def test_reasoning_is_where_the_template_reads_it(load, name, thinking):
    tokenizer = load(name)
    chat_format = ChatFormat(tokenizer)
    assert (chat_format.reasoning_form, chat_format.is_thinking) == (FORMS[name], name in THINKING)
    (example,), dropped, noted = encode(tokenizer, pair(REASONING, inputs=TemplateInputs()), thinking=thinking)
    use = thinking or ("score" if name in THINKING else "drop")
    read, text = tokenizer.decode(token_ids(example.completions[0])), scored(tokenizer, example)
    assert ("Oslo" in read, "Oslo" in text) == (use != "drop", use == "score")
    assert "It is cold." in text
    if use == "context":
        assert text.startswith("It is cold.")
    assert dropped == []
    assert ("reasoning left out (text.thinking: drop)" in noted) is (use == "drop")
    if name != "mistral":
        assert "prompt is not a prefix of the conversation" not in noted


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name not in LEFT_OUT])
def test_results_of_tools_are_read_and_not_scored(load, name):
    tokenizer = load(name)
    result = Message("tool", "minus four degrees", tool_call_id="call00001", name="weather")
    answers = [(*CALLS, result, Message("assistant", text)) for text in ("It is cold.", "It is warm.")]
    other = ToolCall("weather", FrozenJson.freeze({"city": "Bergen"}), "call00001")
    answers[1] = (Message("assistant", "", tool_calls=(other,)), *answers[1][1:])
    examples, dropped, _ = encode(tokenizer, pair(*answers))
    if name == "gptoss":  # its turns have ends of their own, which can't be told from the marks inside
        assert dropped == ["the chat template renders earlier turns of an answer differently"]
        return
    (example,) = examples
    assert dropped == []
    for side, city, last in ((0, "Oslo", "It is cold."), (1, "Bergen", "It is warm.")):
        marked = example.completions[side]
        assert "minus four degrees" in tokenizer.decode(token_ids(marked))
        runs = [run for run in np.split(marked, np.flatnonzero(np.diff(marked < 0)) + 1) if run[0] >= 0]
        call, answer = map(tokenizer.decode, runs)
        assert city in call
        assert last in answer
        assert "minus" not in call + answer


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name != "gptoss"])
def test_a_developer_turn_is_a_system_turn_where_the_template_knows_no_other(load, name):
    record = PreferencePair((Message("developer", "Be brief."), *user_says("Is it cold?")), "Yes.", "No.")
    examples, dropped, noted = encode(load(name), record)
    if name == "mistral":  # with an answer, it has no system message
        assert dropped == ["the chat template leaves out a developer turn"]
        return
    (example,) = examples
    assert (dropped, noted) == ([], [])
    assert "Be brief." in load(name).decode(example.prompt_ids)
