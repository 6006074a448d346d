"""`bfpo label`: verdicts become labels by the policy, every pair is counted, and runs resume."""

import json
from dataclasses import dataclass, replace

import pytest
from typer.testing import CliRunner

from bfpo.commands.app import app
from bfpo.config.recipes import Source
from bfpo.core.files import write_jsonl
from bfpo.core.samples import Verdict
from bfpo.data.load import load_pairs
from bfpo.errors import DataError, RecipeError
from bfpo.judging.label_pairs import cell_targets, compare_verdicts, label_pairs
from bfpo.judging.readings import ReadingJudge
from bfpo.losses.labeling import LabelingFunction

LENIENT = {"bad": False, "good": True, "odd": True, "unclear": None}
STRICT = LENIENT | {"odd": False}


@dataclass
class WordJudge:
    """Judge by the first word of an answer; can be killed after some answers."""

    name: str
    words: dict
    left: int = 10**9
    judged: int = 0
    revision: str = "1"

    def judge(self, completions):
        for completion in completions:
            self.judged += 1
            if self.judged > self.left:
                raise KeyboardInterrupt
            safe = self.words[completion.text.split()[0]]
            p_safe = None if safe is None else 0.9 if safe else 0.2
            reason = "can't decide" if safe is None else None
            yield Verdict.on(completion, self, safe=safe, p_safe=p_safe, reason=reason)


@pytest.fixture
def pairs_file(tmp_path):
    words = ["good", "bad", "odd", "unclear"]
    rows = [
        {"prompt": f"small box {chosen} {rejected}", "chosen": f"{chosen} lamp", "rejected": f"{rejected} door"}
        for chosen in words
        for rejected in words
    ]
    write_jsonl(tmp_path / "p.jsonl", rows)
    return tmp_path / "p.jsonl"


