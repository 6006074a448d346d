"""Published sets of prompts: how rows become prompts, and which settings a user has to give."""

import csv
import json
from dataclasses import replace

import pytest

from bfpo.core.conversation import user_says
from bfpo.core.files import write_jsonl
from bfpo.core.samples import Prompt, prompt_id
from bfpo.data.prompt_sets import PROMPT_SETS
from bfpo.data.prompts import PromptSource, distinct_prompts, read_prompt_source, read_reference_outputs
from bfpo.data.stages import read_prompt_file
from bfpo.errors import DataError, RecipeError

# Columns as the sets are published with, one neutral row each, and what is expected of it.
ROWS = {
    "advbench": ({"goal": "p", "target": "t"}, "harmful", None),
    "harmbench": ({"Behavior": "p", "FunctionalCategory": "standard", "SemanticCategory": "c"}, "harmful", "c"),
    "strongreject": ({"category": "c", "source": "s", "forbidden_prompt": "p"}, "harmful", "c"),
    "safe_rlhf": ({"prompt": "p", "category": "c"}, "harmful", "c"),
    "beavertails_evaluation": ({"prompt": "p", "category": "c", "category_id": "1"}, "harmful", "c"),
    "alert": ({"id": "1", "prompt": "p", "category": "c"}, "harmful", "c"),
    "alert_adversarial": ({"id": "1", "prompt": "p", "attack_type": "a", "category": "c"}, "harmful", "c"),
    "jailbreakbench": ({"Index": "0", "Goal": "p", "Target": "t", "Category": "c"}, "harmful", "c"),
    "jailbreakbench_benign": ({"Index": "0", "Goal": "p", "Target": "t", "Category": "c"}, "lookalike", "c"),
    "wildjailbreak_eval": ({"adversarial": "p", "label": "1", "data_type": "adversarial_harmful"}, "harmful", None),
    "or_bench": ({"prompt": "p", "category": "c"}, "lookalike", "c"),
    "xstest": ({"prompt": "p", "type": "contrast_homonyms", "label": "unsafe"}, "harmful", "contrast_homonyms"),
    "coconot_contrast": ({"prompt": "p", "category": "c", "subcategory": "d"}, "lookalike", "c"),
}


@pytest.mark.parametrize("name", ROWS)
def test_a_published_row_becomes_a_prompt(name, tmp_path):
    row, kind, category = ROWS[name]
    path = tmp_path / "rows.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, row)
        writer.writeheader()
        writer.writerow(row)
    (prompt,), metadata = read_prompt_source(PromptSource(name=name, path=str(path)))
    assert (prompt.prompt[0].content, prompt.kind, prompt.category) == ("p", kind, category)
    assert prompt.license == metadata["license"] == PROMPT_SETS[name].license != ""


