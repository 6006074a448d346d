"""The scripts of examples/ run as their first lines say and print what the library computes."""

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from bfpo.labeling import LabelingFunction
from bfpo.theory import TabularProblem, bilinear_reward, rl_optimum, supervised_minimiser

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_four_actions_prints_the_exact_policies_and_draws_them(tmp_path):
    done = subprocess.run(
        [sys.executable, EXAMPLES / "four_actions.py"],
        cwd=tmp_path,
        env=os.environ | {"MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    printed = {
        line[:18].strip(): [float(word) for word in line[18:].split()] for line in done.stdout.splitlines()[1:-1]
    }

    uniform = np.full(4, 0.25)
    wins = np.array([[0.5, 1, 1, 1], [0, 0.5, 1, 1], [0, 0, 0.5, 1], [0, 0, 0, 0.5]])
    problem = TabularProblem(uniform, uniform, wins, np.array([0, 1, 1, 0]))
    shifted = supervised_minimiser(problem, LabelingFunction.from_parameters(alpha=0.5), beta=0.5)
    optimum = rl_optimum(problem, bilinear_reward(problem), beta=0.5)
    for name, policy in (("BFPO alpha=0.5", shifted), ("bilinear optimum", optimum), ("bfpo_soft", optimum)):
        expected = [*policy, policy @ problem.safe, policy @ problem.win_rates]
        assert printed[name] == pytest.approx(expected, abs=6e-4)  # three digits are printed
    unshifted = printed["BFPO alpha=0"]
    assert unshifted[0] > unshifted[3]
    assert shifted[0] < shifted[3]
    assert ElementTree.parse(tmp_path / "four_actions.svg").getroot().tag.endswith("svg")
