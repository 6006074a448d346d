"""Constrained problems on finite answer sets: optima against duality, definitions and other people's solvers.

Tolerance: everything is solved in float64, and the root search ends at the last bit of the multiplier, so 1e-12 is
rounding.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import brentq, minimize_scalar
from scipy.special import softmax

from bfpo.errors import RecipeError
from bfpo.losses.baselines import DPO
from bfpo.losses.combiners import bilinear, lagrangian, multiplicative, tail, tail_cost
from bfpo.losses.constrained import (
    ConstrainedProblem,
    cvar,
    expectation,
    solve_cvar,
    solve_mean,
)
from bfpo.losses.inputs import PairLogps
from bfpo.losses.labeling import LabelingFunction
from bfpo.losses.theory import (
    bilinear_reward,
    constrained_minimizer,
    random_problem,
    rl_optimum,
    supervised_minimizer,
    supervised_reward,
)
from bfpo.stats.tail import worst_mean

EXACT = 1e-12
SEEDS = st.integers(0, 10**6)


def random_constrained(seed: int, prompts: int = 12, answers: int = 5) -> ConstrainedProblem:
    """A problem in which harm helps, and some answers don't exist."""
    rng = np.random.default_rng(seed)
    cost = rng.normal(0, 1, (prompts, answers))
    reference = rng.dirichlet(np.ones(answers), prompts) + 0.02
    reference[rng.random((prompts, answers)) < 0.1] = 0
    reference[:, 0] += 0.1
    reference /= reference.sum(axis=1, keepdims=True)
    reward = 0.7 * cost + rng.normal(0, 1, (prompts, answers))
    return ConstrainedProblem(reference, reward, cost, float(rng.uniform(0.1, 1)))


def graded(seed: int, prompts: int = 20, answers: int = 6) -> ConstrainedProblem:
    """A problem whose costs are severities with a few values."""
    rng = np.random.default_rng(seed)
    cost = rng.choice([0, 0, 0, 0.25, 0.5, 1], size=(prompts, answers))
    reward = rng.normal(0, 1, cost.shape) + cost
    return ConstrainedProblem(rng.dirichlet(np.ones(answers), prompts), reward, cost, 0.2)


def between(problem: ConstrainedProblem, position: float) -> float:
    """A threshold between the lowest cost (0) and that of the most helpful policy (1)."""
    least, most = problem.least_cost(), problem.expected_cost(0.0)
    return least + position * (most - least)


# --- the mean


@pytest.mark.parametrize("seed", range(40))
def test_primal_equals_dual_and_the_constraint_holds_with_equality(seed):
    problem = random_constrained(seed)
    threshold = between(problem, 0.1 + 0.02 * seed)
    solution = solve_mean(problem, threshold)
    assert solution.state == "active"
    assert solution.multiplier > 0
    policy = problem.policy(solution.multiplier)
    assert abs(expectation(policy, problem.cost) - threshold) < EXACT
    # By weak duality a feasible policy whose objective is a value of the dual is the optimum.
    assert abs(problem.objective(policy) - problem.dual(solution.multiplier, threshold)) < EXACT


def test_no_feasible_policy_is_better_and_no_dual_value_is_lower():
    rng = np.random.default_rng(0)
    problem = random_constrained(3)
    threshold = between(problem, 0.3)
    best = problem.objective(problem.policy(solve_mean(problem, threshold).multiplier))
    feasible = 0
    for multiplier in rng.uniform(0, 10, 200):
        assert problem.dual(multiplier, threshold) >= best - EXACT
        # Policies near other tilted ones: those of a random reward are almost never feasible.
        other = problem.policy(multiplier) * np.exp(0.3 * rng.normal(size=problem.cost.shape))
        other /= other.sum(axis=1, keepdims=True)
        if expectation(other, problem.cost) <= threshold:
            feasible += 1
            assert problem.objective(other) < best
    assert feasible > 50


@given(SEEDS, st.floats(0, 5), st.floats(-1, 1))
def test_slope_of_the_dual_is_the_threshold_less_the_cost_and_rises(seed, multiplier, threshold):
    problem = random_constrained(seed)
    step = 1e-5
    values = [problem.dual(multiplier + shift, threshold) for shift in (-step, 0, step)]
    slope = (values[2] - values[0]) / (2 * step)
    # Central differences of a function of order 1 are exact to about 1e-9 here.
    assert slope == pytest.approx(threshold - problem.expected_cost(multiplier), abs=1e-6)
    assert values[0] + values[2] - 2 * values[1] >= -1e-12


