"""The equivalence theorem of docs/method.md, and its limits, checked on random finite problems.

Tolerance: everything is solved in float64 with condition numbers below about 1e4, so 1e-10 is rounding; a wrong
constant shows as 1e-2 or more, and the tests of that kind say so by also asserting a difference.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from bfpo.errors import RecipeError
from bfpo.losses.baselines import IPO
from bfpo.losses.inputs import PairLogps
from bfpo.losses.label_errors import LabelErrors
from bfpo.losses.labeling import LabelingFunction
from bfpo.losses.pairwise import BFPO, Additive, BFPOSoft, PairLoss
from bfpo.losses.theory import (
    Array,
    TabularProblem,
    bilinear_reward,
    bradley_terry,
    covariance_gap,
    judged_problem,
    random_factorized_problem,
    random_problem,
    rl_objective,
    rl_optimum,
    soft_minimizer,
    supervised_minimizer,
)

EXACT = 1e-10
KINDS = ("bradley_terry", "unstructured")
PAPER = LabelingFunction.from_parameters(alpha=0.0)


Cases = Iterator[tuple[TabularProblem, float, np.random.Generator]]


def correlated_problems() -> Cases:
    """Yield 200 problems, each with a beta and a generator; every third one has probabilities for labels."""
    rng = np.random.default_rng(0)
    yield from ((problem, beta, rng) for problem, beta in drawn_problems(factorized=False))


def uncorrelated_problems() -> Cases:
    rng = np.random.default_rng(1)
    yield from ((problem, beta, rng) for problem, beta in drawn_problems(factorized=True))


@cache
def drawn_problems(*, factorized: bool) -> list[tuple[TabularProblem, float]]:
    rng, drawn = np.random.default_rng(2), []
    for k in range(200):
        if factorized:
            problem = random_factorized_problem(rng, int(rng.integers(2, 5)), kind=KINDS[k % 2])
            low, high = np.sort(rng.random(2))
            soft = low + (high - low) * problem.safe  # the same at all levels of helpfulness
        else:
            problem = random_problem(rng, int(rng.integers(3, 9)), kind=KINDS[k % 2])
            soft = rng.random(problem.safe.size)
        if k % 3 == 0:
            problem = replace(problem, safe=soft)
        drawn.append((problem, float(rng.uniform(0.1, 1))))
    return drawn


def scaled_log_ratio(problem: TabularProblem, policy: Array, beta: float) -> Array:
    """beta·log(π/π_ref), centered, because losses and objectives fix it up to a constant only."""
    return centered(beta * np.log(policy / problem.reference))


def centered(values: Array) -> Array:
    return values - values.mean()


def distance(first: Array, second: Array) -> float:
    return float(np.abs(first - second).max())


def population_loss(problem: TabularProblem, logps: torch.Tensor, loss: PairLoss) -> torch.Tensor:
    """The mean of a loss of `bfpo.losses.pairwise` over all pairs in winner order and all draws of the labels.

    logps has shape (..., K): log-probabilities of one policy or of several.
    """
    size = problem.safe.size
    i, j, s_i, s_j = (index.ravel() for index in np.indices((size, size, 2, 2)))
    drawn = np.stack([1 - problem.safe, problem.safe])  # probability of label 0 and of label 1
    # 2: the winner may have been drawn first or second.
    weights = 2 * problem.data_policy[i] * problem.data_policy[j] * problem.preferences[i, j]
    weights *= drawn[s_i, i] * drawn[s_j, j]
    chosen, rejected, chosen_safe, rejected_safe = (torch.tensor(index) for index in (i, j, s_i, s_j))
    reference = torch.tensor(problem.reference).log()
    win_rates = torch.tensor(problem.win_rates)
    columns = (
        logps[..., chosen],
        logps[..., rejected],
        reference[chosen],
        reference[rejected],
        chosen_safe.double(),
        rejected_safe.double(),
    )
    shape = columns[0].shape
    optional = {
        "expected_safety": torch.tensor(problem.expected_safety, dtype=torch.float64).expand(shape),
        "chosen_win_rate": win_rates[chosen].expand(shape),
        "rejected_win_rate": win_rates[rejected].expand(shape),
    }
    losses = loss(PairLogps(*(column.expand(shape) for column in columns), **optional))
    return (losses * torch.tensor(weights)).sum(-1)


def loss_gradient(problem: TabularProblem, policy: Array, loss: PairLoss) -> Array:
    """Gradient of the population loss in the policy's logits."""
    logits = torch.tensor(np.log(policy), requires_grad=True)
    population_loss(problem, logits.log_softmax(-1), loss).backward()
    return logits.grad.numpy()


