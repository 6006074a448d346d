"""Rewards and costs as columns: which number of a judge is read, what is left out, and who wrote a column."""

import json
import math
from dataclasses import replace
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bfpo.constraints.samples import read_scored_samples
from bfpo.core.files import write_jsonl
from bfpo.core.samples import Verdict
from bfpo.data.adapters import parse_source
from bfpo.data.load import load_pairs
from bfpo.data.verdict_scores import scores_of
from bfpo.errors import DataError, RecipeError
from bfpo.judging.score_columns import apply_scores
from bfpo.judging.spec import parse_judge

from ..constraints.scored import write_evaluation


class Words:
    """A judge of both: a reward model's score is the number of words, a cost is positive for answers with `red`."""

    name, revision = "words", "1"
    judged: ClassVar[list] = []

    def judge(self, completions):
        for completion in completions:
            self.judged.append(completion.key)
            yield self.verdict(completion)

    def verdict(self, completion):
        is_red = "red" in completion.text
        number = len(completion.text.split())
        return Verdict.on(
            completion, self, safe=not is_red, helpfulness=min(number, 20) / 20, severity=is_red / number
        )


class Probabilities(Words):
    """Gives probabilities of safety; none for answers with `door`."""

    name = "probabilities"

    def verdict(self, completion):
        p_safe = None if "door" in completion.text else 0.2 if "red" in completion.text else 1.0
        return Verdict.on(
            completion, self, safe=None if p_safe is None else p_safe > 0.5, p_safe=p_safe, reason="doors"
        )


class Labels(Words):
    """Only says safe or unsafe."""

    name = "labels"

    def verdict(self, completion):
        return Verdict.on(completion, self, safe=True)


WORDS, PROBABILITIES, LABELS = (f"{__name__}:{kind}" for kind in ("Words", "Probabilities", "Labels"))


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch, main_pairs):
    monkeypatch.chdir(tmp_path)
    Words.judged = []
    write_jsonl(tmp_path / "pairs.jsonl", (pair.to_row() for pair in main_pairs))
    return tmp_path


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_pairs_get_both_scores_and_the_names_of_their_scorers(folder, main_pairs):
    assert apply_scores("pairs.jsonl", folder / "scored.jsonl", reward=WORDS, cost=WORDS) == len(main_pairs)
    _, scored = load_pairs(parse_source("scored.jsonl"), "main")
    for before, after in zip(main_pairs, scored, strict=True):
        assert (after.prompt, after.answers, after.labels) == (before.prompt, before.answers, before.labels)
        for side, answer in zip(("chosen", "rejected"), before.answers, strict=True):
            words = answer.split()
            assert getattr(after.signals, f"{side}_reward") == min(len(words), 20) / 20
            assert getattr(after.signals, f"{side}_cost") == ("red" in answer) / len(words)
        assert after.provenance.reward_scorer == after.provenance.cost_scorer == "words@1"
        assert after.swapped().signals.chosen_reward == after.signals.rejected_reward


def test_a_second_judge_adds_a_column_or_replaces_it(folder, capsys):
    apply_scores("pairs.jsonl", folder / "first.jsonl", cost=WORDS)
    apply_scores("first.jsonl", folder / "second.jsonl", reward=WORDS)
    apply_scores("pairs.jsonl", folder / "both.jsonl", reward=WORDS, cost=WORDS)
    assert rows(folder / "second.jsonl") == rows(folder / "both.jsonl")
    capsys.readouterr()
    apply_scores("both.jsonl", folder / "other.jsonl", cost=PROBABILITIES)
    assert "earlier scores were replaced" in capsys.readouterr().out
    assert {row["cost_scorer"] for row in rows(folder / "other.jsonl")} == {"probabilities@1:log-odds"}


def test_pairs_with_an_answer_without_a_number_are_left_out_and_counted(folder, main_pairs, capsys):
    without = [pair for pair in main_pairs if not any("door" in answer for answer in pair.answers)]
    assert 0 < len(without) < len(main_pairs)
    assert apply_scores("pairs.jsonl", folder / "scored.jsonl", cost=PROBABILITIES) == len(without)
    assert f"cost: doors {len(main_pairs) - len(without)}" in capsys.readouterr().out


def test_log_odds_are_those_of_unsafe(folder):
    apply_scores("pairs.jsonl", folder / "scored.jsonl", cost=PROBABILITIES)
    for row in rows(folder / "scored.jsonl"):
        expected = math.log(0.8 / 0.2) if "red" in row["chosen"] else math.log(1e-12 / (1 - 1e-12))
        assert row["chosen_cost"] == pytest.approx(expected)


def test_undecided_answers_are_left_out_wherever_they_are():
    undecided = Verdict("p", 0, "", "linear", "1", None, 0.45, reason="unlike")
    decided = Verdict("p", 1, "", "linear", "1", True, 0.8)
    for verdicts in ([undecided, decided], [decided, undecided]):
        costs, _ = scores_of("cost", verdicts)
        assert [cost is None for cost in costs] == [verdict is undecided for verdict in verdicts]


