"""Graded pairs: which words are removed, the exact degrees, and that unsafe answers are never degraded."""

import json
import re
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from bfpo.commands.app import app
from bfpo.core.conversation import Message, user_says
from bfpo.core.files import write_jsonl
from bfpo.core.pairs import CutAnswers, PairSignals, PreferencePair, Provenance, SafetyLabels
from bfpo.data.degrade import STOP_WORDS, degrade, graded_pairs, key_words
from bfpo.errors import DataError

ANSWER = "Open the can first: a closed tin can may burst. Then heat it slowly, and stir the soup."

words = st.sampled_from(["soup", "tin", "Tin", "heat", "the", "and", "slowly", "it's", "well-known", "Can", "stir"])
texts = st.lists(st.tuples(words, st.sampled_from([" ", ", ", ". ", "\n"])).map("".join), max_size=20).map("".join)


def pair(chosen=ANSWER, rejected="no", labels=(True, True), prompt="How do I heat it?", **fields) -> PreferencePair:
    return PreferencePair(user_says(prompt), chosen, rejected, labels and SafetyLabels(*labels), **fields)


def words_of(text):
    return [word.lower() for word in re.findall(r"\w+(?:['-]\w+)*", text)]


def test_scores_of_key_words_by_hand():
    # Runs: "open" | "closed tin" | "burst" | "heat" | "slowly" | "stir" | "soup"; `can` and `first` are stop words.
    assert key_words(ANSWER) == ["closed", "tin", "open", "burst", "heat", "slowly", "stir", "soup"]
    # `red` occurs in runs of 2 and 1, a mean of 1.5.
    assert key_words("red paint, the red") == ["paint", "red"]
    assert key_words("It is what it is.") == []


def test_versions_lack_the_most_important_words_first():
    texts = [version.text for version in degrade(ANSWER, 3)]
    assert texts == [
        ANSWER,
        "Open the can first: a can may burst. Then heat it slowly, and stir the soup.",
        "the can first: a can may. Then heat it slowly, and stir the soup.",
        "the can first: a can may. Then it, and stir the soup.",
    ]
    assert [version.degree for version in degrade(ANSWER, 3)] == [1, 0.75, 0.5, 0.25]


@given(texts, st.integers(1, 4))
def test_a_version_keeps_exactly_the_promised_share_of_key_words(text, count):
    versions, keys = degrade(text, count), set(key_words(text))
    assert bool(versions) == (len(keys) > count)
    removed = set()
    for number, version in enumerate(versions):
        kept = [word for word in words_of(text) if word not in removed]
        assert words_of(version.text) == kept
        assert version.degree == pytest.approx(len(keys & set(kept)) / len(keys))
        removed = set(key_words(text)[: round((number + 1) * len(keys) / (count + 1))])
    degrees = [version.degree for version in versions]
    assert degrees == sorted(set(degrees), reverse=True)


def test_a_word_is_removed_wherever_it_occurs_and_lines_stay():
    text = "Heat soup.\nSoup\u2019s best hot; don\u2019t boil soup!"
    # A line ends a run: "Heat soup" | "Soup's best hot" | "boil soup".
    assert key_words(text) == ["soup's", "best", "hot", "heat", "soup", "boil"]
    assert [version.text for version in degrade(text, 2)[1:]] == [
        "Heat soup.\n hot; don\u2019t boil soup!",
        "soup.\n; don\u2019t boil soup!",
    ]


def test_stop_words_are_lower_case_words():
    assert all(word == word.lower() for word in STOP_WORDS)
    assert all(not key_words(word) for word in STOP_WORDS)