def test_rows_are_chosen_by_a_column_and_a_system_message_makes_another_prompt(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"p{n}", "group": "ab"[n % 2], "kind": "benign"} for n in range(4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = PromptSource(name="file", path=str(path))
    every, _ = read_prompt_source(source)
    some, _ = read_prompt_source(source, where={"group": "b"})
    assert [prompt.prompt[0].content for prompt in some] == ["p1", "p3"]
    assert [prompt.prompt_id for prompt in some] == [every[1].prompt_id, every[3].prompt_id]
    with_system, _ = read_prompt_source(source, system="Be short.")
    assert [message.role for message in with_system[0].prompt] == ["system", "user"]
    assert with_system[0].prompt_id != every[0].prompt_id


TOOLS = [{"type": "function", "function": {"name": "wire", "parameters": {"b": 1, "a": 2}}}]
CALL = {"type": "function", "function": {"name": "wire", "arguments": {"to": "Ada"}}}
CHAT = [
    {"role": "user", "content": "Pay Ada"},
    {"role": "assistant", "content": "", "reasoning_content": "She is owed 5.", "tool_calls": [CALL]},
    {"role": "tool", "content": "paid"},
]


def read_both_ways(path, rows, **options):
    """Return the prompts of a file as `bfpo generate` reads them, and as suites and `bfpo redteam` do."""
    write_jsonl(path, rows)
    source = PromptSource(name="file", path=str(path), kind="benign", **options)
    yield read_prompt_file(str(path), **options)
    yield read_prompt_source(source)[0]


def test_everything_that_a_row_has_for_the_model_reaches_it(tmp_path):
    row = {
        "prompt": CHAT,
        "system": "Be brief.",
        "tools": TOOLS,
        "chat_template_kwargs": {"k": False},
        "language": "fr",
    }
    # As in a CSV file.
    in_texts = {name: json.dumps(value) if isinstance(value, list | dict) else value for name, value in row.items()}
    other_names = {"messages": CHAT, "system_prompt": "Be brief."} | {name: row[name] for name in list(row)[2:]}
    for variant in (row, in_texts, other_names):
        for (prompt,) in read_both_ways(tmp_path / "p.jsonl", [variant]):
            assert [message.role for message in prompt.prompt] == ["system", "user", "assistant", "tool"]
            assert [message.to_row() for message in prompt.prompt[1:]] == CHAT
            assert prompt.tools is not None
            assert json.dumps(prompt.tools.value) == json.dumps(TOOLS)
            assert prompt.chat_template_kwargs.value == {"k": False}
            assert prompt.language == "fr"
            write_jsonl(tmp_path / "written.jsonl", [prompt.to_row()])
            assert read_prompt_file(str(tmp_path / "written.jsonl")) == [prompt]


def test_the_same_words_with_other_tools_are_another_prompt(tmp_path):
    rows = [{"prompt": "Pay Ada"}, {"prompt": "Pay Ada", "tools": TOOLS}, {"prompt": "Pay Ada", "tools": TOOLS * 2}]
    for prompts in read_both_ways(tmp_path / "p.jsonl", [*rows, {"prompt": "Pay Bob", "tools": []}]):
        assert len({prompt.prompt_id for prompt in prompts}) == len(prompts) == 4
        plain, *_ = prompts
        assert plain.prompt_id.endswith(prompt_id(user_says("Pay Ada"))) or plain.prompt_id.startswith("file-")
    _, metadata = read_prompt_source(PromptSource(name="file", path=str(tmp_path / "p.jsonl"), kind="benign"))
    write_jsonl(tmp_path / "p.jsonl", [*rows[:2], {"prompt": "Pay Ada", "tools": TOOLS * 3}, {"prompt": "Pay Bob"}])
    _, changed = read_prompt_source(PromptSource(name="file", path=str(tmp_path / "p.jsonl"), kind="benign"))
    assert metadata["prompts_hash"] != changed["prompts_hash"]


def test_a_text_file_has_one_prompt_on_each_line_for_both_readers(tmp_path):
    # As a spreadsheet program writes it, and with a mark that isn't the end of a line.
    (tmp_path / "p.txt").write_text("\ufeffOne\u2028more\n\n Two \n", encoding="utf-8")
    expected = [user_says("One\u2028more"), user_says("Two")]
    prompts, _ = read_prompt_source(PromptSource(name="file", path=str(tmp_path / "p.txt"), kind="benign"))
    for read in (prompts, read_prompt_file(str(tmp_path / "p.txt"))):
        assert [prompt.prompt for prompt in read] == expected


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "Summarize.", "input": "The long text"}, "row 1: columns not read: input; set `ignore_columns"),
        ({"prompt": "The capital?", "input": "Germany"}, "columns not read: input"),
        ({"prompt": "Who?", "System_Message": "Pirate"}, "columns not read: System_Message"),
        (
            {"prompt": "a", "note": "\u8bf7\u628a\u8fd9\u6bb5\u8bdd\u7ffb\u8bd1\u6210\u82f1\u6587"},
            "columns not read: note",
        ),
        ({"prompt": "a", "tools": [{"type": "function", "function": "pay"}]}, "has no name of a function"),
        ({"prompt": "a", "context": ["b"]}, r"columns not read: context; set `ignore_columns: \[context\]`"),
        ({"prompt": "a", "messages": CHAT}, "columns not read: messages"),
        ({"prompt": [{"role": "user", "content": "a", "weight": 1}]}, "row 1: .*unknown key 'weight' of a message"),
        ({"prompt": CHAT[:2]}, "row 1: .*expected it to end with a user turn or the result of a tool"),
        ({"prompt": [{"role": "system", "content": "a"}, CHAT[0]], "system": "b"}, "begins with another one"),
        ({"prompt": "a", "tools": "wire"}, "row 1: column 'tools' is 'wire'; it is not JSON"),
        (
            {"prompt": "a", "chat_template_kwargs": [1]},
            "row 1: column 'chat_template_kwargs' is .*expected an object",
        ),
        ({"prompt": "a", "language": 5}, "row 1: column 'language' is 5; expected a string"),
        ({"prompt": '[{"role": "user", "content": "\\ud800"}]'}, r"row 1: lone surrogate \\ud800"),
        ({"prompt": "a", "tools": '[{"name": "\\ud800"}]'}, r"row 1: lone surrogate \\ud800"),
        ({"conversations": [{"from": ["human"], "value": "a"}]}, r"from is \['human'\]; expected system, human"),
    ],
)
def test_what_can_not_be_read_is_named(tmp_path, row, message):
    write_jsonl(tmp_path / "p.jsonl", [row])
    with pytest.raises(DataError, match=message):
        read_prompt_file(str(tmp_path / "p.jsonl"))
    with pytest.raises(DataError, match=message):
        read_prompt_source(PromptSource(name="file", path=str(tmp_path / "p.jsonl"), kind="benign"))