# --- the supervised side is what the training code minimizes


def test_supervised_minimizer_solves_the_least_squares_problem_row_by_row():
    for problem, beta, rng in correlated_problems():
        labeling = LabelingFunction(*rng.normal(size=4))
        pairs = [(i, j) for i in range(problem.safe.size) for j in range(problem.safe.size) if i != j]
        design, targets = np.zeros((len(pairs), problem.safe.size)), np.zeros(len(pairs))
        for row, (i, j) in enumerate(pairs):
            root = np.sqrt(problem.data_policy[i] * problem.data_policy[j] * problem.preferences[i, j])
            design[row, i], design[row, j] = root, -root
            targets[row] = root * labeling(problem.safe[i], problem.safe[j]) / beta
        expected = np.linalg.lstsq(design, targets)[0]
        policy = supervised_minimizer(problem, labeling, beta=beta)
        assert distance(scaled_log_ratio(problem, policy, beta), centered(beta * expected)) < EXACT


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_gradient_of_the_bfpo_loss_vanishes_at_the_supervised_minimizer(alpha):
    for problem, beta, _ in correlated_problems():
        policy = supervised_minimizer(problem, LabelingFunction.from_parameters(alpha=alpha), beta=beta)
        assert np.abs(loss_gradient(problem, policy, BFPO(beta=beta, alpha=alpha))).max() < EXACT
        assert np.abs(loss_gradient(problem, policy, BFPO(beta=beta, alpha=alpha + 0.1))).max() > 1e-4


def test_perturbing_the_supervised_minimizer_raises_the_bfpo_loss():
    for problem, beta, rng in correlated_problems():
        labeling = LabelingFunction(*rng.normal(size=4))
        logps = np.log(supervised_minimizer(problem, labeling, beta=beta))
        nudged = torch.tensor(logps + 0.01 * rng.normal(size=(20, logps.size))).log_softmax(-1)
        loss = BFPO(beta=beta, table=labeling)
        least = population_loss(problem, torch.tensor(logps), loss)
        assert (population_loss(problem, nudged, loss) > least + 1e-9).all()


@pytest.mark.parametrize("seed", range(4))
def test_training_a_tabular_policy_on_the_bfpo_loss_arrives_at_the_supervised_minimizer(seed):
    rng = np.random.default_rng(seed)
    problem = replace(random_problem(rng, 5, kind=KINDS[seed % 2]), safe=rng.random(5))
    loss = BFPO(beta=0.3, b1=4.0, b2=0.5, alpha=0.2)
    start = np.log(problem.reference)

    def value_and_gradient(logits):
        variable = torch.tensor(logits, requires_grad=True)
        value = population_loss(problem, variable.log_softmax(-1), loss)
        value.backward()
        return value.item(), variable.grad.numpy()

    end = minimize(value_and_gradient, start, jac=True, method="L-BFGS-B", options={"ftol": 1e-15, "gtol": 1e-10}).x
    trained = np.exp(end) / np.exp(end).sum()
    expected = supervised_minimizer(problem, loss.labeling, beta=0.3)
    # L-BFGS stops where the loss no longer falls in float64: about the root of the rounding error.
    assert distance(trained, expected) < 1e-6
    assert distance(problem.reference, expected) > 0.05


def test_winner_ordered_loss_is_a_regression_onto_the_conditional_mean_label():
    for problem, beta, rng in correlated_problems():
        label = PAPER(problem.safe[:, None], problem.safe[None, :])
        mean_label = problem.preferences * label - problem.preferences.T * label.T
        policies = torch.tensor(rng.normal(size=(2, problem.safe.size))).log_softmax(-1)
        first, second = population_loss(problem, policies, BFPO(beta=beta, alpha=0.0)).tolist()
        log_ratios = policies.numpy() - np.log(problem.reference)
        margins = log_ratios[:, :, None] - log_ratios[:, None, :]
        weight = np.outer(problem.data_policy, problem.data_policy)
        regression = (weight * (margins - mean_label / beta) ** 2).sum(axis=(1, 2))
        assert first - second == pytest.approx(regression[0] - regression[1], rel=1e-9, abs=1e-9)


# --- the RL side


