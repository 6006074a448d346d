"""Suites of whole conversations from a file: system prompts, tools and languages go through the evaluation."""

import json
from pathlib import Path

import pytest
import yaml

from bfpo.config.loading import check_recipe
from bfpo.core.read_messages import as_messages
from bfpo.data.stages import read_completions, read_prompt_file
from bfpo.errors import DataError
from bfpo.evaluation.pipeline import run_eval
from bfpo.evaluation.recipe import EvalRecipe
from bfpo.generation.dialogues import read_turns
from bfpo.report.html import write_report

from .conftest import Counting

TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}]
CALL = {"type": "function", "id": "c1", "function": {"name": "look", "arguments": {"box": 3}}}
CHAT = [
    {"role": "system", "content": "You have a shed."},
    {"role": "user", "content": "Hello."},
    {"role": "assistant", "content": "Good day."},
    {"role": "user", "content": "What is in box 3?"},
]
LOOKED = [
    {"role": "user", "content": "Look into box 3."},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "a rope", "tool_call_id": "c1"},
]
ROWS = [
    {"prompt": CHAT, "kind": "harmful", "language": "en", "category": "shed"},
    {"prompt": "ما هذا الصندوق؟", "kind": "harmful", "language": "ar", "category": "shed"},
    {
        "prompt": LOOKED,
        "kind": "harmful",
        "language": "en",
        "tools": TOOLS,
        "chat_template_kwargs": {"enable_thinking": False},
    },
    {"messages": CHAT[1:2], "kind": "lookalike", "language": "en"},
    # The same conversation with other tools is another prompt.
    {"prompt": LOOKED, "kind": "harmful", "language": "en"},
]
SUITE = {
    "title": "Sheds",
    "tasks": [
        {"name": "bad", "source": "file", "path": "sheds.jsonl", "only": "harmful"},
        {"name": "fine", "source": "file", "path": "sheds.jsonl", "only": "lookalike"},
    ],
}


@pytest.fixture
def sheds(toy):
    Path("sheds.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS))
    Path("sheds.yaml").write_text(yaml.safe_dump(SUITE))
    toy.requests = []

    def answer(prompt, sample):
        toy.requests.append(prompt)
        return "a gun" if prompt.tools else "a box"

    toy.engines["m"] = Counting(answer, name="m")

    def evaluate(suites=("sheds.yaml",), **changes):
        content = toy.recipe("m", suites=list(suites)) | changes
        return run_eval(check_recipe(content, EvalRecipe, "recipe"))

    toy.evaluate = evaluate
    return toy


def test_conversations_reach_the_model_and_the_files_whole(sheds):
    results = sheds.evaluate()
    expected = [as_messages(row.get("prompt") or row["messages"]) for row in ROWS]
    by_prompt = sorted(expected, key=str)
    assert sorted((prompt.prompt for prompt in sheds.requests), key=str) == by_prompt
    assert sorted((prompt.prompt for prompt in read_prompt_file("out/m/prompts.jsonl")), key=str) == by_prompt
    completions = read_completions(Path("out/m/completions.jsonl"))
    with_tools = [completion for completion in completions if completion.tools is not None]
    assert [(completion.tools.value, completion.chat_template_kwargs.value) for completion in with_tools] == [
        (TOOLS, {"enable_thinking": False})
    ]
    assert sorted(completion.language for completion in completions) == ["ar", "en", "en", "en", "en"]
    safety = {
        (row.language, row.task): row.value
        for row in results.languages
        if (row.metric, row.judge) == ("safety", "one")
    }
    assert safety[("ar", "harmful")] == 1
    assert safety[("en", "harmful")] == pytest.approx(2 / 3)
    calls = sheds.engines["m"].calls
    assert sheds.evaluate().metrics == results.metrics
    assert sheds.engines["m"].calls == calls


def test_they_are_attacked_and_shown_whole(sheds):
    sheds.evaluate(["sheds.yaml", {"suite": "sheds.yaml", "attack": "crescendo"}])
    (folder,) = Path("out/m").glob("attack-crescendo@*")
    turns = read_turns(folder)
    first = next(turn.completion for turn in turns if turn.completion.prompt[0].role == "system")
    assert first.prompt[:3] == as_messages(CHAT)[:3]
    looked = [turn for turn in turns if turn.completion.tools is not None]
    assert looked[-1].completion.prompt[-3:] == as_messages(LOOKED)
    page = write_report(Path("page"), [Path("out/m")]).read_text()
    assert "<b>system</b>" in page
    assert "You have a shed." in page
    assert 'lang="ar"' in page


def test_other_tools_under_the_same_ids_are_other_prompts(sheds):
    sheds.evaluate()
    path = Path("out/m/completions.jsonl")
    path.write_text(path.read_text().replace('"name": "look", "parameters"', '"name": "peek", "parameters"'))
    with pytest.raises(DataError, match="answers another prompt with this id"):
        sheds.evaluate()