@given(SEEDS, st.floats(0, 20), st.floats(0, 20))
def test_cost_falls_as_the_multiplier_grows(seed, first, second):
    problem = random_constrained(seed)
    low, high = sorted((first, second))
    assert problem.expected_cost(high) <= problem.expected_cost(low) + EXACT
    assert problem.expected_cost(high) >= problem.least_cost() - EXACT


@given(SEEDS, st.floats(0.02, 0.98), st.floats(0.02, 0.98))
def test_a_stricter_threshold_has_a_larger_multiplier(seed, first, second):
    problem = random_constrained(seed)
    strict, loose = sorted((first, second))
    multipliers = [solve_mean(problem, between(problem, position)).multiplier for position in (strict, loose)]
    assert multipliers[0] >= multipliers[1] > 0


def test_slack_and_infeasible_are_told_apart():
    problem = random_constrained(1)
    unconstrained, least = problem.expected_cost(0.0), problem.least_cost()
    assert solve_mean(problem, unconstrained + 0.1) == ("slack", 0.0, unconstrained, None)
    assert solve_mean(problem, unconstrained).state == "slack"
    assert solve_mean(problem, least - 0.01) == ("infeasible", None, least, None)
    # At the lowest cost itself the multiplier would be infinite.
    assert solve_mean(problem, least).state == "infeasible"
    almost = solve_mean(problem, least + 1e-6)
    assert almost.state == "active"
    assert almost.achieved == pytest.approx(least + 1e-6, abs=EXACT)


def test_answers_that_do_not_exist_change_nothing():
    problem = random_constrained(5)
    padding = np.zeros((len(problem.cost), 2))
    padded = ConstrainedProblem(
        np.hstack([problem.reference, padding]),
        np.hstack([problem.reward, padding + 99]),
        np.hstack([problem.cost, padding - 99]),
        problem.beta,
    )
    threshold = between(problem, 0.4)
    assert padded.least_cost() == problem.least_cost()
    assert solve_mean(padded, threshold).multiplier == pytest.approx(
        solve_mean(problem, threshold).multiplier, rel=EXACT
    )
    ours, theirs = solve_cvar(problem, threshold + 0.5, 0.3), solve_cvar(padded, threshold + 0.5, 0.3)
    assert ours.state == theirs.state == "active"
    assert ours.multiplier == pytest.approx(theirs.multiplier, rel=1e-9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reference": np.full((12, 5), 0.3)}, "not a probability distribution"),
        ({"reward": np.zeros((12, 4))}, r"reward has shape \(12, 4\)"),
        ({"cost": np.full((12, 5), np.nan)}, "cost has a number that isn't finite"),
        ({"beta": 0.0}, "beta is 0.0"),
    ],
)
def test_impossible_problems_are_refused(change, message):
    with pytest.raises(RecipeError, match=message):
        replace(random_constrained(0), **change)


# --- DPO on relabeled pairs; other algorithms for the same multiplier


def dpo_gradient(log_reference, log_ratio, score, beta):
    """The largest derivative of DPO's population loss at a log-ratio to the reference.

    Pairs are drawn from the reference, and labeled by the Bradley-Terry model of a score. The loss is convex, and
    strictly so up to a constant, so it is least where this is 0.
    """
    i, j = (index.ravel() for index in np.indices((score.size, score.size)))
    weights = np.exp(log_reference[i] + log_reference[j]) / (1 + np.exp(score[j] - score[i]))
    u, ref = torch.tensor(log_ratio, requires_grad=True), torch.tensor(log_reference)
    logps, zero = u + ref, torch.zeros(i.size, dtype=torch.float64)
    losses = DPO(beta=beta)(PairLogps(logps[i], logps[j], ref[i], ref[j], zero, zero))
    (losses * torch.tensor(weights)).sum().backward()
    return u.grad.abs().max()


