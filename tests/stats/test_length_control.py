"""Raw win rates against published ones, and length-controlled win rates."""

import json
from pathlib import Path

import numpy as np
import pytest

from bfpo.errors import DataError
from bfpo.evaluation.alpaca_eval import read_alpaca_annotations
from bfpo.stats.length_control import length_controlled_win_rate, win_rate

DATA = Path(__file__).parents[2].parent / "shared" / "data" / "alpaca_eval"
PUBLISHED = {
    "vicuna-7b-v1.5": 4.80,
    "gemma-7b-it": 6.94,
    "OpenHermes-2.5-Mistral-7B": 10.34,
    "claude-instant-1.2": 16.13,
}


@pytest.mark.skipif(not DATA.is_dir(), reason="no ../shared/data/alpaca_eval")
@pytest.mark.parametrize("model", PUBLISHED)
def test_raw_win_rates_are_the_published_ones(model: str) -> None:
    annotations = read_alpaca_annotations(DATA / f"{model}.jsonl.gz")
    rate = win_rate(annotations.preferences)
    assert round(100 * rate.value, 2) == PUBLISHED[model]
    assert rate.low < rate.value < rate.high


def test_length_control_finds_the_rate_at_equal_length() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.normal(1500, 400, 2000)
    reference = rng.normal(1000, 400, 2000)
    difference = lengths - reference
    p = 1 / (1 + np.exp(1.0 - 2.0 * np.tanh(difference / difference.std())))
    preferences = (rng.random(2000) < p).astype(float)
    rate = length_controlled_win_rate(preferences, lengths, reference, resamples=200)
    assert rate.low < 1 / (1 + np.e) < rate.high
    assert preferences.mean() > rate.high


def test_length_control_stays_finite_without_a_single_win() -> None:
    rate = length_controlled_win_rate(np.zeros(20), np.arange(20.0), np.zeros(20), resamples=50)
    assert 0 <= rate.low <= rate.value <= rate.high < 0.01


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"preference": 3, "instruction": "", "output_1": "", "output_2": ""}, "preference is 3; expected a number"),
        ({"preference": 1, "instruction": "", "output_1": ""}, "no column 'output_2'"),
    ],
)
def test_rows_that_are_not_annotations_are_rejected_by_place(tmp_path, row, message):
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match=f"rows.jsonl.*{message}"):
        read_alpaca_annotations(tmp_path / "rows.jsonl")
    with pytest.raises(DataError, match="there is no such file"):
        read_alpaca_annotations(tmp_path / "none.jsonl")
