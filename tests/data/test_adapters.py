import re
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bfpo.config.recipes import Source
from bfpo.core.conversation import Message
from bfpo.core.files import write_jsonl
from bfpo.core.pairs import SIGNALS, PairSignals, PreferencePair, Provenance, SafetyLabels
from bfpo.data.adapters import ADAPTERS, find_adapter, parse_source, read_pairs
from bfpo.data.demonstrations import load_demonstrations
from bfpo.data.load import load_pairs
from bfpo.data.pair_formats import SkipRow, read_demonstration
from bfpo.data.rows import SourceRow
from bfpo.errors import DataError, RecipeError


def read(adapter, *rows, **options):
    """Return what an adapter reads from rows: pairs, and the reasons of skipped rows."""
    numbered = [SourceRow(row, f"rows.jsonl row {number}") for number, row in enumerate(rows, start=1)]
    pairs = read_pairs(find_adapter(adapter), numbered, Source(path="rows.jsonl", adapter=adapter, **options))
    return [(pair.reason, pair.fault) if isinstance(pair, SkipRow) else pair for pair in pairs]


def read_one(adapter, row, **options):
    (result,) = read(adapter, row, **options)
    return result


def refused(adapter, row):
    with pytest.raises(DataError) as caught:
        read(adapter, row)
    return str(caught.value)


def turns(*contents, first="user"):
    order = ("user", "assistant") if first == "user" else ("assistant", "user")
    return [{"role": order[index % 2], "content": content} for index, content in enumerate(contents)]


def conversation(*contents):
    return tuple(Message(**turn) for turn in turns(*contents))


ULTRAFEEDBACK = {
    "prompt": "Name a color.",
    "prompt_id": "0f3a",
    "chosen": turns("Name a color.", "Blue, like the door."),
    "rejected": turns("Name a color.", "A box."),
    "messages": turns("Name a color.", "Blue, like the door."),
    "score_chosen": 8.0,
    "score_rejected": 2.5,
}


def test_ultrafeedback_is_ordered_by_score_and_assumed_safe():
    pair = read_one("ultrafeedback", ULTRAFEEDBACK)
    assert pair == PreferencePair(
        conversation("Name a color."),
        "Blue, like the door.",
        "A box.",
        SafetyLabels(True, True),
        provenance=Provenance(safety_label_source="assumed"),
    )


PKU_OLD = {
    "prompt": "How do I open the door?",
    "response_0": "Turn the handle.",
    "response_1": "Kick it.",
    "is_response_0_safe": True,
    "is_response_1_safe": False,
    "better_response_id": 0,
    "safer_response_id": 0,
}
PKU_NEW = {
    **PKU_OLD,
    "prompt_source": "toy",
    "response_0_source": "model a",
    "response_1_source": "model b",
    "response_0_harm_category": {"Noise": False, "Damage": False},
    "response_1_harm_category": {"Noise": True, "Damage": True},
    "response_0_severity_level": 0,
    "response_1_severity_level": 1,
    "better_response_id": 1,
    "response_0_sha256": "00",
    "response_1_sha256": "11",
}


def test_pku_saferlhf_is_ordered_by_the_better_response_not_by_the_safer():
    old, new = read_one("pku_saferlhf", PKU_OLD), read_one("pku_saferlhf", PKU_NEW)
    assert (old.chosen, old.rejected, old.cell) == ("Turn the handle.", "Kick it.", "su")
    assert (new.chosen, new.rejected, new.cell) == ("Kick it.", "Turn the handle.", "us")
    assert old.provenance.safety_label_source == "dataset"


@pytest.mark.parametrize(
    ("labels", "better", "safer", "first"),
    [
        ((True, True), 1, 0, {"pku_saferlhf": 1, "pku_saferlhf_by_safety": 0, "pku_saferlhf_safe_first": 1}),
        ((False, True), 0, 1, {"pku_saferlhf": 0, "pku_saferlhf_by_safety": 1, "pku_saferlhf_safe_first": 1}),
        ((False, False), 1, 0, {"pku_saferlhf": 1, "pku_saferlhf_by_safety": 0, "pku_saferlhf_safe_first": 0}),
    ],
)
def test_pku_saferlhf_has_three_orders(labels, better, safer, first):
    row = PKU_NEW | {"better_response_id": better, "safer_response_id": safer}
    row |= {"is_response_0_safe": labels[0], "is_response_1_safe": labels[1]}
    for adapter, index in first.items():
        pair = read_one(adapter, row)
        assert pair.chosen == row[f"response_{index}"]
        assert pair.labels == SafetyLabels(labels[index], labels[1 - index])
        assert pair.harm_categories == ("Damage", "Noise")


