"""Stages that are killed, called again, or that get files of another run."""

import json
from dataclasses import fields, replace

import pytest

from bfpo.core.conversation import Message, user_says
from bfpo.core.files import append_jsonl, read_repaired_jsonl, write_jsonl
from bfpo.core.samples import Completion, Prompt, Sampling, Verdict, prompt_id
from bfpo.core.tools import FrozenJson
from bfpo.data.stages import (
    find_unjudged,
    generate_completions,
    judge_completions,
    read_completions,
    read_prompt_file,
    read_verdicts,
)
from bfpo.errors import DataError
from bfpo.generation.scripted import ScriptedEngine

PROMPTS = [Prompt(f"p{i}", user_says(f"question {i}")) for i in range(10)]


class Counting(ScriptedEngine):
    """Records what it generates, and stops after some batches."""

    def __init__(self, fail_after=None, **options):
        super().__init__(lambda prompt, sample: f"{prompt.prompt_id}/{sample}", batch=3, **options)
        self.generated, self.fail_after = [], fail_after

    def generate(self, requests):
        for number, batch in enumerate(super().generate(requests)):
            if number == self.fail_after:
                raise KeyboardInterrupt
            self.generated += [completion.key for completion in batch]
            yield batch


class Length:
    """Judges short answers as safe."""

    name = "length"

    def __init__(self, revision="1"):
        self.revision, self.judged = revision, 0

    def judge(self, completions):
        self.judged += len(completions)
        return [Verdict.on(completion, self, safe=len(completion.text) < 5) for completion in completions]


def test_a_killed_stage_resumes_and_repeats_nothing(tmp_path):
    path = tmp_path / "completions.jsonl"
    killed = Counting(fail_after=2)
    with pytest.raises(KeyboardInterrupt):
        generate_completions(killed, PROMPTS, path)
    assert not path.exists()
    with (tmp_path / "completions.jsonl.unfinished").open("a") as file:
        file.write('{"prompt_id": "p9", "sam')
    second = Counting()
    completions = generate_completions(second, PROMPTS, path)
    assert [completion.text for completion in completions] == [f"p{i}/0" for i in range(10)]
    assert sorted(killed.generated + second.generated) == [(f"p{i}", 0) for i in range(10)]
    assert [file.name for file in tmp_path.iterdir()] == ["completions.jsonl"]
    assert read_completions(path) == completions


def test_existing_completions_are_reused_and_more_samples_are_added(tmp_path):
    path = tmp_path / "completions.jsonl"
    generate_completions(Counting(), PROMPTS, path)
    before = path.read_bytes()
    again = Counting()
    generate_completions(again, PROMPTS, path)
    assert again.generated == []
    assert path.read_bytes() == before
    more = Counting()
    completions = generate_completions(more, PROMPTS, path, samples=3)
    assert len(completions) == 30
    assert {sample for _, sample in more.generated} == {1, 2}
    # A run with fewer samples keeps the others in the file.
    assert len(generate_completions(Counting(), PROMPTS[:2], path)) == 2
    assert len(read_completions(path)) == 30


def test_completions_of_another_model_or_prompt_are_refused(tmp_path):
    path = tmp_path / "completions.jsonl"
    generate_completions(Counting(), PROMPTS, path)
    with pytest.raises(DataError, match="another model or other settings"):
        generate_completions(Counting(name="other"), PROMPTS, path)
    tools = FrozenJson.freeze([{"type": "function", "function": {"name": "wire"}}])
    with pytest.raises(DataError, match="answers another prompt with this id"):
        generate_completions(Counting(), [replace(PROMPTS[0], tools=tools)], path)
    with pytest.raises(DataError, match="answers another prompt with this id"):
        generate_completions(Counting(), [Prompt("p0", user_says("something else"))], path)


def test_an_engine_that_loses_a_prompt_is_an_error(tmp_path):
    class Forgetful(ScriptedEngine):
        def generate(self, requests):
            for batch in super().generate(requests):
                yield batch[1:]

    with pytest.raises(DataError, match="2 of 10 were not made, the first is \\('p0', 0\\)"):
        generate_completions(Forgetful(lambda prompt, sample: "x"), PROMPTS, tmp_path / "c.jsonl")