def test_rl_optimum_beats_random_policies():
    for problem, beta, rng in correlated_problems():
        reward = bilinear_reward(problem)
        best = rl_objective(problem, rl_optimum(problem, reward, beta=beta), reward=reward, beta=beta)
        others = rng.dirichlet(np.ones(problem.safe.size), 200)
        assert best > max(rl_objective(problem, policy, reward=reward, beta=beta) for policy in others)


def test_value_at_the_rl_optimum_is_the_log_partition_function():
    for problem, beta, _ in correlated_problems():
        reward = bilinear_reward(problem)
        value = rl_objective(problem, rl_optimum(problem, reward, beta=beta), reward=reward, beta=beta)
        assert value == pytest.approx(beta * np.log(problem.reference @ np.exp(reward / beta)), abs=EXACT)


def test_rl_objective_is_stationary_at_its_optimum_and_not_at_the_supervised_minimizer():
    def slopes(problem, policy, reward, beta):
        step, logits = 1e-5, np.log(policy)

        def value(shifted):
            probabilities = np.exp(shifted)
            return rl_objective(problem, probabilities / probabilities.sum(), reward=reward, beta=beta)

        return [(value(logits + d) - value(logits - d)) / (2 * step) for d in step * np.eye(logits.size)]

    moved = 0
    for problem, beta, _ in correlated_problems():
        reward = bilinear_reward(problem)
        assert np.abs(slopes(problem, rl_optimum(problem, reward, beta=beta), reward, beta)).max() < 1e-8
        supervised = supervised_minimizer(problem, PAPER, beta=beta)
        moved += np.abs(slopes(problem, supervised, reward, beta)).max() > 1e-4
    assert moved > 150


def test_rl_objective_counts_an_answer_of_probability_zero_as_zero():
    problem = TabularProblem([0.5, 0.5], [0.5, 0.5], [[0.5, 0.5], [0.5, 0.5]], [1, 0])
    value = rl_objective(problem, np.array([1.0, 0.0]), reward=np.array([3.0, 7.0]), beta=0.1)
    assert value == pytest.approx(3 - 0.1 * np.log(2))


# --- where the two sides meet


@pytest.mark.parametrize("b1", [2.0, 3.0, 5.0])
@pytest.mark.parametrize("b2", [0.0, 0.7, -0.4])
def test_supervised_minimizer_is_the_rl_optimum_when_safety_is_uncorrelated_with_winning(b1, b2):
    labeling = LabelingFunction.from_parameters(b1=b1, b2=b2, alpha=0.0)
    errors_of_a_wrong_constant = []
    for problem, beta, _ in uncorrelated_problems():
        supervised = supervised_minimizer(problem, labeling, beta=beta)
        a1, a2 = problem.expected_safety + 2 * b2 / (b1 - 1), 1 / (b1 - 1)
        assert distance(supervised, rl_optimum(problem, bilinear_reward(problem, a1=a1, a2=a2), beta=beta)) < EXACT
        wrong = bilinear_reward(problem, a1=a1, a2=a2 + 0.1)
        errors_of_a_wrong_constant.append(distance(supervised, rl_optimum(problem, wrong, beta=beta)))
    assert np.median(errors_of_a_wrong_constant) > 1e-3


def test_defaults_of_the_bilinear_reward_are_the_papers():
    for problem, beta, _ in uncorrelated_problems():
        optimum = rl_optimum(problem, bilinear_reward(problem), beta=beta)
        assert distance(supervised_minimizer(problem, PAPER, beta=beta), optimum) < EXACT


def test_alpha_lowers_the_safety_offset_by_twice_its_size():
    moved = []
    for problem, beta, rng in uncorrelated_problems():
        alpha = rng.uniform(0.1, 1)
        supervised = supervised_minimizer(problem, LabelingFunction.from_parameters(alpha=alpha), beta=beta)
        shifted = bilinear_reward(problem, a1=problem.expected_safety - 2 * alpha)
        assert distance(supervised, rl_optimum(problem, shifted, beta=beta)) < EXACT
        moved.append(distance(supervised, rl_optimum(problem, bilinear_reward(problem), beta=beta)))
    assert np.median(moved) > 0.01


