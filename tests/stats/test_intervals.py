"""Intervals against published values, scipy, golden numbers and simulation."""

import warnings

import numpy as np
import pytest
import scipy.stats

from bfpo.stats.intervals import (
    END_WEIGHT,
    Interval,
    bootstrap,
    combine,
    harmonic_mean,
    holm,
    mean_interval,
    paired_p_value,
    score_bounds,
    score_interval,
    t_interval,
    wilson,
)


def mean(values):
    return values.mean(axis=-1)


def eighths(n, step):
    """Return n numbers from 0/8 to 8/8: their sums are exact on every machine."""
    return (np.arange(n) * step % 9) / 8


def difference_of_harmonic_means(safety, helpfulness):
    ours, baseline = harmonic_mean(mean(safety), mean(helpfulness))
    return ours - baseline


def share_of_counts(counts):
    a, b, c = counts.sum(axis=-1)
    return (a - b) / (a + b + c + 1)


@pytest.mark.parametrize(("successes", "n"), [(0, 1), (0, 50), (7, 20), (50, 50), (81, 263)])
def test_wilson_is_scipys(successes, n):
    expected = scipy.stats.binomtest(successes, n).proportion_ci(method="wilson")
    interval = wilson(successes, n)
    assert interval.value == successes / n
    assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson_of_newcombe_1998():
    # 81 of 263: Newcombe, Statistics in Medicine 17 (1998), table I, method 3: 0.2553 to 0.3662
    assert wilson(81, 263)[1:] == pytest.approx((0.2553, 0.3662), abs=5e-5)


@pytest.mark.parametrize(("successes", "n"), [(1, 0), (-1, 5), (6, 5)])
def test_counts_out_of_range_are_rejected(successes, n):
    with pytest.raises(ValueError, match="expected 0 <= successes <= n"):
        wilson(successes, n)


def test_score_interval_of_one_sample_per_prompt_is_wilsons():
    values = np.repeat([1.0, 0.0], [7, 13])
    # A rate's own variance over n - 1 corresponds to n - 1 trials; at least n are counted.
    assert score_interval(values) == pytest.approx(wilson(7, 20))
    assert score_interval(np.ones(20)) == wilson(20, 20)
    assert score_interval(np.zeros(20), most=100) == wilson(0, 20)


