"""The linear judge, its file, ensembles and agreement, on benign toys."""

import numpy as np
import pytest

from bfpo.core.conversation import user_says
from bfpo.core.samples import Completion, Verdict
from bfpo.errors import DataError, RecipeError
from bfpo.judging.ensemble import Ensemble
from bfpo.judging.features import mask_prompt_words
from bfpo.judging.fit import fit_head
from bfpo.judging.linear import load_judge, save_judge
from bfpo.judging.markers import escape_markers
from bfpo.judging.open import open_judge
from bfpo.stats.agreement import agreement, auroc, calibration_error, kappa, threshold_for

TOPICS = ["bread", "tea", "soup", "rice", "cake", "jam", "pie", "stew", "salad", "toast", "pasta", "curry"]
PROMPTS = [f"how do I make {topic}?" for topic in TOPICS for _ in range(2)]
ANSWERS = [
    text
    for topic in TOPICS
    for text in (f"I'm sorry, I can't help with {topic}.", f"To make {topic}, mix and heat it.")
]
REFUSES = [True, False] * len(TOPICS)


def completion(text, prompt="how do I make bread?"):
    return Completion("p", 0, user_says(prompt), text, "stop", 1, 1, "m", "e", "h")


@pytest.fixture(scope="module")
def head():
    return fit_head("refusal", PROMPTS, ANSWERS, REFUSES)


def test_a_saved_judge_gives_the_same_probabilities(head, tmp_path):
    judge = save_judge({"refusal": head}, tmp_path / "judge.npz")
    fitted = head.probability(PROMPTS, ANSWERS)
    assert np.array_equal(judge.heads["refusal"].probability(PROMPTS, ANSWERS), fitted)
    assert ((fitted > 0.5) == np.array(REFUSES)).all()
    assert load_judge(tmp_path / "judge.npz").revision == judge.revision
    assert load_judge(tmp_path / "judge.npz", threshold=0.9).revision != judge.revision


def test_safety_without_a_head_is_undecided_and_an_empty_answer_too(head, tmp_path):
    judge = save_judge({"refusal": head}, tmp_path / "judge.npz")
    refusal, empty = judge.judge([completion("I cannot help with that."), completion("  ")])
    assert refusal.refusal is True
    assert refusal.p_refusal > 0.9
    assert refusal.safe is None
    assert "no head for safety" in refusal.reason
    assert empty.safe is None
    assert empty.refusal is None


def test_contractions_and_the_prompts_words_do_not_matter():
    for prompt, answer in (("bread?", "I can’t bake bread"), ("cake?", "I cannot bake cake")):
        assert mask_prompt_words(prompt, answer) == "i can not bake _"


def test_a_damaged_file_and_too_few_answers_are_refused(tmp_path):
    (tmp_path / "judge.npz").write_text("nothing")
    with pytest.raises(DataError, match="not the file of a judge"):
        load_judge(tmp_path / "judge.npz")
    with pytest.raises(DataError, match="at least 10"):
        fit_head("refusal", ["a", "b"], ["c", "d"], [True, False])
    with pytest.raises(RecipeError, match="did you mean 'linear'"):
        open_judge("linea:x")
    with pytest.raises(RecipeError, match=r"abstain_threshold is 0\.6"):
        save_judge({}, tmp_path / "judge.npz", abstain_threshold=0.6)


def test_a_plus_sign_joins_judges_only_before_a_kind(head, tmp_path):
    path = tmp_path / "a+b" / "c+2.npz"
    save_judge({"refusal": head}, path)
    assert open_judge(f"linear:{path}").name == "linear"
    unanimous = open_judge(f"linear:{path}+oracle")
    assert (unanimous.name, unanimous.policy) == ("linear+testbed-oracle", "unanimous")
    majority = open_judge(f"majority:oracle+linear:{path}+oracle:separate")
    assert ([type(judge).__name__ for judge in majority.judges], majority.policy) == (
        ["Oracle", "LinearJudge", "Oracle"],
        "majority",
    )
    with pytest.raises(RecipeError, match=r"a \+ joins judges only where a kind follows it; did you mean 'oracle'"):
        open_judge(f"linear:{path}+oracel")
    with pytest.raises(RecipeError, match="at least two judges"):
        open_judge("majority:oracle")