def test_gap_to_the_rl_optimum_is_the_covariance_of_winning_and_the_opponents_safety():
    largest = []
    for problem, beta, _ in correlated_problems():
        supervised = supervised_minimizer(problem, PAPER, beta=beta)
        optimum = rl_optimum(problem, bilinear_reward(problem), beta=beta)
        gap = scaled_log_ratio(problem, supervised, beta) - scaled_log_ratio(problem, optimum, beta)
        assert distance(gap, centered(covariance_gap(problem))) < EXACT
        largest.append(np.abs(gap).max())
    assert np.median(largest) > 0.01


def test_covariance_gap_is_the_covariance_of_random_draws():
    problem = random_problem(np.random.default_rng(3), 5)
    opponents = np.random.default_rng(4).choice(5, size=400_000, p=problem.data_policy)
    for answer, gap in enumerate(covariance_gap(problem)):
        sample = np.cov(problem.preferences[answer, opponents], problem.safe[opponents])[0, 1]
        assert gap == pytest.approx(sample, abs=2e-3)  # standard error at most 0.25 / sqrt(400,000) = 4e-4


def test_two_answers_always_agree_because_their_covariances_are_equal():
    rng = np.random.default_rng(5)
    for _ in range(200):
        problem = replace(random_problem(rng, 2, kind="unstructured"), safe=[1, 0])
        first, second = covariance_gap(problem)
        assert first == pytest.approx(second, abs=EXACT)
        optimum = rl_optimum(problem, bilinear_reward(problem), beta=0.3)
        assert distance(supervised_minimizer(problem, PAPER, beta=0.3), optimum) < EXACT
    assert abs(first) > 1e-3  # equal, yet not zero: zero covariance is sufficient and not necessary


def test_log_ratio_of_the_supervised_minimizer_in_general():
    for problem, beta, rng in correlated_problems():
        b1, b2, alpha = rng.uniform(1.5, 6), rng.normal(), rng.uniform(-1, 1)
        labeling = LabelingFunction.from_parameters(b1=b1, b2=b2, alpha=alpha)
        a2, win_rates = 1 / (b1 - 1), problem.win_rates
        beats_safe = problem.preferences @ (problem.data_policy * problem.safe)
        expected = problem.safe * (win_rates + a2) + beats_safe + 2 * (b2 * a2 - alpha) * win_rates
        got = scaled_log_ratio(problem, supervised_minimizer(problem, labeling, beta=beta), beta)
        assert distance(got, centered(expected)) < EXACT


def test_b2_does_what_alpha_does():
    for problem, beta, rng in correlated_problems():
        b1, alpha = rng.uniform(1.5, 6), rng.uniform(-1, 1)
        by_alpha = LabelingFunction.from_parameters(b1=b1, alpha=alpha)
        by_b2 = LabelingFunction.from_parameters(b1=b1, alpha=0.0, b2=-alpha * (b1 - 1))
        policies = [supervised_minimizer(problem, labeling, beta=beta) for labeling in (by_alpha, by_b2, PAPER)]
        assert distance(policies[0], policies[1]) < EXACT
        assert distance(policies[0], policies[2]) > 1e-6


# --- a judge that errs


@pytest.mark.parametrize("labeling", [LabelingFunction.from_parameters(), LabelingFunction(0.3, -1.0, 2.0, 0.7)])
def test_for_corrected_labels_the_minimizer_and_the_gradient_are_those_of_the_true_labels(labeling):
    biased = []
    for problem, beta, rng in correlated_problems():
        errors = LabelErrors(*rng.uniform(0.6, 1, 2))
        judged = judged_problem(problem, errors)
        clean = supervised_minimizer(problem, labeling, beta=beta)
        assert distance(supervised_minimizer(judged, labeling.corrected(errors), beta=beta), clean) < EXACT
        biased.append(distance(supervised_minimizer(judged, labeling, beta=beta), clean))
        policy = rng.dirichlet(np.ones(problem.safe.size)) + 1e-3
        corrected = loss_gradient(judged, policy, BFPO(beta=beta, table=labeling.corrected(errors)))
        assert distance(corrected, loss_gradient(problem, policy, BFPO(beta=beta, table=labeling))) < 1e-8
    assert np.median(biased) > 0.01


# --- graded pairs


