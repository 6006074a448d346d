"""Differences of two models over the same prompts, against published examples and by simulation."""

import numpy as np
import pytest
from scipy.stats import ttest_rel

from bfpo.evaluation.comparisons import verdict_on
from bfpo.stats.intervals import Interval, bootstrap
from bfpo.stats.paired import mcnemar_p_value, paired_means, paired_rates, tango, tango_bounds


def values(gained, lost, both, neither):
    """Return two models' values with these counts of prompts."""
    counts = [gained, lost, both, neither]
    return np.repeat([1.0, 0.0, 1.0, 0.0], counts), np.repeat([0.0, 1.0, 1.0, 0.0], counts)


def test_tango_and_mcnemar_of_cavo_2012():
    # Complete response before and after consolidation therapy, 161 patients: 6 gained, 16 lost, 59 both. The tests of
    # the R package contingencytables (Fagerland, Lydersen and Laake) have -0.1240 to -0.0054, mid-p 0.034690.
    ours, theirs = values(6, 16, 59, 80)
    assert paired_rates(ours, theirs) == pytest.approx((-10 / 161, -0.1240, -0.0054), abs=5e-5)
    assert mcnemar_p_value(ours, theirs) == pytest.approx(0.034690, abs=5e-7)


@pytest.mark.parametrize(("gained", "lost", "n"), [(0, 0, 30), (5, 0, 40), (12, 3, 15), (20, 40, 160), (7, 0, 7)])
def test_tangos_limits_are_where_the_score_is_z(gained, lost, n):
    found = tango(gained, lost, n)
    assert -1 <= found.low <= found.value <= found.high <= 1
    other = tango(lost, gained, n)
    assert (found.low, found.high) == pytest.approx((-other.high, -other.low), abs=1e-9)
    for d in (found.low, found.high):
        if abs(d) < 1:
            # The likeliest rate of losing at a difference of d, by search instead of by formula.
            q = np.linspace(max(0, -d), (1 - d) / 2, 200_001)[1:-1]
            logs = sum(
                count * np.log(rate)
                for count, rate in ((gained, q + d), (lost, q), (n - gained - lost, 1 - 2 * q - d))
                if count
            )
            best = q[np.argmax(logs)]
            z = (gained - lost - n * d) / np.sqrt(n * (2 * best + d * (1 - d)))
            assert abs(z) == pytest.approx(1.959964, abs=2e-3)


def test_no_prompt_that_differs_is_not_certainty():
    # The score at d with none of n differing is d·n / sqrt(n·d(1 - d)): the limit solves n·d = z²(1 - d).
    z = 1.959964**2
    assert tango(0, 0, 50) == pytest.approx((0, -z / (50 + z), z / (50 + z)), abs=1e-6)
    same, p_value = paired_means(np.full(50, 0.25), np.full(50, 0.25))
    assert same == pytest.approx(tango(0, 0, 50))
    assert p_value == 1.0


def test_tango_agrees_with_mcnemar_all_but_at_the_edge():
    counts = np.array([(gained, lost) for gained in range(1, 31) for lost in range(gained)], dtype=float)
    excludes = tango_bounds(counts[:, 0], counts[:, 1], 60)[0] > 0
    assert (excludes == ((counts[:, 0] - counts[:, 1]) ** 2 / counts.sum(axis=1) > 1.959964**2)).all()
    for (gained, lost), told_apart in zip(counts.astype(int), excludes, strict=True):
        p_value = mcnemar_p_value(*values(gained, lost, 0, 60 - gained - lost))
        assert told_apart == (p_value < 0.05) or 0.05 <= p_value < 0.07
    assert mcnemar_p_value(*values(4, 0, 0, 36)) == pytest.approx(0.0625)


def test_mid_p_by_hand():
    # 9 gained, 2 lost: (2 · (1 + 11) + 55) / 2**11, the 55 ways of what was seen at half their weight.
    assert mcnemar_p_value(*values(9, 2, 5, 5)) == pytest.approx(79 / 2048)
    assert mcnemar_p_value(*values(3, 3, 5, 5)) == 1.0
    assert mcnemar_p_value(*values(0, 0, 5, 5)) == 1.0


def test_tango_covers_where_resampling_is_too_sure():
    rng = np.random.default_rng(5)
    # 30 prompts, gained 10 %, lost 2 %.
    outcome = rng.choice([1.0, -1.0, 0.0], (2000, 30), p=[0.10, 0.02, 0.88])
    low, high = tango_bounds((outcome > 0).sum(1).astype(float), (outcome < 0).sum(1).astype(float), 30)
    assert 0.93 <= np.mean((low <= 0.08) & (high >= 0.08)) <= 0.99
    few = [bootstrap(lambda x: x.mean(axis=-1), row, resamples=200) for row in outcome[:300]]
    assert np.mean([one.low <= 0.08 <= one.high for one in few]) < 0.93


def test_student_of_several_samples_is_scipys():
    rng = np.random.default_rng(6)
    ours, theirs = rng.binomial(5, 0.6, 40) / 5, rng.binomial(5, 0.5, 40) / 5
    found, p_value = paired_means(ours, theirs)
    test = ttest_rel(ours, theirs)
    assert p_value == pytest.approx(test.pvalue)
    assert found[1:] == pytest.approx(tuple(test.confidence_interval()))


def test_the_same_difference_everywhere_counts_prompts():
    found, p_value = paired_means(np.ones(4), np.zeros(4))
    assert found == pytest.approx(tango(4, 0, 4))
    assert p_value == pytest.approx(0.0625)
    longer, _ = paired_means(np.full(9, 30.0), np.full(9, 10.0))
    assert longer.low < longer.value == 20 == longer.high


def test_what_is_not_paired_is_refused():
    with pytest.raises(ValueError, match="the same prompts"):
        paired_means(np.zeros(3), np.zeros(4))
    with pytest.raises(ValueError, match="the same prompts"):
        paired_rates(np.zeros(0), np.zeros(0))
    with pytest.raises(ValueError, match="counts that fit"):
        tango(3, 3, 5)


def test_pairing_removes_what_prompts_have_in_common():
    rng = np.random.default_rng(2)
    difficulty, noise = rng.normal(0, 1, 300), rng.normal(0, 0.05, (2, 300))
    ours, theirs = difficulty + 0.1 + noise[0], difficulty + noise[1]
    paired, p_value = paired_means(ours, theirs)
    apart = bootstrap(lambda a, b: a.mean(axis=-1) - b.mean(axis=-1), ours, theirs)
    assert paired.low > 0.08
    assert p_value < 1e-6
    assert (paired.high - paired.low) < 0.1 * (apart.high - apart.low)


@pytest.mark.parametrize(
    ("interval", "higher_is_better", "words"),
    [
        (Interval(0.2, 0.1, 0.3), True, "better"),
        (Interval(0.2, 0.1, 0.3), False, "worse"),
        (Interval(-0.2, -0.3, -0.1), True, "worse"),
        (Interval(-0.2, -0.3, -0.1), False, "better"),
        (Interval(0.2, 0.0, 0.4), True, "not distinguishable"),
        (Interval(0.0, 0.0, 0.0), True, "not distinguishable"),
    ],
)
def test_words_follow_from_the_interval(interval, higher_is_better, words):
    assert verdict_on(interval, higher_is_better=higher_is_better) == words