def test_dpo_on_relabeled_pairs_has_its_minimizer_at_the_constrained_optimum():
    problem = random_constrained(7)
    multiplier = solve_mean(problem, between(problem, 0.3)).multiplier
    combined = lagrangian(problem.reward, problem.cost, multiplier=multiplier)
    for reference, values in zip(problem.reference, combined, strict=True):
        values, log_reference = values[reference > 0], np.log(reference[reference > 0])

        def gradient(log_ratio, score, log_reference=log_reference):
            return dpo_gradient(log_reference, log_ratio, score, problem.beta)

        assert gradient(values / problem.beta, values) < EXACT
        assert gradient(values / problem.beta**2, values) > 1e-5
        # The official PeCAN code draws labels from log-ratios, which lack the factor beta: its minimum is elsewhere.
        assert gradient(values / problem.beta**2, values / problem.beta) < EXACT
    policy = problem.policy(multiplier)
    exists = problem.reference > 0
    scaled = np.where(
        exists, problem.beta * np.log(np.where(exists, policy / np.where(exists, problem.reference, 1), 1)), 0
    )
    shift = np.where(exists, scaled - combined, np.nan)
    assert np.nanmax(np.nanmax(shift, axis=1) - np.nanmin(shift, axis=1)) < EXACT


def test_two_stages_of_dpo_end_at_the_constrained_optimum_and_their_merge_at_that_of_a_smaller_multiplier():
    """SACPO, arXiv 2404.11049: DPO for the reward, then for safety at beta / λ with the first policy as reference."""
    problem = random_constrained(7)
    multiplier = solve_mean(problem, between(problem, 0.3)).multiplier
    assert multiplier > 0.1
    first, second = problem.policy(0), problem.policy(multiplier)
    for prompt, reference in enumerate(problem.reference):
        exists = reference > 0
        log_reference, log_first, log_second = (np.log(p[prompt][exists]) for p in (problem.reference, first, second))
        reward, safety = problem.reward[prompt][exists], -problem.cost[prompt][exists]
        assert dpo_gradient(log_reference, log_first - log_reference, reward, problem.beta) < EXACT
        second_beta = problem.beta / multiplier
        assert dpo_gradient(log_first, log_second - log_first, safety, second_beta) < EXACT
        assert dpo_gradient(log_first, log_second - log_first, safety, problem.beta) > 1e-4
        # P-SACPO: where log-probabilities are linear in the weights, weight q of the second model is multiplier q·λ.
        merged = softmax(0.75 * log_first + 0.25 * log_second)
        np.testing.assert_allclose(merged, problem.policy(0.25 * multiplier)[prompt][exists], atol=EXACT)


def official_multiplier(helpfulness, safety, threshold, kl_coeff, *, lr, err, max_iters):
    """`DualOptimizer.solve` of shuoli90/CAN @68a922c, safe_rlhf/trainers/model_based.py, with one learning rate.

    The official class starts again with a smaller rate when it doesn't converge, at most five times.
    """
    lam, trajectory = 1.0, []
    for _ in range(max_iters):
        logits = (helpfulness + (safety - threshold) * lam) / kl_coeff
        sm_probs = softmax(logits, axis=1)
        gradient = np.sum(sm_probs * (safety - threshold), axis=1).mean()
        lam = np.maximum(lam - lr * gradient, 0)
        trajectory.append(lam)
        if len(trajectory) > 10 and np.abs(lam - np.array(trajectory[-1:-6:-1])).max() < err:
            return lam
    raise AssertionError("it didn't converge")


def official_pecan_multiplier(ref, helpful, safe, kl_coeff, margin, *, lr, err, max_iters):
    """`DualOptimizer.solve` of the same repository, trainers/preference_based_dual_trainer_corrected(1).ipynb."""
    helpfulness_scores, safety_scores = helpful - ref, safe - ref
    kl_divs = np.mean(ref - safe)
    lam, trajectory = 1.0, [1.0]
    for _ in range(max_iters):
        sm_probs = softmax(helpfulness_scores + safety_scores * lam, axis=1)
        gradient = np.sum(sm_probs * safety_scores, axis=1).mean() + kl_divs - margin / kl_coeff
        lam = np.maximum(lam - lr * gradient, 0)
        trajectory.append(lam)
        if len(trajectory) > 10 and np.abs(lam - np.array(trajectory[-1:-6:-1])).max() < err:
            return lam
    raise AssertionError("it didn't converge")


def samples(seed: int, prompts: int = 30, count: int = 16) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    cost = rng.normal(0.3, 1, (prompts, count))
    return 0.7 * cost + rng.normal(0, 1, cost.shape), cost


@pytest.mark.parametrize("threshold", [0.2, -0.1, -0.4])
def test_multiplier_is_that_of_the_official_optimizer_on_samples(threshold):
    reward, cost = samples(0)
    problem = ConstrainedProblem(np.full(cost.shape, 1 / 16), reward, cost, 0.5)
    ours = solve_mean(problem, threshold).multiplier
    theirs = official_multiplier(reward, -cost, -threshold, 0.5, lr=0.5, err=1e-12, max_iters=20000)
    assert ours > 0.1
    assert ours == pytest.approx(theirs, abs=1e-9)