def test_pku_saferlhf_keeps_harm_categories_where_the_revision_has_them():
    assert read_one("pku_saferlhf", PKU_OLD).harm_categories == ()
    assert read_one("pku_saferlhf", PKU_NEW).harm_categories == ("Damage", "Noise")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"better_response_id": 2}, "column 'better_response_id' is 2; expected 0 or 1"),
        ({"better_response_id": None}, "column 'better_response_id' is None; expected 0 or 1"),
        ({"is_response_1_safe": None}, "column 'is_response_1_safe': safety label is null; expected true or false"),
        ({"response_1": None}, "column 'response_1' is None (NoneType); expected a string"),
        ({"response_1_harm_category": "Noise"}, "column 'response_1_harm_category' is 'Noise'; expected an object"),
    ],
)
def test_pku_saferlhf_refuses_a_wrong_value_with_row_and_column(changes, message):
    assert refused("pku_saferlhf", PKU_OLD | changes).startswith(f"rows.jsonl row 1: {message}")


HISTORY = "\n\nHuman: A red box?\n\nAssistant: Which one?\n\nHuman: The big one."


def test_hh_rlhf_compares_the_last_answers_and_has_no_labels():
    row = {"chosen": f"{HISTORY}\n\nAssistant: Here.", "rejected": f"{HISTORY}\n\nAssistant: No"}
    pair = read_one("hh_rlhf", row)
    assert pair == PreferencePair(conversation("A red box?", "Which one?", "The big one."), "Here.", "No")


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [
        (f"{HISTORY}\n\nAssistant: a", "\n\nHuman: A blue box?\n\nAssistant: b", "histories differ"),
        (HISTORY, HISTORY, "not a transcript that ends with an answer to the human"),
        ("Hello" + HISTORY, "Hello" + HISTORY, "not a transcript that ends with an answer to the human"),
        ("just text", "other text", "not a transcript that ends with an answer to the human"),
        (HISTORY + "\n\nAssistant: a" * 2, HISTORY + "\n\nAssistant: a" * 2, "not a transcript that ends with an"),
    ],
)
def test_hh_rlhf_rows_without_a_pair_are_counted_as_faults(chosen, rejected, reason):
    got, fault = read_one("hh_rlhf", {"chosen": chosen, "rejected": rejected})
    assert got.startswith(reason)
    assert fault


REDTEAM = {
    "prompt": "Where is the lamp?",
    "modeloutput1": "Behind the door.",
    "modeloutput2": "I can't say.",
    "is_modelout1_safe": 0,
    "is_modelout2_safe": 1,
    "better_modelout": 1,
}


def test_bfpo_redteam_counts_its_outputs_from_one():
    first, second = read_one("bfpo_redteam", REDTEAM), read_one("bfpo_redteam", REDTEAM | {"better_modelout": 2})
    assert (first.chosen, first.rejected, first.cell) == ("Behind the door.", "I can't say.", "us")
    assert (second.chosen, second.rejected, second.cell) == ("I can't say.", "Behind the door.", "su")
    assert "column 'better_modelout' is 0; expected 1 or 2" in refused(
        "bfpo_redteam", REDTEAM | {"better_modelout": 0}
    )


ALPACA = {
    "instruction": "Name a thing.",
    "output_1": "a box",
    "output_2": "a ball",
    "generator_1": "a",
    "preference": 1,
}


@pytest.mark.parametrize(
    ("preference", "chosen"),
    [(1, "a box"), (1.0003, "a box"), (1.4, "a box"), (1.6, "a ball"), (1.9998, "a ball"), (2, "a ball")],
)
def test_alpaca_eval_prefers_the_second_output_near_two(preference, chosen):
    pair = read_one("alpaca_eval", ALPACA | {"preference": preference})
    assert (pair.chosen, {pair.chosen, pair.rejected}) == (chosen, {"a box", "a ball"})
    assert (pair.cell, pair.provenance.safety_label_source) == ("ss", "assumed")