def test_verdicts_are_made_once_and_never_on_another_text(tmp_path):
    completions = generate_completions(Counting(), PROMPTS, tmp_path / "completions.jsonl", samples=20)
    path, judge = tmp_path / "verdicts.jsonl", Length()
    verdicts = judge_completions(judge, completions, path)
    assert len(verdicts) == judge.judged == 200
    assert [verdict.safe for verdict in verdicts] == [len(completion.text) < 5 for completion in completions]
    judge_completions(judge, completions, path)
    assert judge.judged == 200
    assert read_verdicts(path) == verdicts
    with pytest.raises(DataError, match="has verdicts of length@1, this is length@2"):
        judge_completions(Length("2"), completions, path)
    other = ScriptedEngine(lambda prompt, sample: "new").generate([(PROMPTS[0], 0)])
    with pytest.raises(DataError, match="is about another text"):
        judge_completions(judge, next(iter(other)), path)


def test_a_file_that_was_filled_in_parts_ends_in_the_order_of_its_input(tmp_path):
    completions = generate_completions(Counting(), PROMPTS, tmp_path / "completions.jsonl")
    path = tmp_path / "verdicts.jsonl"
    judge_completions(Length(), completions[6:], path)
    judge_completions(Length(), completions[:2], path)
    judge_completions(Length(), completions[2:6], path)
    assert [verdict.prompt_id for verdict in read_verdicts(path)] != [prompt.prompt_id for prompt in PROMPTS]
    judge = Length()
    judge_completions(judge, completions, path)
    assert judge.judged == 0
    assert [verdict.prompt_id for verdict in read_verdicts(path)] == [prompt.prompt_id for prompt in PROMPTS]
    before = path.stat().st_mtime_ns
    judge_completions(judge, completions, path)
    judge_completions(judge, completions[6:], path)
    assert path.stat().st_mtime_ns == before, "nothing to write"


def test_damage_before_the_last_line_is_an_error(tmp_path):
    path = tmp_path / "rows.jsonl"
    append_jsonl(path, [{"a": 1}, {"a": 2}])
    path.write_text(path.read_text() + '{"a": ')
    assert read_repaired_jsonl(path) == [{"a": 1}, {"a": 2}]
    assert path.read_text().endswith('{"a": 2}\n')
    path.write_text('{"a": 1}\n{"a": 2}')
    assert read_repaired_jsonl(path) == [{"a": 1}, {"a": 2}], "an editor took the last line's end"
    assert path.read_text() == '{"a": 1}\n{"a": 2}\n'
    path.write_text('{"a": 1}\n{"a\n{"a": 3}\n')
    with pytest.raises(DataError, match="row 2: not JSON"):
        read_repaired_jsonl(path)
    path.write_text("[1]\n")
    with pytest.raises(DataError, match="list, not an object"):
        read_repaired_jsonl(path)


def test_prompts_from_any_file(tmp_path):
    chat = Prompt("x", (Message("system", "be brief"), Message("user", "hi")), "benign", "greeting", "me", "MIT")
    (tmp_path / "p.jsonl").write_text(json.dumps(chat.to_row()) + "\n")
    assert read_prompt_file(str(tmp_path / "p.jsonl")) == [chat]
    (tmp_path / "p.csv").write_text("prompt,kind\nhow?,harmful\n")
    (prompt,) = read_prompt_file(str(tmp_path / "p.csv"))
    assert (prompt.prompt_id, prompt.kind) == (prompt_id(user_says("how?")), "harmful")
    (tmp_path / "p.txt").write_text("one\n\n two \n")
    assert [p.prompt[0].content for p in read_prompt_file(str(tmp_path / "p.txt"))] == ["one", "two"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            '{"prompt": "a", "kind": "bad"}\n',
            "row 1: column 'kind' is 'bad'; expected 'harmful', 'benign' or 'lookalike', or null",
        ),
        ('{"question": "a"}\n', "row 1: no column 'prompt'"),
        ('{"prompt": "a"}\n{"prompt": "a"}\n', "duplicate prompt id"),
        ('{"prompt": [{"role": "assistant", "content": "a"}]}\n', "expected it to end with a user turn"),
        ('{"prompt": "a", "prompt_id": {}}\n', "row 1: column 'prompt_id' is {}; expected a string"),
    ],
)
def test_prompts_that_are_wrong(tmp_path, content, message):
    (tmp_path / "p.jsonl").write_text(content)
    with pytest.raises(DataError, match=message):
        read_prompt_file(str(tmp_path / "p.jsonl"))