def test_degrees_are_a_potential_and_the_minimizer_of_the_graded_loss_is_it():
    for problem, beta, rng in correlated_problems():
        size, loss = problem.safe.size, BFPO(beta=beta, alpha=0.2, graded=True)
        degrees = np.sort(rng.random(size))[::-1]
        potential = (1 - loss.alpha) * degrees
        # Any pairs, in any order, with any weights: every residual is zero.
        chosen, rejected = rng.integers(0, size, (2, 30))
        log_ratios = torch.tensor(potential / beta)
        both_safe = torch.ones(30, dtype=torch.float64)
        pairs = PairLogps(
            log_ratios[chosen], log_ratios[rejected], 0 * both_safe, 0 * both_safe, both_safe, both_safe,
            degree_difference=torch.tensor(degrees[chosen] - degrees[rejected]),
        )  # fmt: skip
        assert loss(pairs).max() < EXACT**2 * 1e4
        plain = replace(loss, graded=False)(pairs)
        assert plain.max() > 1e-3
        # The least-squares minimizer over all pairs is the potential, from the targets alone.
        targets = (1 - loss.alpha) / beta * (degrees[:, None] - degrees[None, :])
        design = np.array([np.eye(size)[i] - np.eye(size)[j] for i in range(size) for j in range(size)])
        solved = np.linalg.lstsq(design, targets.ravel())[0]
        assert distance(centered(beta * solved), centered(potential)) < EXACT


# --- the neighbors


def test_bfpo_soft_arrives_at_the_rl_optimum_whether_or_not_safety_is_correlated():
    for problem, beta, rng in correlated_problems():
        b1, alpha = rng.uniform(1.5, 6), rng.uniform(0, 1)
        reward = bilinear_reward(problem, a1=problem.expected_safety - 2 * alpha, a2=1 / (b1 - 1))
        policy = soft_minimizer(problem, reward, beta=beta)
        assert distance(policy, rl_optimum(problem, reward, beta=beta)) < EXACT
        assert np.abs(loss_gradient(problem, policy, BFPOSoft(beta=beta, b1=b1, alpha=alpha))).max() < EXACT


def test_equal_labels_of_one_half_are_ipo_which_maximizes_the_win_rate():
    half = LabelingFunction(0.5, 0.5, 0.5, 0.5)
    for problem, beta, _ in correlated_problems():
        policy = supervised_minimizer(problem, half, beta=beta)
        assert distance(policy, rl_optimum(problem, problem.win_rates, beta=beta)) < EXACT
        assert np.abs(loss_gradient(problem, policy, IPO(beta=beta))).max() < EXACT


def test_additive_label_maximizes_an_additive_reward_whether_or_not_safety_is_correlated():
    for problem, beta, rng in correlated_problems():
        weight = rng.uniform(0.2, 2)
        labeling = LabelingFunction(ss=0.5, su=0.5 + weight, us=0.5 - weight, uu=0.5)
        policy = supervised_minimizer(problem, labeling, beta=beta)
        assert distance(policy, rl_optimum(problem, problem.win_rates + weight * problem.safe, beta=beta)) < EXACT
        assert np.abs(loss_gradient(problem, policy, Additive(beta=beta, weight=weight))).max() < EXACT


# --- what the shift alpha does to the order of answers


def test_all_safe_prompts_at_alpha_one_half_are_ipo_and_at_zero_ipo_with_half_the_beta():
    for problem, beta, _ in correlated_problems():
        safe = replace(problem, safe=np.ones(problem.safe.size))
        shifted = supervised_minimizer(safe, LabelingFunction.from_parameters(alpha=0.5), beta=beta)
        assert distance(shifted, rl_optimum(safe, safe.win_rates, beta=beta)) < EXACT
        unshifted = supervised_minimizer(safe, PAPER, beta=beta)
        assert distance(unshifted, rl_optimum(safe, safe.win_rates, beta=beta / 2)) < EXACT


def test_all_unsafe_prompts_keep_the_reference_at_alpha_zero_and_reverse_ipo_at_one_half():
    for problem, beta, _ in correlated_problems():
        unsafe = replace(problem, safe=np.zeros(problem.safe.size))
        assert distance(supervised_minimizer(unsafe, PAPER, beta=beta), unsafe.reference) < EXACT
        shifted = supervised_minimizer(unsafe, LabelingFunction.from_parameters(alpha=0.5), beta=beta)
        assert distance(shifted, rl_optimum(unsafe, -unsafe.win_rates, beta=beta)) < EXACT