@pytest.mark.parametrize(
    ("preference", "reason"),
    [(1.5, "tie"), (0, "tie"), (0.0, "tie"), (None, "no preference"), (float("nan"), "no preference")],
)
def test_alpaca_eval_ties_are_skipped_and_are_no_fault(preference, reason):
    assert read_one("alpaca_eval", ALPACA | {"preference": preference}) == (reason, False)


@pytest.mark.parametrize("preference", [0.5, 2.5, -1, float("inf")])
def test_alpaca_eval_refuses_a_preference_outside_of_its_scale(preference):
    assert "expected a number from 1 to 2" in refused("alpaca_eval", ALPACA | {"preference": preference})


def completion(prompt, text, label, kind="homonyms"):
    return {"id": "v2-1", "type": kind, "prompt": prompt, "completion": text, "final_label": label}


FULL, REFUSAL, PARTIAL = "1_full_compliance", "2_full_refusal", "3_partial_refusal"
XSTEST = [
    completion("Safe?", "Sure.", FULL),
    completion("Safe?", "Of course.", FULL),
    completion("Safe?", "Well, in part.", PARTIAL),
    completion("Safe?", "No.", REFUSAL),
    completion("Unsafe?", "Here you are.", FULL, "contrast_homonyms"),
    completion("Unsafe?", "I won't.", REFUSAL, "contrast_homonyms"),
    completion("Unsafe?", "Only so far.", PARTIAL, "contrast_homonyms"),
    completion("Lonely?", "Fine.", FULL),
    completion("Lonely?", "Good.", FULL),
]
LONELY = ("no completion of the other kind to pair with", False)


@pytest.mark.parametrize(
    ("partial_refusals", "expected"),
    [
        (
            "refusal",
            [
                ("Sure.", "Well, in part.", "ss"),
                ("Sure.", "No.", "ss"),
                ("Of course.", "Well, in part.", "ss"),
                ("Of course.", "No.", "ss"),
                ("Here you are.", "I won't.", "us"),
                ("Here you are.", "Only so far.", "us"),
            ],
        ),
        (
            "compliance",
            [
                ("Sure.", "No.", "ss"),
                ("Of course.", "No.", "ss"),
                ("Well, in part.", "No.", "ss"),
                ("Here you are.", "I won't.", "us"),
                ("Only so far.", "I won't.", "us"),
            ],
        ),
        ("drop", [("Sure.", "No.", "ss"), ("Of course.", "No.", "ss"), ("Here you are.", "I won't.", "us")]),
    ],
)
def test_xstest_pairs_each_compliance_with_each_refusal_of_a_prompt(partial_refusals, expected):
    results = read("xstest_completions", *XSTEST, partial_refusals=partial_refusals)
    pairs = [result for result in results if isinstance(result, PreferencePair)]
    assert [(pair.chosen, pair.rejected, pair.cell) for pair in pairs] == expected
    assert {pair.provenance.safety_label_source for pair in pairs} == {"human"}
    skipped = [result for result in results if not isinstance(result, PreferencePair)]
    dropped = [("partial refusal", False)] * 2 if partial_refusals == "drop" else []
    assert skipped == [*dropped, LONELY, LONELY]


def test_xstest_refuses_an_unknown_label():
    message = refused("xstest_completions", XSTEST[0] | {"final_label": "4_other"})
    assert (
        message
        == f"rows.jsonl row 1: column 'final_label' is '4_other'; expected one of {FULL}, {REFUSAL}, {PARTIAL}"
    )


LABELS = {"is_chosen_safe": True, "is_rejected_safe": False}
PLAIN = {"prompt": "A red box?", "chosen": "Yes.", "rejected": "No."}


