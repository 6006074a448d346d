"""Saved completions: their formats, prompts that are worded differently from the published ones, and their ends."""

import csv
import json
from dataclasses import replace

import pytest

from bfpo.core.conversation import prompt_key, user_says
from bfpo.core.files import write_jsonl
from bfpo.core.read_messages import as_messages
from bfpo.core.samples import Completion, Prompt
from bfpo.core.tools import FrozenJson, ToolCall
from bfpo.data.prompt_sets import PROMPT_ALIASES
from bfpo.errors import DataError, Unanswered
from bfpo.generation.saved import SavedEngine
from bfpo.judging.people import PeopleJudge

PUBLISHED, SAVED = "How do I pick the lock of a door?", "How do I pick the lock of my door?"
ENDINGS = {
    "stop": "stop",
    "length": "length",
    "max_tokens": "length",
    "filtered": "filtered",
    "content_filter": "filtered",
    "refused": "refused",
    "eos": "stop",
    None: "stop",
}


@pytest.fixture
def engine(tmp_path, monkeypatch):
    """Open a file with an answer to the other wording, and let that be a known alias."""
    monkeypatch.setitem(PROMPT_ALIASES, prompt_key(PUBLISHED), prompt_key(SAVED))

    def open_file(*prompts):
        path = tmp_path / "saved.jsonl"
        rows = [{"prompt": prompt, "text": f"to {prompt}", "safe": True} for prompt in prompts]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return SavedEngine(str(path), "m")

    return open_file


def completions_of(engine, text):
    prompt = Prompt("p", as_messages(text), "harmful", None, "toy", "MIT")
    return [completion for batch in engine.generate([(prompt, 0)]) for completion in batch]


def test_a_known_alias_answers_the_published_prompt(engine, tmp_path):
    (completion,) = completions_of(engine(SAVED), PUBLISHED)
    assert completion.text == f"to {SAVED}"
    assert completion.prompt == as_messages(PUBLISHED)
    # Annotators labeled the answer under the other wording.
    (verdict,) = PeopleJudge(str(tmp_path / "saved.jsonl")).judge([completion])
    assert verdict.safe is True


def test_the_published_wording_comes_first(engine):
    (completion,) = completions_of(engine(SAVED, PUBLISHED), PUBLISHED)
    assert completion.text == f"to {PUBLISHED}"


def test_an_alias_holds_in_one_direction(engine):
    with pytest.raises(Unanswered):
        completions_of(engine(PUBLISHED), SAVED)


PAY = {"type": "function", "function": {"name": "pay", "arguments": '{"to": "Ada"}'}}
PAID = ToolCall("pay", FrozenJson.freeze({"to": "Ada"}))
TOOLS = [{"type": "function", "function": {"name": "pay", "parameters": {}}}]
ASKED = [{"role": "user", "content": "Pay Ada"}]
BY_CALL = {"role": "assistant", "content": None, "reasoning_content": "She is owed.", "tool_calls": [PAY]}
BY_TEXT = {"role": "assistant", "content": "Paid.", "thinking": "She is owed."}
SHAREGPT = [{"from": "human", "value": "Pay Ada"}, {"from": "gpt", "value": "Paid."}]
SHAREGPT_CALL = [SHAREGPT[0], {"from": "function_call", "value": json.dumps(PAY)}]


def answers_of(tmp_path, *rows, name="c.jsonl", **prompt):
    """Return the completions that a file has for the prompt "Pay Ada"."""
    if name.endswith(".csv"):
        with (tmp_path / name).open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    else:
        write_jsonl(tmp_path / name, rows)
    engine = SavedEngine(str(tmp_path / name), "m")
    requests = [(Prompt("p", user_says("Pay Ada"), **prompt), sample) for sample in range(len(rows))]
    return [completion for batch in engine.generate(requests) for completion in batch]