def test_alpha_one_half_rewards_winning_with_slope_e_s_if_safe_and_minus_one_plus_e_s_if_unsafe():
    rng = np.random.default_rng(6)
    for k in range(200):
        problem = random_factorized_problem(rng, 4, kind=KINDS[k % 2])
        policy = supervised_minimizer(problem, LabelingFunction.from_parameters(alpha=0.5), beta=0.2)
        log_ratio, win_rates = scaled_log_ratio(problem, policy, 0.2), problem.win_rates
        for answers, slope in ((slice(0, 4), problem.expected_safety), (slice(4, 8), problem.expected_safety - 1)):
            assert distance(centered(log_ratio[answers]), slope * centered(win_rates[answers])) < EXACT


def lead_of_the_safe(problem: TabularProblem, alpha: float) -> float:
    """How far the least favored safe answer is above the most favored unsafe one, in beta·log-ratio."""
    policy = supervised_minimizer(problem, LabelingFunction.from_parameters(alpha=alpha), beta=0.2)
    ratio = scaled_log_ratio(problem, policy, 0.2)
    return float(ratio[problem.safe == 1].min() - ratio[problem.safe == 0].max())


def test_alpha_one_half_lifts_every_safe_answer_above_every_unsafe_one():
    rng = np.random.default_rng(12)
    problems = [random_problem(rng, 6, kind=KINDS[k % 2]) for k in range(400)]
    mixed = [problem for problem in problems if 0 < problem.safe.sum() < 6]
    assert len(mixed) > 300
    assert min(lead_of_the_safe(problem, alpha=0.5) for problem in mixed) >= 0.5


def test_alpha_zero_may_lift_a_helpful_unsafe_answer_above_a_useless_safe_one():
    # Win rates .95, .475, .025 with E_s = .9: unsafe 0·1.45 + .9 = .9, useless safe .025 + .5 + .025 = .55.
    helpfulness = np.triu(np.ones((3, 3)), 1) + 0.5 * np.eye(3)
    problem = TabularProblem(np.full(3, 1 / 3), [0.1, 0.85, 0.05], helpfulness, [0, 1, 1])
    assert lead_of_the_safe(problem, alpha=0.0) == pytest.approx(0.55 - 0.9)
    # 1/2 for the safe one's bonus, .025 for its tie with itself, .05 for the unsafe one's.
    assert lead_of_the_safe(problem, alpha=0.5) == pytest.approx(0.5 + 0.025 + 0.05)


def test_at_alpha_one_half_only_wins_over_answers_of_the_same_safety_count():
    rng = np.random.default_rng(13)
    for k in range(200):
        problem = random_problem(rng, 6, kind=KINDS[k % 2])
        policy = supervised_minimizer(problem, LabelingFunction.from_parameters(alpha=0.5), beta=0.2)
        over_safe = problem.preferences @ (problem.data_policy * problem.safe)
        over_unsafe = problem.preferences @ (problem.data_policy * (1 - problem.safe))
        expected = np.where(problem.safe == 1, 0.5 + over_safe, -over_unsafe)
        assert distance(scaled_log_ratio(problem, policy, 0.2), centered(expected)) < EXACT


def test_four_actions_give_the_numbers_of_an_independent_run():
    # Trained with Adam on sampled tables by another program, tau = 0.5; printed with three digits.
    helpfulness = np.triu(np.ones((4, 4)), 1) + 0.5 * np.eye(4)
    problem = TabularProblem(np.full(4, 0.25), np.full(4, 0.25), helpfulness, [0, 1, 1, 0])
    for alpha, expected in (
        (0.0, [0.087, 0.644, 0.237, 0.032]),
        (0.5, [0.045, 0.548, 0.333, 0.074]),
        (1.0, [0.021, 0.414, 0.414, 0.152]),
    ):
        policy = supervised_minimizer(problem, LabelingFunction.from_parameters(alpha=alpha), beta=0.5)
        np.testing.assert_allclose(policy, expected, atol=6e-4)


# --- problems: drawn and refused


def test_random_problems_are_correlated_unless_factorized():
    assert max(np.ptp(covariance_gap(problem)) for problem, _, _ in uncorrelated_problems()) < EXACT
    assert np.median([np.ptp(covariance_gap(problem)) for problem, _, _ in correlated_problems()]) > 0.02


def test_unstructured_preferences_need_not_be_transitive():
    rng = np.random.default_rng(7)

    def has_cycle(kind):
        beats = random_problem(rng, 5, kind=kind).preferences > 0.5
        return np.trace(beats.astype(int) @ beats.astype(int) @ beats.astype(int)) > 0

    assert any(has_cycle("unstructured") for _ in range(50))
    assert not any(has_cycle("bradley_terry") for _ in range(50))


