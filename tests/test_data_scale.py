"""The benchmark of large data runs, and docs/scaling.md has the tables of its results."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "data_scale.py"


@pytest.fixture(autouse=True)
def benchmarks_on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))


def test_the_page_has_the_tables_of_the_results():
    from data_scale import MARKS, tables

    results = json.loads((ROOT / "benchmarks/results/data_scale.json").read_text())
    written = (ROOT / "docs/scaling.md").read_text().partition(MARKS[0])[2].partition(MARKS[1])[0]
    assert written.strip() == tables(results["measured"], results["exponents"]).strip()


def test_exponents_have_intervals():
    from data_scale import slope

    sizes = [10, 10, 100, 1000, 1000]
    exact = slope(sizes, [3.0 * size for size in sizes])
    assert (exact["low"], exact["exponent"], exact["high"]) == pytest.approx((1, 1, 1))
    noisy = slope(sizes, (np.array([1, 1.2, 1, 1.1, 0.9]) * sizes).tolist())
    assert noisy["low"] < 1 < noisy["high"] < 1.2


def test_rows_are_short_and_repeat_themselves(tmp_path):
    from data_scale import make_rows

    make_rows(tmp_path / "a.jsonl", 2000, (6, 8, 8), labeled=True, seed=1)
    lines = (tmp_path / "a.jsonl").read_bytes().splitlines()
    assert len(lines) == 2000
    assert max(map(len, lines)) <= 204
    assert 20 < 2000 - len(set(lines)) < 100


@pytest.mark.slow
def test_the_benchmark_runs():
    subprocess.run([sys.executable, SCRIPT, "--quick", "--cores", "1"], check=True, stdout=subprocess.DEVNULL)