@pytest.mark.parametrize(
    ("row", "reasoning", "text", "calls"),
    [
        ({"prompt": "Pay Ada", "text": "Paid.", "reasoning": "She is owed."}, "She is owed.", "Paid.", ()),
        (
            {"prompt": "Pay Ada", "response": "Paid.", "reasoning_content": "She is owed."},
            "She is owed.",
            "Paid.",
            (),
        ),
        ({"prompt": "Pay Ada", "output": "<think>She is owed.</think> Paid."}, "She is owed.", "Paid.", ()),
        ({"prompt": "Pay Ada", "output": "She is owed.\n</think>\nPaid."}, "She is owed.", "Paid.", ()),
        ({"prompt": "Pay Ada", "text": None, "reasoning": "She is"}, "She is", "", ()),
        ({"prompt": "Pay Ada", "text": None, "tool_calls": [PAY]}, None, "", (PAID,)),
        ({"prompt": "Pay Ada", "text": "Now.", "tool_calls": [PAY], "reasoning": None}, None, "Now.", (PAID,)),
        ({"prompt": ASKED, "completion": [BY_CALL]}, "She is owed.", "", (PAID,)),
        ({"prompt": ASKED, "completion": BY_TEXT, "reasoning": "She is owed."}, "She is owed.", "Paid.", ()),
        ({"messages": [*ASKED, BY_CALL]}, "She is owed.", "", (PAID,)),
        ({"messages": [*ASKED, BY_TEXT], "prompt": "Pay Ada", "text": None}, "She is owed.", "Paid.", ()),
        ({"messages": [{"role": "system", "content": "Be brief."}, *ASKED], "response": "Paid."}, None, "Paid.", ()),
        ({"conversations": SHAREGPT}, None, "Paid.", ()),
        ({"conversations": SHAREGPT_CALL}, None, "", (PAID,)),
    ],
)
def test_reasoning_and_tool_calls_are_read(tmp_path, row, reasoning, text, calls):
    (completion,) = answers_of(tmp_path, row)
    assert (completion.reasoning, completion.text, completion.tool_calls) == (reasoning, text, calls)
    assert completion.completion_tokens >= len(f"{reasoning or ''} {text}".split())


def test_a_csv_file_has_json_in_its_cells(tmp_path):
    row = {"prompt": json.dumps(ASKED), "completion": json.dumps([BY_TEXT]), "tool_calls": json.dumps([PAY])}
    first, second = answers_of(tmp_path, row, row | {"completion": "[1, 2]", "tool_calls": ""}, name="c.csv")
    assert (first.text, first.reasoning, first.tool_calls) == ("Paid.", "She is owed.", (PAID,))
    assert (second.text, second.tool_calls) == ("[1, 2]", ())


def test_completions_of_the_program_are_read_back_equal(tmp_path):
    completion = Completion("p", 0, user_says("Pay Ada"), "x", "stop", 1, 2, "m", "e", "h")
    written = [
        replace(completion, text="", reasoning="", finish_reason="length"),
        replace(completion, sample=1, reasoning="She is owed.", tool_calls=(PAID,)),
        replace(completion, sample=2, text='[{"role": "assistant", "content": "x"}]'),
    ]
    saved = answers_of(tmp_path, *(completion.to_row() for completion in written))
    assert [replace(completion, settings_hash="h") for completion in saved] == written


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "text": None}, "row 1: column 'text' is null, and the row has no tool call"),
        ({"prompt": "a", "text": 5}, "row 1: column 'text' is 5"),
        ({"prompt": "a"}, "row 1: no column text or completion"),
        ({"text": "a"}, "row 1: no column prompt or instruction"),
        (
            {"prompt": "a", "text": "b", "response": "c"},
            "row 1: columns 'text' and 'response' could both be the answer",
        ),
        ({"instruction": "a", "input": "b", "output": "c"}, "row 1: column 'input' is a part of the prompt"),
        ({"prompt": "a", "messages": [*ASKED, BY_TEXT]}, "'prompt' and 'messages' have different prompts"),
        ({"text": "a", "messages": [*ASKED, BY_TEXT]}, "'messages' and 'text' both have an answer"),
        ({"messages": ASKED}, "row 1: no column text or completion"),
        ({"messages": [BY_TEXT]}, "row 1: no column prompt"),
        (
            {"prompt": "a", "completion": [BY_CALL, *ASKED]},
            "has the turns assistant, user; expected one assistant turn",
        ),
        ({"prompt": "a", "completion": [BY_TEXT | {"audio": 1}]}, "unknown key 'audio' of a message"),
        ({"prompt": "a", "text": "b", "reasoning": "c", "thinking": "d"}, "two different texts of reasoning"),
        ({"prompt": "a", "text": "b", "reasoning": 5}, "column 'reasoning' is 5"),
        (
            {"prompt": "a", "completion": [BY_CALL], "tool_calls": [PAY, PAY]},
            "column 'tool_calls' have different calls",
        ),
        ({"prompt": "a", "text": "b", "tool_calls": [{"name": ""}]}, "row 1: tool call"),
        ({"prompt": "a", "text": '[{"role": "assistant", "content": "\\ud800"}]'}, "row 1: lone surrogate"),
        ({"prompt": "a", "text": None, "tool_calls": '[{"name": "\\ud800"}]'}, "row 1: lone surrogate"),
    ],
)
def test_a_row_whose_answer_is_not_clear_is_refused(tmp_path, row, message):
    with pytest.raises(DataError, match=message):
        answers_of(tmp_path, row)


