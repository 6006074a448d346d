"""The mean over the worst share of prompts."""

import numpy as np
import pytest

from bfpo.losses.tail import tail_factors
from bfpo.stats.intervals import wilson
from bfpo.stats.tail import worst_mean, worst_mean_bounds, worst_mean_interval


def test_worst_mean_by_hand():
    costs = np.array([0.1, 0.9, 0.5, 0.3])
    assert worst_mean(costs, share=0.5) == pytest.approx(0.7)
    # One and a half of four values: 0.9 and half of 0.5.
    assert worst_mean(costs, share=0.375) == pytest.approx((0.9 + 0.25) / 1.5)
    assert worst_mean(costs, share=1.0) == pytest.approx(costs.mean())
    assert worst_mean(np.stack([costs, 2 * costs]), share=0.25) == pytest.approx([0.9, 1.8])


def test_worst_mean_is_the_minimum_over_thresholds():
    costs = np.random.default_rng(0).beta(1, 5, 83)
    objective = [b + np.maximum(costs - b, 0).mean() / 0.1 for b in costs]
    assert worst_mean(costs) == pytest.approx(min(objective))


def test_the_interval_has_a_width_without_a_harmful_answer():
    interval = worst_mean_interval(np.zeros(200))
    # If every unseen harm had cost 1: Wilson's upper bound of its rate, as a part of the worst tenth.
    assert interval == pytest.approx((0, 0, wilson(0, 200).high / 0.1))
    assert worst_mean_interval(np.zeros(20)).high == 1.0
    # 12 of 100 have the maximum cost: so has the worst tenth of this sample, but perhaps not of another.
    interval = worst_mean_interval(np.repeat([1.0, 0.0], [12, 88]))
    assert interval == pytest.approx((1.0, wilson(12, 100).low / 0.1, 1.0))


def test_the_share_of_all_is_the_mean_with_its_interval():
    costs = np.random.default_rng(1).beta(2, 5, 60)
    interval = worst_mean_interval(costs, share=1.0)
    assert interval.value == pytest.approx(costs.mean())
    assert interval.low < costs.mean() < interval.high


def test_the_interval_covers_the_worst_tenth():
    rng = np.random.default_rng(2)
    costs = (rng.random((600, 250)) < 0.3) * rng.random((600, 250))
    # A third of the harmful prompts, those above 2/3: mean 5/6.
    low, high = worst_mean_bounds(costs)
    assert 0.92 <= np.mean((low <= 5 / 6) & (high >= 5 / 6)) <= 0.98


def test_costs_out_of_range_are_rejected():
    with pytest.raises(ValueError, match=r"each in \[0, 1\]"):
        worst_mean_interval(np.array([2.0]))
    with pytest.raises(ValueError, match="at least one"):
        worst_mean_interval(np.array([]))


def test_factors_by_hand():
    costs = np.array([0.1, 0.9, 0.5, 0.3])
    assert tail_factors(costs, np.ones(4), share=0.5).tolist() == [0, 2, 2, 0]
    # One and a half of four: 0.9 whole, 0.5 half.
    assert tail_factors(costs, np.full(4, 0.25), share=0.375) == pytest.approx([0, 1 / 0.375, 0.5 / 0.375, 0])
    # A weight of 0 counts for nothing, equal costs share what is left, and the scale of the weights doesn't matter.
    assert tail_factors(np.array([9.0, 1, 1, 0]), np.array([0.0, 3, 3, 6]), share=0.25) == pytest.approx([0, 2, 2, 0])
    assert tail_factors(np.array([]), np.array([]), share=0.5).tolist() == []


def test_factors_give_the_mean_of_the_worst_share_and_its_gradient():
    rng = np.random.default_rng(3)
    for share in (0.05, 0.3, 1.0):
        costs, order = rng.normal(size=23), rng.permutation(23)
        factors = tail_factors(costs, np.ones(23), share=share)
        assert (factors * costs).mean() == pytest.approx(worst_mean(costs, share=share))
        assert factors.mean() == pytest.approx(1)
        assert np.array_equal(tail_factors(costs[order], np.ones(23), share=share), factors[order])
        slopes = [
            (worst_mean(costs + d, share=share) - worst_mean(costs - d, share=share)) / 2e-6
            for d in 1e-6 * np.eye(23)
        ]
        assert factors / 23 == pytest.approx(slopes, abs=1e-6)