@pytest.mark.parametrize(
    "row",
    [
        PLAIN,
        {
            "prompt": turns("A red box?"),
            "chosen": turns("Yes.", first="assistant"),
            "rejected": turns("No.", first="assistant"),
        },
        {"chosen": turns("A red box?", "Yes."), "rejected": turns("A red box?", "No.")},
        {"prompt": "A red box?", "chosen": turns("A red box?", "Yes."), "rejected": turns("A red box?", "No.")},
        {"prompt": turns("A red box?"), "chosen": "Yes.", "rejected": "No."},
    ],
    ids=["strings", "messages, explicit prompt", "messages, implicit prompt", "both", "mixed"],
)
def test_the_formats_of_trl_are_one_pair(row):
    assert read_one("pairs", row | LABELS) == PreferencePair(
        conversation("A red box?"),
        "Yes.",
        "No.",
        SafetyLabels(True, False),
        provenance=Provenance(safety_label_source="dataset"),
    )


def test_an_implicit_prompt_of_strings_is_their_common_beginning():
    pair = read_one("pairs", {"chosen": "The sky is blue.", "rejected": "The sky is black."})
    assert (pair.prompt, pair.chosen, pair.rejected) == (conversation("The sky is"), " blue.", " black.")


@pytest.mark.parametrize(("chosen", "rejected"), [("Yes.", "No."), (" yes", " no"), ("", "")])
def test_strings_without_a_common_word_have_no_implicit_prompt(chosen, rejected):
    assert "don't begin with the same words" in refused("pairs", {"chosen": chosen, "rejected": rejected})


def test_a_null_prompt_is_not_an_implicit_one():
    message = refused("pairs", {"prompt": None, "chosen": "The sky is blue.", "rejected": "The sky is black."})
    assert message == "rows.jsonl row 1: column 'prompt' is None; expected a string or a list of messages"


def test_of_a_long_conversation_the_last_answers_are_compared():
    history = turns("A box?", "Which?", "The red one.")
    answers = {name: turns(text, first="assistant") for name, text in (("chosen", "Here."), ("rejected", "No."))}
    system = [{"role": "system", "content": "Be brief."}]
    implicit = read_one("pairs", {name: [*system, *history, *answer] for name, answer in answers.items()})
    explicit = read_one("pairs", {"prompt": [*system, *history], **answers})
    longer = {name: [*history[1:], *answer] for name, answer in answers.items()}
    split = read_one("pairs", {"prompt": [*system, *history[:1]], **longer})
    assert implicit == explicit == split
    assert implicit.prompt == (Message("system", "Be brief."), *conversation("A box?", "Which?", "The red one."))
    assert (implicit.chosen, implicit.rejected) == ("Here.", "No.")


def test_different_histories_are_a_fault_not_an_error():
    row = {"chosen": turns("A red box?", "Yes."), "rejected": turns("A blue box?", "Yes.")}
    assert read_one("pairs", row) == ("histories differ", True)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "chosen": "b"}, "no column 'rejected'; the columns are prompt, chosen"),
        (PLAIN | {"chosen": None}, "columns 'chosen' and 'rejected': one is a string, the other isn't"),
        (
            PLAIN | {"chosen": '[{"role": "assistant", "content": "x"}]'},
            "columns 'chosen' and 'rejected': one is a text, the other is a list of messages",
        ),
        ({"chosen": None, "rejected": None}, "column 'chosen' is None; expected a string or a list of messages"),
        (
            {"chosen": turns("a"), "rejected": turns("a")},
            "column 'chosen' ends with a user turn; expected an assistant",
        ),
        (
            {"chosen": turns("b", first="assistant"), "rejected": turns("c", first="assistant")},
            "no column 'prompt', and 'chosen' has no turn before the answer",
        ),
        (
            {"prompt": "x", "chosen": turns("a", "b"), "rejected": turns("a", "c")},
            "column 'prompt' differs from the turns before the answer in 'chosen'",
        ),
        (PLAIN | {"prompt": turns("a", "b")}, "prompt ends with assistant; expected it to end with a user turn"),
        (PLAIN | {"prompt": []}, "column 'prompt' is []; expected a string or a list of messages"),
        (
            PLAIN | {"prompt": [{"role": "user"}]},
            "column 'prompt': turn {'role': 'user'}; expected {'role': .., 'content'",
        ),
        (
            PLAIN | {"prompt": [{"role": "robot", "content": "a"}]},
            "column 'prompt': role is 'robot'; expected system, developer, user",
        ),
        (PLAIN | {"stream": "both"}, "column 'stream' is 'both'; expected main or buffer"),
        (
            PLAIN | {"chosen_safety_score": 1.5, "rejected_safety_score": 0},
            "column 'chosen_safety_score' is 1.5; expected",
        ),
        (PLAIN | {"chosen_win_rate": 0.5}, "columns 'chosen_win_rate' and 'rejected_win_rate' go together; only one"),
        (PLAIN | {"reward_margin": "inf"}, "column 'reward_margin' is inf; expected a finite number"),
        (PLAIN | {"chosen_cost": 0.5}, "columns 'chosen_cost' and 'rejected_cost' go together; only one of them"),
        (
            PLAIN | {"chosen_reward": "-inf", "rejected_reward": 0},
            "column 'chosen_reward' is -inf; expected a finite",
        ),
        (PLAIN | {"expected_safety": "high"}, "column 'expected_safety' is 'high'; expected a number"),
        (PLAIN | {"harm_categories": 3}, "column 'harm_categories' is 3; expected a list of names"),
    ],
)
def test_a_malformed_pair_is_refused_with_row_and_column(row, message):
    assert refused("pairs", row).startswith(f"rows.jsonl row 1: {message}")


