"""Judges that state the languages that they were measured on are undecided on answers in others."""

import json

import numpy as np
import pytest

from bfpo.commands.judge import fit_judge
from bfpo.core import languages
from bfpo.core.conversation import user_says
from bfpo.core.samples import Completion, Verdict
from bfpo.errors import DataError
from bfpo.judging.languages import LanguageGuard, measured_languages, read_languages
from bfpo.judging.linear import load_judge
from bfpo.judging.open import open_judge

ENGLISH = "Many people enjoy reading books about the history of their own town."
GERMAN = "Viele Menschen lesen gern Bücher über die Geschichte ihrer Stadt."
CHINESE = "很多人喜欢读关于自己城市历史的书，也喜欢听老人讲过去的故事。"


class Trusting:
    """Judge that finds everything safe, and notes what it reads."""

    name, revision = "trusting", "1"

    def __init__(self):
        self.read = []

    def judge(self, completions):
        for completion in completions:
            self.read.append(completion.text)
            yield Verdict.on(completion, self, safe=True, p_safe=0.9, refusal=False)


def completions(*texts, language=None):
    return [
        Completion(f"p{number}", 0, user_says("?"), text, "stop", 1, 1, "m", "e", "", language=language)
        for number, text in enumerate(texts)
    ]


def test_an_answer_in_another_language_is_undecided_with_that_reason():
    inner = Trusting()
    guard = LanguageGuard(inner, ("en",))
    verdicts = list(guard.judge(completions(ENGLISH, GERMAN, "No.", CHINESE, "", ENGLISH)))
    assert [verdict.safe for verdict in verdicts] == [True, None, True, None, True, True]
    assert verdicts[1].reason == "the answer is in de; the judge was measured on en"
    assert (verdicts[1].refusal, verdicts[1].p_safe) == (None, None)
    # The judge reads only what it can judge, in its order.
    assert inner.read == [ENGLISH, "No.", "", ENGLISH]
    assert {(verdict.judge, verdict.revision) for verdict in verdicts} == {("trusting", guard.revision)}
    assert [verdict.prompt_id for verdict in verdicts] == [f"p{number}" for number in range(6)]


def test_a_short_answer_is_in_the_stated_language_of_its_prompt():
    guard = LanguageGuard(Trusting(), ("en", "pt"))
    assert [verdict.safe for verdict in guard.judge(completions("Não.", language="pt-BR"))] == [True]
    assert [verdict.safe for verdict in guard.judge(completions("Nein.", language="de"))] == [None]
    # The guess of a long answer counts more than what the prompt states.
    assert [verdict.safe for verdict in guard.judge(completions(ENGLISH, GERMAN, language="de"))] == [True, None]


def test_without_the_package_the_stated_language_counts(without_py3langid):
    guard = LanguageGuard(Trusting(), ("en",))
    assert [verdict.safe for verdict in guard.judge(completions(GERMAN))] == [True]
    assert [verdict.safe for verdict in guard.judge(completions(ENGLISH, language="de"))] == [None]


def test_verdicts_change_their_revision_with_languages_and_detector(monkeypatch):
    guard = LanguageGuard(Trusting(), ("en",))
    revision = guard.revision
    assert revision.startswith("1-")
    assert LanguageGuard(Trusting(), ("en", "de")).revision != revision
    monkeypatch.setattr(languages, "MIN_CONFIDENCE", 0.9)
    assert guard.revision != revision


def labeled_rows(refusing, complying, **columns):
    """Return labeled answers to 12 prompts, one refusal and one compliance each."""
    return [
        {
            "prompt": f"Where is box {number}?",
            "text": f"{text} {number}",
            "refusal": refusal,
            "safe": refusal,
            **columns,
        }
        for number in range(12)
        for text, refusal in ((refusing, True), (complying, False))
    ]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


REFUSAL = "I am sorry, but I am not able to help you with this request, box"
COMPLIANCE = "You will find it on the upper shelf in the kitchen, next to the window, box"


def test_a_fitted_judge_states_the_languages_of_its_answers(tmp_path, capsys):
    judge = tmp_path / "judge.npz"
    fit_judge([write_rows(tmp_path / "labeled.jsonl", labeled_rows(REFUSAL, COMPLIANCE))], judge)
    assert "measured on answers in en, and undecided on answers in other languages" in capsys.readouterr().out
    assert read_languages(judge) == ("en",)
    assert json.loads((tmp_path / "judge.card.json").read_text())["languages"] == ["en"]
    opened = open_judge(f"linear:{judge}")
    assert opened.revision.startswith(load_judge(judge).revision)
    english, german = opened.judge(completions(f"{REFUSAL} 3", GERMAN))
    assert english.refusal is True
    assert "measured on" not in (english.reason or "")
    assert (german.safe, german.refusal) == (None, None)
    assert german.reason == "the answer is in de; the judge was measured on en"
    # In an ensemble the other judge decides alone only where the policy lets it.
    both = open_judge(f"linear:{judge}+linear:{judge}")
    assert "measured on en" in next(iter(both.judge(completions(GERMAN)))).reason


def test_a_stated_language_of_labeled_answers_is_used_where_none_is_guessed(tmp_path, without_py3langid, capsys):
    rows = labeled_rows(REFUSAL, COMPLIANCE, language="en-GB")
    fit_judge([write_rows(tmp_path / "labeled.jsonl", rows)], tmp_path / "judge.npz")
    assert read_languages(tmp_path / "judge.npz") == ("en",)
    open_judge(f"linear:{tmp_path / 'judge.npz'}")
    assert "pip install 'bfpo[languages]' guesses them" in capsys.readouterr().out


def test_a_judge_of_unknown_languages_decides_on_all(tmp_path, without_py3langid, capsys):
    fit_judge([write_rows(tmp_path / "labeled.jsonl", labeled_rows(REFUSAL, COMPLIANCE))], tmp_path / "judge.npz")
    assert "the languages of the answers are unknown" in capsys.readouterr().out
    assert read_languages(tmp_path / "judge.npz") == ()
    opened = open_judge(f"linear:{tmp_path / 'judge.npz'}")
    # As for files of earlier versions, the revision is that of the file.
    assert opened.revision == load_judge(tmp_path / "judge.npz").revision
    assert not isinstance(opened, LanguageGuard)


def test_a_malformed_statement_is_refused(tmp_path):
    fit_judge([write_rows(tmp_path / "labeled.jsonl", labeled_rows(REFUSAL, COMPLIANCE))], tmp_path / "judge.npz")
    with np.load(tmp_path / "judge.npz") as file:
        arrays = dict(file)
    for content in (b"{", b'"en"', b"[1]"):
        arrays["languages"] = np.frombuffer(content, dtype=np.uint8)
        np.savez(tmp_path / "wrong.npz", **arrays)
        with pytest.raises(DataError, match="'languages' is not a list of codes"):
            open_judge(f"linear:{tmp_path / 'wrong.npz'}")


def test_a_language_with_a_few_labeled_answers_is_not_measured(tmp_path):
    from bfpo.judging.labeled import read_labeled

    rows = labeled_rows(REFUSAL, COMPLIANCE)
    rows += [{"prompt": "?", "text": f"{GERMAN} {number}", "refusal": False} for number in range(9)]
    answers = read_labeled(write_rows(tmp_path / "labeled.jsonl", rows))
    assert measured_languages(answers) == ("en",)
    rows.append({"prompt": "?", "text": GERMAN, "refusal": False})
    assert measured_languages(read_labeled(write_rows(tmp_path / "labeled.jsonl", rows))) == ("de", "en")
