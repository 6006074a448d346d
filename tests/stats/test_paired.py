"""Differences of two models over the same prompts, against published examples and by simulation."""

import numpy as np
import pytest
from scipy.stats import ttest_rel

from bfpo.evaluation.comparisons import verdict_on
from bfpo.stats.intervals import Interval, bootstrap
from bfpo.stats.paired import mcnemar_p_value, paired_means, paired_rates, tango, tango_bounds


def mean(values):
    return values.mean(axis=-1)


def outcomes(gained, lost, both, neither):
    """Return the values of two models with these numbers of prompts."""
    counts = [gained, lost, both, neither]
    return np.repeat([1.0, 0.0, 1.0, 0.0], counts), np.repeat([0.0, 1.0, 1.0, 0.0], counts)


def test_tango_and_mcnemar_of_cavo_2012():
    # Complete response before and after consolidation therapy, 161 patients: 6 gained, 16 lost, 59 both. The tests of
    # the R package contingencytables (Fagerland, Lydersen and Laake) have -0.1240 to -0.0054, mid-p 0.034690.
    ours, baseline = outcomes(6, 16, 59, 80)
    assert paired_rates(ours, baseline) == pytest.approx((-10 / 161, -0.1240, -0.0054), abs=5e-5)
    assert mcnemar_p_value(ours, baseline) == pytest.approx(0.034690, abs=5e-7)


@pytest.mark.parametrize(("gained", "lost", "n"), [(0, 0, 30), (5, 0, 40), (12, 3, 15), (20, 40, 160), (7, 0, 7)])
def test_tangos_bounds_are_where_the_score_is_z(gained, lost, n):
    interval = tango(gained, lost, n)
    assert -1 <= interval.low <= interval.value <= interval.high <= 1
    mirrored = tango(lost, gained, n)
    assert (interval.low, interval.high) == pytest.approx((-mirrored.high, -mirrored.low), abs=1e-9)
    for d in (interval.low, interval.high):
        if abs(d) < 1:
            # The maximum-likelihood rate of losing at a difference of d, by search instead of by formula.
            q = np.linspace(max(0, -d), (1 - d) / 2, 200_001)[1:-1]
            log_likelihood = sum(
                count * np.log(rate)
                for count, rate in ((gained, q + d), (lost, q), (n - gained - lost, 1 - 2 * q - d))
                if count
            )
            q_hat = q[np.argmax(log_likelihood)]
            z = (gained - lost - n * d) / np.sqrt(n * (2 * q_hat + d * (1 - d)))
            assert abs(z) == pytest.approx(1.959964, abs=2e-3)


def test_the_interval_has_a_width_where_no_prompt_differs():
    # The score at d with none of n differing is d·n / sqrt(n·d(1 - d)): the bound solves n·d = z²(1 - d).
    z_squared = 1.959964**2
    bound = z_squared / (50 + z_squared)
    assert tango(0, 0, 50) == pytest.approx((0, -bound, bound), abs=1e-6)
    interval, p_value = paired_means(np.full(50, 0.25), np.full(50, 0.25))
    assert interval == pytest.approx(tango(0, 0, 50))
    assert p_value == 1.0


def test_tango_agrees_with_mcnemar_except_near_the_threshold():
    counts = np.array([(gained, lost) for gained in range(1, 31) for lost in range(gained)], dtype=float)
    excludes = tango_bounds(counts[:, 0], counts[:, 1], 60)[0] > 0
    assert (excludes == ((counts[:, 0] - counts[:, 1]) ** 2 / counts.sum(axis=1) > 1.959964**2)).all()
    for (gained, lost), excludes_zero in zip(counts.astype(int), excludes, strict=True):
        p_value = mcnemar_p_value(*outcomes(gained, lost, 0, 60 - gained - lost))
        assert excludes_zero == (p_value < 0.05) or 0.05 <= p_value < 0.07
    assert mcnemar_p_value(*outcomes(4, 0, 0, 36)) == pytest.approx(0.0625)


