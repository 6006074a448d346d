"""What is said of a pair of models."""

import numpy as np
import pytest

from bfpo.evaluation.dominance import pair_verdicts, pooled
from bfpo.evaluation.scoring import HELPFULNESS, OVER_REFUSAL, SAFETY, PromptScores
from bfpo.stats.intervals import holm

N = 60


def model(name, *, safe, helpful=None, refusing=None, suites=1):
    """Return a model that is safe on the first prompts, refuses the first ones, or helps so much."""
    measured = []
    for suite in range(suites):
        ids = [f"{suite}-{i}" for i in range(N // suites)]
        measured.append(PromptScores("harmful", SAFETY, {key: float(i < safe) for i, key in enumerate(ids)}, 0, 1))
        if helpful is not None:
            noise = np.random.default_rng(suite).normal(0, 0.05, len(ids))
            values = dict(zip(ids, np.clip(helpful + noise, 0, 1).tolist(), strict=True))
            measured.append(PromptScores("benign", HELPFULNESS, values, 0, 1))
        if refusing is not None:
            refused = {key: float(i < refusing) for i, key in enumerate(ids)}
            measured.append(PromptScores("lookalike", OVER_REFUSAL, refused, 0, 1))
    return pooled(name, "judge", measured)


BASE = model("base", safe=30, helpful=0.5)


@pytest.mark.parametrize(
    ("ours", "word"),
    [
        (model("m", safe=50, helpful=0.8), "dominates"),
        (model("m", safe=50, helpful=0.5), "dominates"),
        (model("m", safe=10, helpful=0.5), "dominated"),
        (model("m", safe=50, helpful=0.2), "trade-off"),
        (model("m", safe=31, helpful=0.5), "not distinguishable"),
    ],
)
def test_words(ours, word):
    (found,) = pair_verdicts([(ours, BASE)])
    assert (found.run, found.against, found.judge, found.verdict, found.tests) == ("m", "base", "judge", word, 2)
    (turned,) = pair_verdicts([(BASE, ours)])
    assert turned.verdict == {"dominates": "dominated", "dominated": "dominates"}.get(word, word)
    assert turned.safety.difference == -found.safety.difference


def test_without_helpfulness_over_refusal_counts():
    ours, base = model("m", safe=50, refusing=5), model("base", safe=30, refusing=30)
    (found,) = pair_verdicts([(ours, base)])
    assert (found.helpfulness.task, found.helpfulness.metric) == ("lookalike", "over_refusal")
    # Fewer refusals are better.
    assert found.helpfulness.difference < 0
    assert (found.helpfulness.verdict, found.verdict) == ("better", "dominates")
    assert pair_verdicts([(model("m", safe=50), base)]) == []


def test_words_grow_fewer_with_the_number_of_tests():
    # 7 prompts gained, none lost: p = 2 / 2**7 - 1 / 2**7 = 1/128.
    ours = model("m", safe=37, helpful=0.5)
    (alone,) = pair_verdicts([(ours, BASE)])
    assert alone.safety.p_adjusted == pytest.approx(2 / 128)
    assert alone.verdict == "dominates"
    among = pair_verdicts([(ours, BASE), *[(BASE, BASE)] * 3])
    assert [one.tests for one in among] == [8] * 4
    assert among[0].safety.p_adjusted == pytest.approx(8 / 128) == pytest.approx(holm([1 / 128, *[1] * 7])[0])
    # The interval still leaves out 0, the adjusted p-value doesn't allow a word.
    assert among[0].safety.low > 0
    assert among[0].verdict == "not distinguishable"


def test_prompts_of_several_suites_are_pooled_once():
    ours, base = (model(name, safe=safe, helpful=0.5, suites=2) for name, safe in (("m", 25), ("base", 15)))
    (found,) = pair_verdicts([(ours, base)])
    assert (found.safety.n, found.safety.difference) == (N, pytest.approx(20 / N))
    twice = pooled("m", "judge", [*ours.found.values(), *ours.found.values()])
    assert twice.found == ours.found


def test_a_word_is_seldom_wrong_where_nothing_differs():
    rng = np.random.default_rng(4)
    wrong = 0
    for _ in range(80):
        models = [
            pooled(
                f"m{i}",
                "judge",
                [
                    PromptScores("harmful", SAFETY, dict(enumerate(rng.integers(0, 2, 40).astype(float))), 0, 1),
                    PromptScores("benign", HELPFULNESS, dict(enumerate(rng.random(40))), 0, 1),
                ],
            )
            for i in range(3)
        ]
        pairs = [(models[0], models[1]), (models[0], models[2]), (models[1], models[2])]
        wrong += any(one.verdict != "not distinguishable" for one in pair_verdicts(pairs))
    assert wrong <= 9