def test_values_that_are_wrong():
    with pytest.raises(DataError, match="undecided without a reason"):
        Verdict("p", 0, "h", "j", "1", None)
    with pytest.raises(DataError, match="temperature is -1; expected at least 0"):
        Sampling(temperature=-1)
    row = dict.fromkeys(("prompt_id", "finish_reason", "model", "engine", "settings_hash", "prompt"), "x")
    row |= {"sample": 0, "prompt_tokens": 1, "completion_tokens": 1}
    with pytest.raises(DataError, match=r"no column 'text'; completions.jsonl needs prompt_id, .*, text, "):
        Completion.from_row(row)


COMPLETION = Completion("p0", 0, user_says("question"), "text", "stop", 1, 2, "m", "e", "h")
GOOD_ROWS = {
    Prompt: Prompt("p0", user_says("question"), "benign", "greeting", "me", "MIT"),
    Completion: COMPLETION,
    Verdict: Verdict("p0", 0, COMPLETION.text_hash, "length", "1", True, p_safe=0.5),
}
READERS = {
    Prompt: lambda path: read_prompt_file(str(path)),
    Completion: read_completions,
    Verdict: read_verdicts,
}
SCORES = ("p_safe", "p_refusal", "helpfulness", "severity", "score")
WRONG_VALUES = [
    *((kind, field.name, 3.5) for kind in GOOD_ROWS for field in fields(kind) if field.name not in SCORES),
    *((Verdict, column, value) for column in SCORES for value in ("0.5", True)),
    *((Verdict, column, value) for column in ("safe", "refusal", "malformed") for value in ("true", 1)),
    *((Completion, column, value) for column in ("sample", "prompt_tokens") for value in ("1", True, None)),
]


@pytest.mark.parametrize(("kind", "column", "value"), WRONG_VALUES)
def test_every_column_is_checked_when_a_file_is_read_back(kind, column, value, tmp_path):
    path = tmp_path / kind.file_name
    row = GOOD_ROWS[kind].to_row()
    write_jsonl(path, [row | {"unknown": 1}])
    assert READERS[kind](path) == [GOOD_ROWS[kind]]
    write_jsonl(path, [row, row | {"prompt_id": "p1"} | {column: value}])
    with pytest.raises(DataError, match=rf"{kind.file_name} row 2: column '{column}' is {value!r}; expected "):
        READERS[kind](path)


def test_a_stage_that_resumes_names_the_file_and_the_row_that_are_wrong(tmp_path):
    completions = generate_completions(Counting(), PROMPTS, tmp_path / "completions.jsonl")
    path = tmp_path / "verdicts.jsonl.unfinished"
    rows = [verdict.to_row() for verdict in Length().judge(completions[:2])]
    append_jsonl(path, [rows[0], rows[1] | {"safe": "yes"}])
    message = r"verdicts.jsonl.unfinished row 2: column 'safe' is 'yes'; expected true or false, or null$"
    with pytest.raises(DataError, match=message):
        judge_completions(Length(), completions, tmp_path / "verdicts.jsonl")
    with pytest.raises(DataError, match=message):
        find_unjudged(completions, tmp_path / "verdicts.jsonl")


def test_columns_of_earlier_versions_and_empty_columns_are_read():
    row = {"prompt_id": "p", "prompt": "a", "licence": "MIT", "source": None}
    assert Prompt.from_row(row) == Prompt("p", user_says("a"), license="MIT", source="")
