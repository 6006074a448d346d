"""Calibration: the error with its interval, and the bins of a reliability diagram."""

import numpy as np
import pytest

from bfpo.stats.agreement import calibration_error, calibration_interval, reliability


def draw(prompts, calibrated=True):
    rng = np.random.default_rng(0)
    p = rng.uniform(0, 1, 2 * prompts)
    labels = rng.uniform(0, 1, 2 * prompts) < (p if calibrated else p**3)
    return labels, p, [str(index // 2) for index in range(2 * prompts)]


def test_the_interval_is_around_the_error_by_bins():
    labels, p, prompts = draw(400, calibrated=False)
    interval = calibration_interval(labels, p, prompts)
    assert interval.value == pytest.approx(calibration_error(labels, p), abs=1e-12)
    assert 0.15 < interval.low < interval.value < interval.high < 0.35
    assert calibration_interval(*draw(1500)).high < 0.05


def test_bins_add_up_to_the_error_and_cover_calibrated_probabilities():
    labels, p, prompts = draw(1000)
    bins = reliability(labels, p, prompts)
    assert [part.low for part in bins] == [index / 10 for index in range(10)]
    assert sum(part.n for part in bins) == len(p)
    error = sum(part.n * abs(part.mean_p - part.share.value) for part in bins) / len(p)
    assert error == pytest.approx(calibration_error(labels, p), abs=1e-12)
    assert sum(part.share.low <= part.mean_p <= part.share.high for part in bins) >= 8
