"""The scripts of examples/ run by their documented commands and print what the library computes."""

import os
import runpy
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from bfpo.losses.labeling import LabelingFunction
from bfpo.losses.theory import TabularProblem, bilinear_reward, rl_optimum, supervised_minimizer

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_four_actions_prints_the_exact_policies_and_draws_them(tmp_path):
    process = subprocess.run(
        [sys.executable, EXAMPLES / "four_actions.py"],
        cwd=tmp_path,
        env=os.environ | {"MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    printed = {
        line[:18].strip(): [float(number) for number in line[18:].split()]
        for line in process.stdout.splitlines()[1:-1]
    }

    uniform = np.full(4, 0.25)
    wins = np.array([[0.5, 1, 1, 1], [0, 0.5, 1, 1], [0, 0, 0.5, 1], [0, 0, 0, 0.5]])
    problem = TabularProblem(uniform, uniform, wins, np.array([0, 1, 1, 0]))
    shifted = supervised_minimizer(problem, LabelingFunction.from_parameters(alpha=0.5), beta=0.5)
    optimum = rl_optimum(problem, bilinear_reward(problem), beta=0.5)
    for name, policy in (("BFPO alpha=0.5", shifted), ("bilinear optimum", optimum), ("bfpo_soft", optimum)):
        expected = [*policy, policy @ problem.safe, policy @ problem.win_rates]
        assert printed[name] == pytest.approx(expected, abs=6e-4)  # three digits are printed
    unshifted = printed["BFPO alpha=0"]
    assert unshifted[0] > unshifted[3]
    assert shifted[0] < shifted[3]
    assert ElementTree.parse(tmp_path / "four_actions.svg").getroot().tag.endswith("svg")


def test_four_actions_names_the_command_that_installs_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit, match=r"needs matplotlib; pip install 'bfpo\[dev\]'"):
        runpy.run_path(str(EXAMPLES / "four_actions.py"))


OFFICIAL = """
class BFPOTrainer(DPOTrainer):
    def bfpo(self, safe_w, safe_l, policy_w: torch.FloatTensor, policy_l, ref_w, ref_l, free: bool = False) -> Tuple:
        factor = self.b1 * self.b3 * safe_w - self.b3 * safe_l - {alpha}
        return ((policy_w - policy_l) - (ref_w - ref_l) - 1 / self.beta * factor) ** 2, safe_w
"""


@pytest.mark.parametrize(("alpha", "code"), [(None, 0), ("self.alpha", 0), ("0.4", 1)])
def test_a_buffered_run_has_the_losses_of_the_official_arithmetic(tmp_path, monkeypatch, capsys, alpha, code):
    monkeypatch.syspath_prepend(EXAMPLES)
    import official_parity

    arguments = []
    if alpha:
        file = tmp_path / "src/alignment/trainer/bfpo.py"
        file.parent.mkdir(parents=True)
        file.write_text(OFFICIAL.format(alpha=alpha))
        arguments = ["--official", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["official_parity.py", *arguments])
    monkeypatch.setattr(official_parity, "STEPS", 4)
    with pytest.raises(SystemExit) as exit_info:
        official_parity.main()
    assert exit_info.value.code == code
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed[-7:-2]] == ["step", "0", "1", "2", "3"]
    assert printed[-2].startswith("largest relative difference of a loss: ")


def test_a_folder_that_is_no_checkout_is_rejected(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    import official_parity

    with pytest.raises(SystemExit, match="--official expects a checkout of wx-zhang/bfpo"):
        official_parity.checkout_loss(tmp_path)