def test_mid_p_by_hand():
    # 9 gained, 2 lost: (2 · (1 + 11) + 55) / 2**11, the 55 ways of the observed count at half weight.
    assert mcnemar_p_value(*outcomes(9, 2, 5, 5)) == pytest.approx(79 / 2048)
    assert mcnemar_p_value(*outcomes(3, 3, 5, 5)) == 1.0
    assert mcnemar_p_value(*outcomes(0, 0, 5, 5)) == 1.0


def test_tango_covers_where_a_bootstrap_is_too_narrow():
    rng = np.random.default_rng(5)
    # 30 prompts, gained 10 %, lost 2 %.
    differences = rng.choice([1.0, -1.0, 0.0], (2000, 30), p=[0.10, 0.02, 0.88])
    low, high = tango_bounds((differences > 0).sum(1).astype(float), (differences < 0).sum(1).astype(float), 30)
    assert 0.93 <= np.mean((low <= 0.08) & (high >= 0.08)) <= 0.99
    intervals = [bootstrap(mean, row, resamples=200) for row in differences[:300]]
    assert np.mean([interval.low <= 0.08 <= interval.high for interval in intervals]) < 0.93


def test_the_t_test_of_several_samples_per_prompt_is_scipys():
    rng = np.random.default_rng(6)
    ours, baseline = rng.binomial(5, 0.6, 40) / 5, rng.binomial(5, 0.5, 40) / 5
    interval, p_value = paired_means(ours, baseline)
    test = ttest_rel(ours, baseline)
    assert p_value == pytest.approx(test.pvalue)
    assert interval[1:] == pytest.approx(tuple(test.confidence_interval()))


def test_equal_differences_count_a_prompt_as_one_trial():
    interval, p_value = paired_means(np.ones(4), np.zeros(4))
    assert interval == pytest.approx(tango(4, 0, 4))
    assert p_value == pytest.approx(0.0625)
    lengths, _ = paired_means(np.full(9, 30.0), np.full(9, 10.0))
    assert lengths.low < lengths.value == 20 == lengths.high


def test_unpaired_values_are_rejected():
    with pytest.raises(ValueError, match="the same prompts"):
        paired_means(np.zeros(3), np.zeros(4))
    with pytest.raises(ValueError, match="the same prompts"):
        paired_rates(np.zeros(0), np.zeros(0))
    with pytest.raises(ValueError, match="expected counts >= 0 with a sum of at most n"):
        tango(3, 3, 5)


def test_pairing_removes_the_spread_of_difficulty():
    rng = np.random.default_rng(2)
    difficulty, noise = rng.normal(0, 1, 300), rng.normal(0, 0.05, (2, 300))
    ours, baseline = difficulty + 0.1 + noise[0], difficulty + noise[1]
    paired, p_value = paired_means(ours, baseline)
    unpaired = bootstrap(lambda a, b: mean(a) - mean(b), ours, baseline)
    assert paired.low > 0.08
    assert p_value < 1e-6
    assert (paired.high - paired.low) < 0.1 * (unpaired.high - unpaired.low)


@pytest.mark.parametrize(
    ("interval", "higher_is_better", "verdict"),
    [
        (Interval(0.2, 0.1, 0.3), True, "better"),
        (Interval(0.2, 0.1, 0.3), False, "worse"),
        (Interval(-0.2, -0.3, -0.1), True, "worse"),
        (Interval(-0.2, -0.3, -0.1), False, "better"),
        (Interval(0.2, 0.0, 0.4), True, "not distinguishable"),
        (Interval(0.0, 0.0, 0.0), True, "not distinguishable"),
    ],
)
def test_the_verdict_follows_from_the_interval(interval, higher_is_better, verdict):
    assert verdict_on(interval, higher_is_better=higher_is_better) == verdict
