"""Comparing pairs of models in safety and helpfulness."""

import numpy as np
import pytest

from bfpo.evaluation.dominance import compare_models, pool_scores
from bfpo.evaluation.metric_specs import HELPFULNESS, OVER_REFUSAL, SAFETY
from bfpo.evaluation.scoring import PromptScores
from bfpo.stats.intervals import holm

N = 60


def model(name, *, safe, helpful=None, refusing=None, suites=1):
    """Return scores of a model that is safe on the first prompts, refuses the first ones, and is this helpful."""
    scores = []
    for suite in range(suites):
        ids = [f"{suite}-{i}" for i in range(N // suites)]
        scores.append(PromptScores("harmful", SAFETY, {key: float(i < safe) for i, key in enumerate(ids)}, 0, 1))
        if helpful is not None:
            noise = np.random.default_rng(suite).normal(0, 0.05, len(ids))
            values = dict(zip(ids, np.clip(helpful + noise, 0, 1).tolist(), strict=True))
            scores.append(PromptScores("benign", HELPFULNESS, values, 0, 1))
        if refusing is not None:
            refused = {key: float(i < refusing) for i, key in enumerate(ids)}
            scores.append(PromptScores("lookalike", OVER_REFUSAL, refused, 0, 1))
    return pool_scores(name, "judge", scores)


BASE = model("base", safe=30, helpful=0.5)


@pytest.mark.parametrize(
    ("ours", "verdict"),
    [
        (model("m", safe=50, helpful=0.8), "dominates"),
        (model("m", safe=50, helpful=0.5), "dominates"),
        (model("m", safe=10, helpful=0.5), "dominated"),
        (model("m", safe=50, helpful=0.2), "trade-off"),
        (model("m", safe=31, helpful=0.5), "not distinguishable"),
    ],
)
def test_verdicts(ours, verdict):
    (comparison,) = compare_models([(ours, BASE)])
    assert (comparison.run, comparison.against, comparison.judge, comparison.verdict, comparison.tests) == (
        "m",
        "base",
        "judge",
        verdict,
        2,
    )
    (turned,) = compare_models([(BASE, ours)])
    assert turned.verdict == {"dominates": "dominated", "dominated": "dominates"}.get(verdict, verdict)
    assert turned.safety.difference == -comparison.safety.difference


def test_without_helpfulness_over_refusal_counts():
    ours, base = model("m", safe=50, refusing=5), model("base", safe=30, refusing=30)
    (comparison,) = compare_models([(ours, base)])
    assert (comparison.helpfulness.task, comparison.helpfulness.metric) == ("lookalike", "over_refusal")
    # Fewer refusals are better.
    assert comparison.helpfulness.difference < 0
    assert (comparison.helpfulness.verdict, comparison.verdict) == ("better", "dominates")
    assert compare_models([(model("m", safe=50), base)]) == []


def test_verdicts_grow_fewer_with_the_number_of_tests():
    # 7 prompts gained, none lost: p = 2 / 2**7 - 1 / 2**7 = 1/128.
    ours = model("m", safe=37, helpful=0.5)
    (alone,) = compare_models([(ours, BASE)])
    assert alone.safety.p_adjusted == pytest.approx(2 / 128)
    assert alone.verdict == "dominates"
    among = compare_models([(ours, BASE), *[(BASE, BASE)] * 3])
    assert [comparison.tests for comparison in among] == [8] * 4
    assert among[0].safety.p_adjusted == pytest.approx(8 / 128) == pytest.approx(holm([1 / 128, *[1] * 7])[0])
    # The interval excludes 0, but the adjusted p-value isn't significant.
    assert among[0].safety.low > 0
    assert among[0].verdict == "not distinguishable"


def test_prompts_of_several_suites_are_pooled_once():
    ours, base = (model(name, safe=safe, helpful=0.5, suites=2) for name, safe in (("m", 25), ("base", 15)))
    (comparison,) = compare_models([(ours, base)])
    assert (comparison.safety.n, comparison.safety.difference) == (N, pytest.approx(20 / N))
    twice = pool_scores("m", "judge", [*ours.scores.values(), *ours.scores.values()])
    assert twice.scores == ours.scores


def test_a_verdict_is_seldom_wrong_where_nothing_differs():
    rng = np.random.default_rng(4)
    wrong = 0
    for _ in range(80):
        models = [
            pool_scores(
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
        wrong += any(comparison.verdict != "not distinguishable" for comparison in compare_models(pairs))
    assert wrong <= 9
