"""RLOO on bandits of one token ends at the policy of the closed form, and λ at that of `bfpo dual`."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import online_bandits as bandits


@pytest.fixture
def bandit(tmp_path):
    bandits.make_bandit(tmp_path / "bandit", seed=3)
    return tmp_path / "bandit"


def test_the_policy_ends_at_the_closed_form(bandit, tmp_path):
    combine = {"name": "lagrangian", **bandits.COMBINERS["lagrangian"]}
    run = bandits.train(bandit, tmp_path / "out", combine, seed=0, max_steps=30)
    before, after = bandits.distances(bandit, tmp_path / "out", run, combine)
    assert after < 0.05
    assert after < before / 5


@pytest.mark.slow
def test_lambda_ends_at_the_constrained_optimum(bandit, tmp_path):
    threshold = bandits.threshold_of(bandit)
    combine = {"name": "lagrangian", "cost_at_most": threshold, **bandits.CONSTRAINED}
    bandits.train(bandit, tmp_path / "out", combine, seed=0, **bandits.CONSTRAINED_TRAINER)
    multiplier, _ = bandits.constrained_optimum(bandit, threshold)
    assert multiplier > 0.1
    # λ wanders around the optimum, with the noise of 64 samples in a step.
    assert bandits.mean_multiplier(tmp_path / "out") == pytest.approx(multiplier, rel=0.15)