def test_multiplier_of_three_models_is_that_of_the_official_optimizer():
    rng = np.random.default_rng(1)
    beta, margin = 0.1, 0.05
    ref = rng.normal(-30, 5, (20, 16))
    safe, helpful = ref + rng.normal(0, 0.8, ref.shape), ref + rng.normal(0, 0.8, ref.shape)
    # Scores are beta times the log-ratios, and the constraint is a gain over the reference.
    reward, cost = beta * (helpful - ref), -beta * (safe - ref)
    problem = ConstrainedProblem(np.full(ref.shape, 1 / 16), reward, cost, beta)
    ours = solve_mean(problem, float(cost.mean()) - margin).multiplier
    theirs = official_pecan_multiplier(ref, helpful, safe, beta, margin, lr=0.2, err=1e-12, max_iters=20000)
    assert ours == pytest.approx(theirs, abs=1e-9)
    assert ours > 0.1


def test_dual_ascent_and_log_updates_arrive_at_the_same_multiplier():
    problem = random_constrained(11)
    threshold = between(problem, 0.3)
    root = solve_mean(problem, threshold).multiplier
    ascent = log_ascent = 1.0
    for _ in range(4000):
        # C-DPO's outer loop with an exact inner problem, and Safe RLHF's update of log λ.
        ascent = max(0.0, ascent + 0.1 * (problem.expected_cost(ascent) - threshold))
        log_ascent *= np.exp(0.1 * log_ascent * (problem.expected_cost(log_ascent) - threshold))
    assert ascent == pytest.approx(root, rel=1e-9)
    assert log_ascent == pytest.approx(root, rel=1e-9)


# --- the tail


@given(SEEDS, st.floats(0.01, 1))
def test_cvar_is_the_smallest_mean_of_the_tail_cost(seed, share):
    rng = np.random.default_rng(seed)
    values, weights = rng.choice([0, 0.25, 0.5, 1], 30) + rng.normal(0, 0.1, 30), rng.random(30)
    means = [weights @ tail_cost(values, start=start, share=share) / weights.sum() for start in values]
    assert cvar(values, weights, share) == pytest.approx(min(means), abs=1e-9)
    # As a value to be maximized: the mean of the lowest share.
    start = values[int(np.argmin(means))]
    mean_of_tail = -start + weights @ tail(-values, start=-start, share=share) / weights.sum()
    assert mean_of_tail == pytest.approx(-cvar(values, weights, share), abs=1e-9)


def test_cvar_of_equal_weights_is_the_worst_mean_and_of_two_values_a_capped_rate():
    rng = np.random.default_rng(0)
    values = rng.normal(size=97)
    for share in (0.01, 0.1, 0.33, 1.0):
        assert cvar(values, np.ones(97), share) == pytest.approx(float(worst_mean(values, share=share)), abs=EXACT)
    for rate in (0.02, 0.05, 0.2):
        binary = np.array([1.0, 0.0])
        assert cvar(binary, np.array([rate, 1 - rate]), 0.1) == pytest.approx(min(1, rate / 0.1), abs=EXACT)


def test_gradient_of_cvar_is_that_of_an_expected_tail_cost():
    rng = np.random.default_rng(1)
    cost, logits, share, step = rng.normal(size=7), rng.normal(size=7), 0.3, 1e-6
    policy = softmax(logits)
    numeric = [
        (cvar(cost, softmax(logits + step * unit), share) - cvar(cost, softmax(logits - step * unit), share))
        / step
        / 2
        for unit in np.eye(7)
    ]
    order = np.argsort(-cost)
    start = cost[order][np.searchsorted(np.cumsum(policy[order]), share)]
    surrogate = tail_cost(cost, start=start, share=share)
    np.testing.assert_allclose(numeric, policy * (surrogate - policy @ surrogate), atol=1e-8)