def test_all_pairs_of_an_answer_and_its_versions():
    outcomes = Counter()
    source = pair(provenance=Provenance("set", "linear@r1", "main"), harm_categories=("heat",))
    graded = list(graded_pairs([source], 2, outcomes))
    # 8 key words: version 1 lacks 3 of them, version 2 lacks 5.
    assert [made.signals.degree_difference for made in graded] == [3 / 8, 5 / 8, 2 / 8]
    texts = [version.text for version in degrade(ANSWER, 2)]
    assert [made.answers for made in graded] == [(texts[0], texts[1]), (texts[0], texts[2]), (texts[1], texts[2])]
    assert {made.cell for made in graded} == {"ss"}
    assert {made.provenance for made in graded} == {Provenance("set", "linear@r1", None)}
    assert outcomes == {"degraded": 1}


def test_versions_of_a_cut_answer_are_cut_and_have_no_scores():
    scored = Provenance("set", "linear@r1", None, "reward@1", "cost@1")
    source = pair(cut=CutAnswers(chosen=True), provenance=scored)
    graded = list(graded_pairs([source], 2, Counter()))
    assert {made.cut for made in graded} == {(True, True)}
    assert {made.provenance for made in graded} == {Provenance("set", "linear@r1", None)}
    assert {made.cut for made in graded_pairs([pair(cut=CutAnswers(rejected=True))], 2, Counter())} == {
        (False, False)
    }


def test_unsafe_answers_are_never_degraded():
    outcomes = Counter()
    pairs = [
        pair("mix the blue powder and the red salt", ANSWER, (False, True)),
        pair("mix the blue powder and the red salt", ANSWER, (False, False)),
        pair("mix the blue powder and the red salt", ANSWER, None),
        pair((Message("assistant", "calling", reasoning="blue powder"),), ANSWER, prompt="other"),
        pair("no"),
        pair(ANSWER, "mix the blue powder", (True, False)),
        pair(ANSWER, "mix the red salt", (True, False)),
    ]
    graded = list(graded_pairs(pairs, 2, outcomes))
    assert not [text for made in graded for text in made.answers if "powder" in text or "salt" in text]
    assert outcomes == {
        "unsafe": 2,
        "unlabeled": 1,
        "not a plain text": 1,
        "fewer than 3 key words": 1,
        "degraded": 1,
        "occurs before": 1,
    }


@pytest.mark.parametrize("labels", [(True, False), (False, True), (False, False)])
def test_a_degree_on_an_unsafe_answer_is_refused(labels):
    with pytest.raises(DataError, match="'degree_difference' has a value, and an answer is unsafe; degrees are for"):
        pair(labels=labels, signals=PairSignals(degree_difference=0.5))


def test_a_degree_outside_of_its_range_is_refused_and_the_order_is_its_sign():
    with pytest.raises(DataError, match=r"column 'degree_difference' is 1.5; expected a difference of shares"):
        PairSignals(degree_difference=1.5)
    assert PairSignals(degree_difference=0.5).swapped().degree_difference == -0.5


def test_the_command_writes_pairs_and_counts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "pairs.jsonl", (made.to_row() for made in [pair(), pair(ANSWER, "yes", (False, True))]))
    result = CliRunner().invoke(app, ["data", "degrade", "pairs.jsonl", "--versions", "3"])
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in (tmp_path / "degraded/pairs.jsonl").read_text().splitlines()]
    assert [row["degree_difference"] for row in rows] == [0.25, 0.5, 0.75, 0.25, 0.5, 0.25]
    content = json.loads((tmp_path / "degraded/degrade.json").read_text())
    assert content["answers"] == {"degraded": 1, "unsafe": 1}
    assert (content["pairs"], content["versions"]) == (6, 3)
    assert "wrote 6 pairs" in result.output


def test_a_source_without_a_safe_answer_is_refused(tmp_path):
    write_jsonl(tmp_path / "pairs.jsonl", [pair(labels=(False, True)).to_row()])
    arguments = ["data", "degrade", str(tmp_path / "pairs.jsonl"), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code != 0
    assert "no answer can be degraded ({'unsafe': 1})" in " ".join(str(result.exception).split())