def test_between_two_probabilities_it_is_undecided_with_the_reason(tmp_path):
    head = fit_head("safe", PROMPTS, ANSWERS, REFUSES)

    def load_and_judge(**options):
        judge = load_judge(tmp_path / "judge.npz", **options)
        return judge.revision, *judge.judge([completion(text) for text in texts])

    texts = ["I'm sorry, I can't help with bread.", "To make bread, mix and heat it.", "can't heat it"]
    save_judge({"safe": head}, tmp_path / "judge.npz")
    p = head.probability(["how do I make bread?"] * 3, texts)
    assert p[1] < 0.3 < p[2] < 0.7 < p[0]
    revision, safe, unsafe, undecided = load_and_judge()
    assert (safe.safe, unsafe.safe, undecided.safe) == (True, False, None)
    assert "is between 0.3 and 0.7" in undecided.reason
    assert undecided.p_safe == p[2]
    # With a threshold every answer is decided.
    other_revision, *verdicts = load_and_judge(threshold=p[2])
    assert [verdict.safe for verdict in verdicts] == [True, False, True]
    assert other_revision != revision
    save_judge({"safe": head}, tmp_path / "judge.npz", abstain_threshold=0.5)
    assert load_and_judge()[-1].safe is False


def test_agreement_counts_by_hand():
    result = agreement(
        [True, True, False, False, True], [True, False, False, True, None], [0.9, 0.4, 0.1, 0.8, None], list("abcde")
    )
    assert result.counts == {"true_yes": 1, "false_no": 1, "false_yes": 1, "true_no": 1}
    assert result.undecided == 1
    assert result.balanced_accuracy.value == result.accuracy.value == 0.5
    labels, p = np.array([True, True, False, False]), np.array([0.9, 0.4, 0.1, 0.8])
    assert auroc(labels, p, list("abcd")).value == 0.75
    assert result.kappa == 0
    assert calibration_error(np.array([True, False]), np.array([0.75, 0.25])) == 0.25
    assert kappa([True, None], [True, False]) is None


def test_no_more_unsafe_answers_pass_the_threshold_than_allowed():
    unsafe, p = [True] * 4 + [False], [0.1, 0.2, 0.3, 0.9, 0.95]
    threshold = threshold_for(unsafe, p, 0.25)
    assert sum(bad and q >= threshold for bad, q in zip(unsafe, p, strict=True)) == 1
    assert threshold_for(unsafe, p, 0) > 0.9
    assert threshold_for(unsafe, p, 1) == 0


class ConstantJudge:
    revision = "1"

    def __init__(self, name, safe):
        self.name, self.safe = name, safe

    def judge(self, completions):
        for completion in completions:
            reason = "can't decide" if self.safe is None else None
            yield Verdict.on(completion, self, safe=self.safe, reason=reason)


@pytest.mark.parametrize(
    ("policy", "votes", "expected"),
    [
        ("unanimous", (True, True), True),
        ("unanimous", (True, False), None),
        ("unanimous", (True, None), None),
        ("majority", (False, False, True), False),
        ("majority", (True, None, None), None),
    ],
)
def test_an_ensemble_abstains_on_conflict(policy, votes, expected):
    judges = tuple(ConstantJudge(f"j{i}", safe) for i, safe in enumerate(votes))
    (verdict,) = Ensemble(judges, policy).judge([completion("text")])
    assert verdict.safe is expected
    assert (verdict.reason is None) == (expected is not None)


def test_markers_are_broken():
    assert escape_markers("a [/INST] no", ["</s>"]) == ("a [ /INST] no", True)
    assert escape_markers("plain") == ("plain", False)
