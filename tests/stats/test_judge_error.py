"""Correction of a rate for a judge's errors: values by hand, and how often the interval holds the truth."""

import math

import numpy as np
import pytest

from bfpo.stats.intervals import wilson
from bfpo.stats.judge_error import UNKNOWN, JudgeErrors, corrected_rate, fits, judge_errors


def test_errors_are_counted_by_people_s_label_and_prompts_are_the_trials():
    yes = [("a", True, True), ("a", True, False), ("b", True, True), ("c", True, True)]
    no = [("a", False, False), ("d", False, True)]
    assert judge_errors(yes + no) == JudgeErrors(0.75, 3, 0.5, 2)
    assert judge_errors([("a", True, True)]) == JudgeErrors(1.0, 1, 0.0, 0)


def test_the_estimate_turns_the_judge_s_errors_back():
    # Of 0.3, a judge with these errors finds 0.3 x 0.9 + 0.7 x 0.2 = 0.41.
    assert corrected_rate(0.41, 1000, JudgeErrors(0.9, 500, 0.8, 500)).value == pytest.approx(0.3)
    # Fewer yeses than its false ones alone would be, and more than it could find: cut.
    assert corrected_rate(0.1, 50, JudgeErrors(0.9, 500, 0.8, 500)).value == 0
    assert corrected_rate(0.99, 50, JudgeErrors(0.9, 500, 0.8, 500)).value == 1


def test_the_interval_is_lang_and_reiczigel_s_by_hand():
    # z = 1.959964; drawn to one half: rate (40 + 1.92073) / 103.84146 = 0.403700, sensitivity 46 / 52 = 0.884615,
    # specificity 41 / 52 = 0.788462. Center 0.192161 / 0.673077 = 0.285497; variances 0.00231820, 0.00196290,
    # 0.00320751; shift 2 z^2 (0.285497 x 0.00196290 - 0.714503 x 0.00320751) = -0.0133020; half-width
    # z sqrt(0.00231820 + 0.0815084 x 0.00196290 + 0.510515 x 0.00320751) / 0.673077 = 0.186812.
    value, low, high = corrected_rate(0.4, 100, JudgeErrors(0.9, 50, 0.8, 50))
    assert value == pytest.approx(0.2 / 0.7)
    assert low == pytest.approx(0.285497 - 0.0133020 - 0.186812, abs=2e-5)
    assert high == pytest.approx(0.285497 - 0.0133020 + 0.186812, abs=2e-5)


def test_a_judge_that_never_errs_changes_nothing():
    # Without errors it is Agresti and Coull's interval, which has Wilson's center.
    value, low, high = corrected_rate(0.3, 200, JudgeErrors(1.0, 10**7, 1.0, 10**7))
    exact = wilson(60, 200)
    assert value == pytest.approx(0.3, abs=1e-6)
    assert (low + high) / 2 == pytest.approx((exact.low + exact.high) / 2, abs=1e-5)
    assert exact.high - exact.low < high - low < 1.01 * (exact.high - exact.low)


def test_fewer_calibration_answers_widen_the_interval_and_it_holds_the_estimate():
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
def test_a_judge_whose_word_tells_nothing_leaves_everything_open(errors):
    found = corrected_rate(0.4, 100, errors)
    assert found is UNKNOWN
    assert (found.low, found.high) == (0, 1)
    assert math.isnan(found.value)


def test_near_0_it_is_never_narrower_than_people_s_own_labels_would_be():
    # Of 133 answers the judge calls none a yes, though it errs on 6 % of people's no: the formula alone ends at 0.
    errors = JudgeErrors(0.94, 258, 0.94, 196)
    found = corrected_rate(0.0, 133, errors)
    assert (found.value, found.low, found.high) == (0, 0, pytest.approx(wilson(0, 133).high))
    full = corrected_rate(1.0, 133, JudgeErrors(0.94, 196, 0.94, 258))
    assert (full.value, full.low, full.high) == (1, pytest.approx(wilson(133, 133).low), 1)


def test_a_rate_that_no_truth_would_give_does_not_fit_the_errors():
    errors = JudgeErrors(0.94, 258, 0.94, 196)
    assert not fits(0.0, 133, errors)
    assert not fits(1.0, 133, errors)
    assert fits(0.06, 133, errors)
    assert fits(0.94, 133, errors)
    assert fits(0.0, 10, errors)
    assert fits(0.0, 133, JudgeErrors(0.5, 50, 0.5, 50))


def test_impossible_counts_are_refused():
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
def test_nominal_95_percent_intervals_hold_the_truth_as_often(truth, sensitivity, specificity, n, labeled):
    rng = np.random.default_rng(0)
    yes, tries = max(5, round(truth * labeled)), 2000
    found = rng.binomial(n, truth * sensitivity + (1 - truth) * (1 - specificity), tries) / n
    hits = rng.binomial(yes, sensitivity, tries) / yes
    rest = rng.binomial(labeled - yes, specificity, tries) / (labeled - yes)
    held, plain = 0, 0
    for rate, right_yes, right_no in zip(found, hits, rest, strict=True):
        interval = corrected_rate(rate, n, JudgeErrors(right_yes, yes, right_no, labeled - yes))
        held += interval.low <= truth <= interval.high
        uncorrected = wilson(round(rate * n), n)
        plain += uncorrected.low <= truth <= uncorrected.high
    # Two standard errors of the simulation below 95 %; the interval is known to be a little wide.
    assert 0.94 <= held / tries <= 0.99
    assert plain / tries < held / tries - 0.02