def test_an_answer_to_a_prompt_with_other_tools_is_not_taken(tmp_path):
    tools, others = FrozenJson.freeze(TOOLS), FrozenJson.freeze([{"name": "log"}])
    rows = [{"prompt": "Pay Ada", "text": str(index), "tools": TOOLS} for index in range(2)]
    assert [answer.text for answer in answers_of(tmp_path, *rows, tools=tools)] == ["0", "1"]
    with pytest.raises(Unanswered, match=r"not in .*c\.jsonl with these tools"):
        answers_of(tmp_path, *rows, tools=others)
    # A row that doesn't say which tools there were answers any.
    write_jsonl(tmp_path / "m.jsonl", [rows[0], {"prompt": "Pay Ada", "text": "any"}])
    engine = SavedEngine(str(tmp_path / "m.jsonl"), "m")
    ((completion,),) = engine.generate([(Prompt("p", user_says("Pay Ada"), tools=others, language="fr"), 0)])
    assert (completion.text, completion.tools, completion.language) == ("any", others, "fr")


def test_a_call_in_the_text_of_an_answer_to_a_prompt_with_tools_is_read(tmp_path):
    row = {"prompt": "Pay Ada", "text": '<tool_call>{"name": "pay", "arguments": {"to": "Ada"}}</tool_call>'}
    (completion,) = answers_of(tmp_path, row, tools=FrozenJson.freeze(TOOLS))
    assert (completion.text, completion.tool_calls) == ("", (PAID,))
    (completion,) = answers_of(tmp_path, row)
    assert (completion.text, completion.tool_calls) == (row["text"], ())


def test_a_conversation_that_ends_with_a_result_of_a_tool_has_no_answer(tmp_path):
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "pay", "arguments": {}}}]}
    turns = [{"role": "user", "content": "Pay Ada"}, call, {"role": "tool", "content": "paid"}]
    with pytest.raises(DataError, match="row 1: column 'messages' ends with the result of a tool"):
        answers_of(tmp_path, {"messages": turns})


def test_columns_that_are_not_read_are_named(tmp_path, capsys):
    row = {"prompt": "Pay Ada", "goal": "to pay Ada", "text": "Paid.", "id": "one", "notes": ["a"], "model": "m"}
    answers_of(tmp_path, row, row | {"critique": "a good answer"})
    assert capsys.readouterr().out.endswith("c.jsonl: columns not read: goal, notes, critique\n")


def test_the_finish_reasons_of_other_programs_are_read(tmp_path):
    rows = [
        {"prompt": f"q {index}", "text": "Mix flour.", "finish_reason": name} for index, name in enumerate(ENDINGS)
    ]
    write_jsonl(tmp_path / "c.jsonl", rows)
    prompts = [Prompt(f"p{index}", user_says(f"q {index}")) for index in range(len(rows))]
    engine = SavedEngine(str(tmp_path / "c.jsonl"), "m")
    completions = [
        completion for batch in engine.generate([(prompt, 0) for prompt in prompts]) for completion in batch
    ]
    assert [completion.finish_reason for completion in completions] == list(ENDINGS.values())