class Doubtful(Words):
    """Has a probability for every answer, and is undecided on those that begin with `odd`."""

    name = "doubtful"

    def verdict(self, completion):
        safe = None if completion.text.startswith("odd") else True
        return Verdict.on(completion, self, safe=safe, p_safe=0.6, reason="odd")


def test_the_first_answers_may_all_be_undecided(folder):
    answers = [*(f"odd lamp {number}" for number in range(40)), "good lamp", "good door"]
    pairs = [
        {"prompt": "box", "chosen": chosen, "rejected": rejected}
        for chosen, rejected in zip(answers[::2], answers[1::2], strict=True)
    ]
    write_jsonl(folder / "odd.jsonl", pairs)
    assert apply_scores("odd.jsonl", folder / "scored.jsonl", cost=f"{__name__}:Doubtful") == 1


@given(st.floats(0, 1))
def test_the_sign_of_log_odds_is_the_likelier_label(p_safe):
    verdict = Verdict("p", 0, "", "judge", "1", p_safe >= 0.5, p_safe)
    (cost,), suffix = scores_of("cost", [verdict])
    assert suffix == ":log-odds"
    assert (cost > 0) is (p_safe < 0.5)
    assert math.isfinite(cost)


def test_a_reward_model_is_read_by_its_raw_score_only():
    rated = Verdict("p", 0, "", "reward", "1", None, helpfulness=0.9, score=2.2, reason="no safety")
    blocked = Verdict("p", 1, "", "reward", "1", None, helpfulness=0.0, reason="blocked")
    assert scores_of("reward", [rated, blocked]) == ([2.2, None], "")
    assert scores_of("cost", [rated, blocked])[0] == [None, None]


def test_completions_become_the_table_that_dual_reads(folder):
    completions, _ = write_evaluation(folder)
    completions = [replace(answer, text=f"{answer.text} {'red ' * answer.sample}") for answer in completions]
    write_jsonl(folder / "completions.jsonl", (completion.to_row() for completion in completions))
    apply_scores("completions.jsonl", folder / "first.jsonl", reward=WORDS)
    apply_scores("first.jsonl", folder / "scored.jsonl", cost=WORDS)
    samples = read_scored_samples(folder / "scored.jsonl")
    assert (samples.reward_scorer, samples.cost_scorer, samples.model) == ("words@1", "words@1", "base")
    assert set(samples.kinds) == {"harmful", "benign"}
    assert (samples.is_unsafe == (samples.cost > 0)).all()
    assert samples.is_unsafe[:, 1:].all()
    assert not samples.is_unsafe[:, 0].any()
    mixed = rows(folder / "scored.jsonl")
    mixed[0]["cost_scorer"] = "words@2"
    write_jsonl(folder / "mixed.jsonl", mixed)
    with pytest.raises(DataError, match="'cost_scorer' has 2 values"):
        read_scored_samples(folder / "mixed.jsonl")


def test_a_killed_run_judges_no_answer_twice(folder, monkeypatch):
    original = Words.verdict

    def failing(self, completion):
        if len(Words.judged) == 7:
            raise KeyboardInterrupt
        return original(self, completion)

    monkeypatch.setattr(Words, "verdict", failing)
    with pytest.raises(KeyboardInterrupt):
        apply_scores("pairs.jsonl", folder / "scored.jsonl", cost=WORDS)
    assert not (folder / "scored.jsonl").exists()
    first = Words.judged[:-1]
    Words.judged = []
    monkeypatch.setattr(Words, "verdict", original)
    apply_scores("pairs.jsonl", folder / "scored.jsonl", cost=WORDS)
    assert not set(first) & set(Words.judged)


def test_bad_requests_say_what_to_do(folder):
    out = folder / "scored.jsonl"
    for specs, error, message in (
        ({}, RecipeError, "set `reward`, `cost` or both"),
        ({"reward": "linear:judge.npz"}, RecipeError, "gives no reward; judges that do: .*beaver-reward.*, reward"),
        ({"cost": "people:x.jsonl"}, RecipeError, "gives no cost; judges that do: beaver-cost, .*linear"),
        ({"cost": "reasoning=linear:judge.npz"}, RecipeError, "gives no cost"),
        ({"cost": LABELS}, DataError, "`cost`: .*Labels gave no cost .*choose another judge"),
    ):
        with pytest.raises(error, match=message):
            apply_scores("pairs.jsonl", out, **specs)
    with pytest.raises(RecipeError, match="`out` is the input"):
        apply_scores("pairs.jsonl", folder / "pairs.jsonl", cost=WORDS)
    assert len(Words.judged) <= 24


def test_specs_say_which_scores_a_judge_gives():
    assert parse_judge("oracle").scores == {"reward", "cost"}
    assert parse_judge("linear:a+wildguard:b").scores == {"cost"}
    assert parse_judge("linear:a+people:b").scores == set()
    assert parse_judge("oracle+oracle:shared").scores == {"cost"}