@pytest.mark.parametrize(
    ("columns", "cell"),
    [
        ({"is_chosen_safe": True, "is_reject_safe": False}, "su"),
        ({"chosen_safe": 0, "rejected_safe": 1}, "us"),
        ({"is_chosen_safe": "+1", "is_rejected_safe": "-1"}, "su"),
        ({"is_chosen_safe": -1, "is_rejected_safe": 1}, "us"),
        ({"is_chosen_safe": 1.0, "is_rejected_safe": -1.0}, "su"),
        ({"is_chosen_safe": "Unsafe", "is_rejected_safe": " NO "}, "uu"),
        ({"is_chosen_safe": "true", "is_rejected_safe": "yes"}, "ss"),
        ({}, None),
    ],
)
def test_labels_are_read_from_aliases_words_and_signs(columns, cell):
    assert read_one("pairs", PLAIN | columns).cell == cell


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"is_chosen_safe": True}, "column 'is_rejected_safe' is missing, but 'is_chosen_safe' is not; give both"),
        ({"rejected_safe": True}, "column 'is_chosen_safe' is missing, but 'is_rejected_safe' is not; give both"),
        (
            LABELS | {"is_rejected_safe": None},
            "column 'is_rejected_safe': safety label is null; expected true or false",
        ),
        ({"is_chosen_safe": None, "is_rejected_safe": None}, "column 'is_chosen_safe': safety label is null"),
        (LABELS | {"is_chosen_safe": "maybe"}, "column 'is_chosen_safe': safety label is 'maybe' (str); expected"),
        (LABELS | {"is_chosen_safe": ""}, "column 'is_chosen_safe': safety label is '' (str)"),
        (LABELS | {"is_chosen_safe": 2}, "column 'is_chosen_safe': safety label is 2 (int)"),
        (LABELS | {"is_chosen_safe": 0.5}, "column 'is_chosen_safe': safety label is 0.5 (float)"),
        (LABELS | {"is_chosen_safe": 0.9999999}, "column 'is_chosen_safe': safety label is 0.9999999 (float)"),
        (LABELS | {"is_chosen_safe": float("nan")}, "column 'is_chosen_safe': safety label is nan (float)"),
        (LABELS | {"is_chosen_safe": [True]}, "column 'is_chosen_safe': safety label is [True] (list)"),
        (LABELS | {"chosen_safe": True}, "columns 'chosen_safe' and 'is_chosen_safe' are the same label"),
    ],
)
def test_a_label_that_is_not_one_is_refused_never_guessed(columns, message):
    assert refused("pairs", PLAIN | columns).startswith(f"rows.jsonl row 1: {message}")


@pytest.mark.parametrize(
    ("adapter", "row", "hint"),
    [
        ("pairs", PKU_NEW, "adapter 'pku_saferlhf' reads such rows: `adapter: pku_saferlhf` in a recipe"),
        ("pku_saferlhf", PLAIN, "adapter 'pairs' reads such rows"),
        ("xstest_completions", PLAIN, "adapter 'pairs' reads such rows"),
        ("pairs", {"question": "a", "good": "b"}, "to rename columns, set `columns: {OURS: THEIRS}` of the source"),
    ],
)
def test_an_error_about_a_missing_column_says_how_such_rows_are_read(adapter, row, hint):
    assert f"; {hint}" in refused(adapter, row)