@pytest.mark.parametrize("seed", range(6))
def test_cvar_constraint_holds_and_no_other_start_of_the_tail_is_better(seed):
    problem = graded(seed)
    share, threshold = 0.1, 0.45
    solution = solve_cvar(problem, threshold, share)
    assert solution.state == "active"
    shifted = problem.with_cost(tail_cost(problem.cost, start=solution.tail_start, share=share))
    policy = shifted.policy(solution.multiplier)
    assert cvar(problem.cost, policy, share) == pytest.approx(solution.achieved, abs=EXACT)
    assert solution.achieved == pytest.approx(threshold, abs=1e-9)
    for start in np.linspace(-0.2, threshold, 60):
        other = problem.with_cost(tail_cost(problem.cost, start=start, share=share))
        candidate = solve_mean(other, threshold)
        if candidate.multiplier is not None:
            assert problem.objective(other.policy(candidate.multiplier)) <= problem.objective(policy) + 1e-9


def test_bounding_the_tail_is_not_bounding_the_mean():
    problem = graded(2)
    solution = solve_cvar(problem, 0.5, 0.1)
    shifted = problem.with_cost(tail_cost(problem.cost, start=solution.tail_start, share=0.1))
    policy = shifted.policy(solution.multiplier)
    mean = solve_mean(problem, expectation(policy, problem.cost))
    same_mean = problem.policy(mean.multiplier)
    assert cvar(problem.cost, same_mean, 0.1) > 0.7
    assert problem.objective(same_mean) > problem.objective(policy)


def test_many_distinct_costs_still_meet_the_constraint_and_cost_little():
    rng = np.random.default_rng(3)
    cost = rng.gamma(1.0, 1.0, (40, 12))
    problem = ConstrainedProblem(np.full(cost.shape, 1 / 12), rng.normal(0, 1, cost.shape) + cost, cost, 0.3)
    solution = solve_cvar(problem, 1.2, 0.1)
    assert solution.state == "active"
    assert solution.achieved <= 1.2 + 1e-9

    def value_at(start):
        shifted = problem.with_cost(tail_cost(cost, start=start, share=0.1))
        multiplier = solve_mean(shifted, 1.2).multiplier
        return np.inf if multiplier is None else -problem.objective(shifted.policy(multiplier))

    best = -minimize_scalar(value_at, bounds=(0.2, 1.2), method="bounded", options={"xatol": 1e-6}).fun
    shifted = problem.with_cost(tail_cost(cost, start=solution.tail_start, share=0.1))
    assert problem.objective(shifted.policy(solution.multiplier)) > best - 1e-3


def test_slack_and_infeasible_tails_are_told_apart():
    problem = graded(1)
    assert solve_cvar(problem, 1.0, 0.1).state == "slack"
    assert solve_cvar(problem, 1.0, 0.1).multiplier == 0
    every_answer_harms = problem.with_cost(0.25 + 0.5 * problem.cost)
    infeasible = solve_cvar(every_answer_harms, 0.2, 0.1)
    assert infeasible.state == "infeasible"
    assert infeasible.multiplier is None
    assert infeasible.achieved >= 0.25


# --- combiners


def test_multiplicative_is_bilinear_with_other_offsets():
    rng = np.random.default_rng(0)
    reward, p_unsafe = rng.random(50), rng.random(50)
    np.testing.assert_allclose(
        multiplicative(reward, p_unsafe, floor=-0.3), bilinear(1 - p_unsafe, reward, a1=0, a2=0.3), atol=EXACT
    )


def test_combiners_order_four_answers_as_their_definitions_say():
    safe, helpful = np.array([1.0, 1, 0, 0]), np.array([1.0, 0, 1, 0])
    assert multiplicative(helpful, 1 - safe).tolist() == [1, 0, 0, 0]
    assert bilinear(safe, helpful, a1=0.5, a2=0.5).tolist() == [2.25, 0.75, 0.75, 0.25]
    # alpha = 1/2 lowers a1 by 1.
    assert bilinear(safe, helpful, a1=-0.5, a2=0.5).tolist() == [0.75, 0.25, -0.75, -0.25]
    assert lagrangian(helpful, 1 - safe, multiplier=3).tolist() == [1, 0, -2, -3]
    assert lagrangian(helpful, 1 - safe, multiplier=3, normalize=True).tolist() == [0.25, 0, -0.5, -0.75]
    assert lagrangian(helpful, 1 - safe, multiplier=3, threshold=0.5).tolist() == [2.5, 1.5, -0.5, -1.5]
    assert tail(helpful, start=0.5, share=0.25).tolist() == [0, -2, 0, -2]


@pytest.mark.parametrize("wrong", [-0.1, np.nan, np.inf])
def test_a_negative_or_infinite_multiplier_is_refused(wrong):
    with pytest.raises(RecipeError, match="multiplier is"):
        lagrangian(np.zeros(2), np.zeros(2), multiplier=wrong)


