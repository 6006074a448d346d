"""Conversations of several turns as pairs: the last answers, whole trajectories, or turn by turn."""

import json

import pytest

from bfpo.config.recipes import DataRecipe, Source
from bfpo.core.conversation import Message, user_says
from bfpo.core.pairs import PreferencePair, SafetyLabels
from bfpo.data.load import load_pairs
from bfpo.data.prepare import prepare, write_prepared
from bfpo.errors import DataError

ASKED = {"role": "user", "content": "Is it cold?"}
MORE = {"role": "user", "content": "And tomorrow?"}


def answer(text):
    return {"role": "assistant", "content": text}


def conversation(first, second):
    return [ASKED, answer(first), MORE, answer(second)]


@pytest.fixture
def load(tmp_path):
    def load(row, **options):
        path = tmp_path / "rows.jsonl"
        path.write_text(json.dumps(row) + "\n")
        report, pairs = load_pairs(Source(path=str(path), **options), "main")
        return report, pairs

    return load


def labeled(chosen, rejected, is_chosen_safe=True, is_rejected_safe=False, **others):
    row = {"chosen": chosen, "rejected": rejected}
    return row | {"is_chosen_safe": is_chosen_safe, "is_rejected_safe": is_rejected_safe} | others


def test_the_last_answers_are_compared_after_one_history(load):
    _, (pair,) = load(labeled(conversation("Yes.", "Warmer."), conversation("Yes.", "Colder.")))
    assert (pair.chosen, pair.rejected) == ("Warmer.", "Colder.")
    assert [message.content for message in pair.prompt] == ["Is it cold?", "Yes.", "And tomorrow?"]


def test_trajectories_begin_where_the_conversations_differ(load):
    row = labeled(conversation("Yes.", "Warmer."), conversation("No.", "Warmer."))
    with pytest.raises(DataError, match=r"no pairs in .*histories differ"):
        load(row)
    _, (pair,) = load(row, turns="all")
    assert pair.prompt == user_says("Is it cold?")
    assert [message.content for message in pair.chosen] == ["Yes.", "And tomorrow?", "Warmer."]
    assert [message.content for message in pair.rejected] == ["No.", "And tomorrow?", "Warmer."]


def test_with_a_prompt_column_the_answers_are_whole(load):
    turns = [answer("Yes."), MORE, answer("Warmer.")], [answer("No."), MORE, answer("Colder.")]
    _, (pair,) = load(labeled(*turns, prompt="Is it cold?"))
    assert pair.prompt == user_says("Is it cold?")
    assert len(pair.chosen) == len(pair.rejected) == 3


def test_each_turn_is_a_pair_with_its_label_after_the_more_helpful_history(load):
    row = labeled(conversation("Yes.", "Warmer."), conversation("No.", "Colder."), [True, False], [True, True])
    _, pairs = load(row, turns="each")
    history = (*user_says("Is it cold?"), Message("assistant", "Yes."), *user_says("And tomorrow?"))
    assert [(pair.prompt, pair.chosen, pair.rejected) for pair in pairs] == [
        (user_says("Is it cold?"), "Yes.", "No."),
        (history, "Warmer.", "Colder."),
    ]
    assert [pair.labels for pair in pairs] == [SafetyLabels(True, True), SafetyLabels(False, True)]


def test_each_turn_has_the_label_of_its_reasoning_and_labels_can_be_a_text(load):
    row = labeled(conversation("Yes.", "Warmer."), conversation("No.", "Colder."), "[true, false]", "[true, true]")
    row |= {"is_chosen_reasoning_safe": [False, True], "is_rejected_reasoning_safe": [True, True]}
    _, pairs = load(row, turns="each")
    assert [pair.labels for pair in pairs] == [SafetyLabels(True, True), SafetyLabels(False, True)]
    assert [pair.reasoning_labels for pair in pairs] == [SafetyLabels(False, True), SafetyLabels(True, True)]


def test_only_the_last_turn_of_a_cut_answer_is_cut(load):
    row = labeled(conversation("Yes.", "Warmer."), conversation("No.", "Colder."), [True, False], [True, True])
    _, pairs = load(row | {"is_chosen_cut": True}, turns="each")
    assert [pair.cut for pair in pairs] == [(False, False), (True, False)]


def test_turns_that_are_equal_in_both_are_no_pair(load):
    row = labeled(conversation("Yes.", "Warmer."), conversation("No.", "Warmer."), [True, True], [True, True])
    _, pairs = load(row, turns="each")
    assert [pair.chosen for pair in pairs] == ["Yes."]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (labeled(conversation("a", "b"), conversation("c", "d")), "expected a list with the label of each of the 2"),
        (labeled(conversation("a", "b"), conversation("c", "d"), [True], [True]), "each of the 2 answers"),
        (labeled("a", "b", prompt="c"), "`turns: each` needs conversations in 'chosen' and 'rejected', not strings"),
        (
            labeled(conversation("a", "b"), [ASKED, answer("c"), ASKED, answer("d")], [True, True], [True, True]),
            "the turns between the answers differ",
        ),
    ],
)
def test_what_cannot_be_compared_turn_by_turn_is_said(load, row, message):
    with pytest.raises(DataError, match=message):
        load(row, turns="each")


def test_turns_are_refused_for_an_adapter_that_does_not_read_them():
    with pytest.raises(ValueError, match="turns is 'all', which only the adapter 'pairs' reads; got 'hh_rlhf'"):
        Source(path="rows.jsonl", adapter="hh_rlhf", turns="all")


def test_prepared_trajectories_are_read_back_by_default(tmp_path):
    chosen, rejected = conversation("Yes.", "Warmer."), conversation("No.", "Colder.")
    (tmp_path / "rows.jsonl").write_text(json.dumps(labeled(chosen, rejected)) + "\n")
    recipe = DataRecipe(data=[Source(path=str(tmp_path / "rows.jsonl"), turns="all")])
    prepared = prepare(recipe)
    write_prepared(prepared, tmp_path / "prepared")
    again = prepare(DataRecipe(data=[Source(path=str(tmp_path / "prepared/pairs.jsonl"))]))
    (pair,), (before,) = again.train, prepared.train
    assert isinstance(pair, PreferencePair)
    assert (pair.prompt, pair.chosen, pair.rejected, pair.labels) == (
        before.prompt,
        before.chosen,
        before.rejected,
        before.labels,
    )