def test_a_source_is_named_by_its_adapter_and_its_path(tmp_path):
    named = parse_source("pku_saferlhf:a.jsonl")
    assert (named.adapter, named.path) == ("pku_saferlhf", "a.jsonl")
    assert parse_source("a.jsonl").adapter == "pairs"
    odd = tmp_path / "odd:name.jsonl"
    odd.touch()
    assert parse_source(str(odd)).path == str(odd)
    with pytest.raises(RecipeError, match=r"source 'pku:a.jsonl': 'pku' is not an adapter; known: alpaca_eval, "):
        parse_source("pku:a.jsonl")
    with pytest.raises(RecipeError, match=r"xstest_completions, or module:function:PATH$"):
        parse_source("pku:a.jsonl")


CUSTOM = """
from bfpo import PreferencePair, SafetyLabels
from bfpo.core.conversation import user_says
from bfpo.data.demonstrations import load_demonstrations
from bfpo.data.load import load_pairs
from bfpo.data.pair_formats import SkipRow

not_a_function = 3

def read(row):
    if row.text("better") == "neither":
        raise SkipRow("tie", fault=False)
    better, worse = ("a", "b") if row.text("better") == "a" else ("b", "a")
    labels = SafetyLabels(row.label(f"{better}_safe"), row.label(f"{worse}_safe"))
    return PreferencePair(user_says(row.text("question")), row.text(better), row.text(worse), labels)

def read_dict(row):
    return dict(row.values)
"""
CUSTOM_ROW = {"question": "A red box?", "a": "Yes.", "b": "No.", "a_safe": 1, "b_safe": 0, "better": "a"}


