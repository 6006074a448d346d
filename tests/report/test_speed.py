"""The benchmark of reports writes runs that a report can be written on."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "report_speed.py"


@pytest.mark.slow
def test_the_benchmark_of_reports_runs():
    arguments = ["--runs", "2", "--prompts", "30", "--rounds", "1", "--out", "-"]
    output = subprocess.run([sys.executable, SCRIPT, *arguments], check=True, capture_output=True, text=True).stdout
    assert "'report':" in output