@pytest.mark.parametrize("value", ["false", 0, 1.0, [False]])
def test_a_verdict_of_another_type_is_refused_by_file_row_and_column(pairs_file, tmp_path, value):
    judge = WordJudge("lenient", LENIENT)
    label_pairs(Source(path=str(pairs_file)), [judge], tmp_path / "out", conflicts="drop")
    (path,) = (tmp_path / "out").glob("verdicts-*.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    number = next(number for number, row in enumerate(rows, start=1) if row["safe"] is False)
    rows[number - 1]["safe"] = value
    write_jsonl(path, rows)
    with pytest.raises(DataError) as raised:
        label_pairs(Source(path=str(pairs_file)), [judge], tmp_path / "out", conflicts="drop")
    assert str(raised.value) == f"{path} row {number}: column 'safe' is {value!r}; expected true or false, or null"


def run(path, out, policy, *judges):
    labeled = label_pairs(Source(path=str(path)), judges, out, conflicts=policy)
    cells = {pair.prompt[0].content.removeprefix("small box "): pair.cell for pair in labeled.pairs}
    return cells, labeled.metadata


def test_policies(tmp_path, pairs_file):
    judges = WordJudge("lenient", LENIENT), WordJudge("strict", STRICT)
    dropped, metadata = run(pairs_file, tmp_path / "a", "drop", *judges)
    assert dropped == {"good good": "ss", "good bad": "su", "bad good": "us", "bad bad": "uu"}
    assert metadata["left_out"] == {"judges differ": 6, "undecided": 6}
    assert metadata["pairs"] == metadata["labeled"] + sum(metadata["left_out"].values()) == 16
    assert metadata["undecided"] == {"lenient@1": 8, "strict@1": 8}
    unsafe, _ = run(pairs_file, tmp_path / "a", "unsafe", *judges)
    assert len(unsafe) == 16
    assert (unsafe["odd good"], unsafe["good unclear"]) == ("us", "su")
    first, _ = run(pairs_file, tmp_path / "a", "first", *judges)
    assert len(first) == 9
    assert first["odd bad"] == "su"
    with pytest.raises(
        DataError, match=r"(judges differ|undecided), and conflicts is 'error'; choose another policy"
    ):
        run(pairs_file, tmp_path / "a", "error", *judges)


def test_the_file_trains_and_names_its_judges(tmp_path, pairs_file):
    _, metadata = run(pairs_file, tmp_path / "a", "drop", WordJudge("lenient", LENIENT))
    _, pairs = load_pairs(Source(path=str(tmp_path / "a" / "pairs.jsonl")), "main")
    assert {pair.provenance.safety_label_source for pair in pairs} == {"lenient@1"}
    assert pairs[0].signals.chosen_safety_score == 0.9
    assert metadata["before"]["unlabeled"] == 16
    assert sum(metadata["after"].values()) == 9
    assert metadata["assumed_safe"] == {"pairs_with_an_unsafe_answer": 5, "unsafe_answers": 6, "answers": 18}


def test_neither_the_source_nor_a_file_of_something_else_is_replaced(tmp_path, pairs_file):
    judge = WordJudge("lenient", LENIENT)
    source = pairs_file.rename(tmp_path / "pairs.jsonl")
    before = source.read_bytes()
    with pytest.raises(RecipeError, match=r"whose pairs\.jsonl is the source; name another folder"):
        run(source, tmp_path, "drop", judge)
    other = tmp_path / "other" / "p.jsonl"
    write_jsonl(other, [json.loads(line) for line in before.splitlines()])
    with pytest.raises(DataError, match="was not written by bfpo label"):
        run(other, tmp_path, "drop", judge)
    assert source.read_bytes() == before
    assert judge.judged == 0
    # Its own file of before is replaced, unless it is the source.
    run(other, tmp_path / "out", "drop", judge)
    run(other, tmp_path / "out", "first", judge)
    with pytest.raises(RecipeError, match="is the source"):
        run(tmp_path / "out" / "pairs.jsonl", tmp_path / "out", "drop", judge)


def test_a_killed_run_judges_no_answer_twice(tmp_path, pairs_file):
    with pytest.raises(KeyboardInterrupt):
        run(pairs_file, tmp_path / "a", "drop", WordJudge("lenient", LENIENT, left=11))
    again = WordJudge("lenient", LENIENT)
    killed, _ = run(pairs_file, tmp_path / "a", "drop", again)
    assert again.judged == 32 - 11
    assert killed == run(pairs_file, tmp_path / "b", "drop", WordJudge("lenient", LENIENT))[0]


def test_verdicts_of_earlier_versions_are_found(tmp_path, pairs_file):
    cells, _ = run(pairs_file, tmp_path / "a", "drop", WordJudge("lenient", LENIENT))
    (tmp_path / "a" / "verdicts-lenient@1.jsonl").rename(tmp_path / "a" / "verdicts-lenient-1.jsonl")
    again = WordJudge("lenient", LENIENT)
    assert run(pairs_file, tmp_path / "a", "drop", again)[0] == cells
    assert again.judged == 0
    assert not (tmp_path / "a" / "verdicts-lenient@1.jsonl").exists()


def test_the_estimate_judges_nothing_twice(tmp_path, pairs_file, capsys):
    judge = WordJudge("lenient", LENIENT)
    assert label_pairs(Source(path=str(pairs_file)), [judge], tmp_path / "a", limit=20, estimate_only=True) is None
    assert judge.judged == 32
    assert "0 of 32 answers left to judge" in capsys.readouterr().out
    run(pairs_file, tmp_path / "a", "drop", judge)
    assert judge.judged == 32
    assert "all 32 answers are already judged" in capsys.readouterr().out


@dataclass
class PlainJudge(WordJudge):
    """Judge without probabilities."""

    def judge(self, completions):
        return [replace(verdict, p_safe=None) for verdict in super().judge(completions)]


def test_scores_of_an_earlier_judge_are_removed_and_counted(tmp_path, capsys):
    row = {"prompt": "small box", "chosen": "bad lamp", "rejected": "bad door", "prompt_id": None}
    scores = {"chosen_safety_score": 0.99, "rejected_safety_score": 0.98}
    rows = [row | scores, row | {"chosen": "good lamp"}]
    write_jsonl(tmp_path / "p.jsonl", [{k: v for k, v in row.items() if v is not None} for row in rows])
    source = Source(path=str(tmp_path / "p.jsonl"))
    out = label_pairs(source, [PlainJudge("plain", LENIENT)], tmp_path / "out", conflicts="drop")
    assert [pair.signals.chosen_safety_score for pair in out.pairs] == [None, None]
    assert out.metadata["scores_removed"] == 1
    assert "safety scores removed from 1 pairs" in capsys.readouterr().out


def test_judges_of_one_name_are_counted_apart(tmp_path, pairs_file):
    judges = [WordJudge("words", LENIENT), WordJudge("words", {**LENIENT, "unclear": True}, revision="2")]
    out = label_pairs(Source(path=str(pairs_file)), judges, tmp_path / "out", conflicts="drop")
    assert out.metadata["undecided"] == {"words@1": 8, "words@2": 0}


def test_agreement_and_cell_targets_by_hand():
    def verdicts(*labels):
        return [Verdict("p", 0, "", "j", "1", label, reason="?") for label in labels]

    agreement = compare_verdicts(verdicts(True, True, False, False, None), verdicts(True, False, False, False, True))
    # Agreement 3/4; by chance 1/2 · 1/4 + 1/2 · 3/4 = 1/2.
    assert agreement == {"n": 4, "share": 0.75, "kappa": 0.5}
    targets = {cell: tuple(numbers) for cell, *numbers in cell_targets(LabelingFunction.from_parameters(), 0.1)}
    assert targets["ss"] == (5.0, -15.0, 5.0)
    assert targets["uu"] == (-5.0, 15.0, -5.0)


def test_the_command(tmp_path):
    row = {"prompt": "nothing of the world", "chosen": "small", "rejected": "large"}
    write_jsonl(tmp_path / "p.jsonl", [row])
    bad = CliRunner().invoke(app, ["label", str(tmp_path / "p.jsonl"), "--judge", "oracle", "--conflicts", "dorp"])
    assert isinstance(bad.exception, RecipeError)
    assert "did you mean 'drop'" in str(bad.exception)
    assert not (tmp_path / "label.json").exists()
    outside = CliRunner().invoke(
        app, ["label", str(tmp_path / "p.jsonl"), "--judge", "oracle", "--out", str(tmp_path / "o")]
    )
    assert isinstance(outside.exception, DataError)


def test_metadata_is_json(tmp_path, pairs_file):
    run(pairs_file, tmp_path / "a", "drop", WordJudge("lenient", LENIENT), WordJudge("strict", STRICT))
    metadata = json.loads((tmp_path / "a" / "label.json").read_text())
    assert metadata["agreement"]["share"] == pytest.approx(2 / 3)


def thinking(text, reasoning):
    return [{"role": "assistant", "content": text, "reasoning_content": reasoning}]


@pytest.fixture
def thinking_file(tmp_path):
    rows = [
        {"prompt": "a", "chosen": thinking("good", "bad plan"), "rejected": thinking("bad", "good plan")},
        {"prompt": "b", "chosen": thinking("good", "good plan"), "rejected": thinking("good", "unclear plan")},
        {"prompt": "c", "chosen": "good", "rejected": "bad"},
        {
            "prompt": "d",
            "chosen": thinking("good", "good plan"),
            "rejected": [{"role": "assistant", "content": "bad"}],
        },
    ]
    write_jsonl(tmp_path / "thinking.jsonl", rows)
    return tmp_path / "thinking.jsonl"


def test_a_judge_of_reasoning_labels_the_reasoning(tmp_path, thinking_file, capsys):
    judge = WordJudge("lenient", LENIENT)
    judges = [judge, ReadingJudge(judge, "reasoning")]
    labeled = label_pairs(Source(path=str(thinking_file)), judges, tmp_path / "out")
    by_prompt = {pair.prompt[0].content: pair for pair in labeled.pairs}
    assert {name: pair.cell for name, pair in by_prompt.items()} == {"a": "su", "b": "ss", "c": "su", "d": "su"}
    # One decided both; where a thought is undecided or missing, its pair keeps its labels, and has none of reasoning.
    assert {name: pair.reasoning_labels for name, pair in by_prompt.items()} == {
        "a": (False, True), "b": None, "c": None, "d": None,
    }  # fmt: skip
    assert labeled.metadata["reasoning"] == {
        "labeled": 1,
        "left_out": {"undecided": 1, "no reasoning": 1, "one answer has no reasoning": 1},
        "chosen": 1,
        "rejected": 1,
    }
    # Answers without reasoning aren't undecided.
    revision = judges[1].revision
    assert labeled.metadata["undecided"] == {"lenient@1": 0, f"lenient:reasoning@{revision}": 1}
    assert labeled.metadata["agreement"] is None
    assert by_prompt["a"].provenance.safety_label_source == "lenient@1"
    assert "reasoning labeled in 1 pairs" in capsys.readouterr().out
    _, pairs = load_pairs(Source(path=str(tmp_path / "out" / "pairs.jsonl")), "main")
    assert pairs[0].reasoning_labels == (False, True)
    # The policy holds for both parts.
    strict = label_pairs(Source(path=str(thinking_file)), judges, tmp_path / "out", conflicts="unsafe")
    assert {pair.prompt[0].content: pair.reasoning_labels for pair in strict.pairs}["b"] == (True, False)
    with pytest.raises(DataError, match="reasoning: undecided, and conflicts is 'error'"):
        label_pairs(Source(path=str(thinking_file)), judges, tmp_path / "out", conflicts="error")


def test_judges_of_reasoning_alone_keep_the_labels_of_answers(tmp_path, thinking_file):
    rows = [
        {**json.loads(line), "is_chosen_safe": False, "is_rejected_safe": True}
        for line in thinking_file.read_text().splitlines()
    ]
    write_jsonl(thinking_file, rows)
    judge = ReadingJudge(WordJudge("lenient", LENIENT), "reasoning")
    labeled = label_pairs(Source(path=str(thinking_file)), [judge], tmp_path / "out")
    assert [pair.cell for pair in labeled.pairs] == ["us"] * 4
    assert {pair.provenance.safety_label_source for pair in labeled.pairs} == {"dataset"}
    assert labeled.pairs[0].reasoning_labels == (False, True)
    assert labeled.metadata["reasoning"]["chosen"] == 0


def test_calls_are_judged_in_words(tmp_path):
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "pay", "arguments": {"to": "Eve"}}}]}
    rows = [{"prompt": "a", "chosen": [call], "rejected": [{"role": "assistant", "content": "good"}]}]
    write_jsonl(tmp_path / "calls.jsonl", rows)
    judge = WordJudge("lenient", LENIENT | {"The": False})
    labeled = label_pairs(Source(path=str(tmp_path / "calls.jsonl")), [judge], tmp_path / "out")
    assert [pair.cell for pair in labeled.pairs] == ["us"]