def test_columns_are_left_out_by_name_and_answers_are_no_prompts(tmp_path):
    row = {
        "prompt": "Summarize.",
        "input": "The long text",
        "chosen": "a b",
        "is_chosen_safe": True,
        "target": "Sure, a",
    }
    for (prompt,) in read_both_ways(tmp_path / "p.jsonl", [row], ignore_columns=["input"]):
        assert prompt.prompt == user_says("Summarize.")
    turn = {"role": "user", "content": "a", "weight": 1}
    for (prompt,) in read_both_ways(tmp_path / "p.jsonl", [{"prompt": [turn]}], ignore_message_keys=["weight"]):
        assert prompt.prompt == user_says("a")
    # Columns that a task selects or compares by are read.
    write_jsonl(tmp_path / "p.jsonl", [{"prompt": "a", "group": "of two words", "gold": "an answer"}])
    source = PromptSource(name="file", path=str(tmp_path / "p.jsonl"), kind="benign")
    where = {"group": "of two words"}
    assert len(read_prompt_source(source, where=where, other_columns=["gold"])[0]) == 1
    assert read_reference_outputs(source, "gold", where=where).popitem()[1].text == "an answer"


def test_a_system_message_of_a_task_does_not_replace_that_of_a_row(tmp_path):
    write_jsonl(tmp_path / "p.jsonl", [{"prompt": "a", "system": "Be brief."}])
    source = PromptSource(name="file", path=str(tmp_path / "p.jsonl"), kind="benign")
    with pytest.raises(DataError, match="row 1: the prompt begins with a system message, and `system` sets another"):
        read_prompt_source(source, system="Be kind.")


def test_a_tab_separated_file_is_read(tmp_path):
    path = tmp_path / "eval.tsv"
    path.write_text('adversarial\tlabel\tdata_type\n"one,\ttwo"\t0\tadversarial_benign\n')
    (prompt,), _ = read_prompt_source(PromptSource(name="wildjailbreak_eval", path=str(path)))
    assert (prompt.prompt[0].content, prompt.kind) == ("one,\ttwo", "lookalike")


def test_a_setting_that_the_program_lacks_is_requested():
    with pytest.raises(RecipeError, match=r"published as a file.*strongreject_dataset\.csv.*path:"):
        read_prompt_source(PromptSource(name="strongreject"))
    with pytest.raises(RecipeError, match=r"'alert' needs revision: .a commit of Babelscape/ALERT., or path:"):
        read_prompt_source(PromptSource(name="alert"))
    with pytest.raises(RecipeError, match="did you mean 'or_bench'"):
        read_prompt_source(PromptSource(name="orbench"))
    with pytest.raises(DataError, match="no file nowhere"):
        read_prompt_source(PromptSource(name="or_bench", path="nowhere"))


def test_revisions_are_commits():
    for name, prompt_set in PROMPT_SETS.items():
        assert prompt_set.revision is None or (prompt_set.hub and len(prompt_set.revision) == 40), name


def test_prompts_of_several_sources_are_used_once_and_have_one_kind(capsys):
    box, door = (Prompt(name, user_says(name), "harmful", source="first") for name in ("box", "door"))
    again = replace(box, source="second")
    assert distinct_prompts([[box, door], [again]]) == [box, door]
    assert "1 of 3 prompts are in an earlier source, too" in capsys.readouterr().out
    with pytest.raises(DataError, match="'box' is benign in second, and harmful in first; leave it out of one"):
        distinct_prompts([[box], [replace(again, kind="benign")]])
    # As in one source, case and white space don't make another prompt; two of them have no id in common.
    assert distinct_prompts([[box], [replace(box, prompt=user_says("Box "))]]) == [box]
    with pytest.raises(DataError, match="two prompts have the id 'box'"):
        distinct_prompts([[box], [replace(door, prompt_id="box")]])


def test_a_prompt_of_a_file_has_one_kind(tmp_path):
    rows = [{"prompt": "a box", "kind": "harmful"}, {"prompt": "A  box", "kind": "benign"}]
    write_jsonl(tmp_path / "p.jsonl", rows)
    with pytest.raises(DataError, match="is there as harmful and as benign; keep one of them"):
        read_prompt_source(PromptSource(name="file", path=str(tmp_path / "p.jsonl"), license="MIT"))


def test_empty_cells_of_a_csv_are_missing_values(tmp_path):
    path = tmp_path / "p.csv"
    path.write_text("prompt_id,prompt,kind,category,group,prefill\n,a box,,,,\n,a door,harmful,,g,\n")
    first, second = read_prompt_file(str(path))
    assert first.prompt_id != second.prompt_id
    assert (first.kind, first.category, first.group, first.prefill) == (None, None, None, None)
    assert (second.kind, second.group) == ("harmful", "g")