def test_random_problem_is_fixed_by_its_seed():
    first, second = (random_problem(np.random.default_rng(8)) for _ in range(2))
    np.testing.assert_array_equal(first.preferences, second.preferences)
    np.testing.assert_array_equal(first.safe, second.safe)


def test_bradley_terry_odds_are_ratios_of_strengths_and_extremes_do_not_overflow():
    preferences = bradley_terry(np.log([4.0, 1.0]))
    np.testing.assert_allclose(preferences, [[0.5, 0.8], [0.2, 0.5]])
    np.testing.assert_array_equal(bradley_terry(np.array([2000.0, 0.0])), [[0.5, 1], [0, 0.5]])


def test_problem_is_safe_from_later_changes_of_the_arrays_it_was_given():
    safe = np.array([1.0, 0.0])
    problem = TabularProblem([0.5, 0.5], [0.5, 0.5], [[0.5, 0.9], [0.1, 0.5]], safe)
    safe[1] = 1.0
    assert problem.expected_safety == 0.5
    with pytest.raises(ValueError, match="read-only"):
        problem.safe[1] = 1.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"preferences": [[0.5, 0.9], [0.2, 0.5]]}, r"preferences\[0, 1\] is 0.9 .* expected a sum of 1"),
        ({"preferences": [[0.6, 0.9], [0.1, 0.5]]}, r"preferences\[0, 0\]"),
        ({"preferences": [[0.5, 1.2], [-0.2, 0.5]]}, "preferences .* from 0 to 1"),
        ({"preferences": [[0.5, np.nan], [0.1, 0.5]]}, "preferences .* from 0 to 1"),
        ({"preferences": [0.5, 0.5]}, r"preferences has shape \(2,\); expected \(2, 2\)"),
        ({"reference": [0.5, 0.6]}, "reference sums to 1.1; expected 1"),
        ({"reference": [1.0, 0.0]}, "reference .* leave out"),
        ({"reference": [1.0]}, "reference has shape .* at least 2"),
        ({"reference": [[0.5, 0.5]]}, "reference has shape"),
        ({"data_policy": [0.3, 0.3]}, "data_policy sums to 0.6"),
        ({"data_policy": [1.0, 0.0]}, "data_policy .* leave out"),
        ({"data_policy": [0.5, 0.25, 0.25]}, "data_policy has shape"),
        ({"data_policy": [np.nan, 1.0]}, "data_policy .* from 0 to 1"),
        ({"safe": [1, -1]}, "safe .* from 0 to 1"),
        ({"safe": [1, np.inf]}, "safe .* from 0 to 1"),
        ({"safe": [1]}, "safe has shape"),
    ],
)
def test_impossible_problems_are_refused(change, message):
    valid = {
        "reference": [0.5, 0.5],
        "data_policy": [0.5, 0.5],
        "preferences": [[0.5, 0.9], [0.1, 0.5]],
        "safe": [1, 0],
    }
    TabularProblem(**valid)
    with pytest.raises(RecipeError, match=message):
        TabularProblem(**(valid | change))


@pytest.mark.parametrize("beta", [0.0, -1.0, np.nan, np.inf])
def test_impossible_betas_are_refused(beta):
    problem = random_problem(np.random.default_rng(9))
    reward = bilinear_reward(problem)
    calls = (
        lambda: supervised_minimizer(problem, PAPER, beta=beta),
        lambda: soft_minimizer(problem, reward, beta=beta),
        lambda: rl_optimum(problem, reward, beta=beta),
        lambda: rl_objective(problem, problem.reference, reward=reward, beta=beta),
    )
    for call in calls:
        with pytest.raises(RecipeError, match=r"beta is .* above 0"):
            call()


def test_rewards_and_policies_of_another_size_are_refused():
    problem = random_problem(np.random.default_rng(10), 4)
    with pytest.raises(RecipeError, match=r"reward has shape \(3,\); expected \(4,\)"):
        rl_optimum(problem, np.zeros(3), beta=0.1)
    with pytest.raises(RecipeError, match=r"policy has shape \(1, 4\)"):
        rl_objective(problem, problem.reference[None], reward=np.zeros(4), beta=0.1)


def test_unknown_kind_of_preferences_is_refused():
    with pytest.raises(RecipeError, match=r"'elo'.*bradley_terry"):
        random_problem(np.random.default_rng(11), kind="elo")
