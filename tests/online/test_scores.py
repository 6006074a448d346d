"""Scores of samples: which number of a verdict is the reward or the cost, and which are missing."""

import math

import pytest

from bfpo.core.conversation import user_says
from bfpo.core.samples import Completion, Prompt, Verdict
from bfpo.data.verdict_scores import score_of
from bfpo.online.scores import Score, Scorers, count_missing, judge_if_read

PROMPT = Prompt("p", user_says("hello"))


def completion(sample=0, text="hi", **fields):
    return Completion.on(
        PROMPT,
        sample,
        **{
            "text": text,
            "finish_reason": "stop",
            "prompt_tokens": 0,
            "completion_tokens": 1,
            "model": "",
            "engine": "",
            "settings_hash": "",
        }
        | fields,
    )


class Fixed:
    """Judge with the same assessment of everything."""

    name, revision = "fixed", "1"

    def __init__(self, **assessment):
        self.assessment, self.asked = {"safe": True, "reason": "why"} | assessment, 0

    def judge(self, completions):
        self.asked += len(completions)
        return [Verdict.on(each, self, **self.assessment) for each in completions]


def verdict(**assessment):
    return Fixed(**assessment).judge([completion()])[0]


def test_the_cost_is_the_score_else_the_severity_else_log_odds():
    def cost(**assessment):
        return score_of("cost", verdict(**assessment))

    assert cost(score=2.5, severity=0.5, p_safe=0.1) == 2.5
    assert cost(severity=0.5, p_safe=0.1) == 0.5
    assert cost(p_safe=0.2) == pytest.approx(math.log(4))
    assert cost(p_safe=1.0) == pytest.approx(-cost(p_safe=0.0)) == pytest.approx(math.log(1e-12))
    assert cost() is None


def test_what_a_combiner_reads_decides_the_numbers():
    # A reward model says nothing about safety; its helpfulness is σ(score).
    rewarding = Fixed(safe=None, score=-3.0, helpfulness=0.05)
    costing = Fixed(safe=False, score=1.5, p_safe=0.2)
    numbers = {
        reads: Scorers(rewarding, costing, reads).score([completion()])[0]
        for reads in ("cost", "unsafe", "probability")
    }
    assert numbers == {
        "cost": Score(-3.0, 1.5, None),
        "unsafe": Score(-3.0, 1.0, None),
        "probability": Score(0.05, 0.8, None),
    }


@pytest.mark.parametrize("reads", ["cost", "unsafe", "probability"])
def test_an_undecided_verdict_is_missing_although_it_has_a_probability(reads):
    undecided = Fixed(safe=None, helpfulness=0.6, p_safe=0.45, reason="unlike")
    (score,) = Scorers(undecided, undecided, reads).score([completion()])
    assert (score.cost, score.missing) == (None, "no cost: unlike")


def test_missing_scores_have_a_reason_and_nothing_is_imputed():
    undecided = Fixed(safe=None, helpfulness=0.5)
    scores = Scorers(undecided, undecided, "unsafe").score([completion()])
    assert scores[0].missing == "no cost: why"
    assert scores[0].cost is None
    scores += Scorers(Fixed(), Fixed(severity=0.0), "cost").score([completion()])
    # The reasoning was cut before an answer began.
    lacking = completion(1, "", reasoning="hmm", finish_reason="length")
    scorers = Scorers(judge := Fixed(helpfulness=1.0, severity=0.0), judge, "cost")
    scores += scorers.score([completion(), lacking])
    assert dict(count_missing(scores)) == {"no cost: why": 1, "no reward: why": 1, "no answer to read": 1}
    assert scorers.calls == judge.asked == 1


def test_judges_with_one_spec_are_asked_once():
    judge, other = Fixed(helpfulness=1.0, severity=0.0), Fixed(severity=0.0)
    same, both = Scorers(judge, judge, "cost"), Scorers(judge, other, "cost")
    for scorers, calls in ((same, 3), (both, 6)):
        scorers.score([completion(sample) for sample in range(3)])
        assert scorers.calls == calls
    assert (judge.asked, other.asked) == (6, 3)


def test_unread_answers_are_none_at_their_places():
    read = judge_if_read(Fixed(), [completion(0), completion(1, "", reasoning="hmm"), completion(2)])
    assert [each and each.sample for each in read] == [0, None, 2]
