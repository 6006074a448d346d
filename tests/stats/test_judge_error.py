"""Correction of a rate for a judge's errors: values by hand, and the coverage of the interval."""

import math

import numpy as np
import pytest

from bfpo.stats.intervals import wilson
from bfpo.stats.judge_error import UNKNOWN, JudgeErrors, corrected_rate, is_consistent, judge_errors


def test_errors_are_counted_by_human_label_and_prompts_are_the_trials():
    labeled_yes = [("a", True, True), ("a", True, False), ("b", True, True), ("c", True, True)]
    labeled_no = [("a", False, False), ("d", False, True)]
    assert judge_errors(labeled_yes + labeled_no) == JudgeErrors(0.75, 3, 0.5, 2)
    assert judge_errors([("a", True, True)]) == JudgeErrors(1.0, 1, 0.0, 0)


def test_the_estimate_inverts_the_judge_s_errors():
    # At a true rate of 0.3, a judge with these errors measures 0.3 x 0.9 + 0.7 x 0.2 = 0.41.
    assert corrected_rate(0.41, 1000, JudgeErrors(0.9, 500, 0.8, 500)).value == pytest.approx(0.3)
    # Below its false-positive rate, and above its sensitivity: clipped.
    assert corrected_rate(0.1, 50, JudgeErrors(0.9, 500, 0.8, 500)).value == 0
    assert corrected_rate(0.99, 50, JudgeErrors(0.9, 500, 0.8, 500)).value == 1


def test_the_interval_is_lang_and_reiczigel_s_by_hand():
    # z = 1.959964; shrunk to one half: rate (40 + 1.92073) / 103.84146 = 0.403700, sensitivity 46 / 52 = 0.884615,
    # specificity 41 / 52 = 0.788462. Center 0.192161 / 0.673077 = 0.285497; variances 0.00231820, 0.00196290,
    # 0.00320751; shift 2 z^2 (0.285497 x 0.00196290 - 0.714503 x 0.00320751) = -0.0133020; half-width
    # z sqrt(0.00231820 + 0.0815084 x 0.00196290 + 0.510515 x 0.00320751) / 0.673077 = 0.186812.
    value, low, high = corrected_rate(0.4, 100, JudgeErrors(0.9, 50, 0.8, 50))
    assert value == pytest.approx(0.2 / 0.7)
    assert low == pytest.approx(0.285497 - 0.0133020 - 0.186812, abs=2e-5)
    assert high == pytest.approx(0.285497 - 0.0133020 + 0.186812, abs=2e-5)


def test_a_judge_without_errors_changes_nothing():
    # Without errors it is Agresti and Coull's interval, which has Wilson's center.
    value, low, high = corrected_rate(0.3, 200, JudgeErrors(1.0, 10**7, 1.0, 10**7))
    exact = wilson(60, 200)
    assert value == pytest.approx(0.3, abs=1e-6)
    assert (low + high) / 2 == pytest.approx((exact.low + exact.high) / 2, abs=1e-5)
    assert exact.high - exact.low < high - low < 1.01 * (exact.high - exact.low)


def test_fewer_calibration_answers_widen_the_interval_which_contains_the_estimate():
    widths = []
    for n in (1000, 100, 20, 8):
        value, low, high = corrected_rate(0.4, 200, JudgeErrors(0.95, n, 0.95, n))
        assert 0 <= low <= value <= high <= 1
        widths.append(high - low)
    assert widths == sorted(widths)
    assert widths[-1] > 3 * widths[0]
    for rate in (0.0, 1.0):
        value, low, high = corrected_rate(rate, 50, JudgeErrors(0.9, 30, 0.8, 30))
        assert low <= value <= high


@pytest.mark.parametrize(
    "errors",
    [
        JudgeErrors(0.5, 100, 0.5, 100),
        JudgeErrors(0.3, 100, 0.3, 100),
        JudgeErrors(0.6, 20, 0.6, 20),
        JudgeErrors(1.0, 100, 0.0, 0),
        JudgeErrors(0.0, 0, 1.0, 100),
        JudgeErrors(0.0, 0, 0.0, 0),
    ],
)
def test_an_uninformative_judge_leaves_the_rate_unknown(errors):
    interval = corrected_rate(0.4, 100, errors)
    assert interval is UNKNOWN
    assert (interval.low, interval.high) == (0, 1)
    assert math.isnan(interval.value)


def test_near_0_and_1_it_is_never_narrower_than_by_human_labels():
    # The judge calls none of 133 answers a yes, though it errs on 6 % of those labeled no: the formula ends at 0.
    errors = JudgeErrors(0.94, 258, 0.94, 196)
    lowest = corrected_rate(0.0, 133, errors)
    assert (lowest.value, lowest.low, lowest.high) == (0, 0, pytest.approx(wilson(0, 133).high))
    highest = corrected_rate(1.0, 133, JudgeErrors(0.94, 196, 0.94, 258))
    assert (highest.value, highest.low, highest.high) == (1, pytest.approx(wilson(133, 133).low), 1)


def test_a_rate_that_no_true_rate_explains_is_inconsistent_with_the_errors():
    errors = JudgeErrors(0.94, 258, 0.94, 196)
    assert not is_consistent(0.0, 133, errors)
    assert not is_consistent(1.0, 133, errors)
    assert is_consistent(0.06, 133, errors)
    assert is_consistent(0.94, 133, errors)
    assert is_consistent(0.0, 10, errors)
    assert is_consistent(0.0, 133, JudgeErrors(0.5, 50, 0.5, 50))


def test_rates_and_counts_out_of_range_are_rejected():
    for rate, n, errors in (
        (1.2, 10, JudgeErrors(1, 9, 1, 9)),
        (0.2, 0, JudgeErrors(1, 9, 1, 9)),
        (0.2, 5, JudgeErrors(1, -1, 1, 9)),
        (0.2, 5, JudgeErrors(1.5, 3, 1, 9)),
    ):
        with pytest.raises(ValueError, match="expected"):
            corrected_rate(rate, n, errors)


@pytest.mark.parametrize(
    ("truth", "sensitivity", "specificity", "n", "labeled"),
    [(0.1, 0.9, 0.95, 250, 100), (0.3, 0.85, 0.8, 200, 60), (0.6, 0.95, 0.9, 150, 40)],
)
def test_nominal_95_percent_intervals_have_that_coverage(truth, sensitivity, specificity, n, labeled):
    rng = np.random.default_rng(0)
    yes, repetitions = max(5, round(truth * labeled)), 2000
    no = labeled - yes
    rates = rng.binomial(n, truth * sensitivity + (1 - truth) * (1 - specificity), repetitions) / n
    sensitivities = rng.binomial(yes, sensitivity, repetitions) / yes
    specificities = rng.binomial(no, specificity, repetitions) / no
    corrected_covers, plain_covers = 0, 0
    for rate, found_sensitivity, found_specificity in zip(rates, sensitivities, specificities, strict=True):
        corrected = corrected_rate(rate, n, JudgeErrors(found_sensitivity, yes, found_specificity, no))
        corrected_covers += corrected.low <= truth <= corrected.high
        plain = wilson(round(rate * n), n)
        plain_covers += plain.low <= truth <= plain.high
    # Two standard errors of the simulation below 95 %; the interval is known to be slightly wide.
    assert 0.94 <= corrected_covers / repetitions <= 0.99
    assert plain_covers / repetitions < corrected_covers / repetitions - 0.02