@pytest.mark.parametrize("wrong", [0, 1.1, np.nan])
def test_an_impossible_share_is_refused(wrong):
    for function in (tail, tail_cost):
        with pytest.raises(RecipeError, match="share is"):
            function(np.zeros(2), start=0.0, share=wrong)


# --- constrained BFPO


def bandits(count: int = 120):
    """Yield problems with safe and unsafe answers, each with a beta."""
    rng = np.random.default_rng(0)
    for number in range(count):
        problem = random_problem(rng, 6, kind=("bradley_terry", "unstructured")[number % 2])
        if 0 < problem.safe.sum() < 6:
            yield problem, float(rng.uniform(0.1, 0.6))


def test_a_safety_weight_multiplies_the_minimizer_by_an_exponential_of_safety():
    base = LabelingFunction.from_parameters()
    for problem, beta in bandits():
        weighted = supervised_minimizer(problem, base.with_safety_weight(1.3), beta=beta)
        closed = constrained_minimizer(problem, base, safety_weight=1.3, beta=beta)
        tilted = supervised_minimizer(problem, base, beta=beta) * np.exp(1.3 * problem.safe / beta)
        np.testing.assert_allclose(weighted, closed, atol=EXACT)
        np.testing.assert_allclose(weighted, tilted / tilted.sum(), atol=EXACT)


def test_it_does_so_for_probabilities_of_safety_too():
    rng = np.random.default_rng(5)
    base = LabelingFunction(*rng.normal(size=4))
    problem = replace(random_problem(rng, 5), safe=rng.random(5))
    weighted = supervised_minimizer(problem, base.with_safety_weight(0.8), beta=0.3)
    np.testing.assert_allclose(
        weighted, constrained_minimizer(problem, base, safety_weight=0.8, beta=0.3), atol=EXACT
    )


def test_reward_of_the_supervised_minimizer_is_the_bilinear_one_without_correlation():
    problem = replace(random_problem(np.random.default_rng(8), 5), preferences=np.full((5, 5), 0.5))
    gap = supervised_reward(problem, LabelingFunction.from_parameters(alpha=0)) - bilinear_reward(problem)
    assert np.ptp(gap) < EXACT


@given(SEEDS, st.floats(0, 5), st.floats(0, 5))
def test_unsafe_answers_become_rarer_as_the_safety_weight_grows(seed, first, second):
    problem = random_problem(np.random.default_rng(seed), 6)
    low, high = sorted((first, second))
    rates = [
        constrained_minimizer(problem, LabelingFunction.from_parameters(), safety_weight=weight, beta=0.3)
        @ (1 - problem.safe)
        for weight in (low, high)
    ]
    assert rates[1] <= rates[0] + EXACT


def test_one_root_search_hits_a_threshold_that_alpha_need_not_reach():
    table, not_monotone = LabelingFunction.from_parameters(), 0
    for problem, beta in bandits():
        unsafe = 1 - problem.safe
        rates = [
            rl_optimum(problem, bilinear_reward(problem, a1=problem.expected_safety - 2 * alpha), beta=beta) @ unsafe
            for alpha in np.linspace(0, 1, 21)
        ]
        not_monotone += bool(np.any(np.diff(rates) > EXACT))
        if supervised_minimizer(problem, table, beta=beta) @ unsafe <= 0.01:
            continue

        def excess(weight, problem=problem, beta=beta, unsafe=unsafe):
            return supervised_minimizer(problem, table.with_safety_weight(weight), beta=beta) @ unsafe - 0.01

        assert abs(excess(brentq(excess, 0, 50, xtol=1e-14))) < 1e-10
        # The same multiplier as that of the Lagrangian with BFPO's own reward.
        reward = supervised_reward(problem, table)
        as_constraint = ConstrainedProblem(problem.reference[None], reward[None], unsafe[None], beta)
        assert abs(excess(solve_mean(as_constraint, 0.01).multiplier)) < 1e-10
    assert not_monotone > 50


def test_a_weight_of_zero_is_the_same_table_and_a_negative_one_is_refused():
    table = LabelingFunction.from_parameters()
    assert table.with_safety_weight(0) is table
    weighted = table.with_safety_weight(2)
    assert (weighted.ss, weighted.su, weighted.us, weighted.uu) == (0.5, 3.0, -3.0, -0.5)
    for wrong in (-1, np.nan, np.inf):
        with pytest.raises(RecipeError, match="safety_weight is"):
            table.with_safety_weight(wrong)
