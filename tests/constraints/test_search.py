"""The search of C-DPO's outer loop on finite problems, whose multiplier `bfpo dual` has exactly."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bfpo.constraints.search import Tried, next_multiplier
from bfpo.losses.constrained import ConstrainedProblem, solve_mean
from bfpo.losses.labeling import LabelingFunction
from bfpo.losses.theory import constrained_minimizer, random_problem

SEEDS = st.integers(0, 10**6)


def unsafe_and_helpful(seed: int, prompts: int = 12, answers: int = 5) -> ConstrainedProblem:
    """A problem in which unsafe answers are the more helpful ones."""
    rng = np.random.default_rng(seed)
    cost = (rng.random((prompts, answers)) < 0.6).astype(float)
    reward = 2 * cost + rng.normal(0, 1, cost.shape)
    return ConstrainedProblem(rng.dirichlet(np.ones(answers), prompts), reward, cost, float(rng.uniform(0.1, 1)))


def threshold_of(problem: ConstrainedProblem, position: float) -> float:
    least, most = problem.least_cost(), problem.expected_cost(0.0)
    return least + position * (most - least)


def search(excess, *, start: float, step: float, rounds: int) -> list[Tried]:
    """Run the outer loop with an exact measurement in place of training and sampling."""
    tried: list[Tried] = []
    for _ in range(rounds):
        multiplier = next_multiplier(tried, start=start, step=step)
        tried.append(Tried(multiplier, excess(multiplier)))
    return tried


def search_costs(problem: ConstrainedProblem, threshold: float, *, start: float, rounds: int) -> list[Tried]:
    """Run it with the exact optimum of each relabeled problem as the policy."""
    return search(
        lambda multiplier: problem.expected_cost(multiplier) - threshold,
        start=start,
        step=problem.beta,
        rounds=rounds,
    )


@given(SEEDS, st.floats(0.05, 0.95), st.floats(0, 3))
def test_the_fixed_point_is_the_multiplier_of_bfpo_dual(seed, position, start):
    problem = unsafe_and_helpful(seed)
    threshold = threshold_of(problem, position)
    exact = solve_mean(problem, threshold).multiplier
    tried = search_costs(problem, threshold, start=start * exact, rounds=60)
    # The measure is of order 1, so its rounding moves the root by less than this.
    assert tried[-1].multiplier == pytest.approx(exact, rel=1e-9)


def test_for_bfpo_the_fixed_point_meets_the_constraint_on_its_own_policy():
    problem, labeling = random_problem(np.random.default_rng(3), 6), LabelingFunction.from_parameters()
    unsafe, beta = 1 - problem.safe, 0.3

    def share(multiplier):
        return float(constrained_minimizer(problem, labeling, beta=beta, safety_weight=multiplier) @ unsafe)

    threshold = 0.2 * share(0.0)
    tried = search(lambda multiplier: share(multiplier) - threshold, start=0.0, step=beta, rounds=40)
    assert share(tried[-1].multiplier) == pytest.approx(threshold, abs=1e-12)


def test_five_rounds_leave_a_tenth_of_the_error_of_a_biased_estimate():
    first, left = [], []
    for seed in range(40):
        problem = unsafe_and_helpful(seed)
        threshold = threshold_of(problem, 0.1)
        # `bfpo dual` from samples is off by tens of percent, not by orders of magnitude.
        start = 0.8 * solve_mean(problem, threshold).multiplier
        excesses = [point.excess for point in search_costs(problem, threshold, start=start, rounds=5)]
        first.append(excesses[0])
        left.append(min(map(abs, excesses)))
    assert min(first) > 0
    assert np.mean(left) < 0.1 * np.mean(first)


def test_a_slack_constraint_ends_at_zero():
    problem = unsafe_and_helpful(0)
    threshold = problem.expected_cost(0.0) + 0.1
    tried = search_costs(problem, threshold, start=2.0, rounds=8)
    assert tried[-1].multiplier == 0
    assert tried[-1].holds


def test_an_infeasible_constraint_never_holds_and_the_multiplier_grows():
    problem = unsafe_and_helpful(1)
    threshold = problem.least_cost() - 0.01
    tried = search_costs(problem, threshold, start=1.0, rounds=5)
    steps = np.diff([point.multiplier for point in tried]) / problem.beta
    assert steps == pytest.approx([1, 2, 4, 8])
    assert not any(point.holds for point in tried)


@given(SEEDS)
def test_what_is_tried_next_is_between_the_highest_failure_and_the_next_success(seed):
    rng = np.random.default_rng(seed)
    tried: list[Tried] = []
    for _ in range(8):
        multiplier = next_multiplier(tried, start=1.0, step=0.5)
        failed = [point.multiplier for point in tried if not point.holds]
        assert multiplier >= max(failed, default=0.0)
        above = [point.multiplier for point in tried if point.holds and point.multiplier > max(failed, default=-1.0)]
        assert multiplier <= min(above, default=np.inf)
        # Noise as large as the signal.
        tried.append(Tried(multiplier, 0.5 - 0.2 * multiplier + rng.normal()))


def test_a_line_of_excesses_is_solved_by_one_step():
    tried = [Tried(1.0, 0.3), Tried(2.0, -0.1)]
    assert next_multiplier(tried, start=0.0, step=1.0) == pytest.approx(1.75)
    # The lower end has stayed for one round: its excess counts for half.
    tried.append(Tried(1.75, -0.05))
    assert next_multiplier(tried, start=0.0, step=1.0) == pytest.approx(1 + 0.75 * 0.15 / (0.15 + 0.05))
