"""Preferences from scores: by the measure of the constraint, drawn once and for good."""

from dataclasses import replace

import numpy as np
import pytest

from bfpo.core.conversation import user_says
from bfpo.core.pairs import PairSignals, PreferencePair, Provenance, SafetyLabels
from bfpo.data.inspect import show_scores
from bfpo.data.score_labels import is_reordered, require_scores, score_margins
from bfpo.errors import DataError
from bfpo.losses.dual import Constraint, Dual, FrontierPoint

POINT = FrontierPoint(2.0, 0.02, 0.6, 0.02, 0.02, 1.2, 20.0)
DUAL = Dual(
    "active", Constraint("unsafe", 0.02), "reward", 0.1, None, 2.0, 1.0, 3.0, 0.02, 0.01, 0.03, 0.02, None, POINT,
    POINT, [POINT], 50, 50, 1600,
)  # fmt: skip


def pair(number: int, rewards: tuple[float, float], costs: tuple[float, float]) -> PreferencePair:
    signals = PairSignals(chosen_reward=rewards[0], rejected_reward=rewards[1],
                          chosen_cost=costs[0], rejected_cost=costs[1])  # fmt: skip
    labels = SafetyLabels(costs[0] <= 0, costs[1] <= 0)
    return PreferencePair(user_says(f"question {number}"), "yes", "no", labels, signals, provenance=Provenance("toy"))


def test_margins_are_differences_of_reward_less_multiplied_cost():
    pairs = [pair(0, (3, 1), (0.5, -1)), pair(1, (1, 2), (-1, -2)), pair(2, (0, 0), (0.2, 0.9))]
    assert score_margins(pairs, DUAL).tolist() == [0, -1, 0]
    mean = replace(DUAL, constraint=Constraint("cost", 0.0))
    np.testing.assert_allclose(score_margins(pairs, mean), [-1, -3, 1.4], atol=1e-12)
    tail = replace(DUAL, constraint=Constraint("cvar", 0.5, share=0.5), tail_start=0.4)
    np.testing.assert_allclose(score_margins(pairs, tail), [2 - 0.4, -1, 2.0], atol=1e-12)
    scaled = replace(DUAL, reward_scale=10.0)
    assert score_margins(pairs, scaled).tolist() == [18, -10, 0]
    assert score_margins([], DUAL).shape == (0,)


def test_a_swapped_pair_has_the_opposite_margin():
    rng = np.random.default_rng(0)
    pairs = [pair(n, tuple(rng.normal(size=2)), tuple(rng.normal(size=2))) for n in range(20)]
    np.testing.assert_allclose(score_margins([p.swapped() for p in pairs], DUAL), -score_margins(pairs, DUAL))
    assert [p.swapped().cell for p in pairs if p.cell == "us"] == ["su"] * sum(p.cell == "us" for p in pairs)


def test_argmax_prefers_the_higher_score_and_soft_leaves_the_order():
    pairs = [pair(0, (3, 1), (0.5, -1)), pair(1, (1, 2), (-1, -2)), pair(2, (5, 0), (-1, -1))]
    assert is_reordered(pairs, DUAL, "argmax", seed=0).tolist() == [False, True, False]
    assert is_reordered(pairs, DUAL, "soft", seed=0).tolist() == [False] * 3


def test_drawn_orders_follow_the_bradley_terry_model():
    for margin in (-1.0, 0.0, 2.0):
        pairs = [pair(number, (margin, 0), (-1, -1)) for number in range(4000)]
        kept = 1 - is_reordered(pairs, DUAL, "probability", seed=1).mean()
        # Standard error below .008.
        assert kept == pytest.approx(1 / (1 + np.exp(-margin)), abs=0.03)


def test_a_draw_depends_on_the_seed_and_the_pair_only():
    pairs = [pair(number, (0.3, 0), (-1, -1)) for number in range(200)]
    drawn = is_reordered(pairs, DUAL, "probability", seed=7)
    assert is_reordered(pairs[50:], DUAL, "probability", seed=7).tolist() == drawn[50:].tolist()
    assert is_reordered(pairs, DUAL, "probability", seed=8).tolist() != drawn.tolist()


def test_a_pair_without_scores_is_named():
    pairs = [
        pair(0, (3, 1), (0.5, -1)),
        replace(pair(1, (0, 0), (0, 0)), signals=PairSignals(chosen_reward=1, rejected_reward=2)),
    ]
    with pytest.raises(
        DataError, match=r"toy: row \w+ has no chosen_cost and rejected_cost; labels from scores need"
    ):
        require_scores(pairs, DUAL)
    require_scores(pairs[:1], DUAL)


def test_an_inspection_shows_scores_and_whether_costs_agree_with_labels(capsys):
    pairs = [pair(number, (number, 0), (0.5 - number, -1)) for number in range(4)]
    wrong = replace(pairs[0], labels=SafetyLabels(True, True))
    show_scores([wrong, *pairs[1:]])
    lines = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines() if "_" in line}
    assert lines["chosen_reward"] == ["chosen_reward", "4", "unknown", "0.15", "1.5", "2.85"]
    assert lines["chosen_cost"][-1] == "75.0%"
    assert lines["rejected_cost"][-1] == "100.0%"
    show_scores([replace(pairs[0], signals=PairSignals())])
    assert capsys.readouterr().out == ""