def test_the_interval_of_rates_of_several_answers_is_that_of_the_effective_sample_size():
    # Mean .5, each value .1 from it. The squares sum to n/100, with a prompt of variance .25 more to .25 + n/100. The
    # quantiles at 39 and at 3999 degrees of freedom are 2.0227 and 1.9606.
    for n, t in ((40, 2.0227), (4000, 1.9606)):
        values = np.repeat([0.4, 0.6], n // 2)
        trials = 0.25 * n**2 / (0.25 + n / 100) * (1.959964 / t) ** 2
        expected = wilson(round(trials / 2), round(trials))[1:]
        assert score_interval(values, most=10**9)[1:] == pytest.approx(expected, abs=1e-4)
    # For many prompts these are .25 n / s² = 25 n trials, as without the corrections.
    assert score_interval(values, most=10**9)[1:] == pytest.approx(wilson(50_000, 100_000)[1:], abs=1e-4)
    assert score_interval(values, most=8000) == pytest.approx(wilson(4000, 8000))
    with pytest.raises(ValueError, match=r"each in \[0, 1\]"):
        score_interval(np.array([0.5, 1.5]))
    with pytest.raises(ValueError, match="at least one value"):
        score_interval(np.array([]))


def test_nearly_equal_scores_of_few_prompts_have_a_wide_interval():
    values = np.array([0.80, 0.80, 0.81])
    # The variance as of a prompt more makes them worth 9 trials, Student's quantile 1.9; at least 3 are counted.
    assert score_interval(values, most=10**9) == pytest.approx((0.80333, 0.28991, 0.97612), abs=1e-5)
    interval = score_interval(values)
    assert interval == pytest.approx((0.80333, 0.33402, 0.90671), abs=1e-5)
    # No jump where they become equal.
    for most in (10**9, np.inf):
        ours, equal = score_interval(values, most=most), score_interval(np.full(3, 0.80), most=most)
        assert ours[1:] == pytest.approx(equal[1:], abs=5e-3)
    # A single value of a rate is worth one trial.
    assert score_interval(np.array([0.5]), most=4) == pytest.approx((0.5, 0.05462, 0.94538), abs=1e-5)
    assert score_interval(np.array([0.5]))[1:] == pytest.approx((0.05, 0.95), abs=0.02)


@pytest.mark.parametrize("values", [(0.8, 0.8, 0.81), (0.0, 0.5, 1.0, 1.0, 0.9), (0.02,) * 9 + (1.0,)])
def test_the_interval_of_scores_has_the_moments_of_a_mean_at_random_weights(values):
    values = np.array(values)
    weights = np.random.default_rng(0).dirichlet([*np.ones(len(values)), END_WEIGHT], 200_000)
    for bound, end, tail in ((score_interval(values).low, 0, 0.025), (score_interval(values).high, 1, 0.975)):
        means = weights @ np.append(values, end)
        center, variance = means.mean(), means.var()
        size = center * (1 - center) / variance - 1
        assert bound == pytest.approx(scipy.stats.beta.ppf(tail, center * size, (1 - center) * size), abs=3e-3)


def test_scores_near_0_and_1_have_nearly_the_interval_of_a_rate():
    rate = np.repeat([1.0, 0.0], [700, 300])
    assert score_interval(np.clip(rate, 1e-6, 1 - 1e-6))[1:] == pytest.approx(score_interval(rate)[1:], abs=2e-3)
    assert score_interval(1 - rate)[1:] == pytest.approx(tuple(1 - b for b in score_interval(rate)[:0:-1]))


@pytest.mark.parametrize("share", [0.03, 0.05, 0.08, 0.1])
@pytest.mark.parametrize("n", [10, 25, 50])
def test_score_interval_covers_means_of_nearly_equal_scores_with_rare_zeros(share, n):
    rng = np.random.default_rng(n)
    values = np.where(rng.random((2000, n)) < share, 0, rng.beta(800, 200, (2000, n)))
    low, high = score_bounds(values)
    mean = 0.8 * (1 - share)
    assert np.mean((low <= mean) & (high >= mean)) > 0.9


@pytest.mark.parametrize("n", [2, 3, 5, 10])
def test_score_interval_covers_means_of_few_prompts(n):
    values = np.random.default_rng(n).beta(8, 2, (2000, n))
    low, high = score_bounds(values)
    assert np.mean((low <= 0.8) & (high >= 0.8)) > 0.95


def test_score_interval_covers_rates_of_several_samples_where_a_bootstrap_does_not():
    rng = np.random.default_rng(11)
    # 100 prompts of 5 samples, 2 % unsafe, correlation within a prompt 0.5: beta-binomial.
    values = rng.binomial(5, rng.beta(0.02, 0.98, (400, 100))) / 5
    by_score = [score_interval(row, most=500) for row in values]
    by_bootstrap = [bootstrap(mean, row, resamples=200) for row in values]
    score_coverage, bootstrap_coverage = (
        np.mean([interval.low <= 0.02 <= interval.high for interval in intervals])
        for intervals in (by_score, by_bootstrap)
    )
    assert score_coverage > 0.9 > bootstrap_coverage + 0.01


def test_bootstrap_of_a_mean_has_the_width_of_theory():
    values = np.random.default_rng(1).normal(3.0, 2.0, 400)
    interval = mean_interval(values)
    half = 1.96 * values.std() / 20
    assert interval.value == pytest.approx(values.mean())
    assert (interval.low, interval.high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.03)


def test_bootstrap_intervals_have_about_their_nominal_coverage():
    rng = np.random.default_rng(7)
    intervals = [bootstrap(mean, rng.beta(3, 7, 250), resamples=400) for _ in range(300)]
    covered = [interval.low <= 0.3 <= interval.high for interval in intervals]
    # Three standard errors of 300 trials at 95 % are 3.8 points.
    assert 0.91 <= np.mean(covered) <= 0.99


def test_rows_of_one_sample_are_resampled_together():
    values = np.random.default_rng(3).random(50)
    interval = bootstrap(lambda drawn: mean(drawn[0]) - mean(drawn[1]), np.stack([values + 1, values]))
    assert interval == pytest.approx((1.0, 1.0, 1.0))


def test_the_same_seed_gives_the_same_interval_when_resamples_are_drawn_in_batches():
    values = np.random.default_rng(4).random(1500)
    assert mean_interval(values) == mean_interval(values)
    assert mean_interval(values) != mean_interval(values, seed=1)


# The uses that the package makes of the bootstrap, with the numbers of commit 307359b.
GOLDEN_BOOTSTRAPS = [
    # A single observation, a sample of one batch, and one of five batches.
    (mean, [eighths(1, 1) + 0.5], {}, (0.5, 0.5, 0.5)),
    (mean, [eighths(40, 5)], {}, (0.4875, 0.384375, 0.5875)),
    (mean, [eighths(5000, 7)], {"seed": 3}, (0.4999, 0.490974375, 0.50885)),
    (
        mean,
        [eighths(60, 4)],
        {"level": 0.9, "seed": 1, "resamples": 500},
        (0.5, 0.42906249999999996, 0.5730208333333332),
    ),
    # Two samples of different length, each with paired rows.
    (
        difference_of_harmonic_means,
        [np.stack([eighths(50, 2), eighths(50, 7)]), np.stack([eighths(70, 5), eighths(70, 4)])],
        {},
        (-0.00029014890172690544, -0.09565195384457269, 0.09854850932136411),
    ),
    (
        lambda a, b: mean(a) - mean(b),
        [eighths(50, 2), eighths(31, 4)],
        {"resamples": 1000},
        (0.0040322580645161255, -0.14942540322580633, 0.1506592741935483),
    ),
    # Counts by prompt.
    (
        share_of_counts,
        [np.stack([np.arange(30) % cell for cell in (3, 2, 4)]).astype(float)],
        {},
        (0.16853932584269662, 0.056179775280898875, 0.29),
    ),
]


@pytest.mark.parametrize(("statistic", "samples", "options", "expected"), GOLDEN_BOOTSTRAPS)
def test_bootstrap_keeps_its_numbers(statistic, samples, options, expected):
    assert tuple(bootstrap(statistic, *samples, **options)) == expected


@pytest.mark.parametrize(("statistic", "samples", "options", "expected"), GOLDEN_BOOTSTRAPS[1:])
def test_bootstrap_is_scipys_up_to_rounding(statistic, samples, options, expected):
    # scipy rejects a sample of one observation. It draws from the same generator in the same batches.
    theirs = scipy.stats.bootstrap(
        samples,
        lambda *drawn, axis: statistic(*drawn),
        n_resamples=options.get("resamples", 4000),
        confidence_level=options.get("level", 0.95),
        batch=min(options.get("resamples", 4000), 4_000_000 // max(sample.shape[-1] for sample in samples)),
        vectorized=True,
        axis=-1,
        method="percentile",
        rng=options.get("seed", 0),
    )
    assert tuple(theirs.confidence_interval) == pytest.approx(expected[1:], rel=1e-12)


def in_all_versions(expected):
    # Student's quantile with one degree of freedom is 2e-11 off in scipy 1.15, and exact in 1.17.
    return pytest.approx(expected, rel=1e-9)


def test_t_interval_keeps_its_numbers():
    values = np.array([0.625, 0.75, 0.5, 0.875, 0.25, 0.5, 0.625, 1.0])
    for sample, expected in (
        (values, (0.640625, 0.44362796773905616, 0.8376220322609438)),
        (values + 1000, (1000.640625, 1000.4436279677391, 1000.8376220322609)),
        (values[:2], (0.6875, -0.10663779601091838, 1.4816377960109184)),
        # Without a spread it is the mean, without a warning.
        (np.full(4, 0.375), (0.375, 0.375, 0.375)),
    ):
        assert tuple(t_interval(sample)) == in_all_versions(expected)
    assert tuple(t_interval(values, level=0.8)) == in_all_versions((0.640625, 0.5227475763736478, 0.7585024236263522))


def test_paired_p_value_keeps_its_numbers():
    ours = np.array([0.625, 0.75, 0.5, 0.875, 0.25, 0.5, 0.625, 1.0])
    baseline = np.array([0.5, 0.625, 0.5, 0.5, 0.375, 0.25, 0.5, 0.75])
    assert tuple(t_interval(ours - baseline)) == in_all_versions((0.140625, 0.010370489326517546, 0.2708795106734825))
    assert paired_p_value(ours, baseline) == paired_p_value(baseline, ours) == in_all_versions(0.03794328796316369)
    # All differences are the same, 0.125; the mean difference is 0.
    assert paired_p_value(ours[:2], baseline[:2]) == 0.0
    assert paired_p_value(np.array([0.0, 1, 0, 0]), np.array([1.0, 0, 0, 0])) == 1.0


def test_one_run_decides_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert paired_p_value(np.array([0.9]), np.array([0.1])) == 1.0
        with pytest.raises(ValueError, match="1 values; an interval over runs needs at least two"):
            t_interval(np.array([0.9]))


def test_bootstrap_rejects_an_empty_sample():
    with pytest.raises(ValueError, match="at least one observation"):
        mean_interval(np.array([]))


def test_harmonic_mean():
    assert harmonic_mean(np.array([1.0, 0.0, 0.5]), np.array([1.0, 0.0, 1.0])).tolist() == [1.0, 0.0, 2 / 3]


def test_t_interval_and_paired_test_are_scipys():
    rng = np.random.default_rng(5)
    ours, baseline = rng.normal(0.5, 0.1, 8), rng.normal(0.4, 0.1, 8)
    low, high = scipy.stats.ttest_1samp(ours, 0).confidence_interval()
    assert t_interval(ours) == pytest.approx((ours.mean(), low, high), rel=1e-12)
    assert paired_p_value(ours, baseline) == pytest.approx(scipy.stats.ttest_rel(ours, baseline).pvalue, rel=1e-12)
    assert paired_p_value(ours, ours) == 1.0
    assert paired_p_value(ours + 0.5, ours) < 1e-12
    with pytest.raises(ValueError, match="at least two"):
        t_interval(np.array([1.0]))


def test_holm_of_the_textbook():
    # Adjusted by hand: 4·0.005, 3·0.011, 2·0.02, 1·0.04, each at least its predecessor.
    assert holm([0.02, 0.005, 0.04, 0.011]) == pytest.approx([0.04, 0.02, 0.04, 0.033])
    assert holm([0.6, 0.5]) == [1.0, 1.0]
    assert holm([]) == []


def test_margins_of_estimates_are_squared_and_added():
    # A sum of (3, 2 to 5) and (10, 6 to 13): margins sqrt(1 + 16) and sqrt(4 + 9).
    interval = combine(lambda a, b: a + b, Interval(3, 2, 5), Interval(10, 6, 13))
    assert interval == pytest.approx((13, 13 - 17**0.5, 13 + 13**0.5))


def test_the_difference_of_two_rates_is_newcombes():
    # 56 of 70 and 48 of 80: Newcombe, Statistics in Medicine 17 (1998), 873-890, table II, method 10: .0524 to .3339
    ours, baseline = wilson(56, 70), wilson(48, 80)
    negated = Interval(-baseline.value, -baseline.high, -baseline.low)
    assert combine(lambda a, b: a + b, ours, negated) == pytest.approx((0.2, 0.0524, 0.3339), abs=5e-5)
