"""Intervals against known values and by simulation."""

import numpy as np
import pytest
from scipy.stats import binomtest, ttest_1samp, ttest_rel

from bfpo.stats.intervals import (
    Interval,
    bootstrap,
    combined,
    harmonic_mean,
    holm,
    mean_interval,
    paired_p_value,
    score_interval,
    t_interval,
    wilson,
)


@pytest.mark.parametrize(("successes", "n"), [(0, 1), (0, 50), (7, 20), (50, 50), (81, 263)])
def test_wilson_is_scipys(successes, n):
    theirs = binomtest(successes, n).proportion_ci(method="wilson")
    ours = wilson(successes, n)
    assert ours.value == successes / n
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


def test_wilson_of_newcombe_1998():
    # 81 of 263: Newcombe, Statistics in Medicine 17 (1998), table I, method 3: 0.2553 to 0.3662
    assert wilson(81, 263)[1:] == pytest.approx((0.2553, 0.3662), abs=5e-5)


@pytest.mark.parametrize(("successes", "n"), [(1, 0), (-1, 5), (6, 5)])
def test_impossible_counts_are_refused(successes, n):
    with pytest.raises(ValueError, match="expected 0 <= successes <= n"):
        wilson(successes, n)


def test_score_interval_of_one_sample_each_is_wilsons():
    values = np.repeat([1.0, 0.0], [7, 13])
    # A rate's own variance over n - 1 speaks of n - 1 trials; no fewer than n are counted.
    assert score_interval(values) == pytest.approx(wilson(7, 20))
    assert score_interval(np.ones(20)) == wilson(20, 20)
    assert score_interval(np.zeros(20), most=100) == wilson(0, 20)


def test_score_interval_counts_the_trials_that_the_variance_speaks_of():
    # Mean .5, each value .1 from it: s² = n/100/(n - 1), so that .25 n / s² = 25 (n - 1) trials.
    values = np.repeat([0.4, 0.6], 20)
    assert score_interval(values)[1:] == pytest.approx(wilson(25 * 39 // 2, 25 * 39)[1:], abs=1e-3)
    assert score_interval(values, most=200) == pytest.approx(wilson(100, 200))
    with pytest.raises(ValueError, match=r"each in \[0, 1\]"):
        score_interval(np.array([0.5, 1.5]))
    with pytest.raises(ValueError, match="at least one value"):
        score_interval(np.array([]))


def test_score_interval_covers_rates_of_several_samples_where_resampling_does_not():
    rng = np.random.default_rng(11)
    # 100 prompts of 5 samples, 2 % unsafe, correlation within a prompt 0.5: beta-binomial.
    values = rng.binomial(5, rng.beta(0.02, 0.98, (400, 100))) / 5
    by_score = [score_interval(row, most=500) for row in values]
    by_bootstrap = [bootstrap(lambda x: x.mean(axis=-1), row, resamples=200) for row in values]
    covered = [np.mean([one.low <= 0.02 <= one.high for one in found]) for found in (by_score, by_bootstrap)]
    assert covered[0] > 0.9 > covered[1] + 0.01


def test_bootstrap_of_a_mean_has_the_width_of_theory():
    values = np.random.default_rng(1).normal(3.0, 2.0, 400)
    found = mean_interval(values)
    half = 1.96 * values.std() / 20
    assert found.value == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.03)


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    rng = np.random.default_rng(7)
    covered = [
        found.low <= 0.3 <= found.high
        for _ in range(300)
        for found in [bootstrap(lambda x: x.mean(axis=-1), rng.beta(3, 7, 250), resamples=400)]
    ]
    # Three standard errors of 300 trials at 95 % are 3.8 points.
    assert 0.91 <= np.mean(covered) <= 0.99


def test_rows_of_one_sample_are_resampled_together():
    values = np.random.default_rng(3).random(50)
    found = bootstrap(lambda x: x[0].mean(axis=-1) - x[1].mean(axis=-1), np.stack([values + 1, values]))
    assert found == pytest.approx((1.0, 1.0, 1.0))


def test_same_seed_same_interval_and_large_samples_are_cut_in_pieces():
    values = np.random.default_rng(4).random(5000)
    assert mean_interval(values) == mean_interval(values)
    assert mean_interval(values) != mean_interval(values, seed=1)


def test_what_cannot_be_resampled_is_refused():
    with pytest.raises(ValueError, match="at least one observation"):
        mean_interval(np.array([]))


def test_harmonic_mean():
    assert harmonic_mean(np.array([1.0, 0.0, 0.5]), np.array([1.0, 0.0, 1.0])).tolist() == [1.0, 0.0, 2 / 3]


def test_t_interval_and_paired_test_are_scipys():
    rng = np.random.default_rng(5)
    ours, theirs = rng.normal(0.5, 0.1, 8), rng.normal(0.4, 0.1, 8)
    low, high = ttest_1samp(ours, 0).confidence_interval()
    assert t_interval(ours) == pytest.approx((ours.mean(), low, high))
    assert paired_p_value(ours, theirs) == pytest.approx(ttest_rel(ours, theirs).pvalue)
    assert paired_p_value(ours, ours) == 1.0
    assert paired_p_value(ours + 0.5, ours) < 1e-12
    with pytest.raises(ValueError, match="at least two"):
        t_interval(np.array([1.0]))


def test_holm_of_the_textbook():
    # Adjusted by hand: 4·0.005, 3·0.011, 2·0.02, 1·0.04, each at least the one before.
    assert holm([0.02, 0.005, 0.04, 0.011]) == pytest.approx([0.04, 0.02, 0.04, 0.033])
    assert holm([0.6, 0.5]) == [1.0, 1.0]
    assert holm([]) == []


def test_margins_of_parts_are_squared_and_added():
    # A sum of (3, 2 to 5) and (10, 6 to 13): margins sqrt(1 + 16) and sqrt(4 + 9).
    found = combined(lambda a, b: a + b, Interval(3, 2, 5), Interval(10, 6, 13))
    assert found == pytest.approx((13, 13 - 17**0.5, 13 + 13**0.5))


def test_the_difference_of_two_rates_is_newcombes():
    # 56 of 70 and 48 of 80: Newcombe, Statistics in Medicine 17 (1998), 873-890, table II, method 10: .0524 to .3339
    ours, theirs = wilson(56, 70), wilson(48, 80)
    turned = Interval(-theirs.value, -theirs.high, -theirs.low)
    assert combined(lambda a, b: a + b, ours, turned) == pytest.approx((0.2, 0.0524, 0.3339), abs=5e-5)