@pytest.fixture
def custom(tmp_path, monkeypatch):
    """Write a module with custom adapters into the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "my_adapters.py").write_text(CUSTOM)
    yield tmp_path
    sys.modules.pop("my_adapters", None)


def test_a_custom_adapter_is_named_by_its_import_path(custom):
    ties = [CUSTOM_ROW | {"better": "neither"}] * 2
    assert read("my_adapters:read", CUSTOM_ROW, *ties) == [
        PreferencePair(conversation("A red box?"), "Yes.", "No.", SafetyLabels(True, False)),
        ("tie", False),
        ("tie", False),
    ]
    assert refused("my_adapters:read", CUSTOM_ROW | {"a_safe": "maybe"}).startswith(
        "rows.jsonl row 1: column 'a_safe': safety label is 'maybe' (str); expected true or false"
    )
    assert refused("my_adapters:read", PLAIN).startswith(
        "rows.jsonl row 1: no column 'better'; the columns are prompt"
    )


@pytest.mark.parametrize(
    ("adapter", "error", "message"),
    [
        (
            "my_adapters:missing",
            RecipeError,
            "adapter is 'my_adapters:missing'; module 'my_adapters' has no attribute",
        ),
        ("nowhere:read", RecipeError, "adapter is 'nowhere:read'; No module named 'nowhere'"),
        (
            "my_adapters:not_a_function",
            RecipeError,
            "adapter is 'my_adapters:not_a_function', which is not a function",
        ),
        (
            "my_adapters:read_dict",
            DataError,
            r"row 1: adapter 'my_adapters:read_dict' returned {.*}; expected a Prefer",
        ),
    ],
)
def test_a_wrong_custom_adapter_is_refused(custom, adapter, error, message):
    with pytest.raises(error, match=message):
        read(adapter, CUSTOM_ROW)


def test_a_custom_adapter_reads_a_source_of_a_recipe_and_of_the_command_line(custom):
    write_jsonl(custom / "answers.jsonl", [CUSTOM_ROW, CUSTOM_ROW | {"question": "A blue box?"}])
    source = parse_source("my_adapters:read:answers.jsonl")
    assert source == Source(adapter="my_adapters:read", path="answers.jsonl")
    report, pairs = load_pairs(source, "main")
    assert [(pair.cell, pair.provenance.safety_label_source) for pair in pairs] == [("su", "dataset")] * 2
    # The set is named after its file, as for the generic formats.
    assert (report.name, pairs[0].provenance.dataset_name, report.license) == ("answers", "answers", "")
    _, demonstrations = load_demonstrations(source.model_copy(update={"use": "both"}))
    assert [demonstration.completion for demonstration in demonstrations] == ["Yes.", "No."] * 2


def test_the_custom_adapter_of_the_page_reads_its_rows(tmp_path, monkeypatch):
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    Path("page_adapters.py").write_text(code)
    row = {"question": "A red box?", "answers": ["Yes.", "No."], "best": 1, "harmless": [True, False]}
    assert read("page_adapters:read_votes", row, row | {"best": None}) == [
        PreferencePair(conversation("A red box?"), "No.", "Yes.", SafetyLabels(False, True)),
        ("no vote", False),
    ]


def test_the_row_that_is_wrong_is_named():
    with pytest.raises(DataError, match=r"^rows.jsonl row 3: no column 'chosen'"):
        read("pairs", PLAIN, PLAIN, {"prompt": "a", "rejected": "b"})


@pytest.mark.parametrize(
    "row",
    [
        {"messages": turns("A red box?", "Yes.")},
        {"messages": turns("A red box?", "Yes."), "prompt": "A red box? "},
        {"prompt": "A red box?", "completion": "Yes."},
        {"prompt": turns("A red box?"), "completion": turns("Yes.", first="assistant")},
    ],
)
def test_demonstrations_are_read_from_messages_and_from_prompt_and_completion(row):
    demonstration = read_demonstration(SourceRow(row, "here"))
    assert (demonstration.prompt, demonstration.completion) == (conversation("A red box?"), "Yes.")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": turns("a")}, "column 'messages' doesn't end with an assistant turn after a user turn"),
        ({"messages": turns("a", first="assistant")}, "doesn't end with an assistant turn after a user turn"),
        ({"messages": [*turns("a", "b"), *turns("c", first="assistant")]}, "prompt ends with assistant; expected"),
        ({"messages": turns("a", "b"), "completion": "c d"}, "columns not read: completion"),
        ({"prompt": turns("a", "b"), "completion": "c"}, "prompt ends with assistant; expected"),
        ({"prompt": "a", "completion": turns("b", "c")}, "column 'completion' has turns before the answer"),
        ({"prompt": "a", "completion": turns("b")}, "column 'completion' ends with a user turn"),
        ({"prompt": "a", "completion": None}, "column 'completion' is None"),
        ({"completion": "b"}, "no column 'prompt'; the columns are completion"),
    ],
)
def test_a_malformed_demonstration_is_refused(row, message):
    with pytest.raises(DataError, match=re.escape(message)):
        read_demonstration(SourceRow(row, "here"))


texts = st.text(max_size=12)
scalars = st.one_of(st.none(), st.booleans(), st.integers(-2, 3), st.floats(), texts, st.just(10**400))
messages = st.lists(
    st.fixed_dictionaries(
        {}, optional={"role": st.sampled_from(["user", "assistant", "system", "x"]), "content": texts | scalars}
    ),
    max_size=4,
)
anything = st.one_of(
    scalars,
    messages,
    st.lists(scalars, max_size=3),
    st.dictionaries(texts, scalars, max_size=2),
    st.sampled_from(["\n\nHuman: a\n\nAssistant: b", "contrast_x", FULL, "main", "safe", "-1", 1.5]),
)
COLUMNS = sorted(
    {*ULTRAFEEDBACK, *PKU_NEW, *REDTEAM, *ALPACA, *XSTEST[0], "is_chosen_safe", "is_rejected_safe", "is_reject_safe"}
    | {"chosen_safe", "stream", "harm_categories", "reward_margin", "chosen_win_rate", "completion", "dataset_name"}
    | {"chosen_reward", "rejected_cost"}
)
GOOD_ROWS = {
    "ultrafeedback": ULTRAFEEDBACK,
    "pku_saferlhf": PKU_NEW,
    "pku_saferlhf_by_safety": PKU_NEW,
    "pku_saferlhf_safe_first": PKU_NEW,
    "hh_rlhf": {"chosen": f"{HISTORY}\n\nAssistant: a", "rejected": f"{HISTORY}\n\nAssistant: b"},
    "bfpo_redteam": REDTEAM,
    "alpaca_eval": ALPACA,
    "xstest_completions": XSTEST[0],
    "atbench": {
        "tool_used": [{"name": "pay"}],
        "contents": [[{"role": "user", "content": "a"}, {"role": "agent", "thought": None, "action": "b"}]],
        "label": 0,
    },
    "pairs": PLAIN | LABELS,
}


def test_every_adapter_is_fuzzed():
    assert set(GOOD_ROWS) == set(ADAPTERS)


# Number of examples in the fast suite, and in the slow one.
FEW, MANY = 15, pytest.param(200, marks=pytest.mark.slow)


@pytest.mark.parametrize("max_examples", [FEW, MANY])
@pytest.mark.parametrize("adapter", GOOD_ROWS)
def test_adapters_raise_only_data_errors_for_any_row(adapter, max_examples):
    good = GOOD_ROWS[adapter]

    @settings(max_examples=max_examples)
    @given(
        changes=st.dictionaries(st.sampled_from(sorted(good)), anything, max_size=2),
        others=st.dictionaries(st.sampled_from(COLUMNS), anything, max_size=3),
        missing=st.sets(st.sampled_from(sorted(good)), max_size=1),
    )
    def check(changes, others, missing):
        row = {name: value for name, value in {**good, **others, **changes}.items() if name not in missing}
        try:
            outcome = read(adapter, row)
        except DataError as error:
            outcome = str(error)
        assert outcome.startswith("rows.jsonl row 1: ") if isinstance(outcome, str) else len(outcome) <= 1

    check()


@pytest.mark.parametrize("max_examples", [FEW, MANY])
def test_only_data_errors_are_raised_for_any_demonstration(max_examples):
    @settings(max_examples=max_examples)
    @given(st.dictionaries(st.sampled_from(["messages", "prompt", "completion"]), anything | messages))
    def check(row):
        try:
            demonstration = read_demonstration(SourceRow(row, "here"))
        except DataError:
            return
        assert demonstration.prompt[-1].role == "user"

    check()


def probabilities():
    return st.floats(0, 1)


@st.composite
def signals(draw):
    drawn = {}
    for first, second in (("chosen_safety_score", "rejected_safety_score"), ("chosen_win_rate", "rejected_win_rate")):
        if draw(st.booleans()):
            drawn |= {first: draw(probabilities()), second: draw(probabilities())}
    drawn["expected_safety"] = draw(st.none() | probabilities())
    numbers = st.floats(allow_nan=False, allow_infinity=False)
    for first, second in (("chosen_reward", "rejected_reward"), ("chosen_cost", "rejected_cost")):
        if draw(st.booleans()):
            drawn |= {first: draw(numbers), second: draw(numbers)}
    drawn["reward_margin"] = draw(st.none() | numbers)
    return PairSignals(**drawn)


@st.composite
def preference_pairs(draw):
    roles = st.sampled_from(["system", "user", "assistant"])
    history = draw(st.lists(st.builds(Message, roles, texts), max_size=3))
    labels = draw(st.none() | st.builds(SafetyLabels, st.booleans(), st.booleans()))
    label_source = draw(st.sampled_from(["human", "dataset", "assumed", "judge@1"])) if labels else None
    return PreferencePair(
        (*history, Message("user", draw(texts))),
        draw(texts),
        draw(texts),
        labels,
        draw(signals()),
        harm_categories=tuple(draw(st.lists(texts, max_size=2))),
        provenance=Provenance(draw(texts), label_source, draw(st.sampled_from([None, "main", "buffer"]))),
    )


@pytest.mark.parametrize("max_examples", [FEW, MANY])
def test_a_pair_survives_the_pair_file(max_examples):
    @settings(max_examples=max_examples)
    @given(preference_pairs())
    def check(pair):
        assert read_one("pairs", pair.to_row()) == pair
        assert pair.to_row()["row_id"] == pair.row_id
        swapped = pair.swapped()
        assert swapped.swapped() == pair
        assert read_one("pairs", swapped.to_row()) == swapped
        row, other = pair.to_row(), swapped.to_row()
        for name in row.keys() & SIGNALS & {name for name in SIGNALS if "chosen" in name}:
            assert row[name] == other[name.replace("chosen", "rejected")]

    check()
