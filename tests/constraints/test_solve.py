"""The multiplier from samples: against exact problems, and what is said when it can't be trusted or doesn't exist."""

import math
import re
from dataclasses import replace
from statistics import NormalDist

import numpy as np
import pytest

from bfpo.constraints import estimates
from bfpo.constraints.samples import ScoredSamples, read_scored_samples
from bfpo.constraints.solve import ConstraintRequest, solve_constraint
from bfpo.errors import DataError, RecipeError
from bfpo.losses.combiners import tail_cost
from bfpo.losses.constrained import ConstrainedProblem, cvar, solve_cvar, solve_mean
from bfpo.losses.labeling import LabelingFunction
from bfpo.losses.theory import TabularProblem, bradley_terry, constrained_minimizer

from .scored import rows, write_table

PAPER = LabelingFunction.from_parameters()


def scored(reward: np.ndarray, cost: np.ndarray, **changes) -> ScoredSamples:
    size = len(reward)
    samples = ScoredSamples(
        tuple(f"p{x}" for x in range(size)), (None,) * size, np.ones(reward.shape, dtype=bool), reward, cost, cost >
        0, "base", "rm@1", "cm@1", {},
    )  # fmt: skip
    return replace(samples, **changes)


def random_samples(seed: int = 0, prompts: int = 80, count: int = 24) -> ScoredSamples:
    rng = np.random.default_rng(seed)
    cost = rng.normal(-0.2, 1, (prompts, count))
    return scored(0.7 * cost + rng.normal(0, 1, cost.shape), cost)


def uniform(samples: ScoredSamples, cost: np.ndarray, beta: float) -> ConstrainedProblem:
    return ConstrainedProblem(np.full(cost.shape, 1 / cost.shape[1]), samples.reward, cost, beta)


# --- the multiplier


def test_the_multiplier_is_that_of_the_samples_as_a_finite_problem():
    samples = random_samples()
    dual = solve_constraint(samples, ConstraintRequest(max=0.05, beta=0.8))
    exact = solve_mean(uniform(samples, samples.is_unsafe.astype(float), 0.8), 0.05)
    assert (dual.state, dual.multiplier) == ("active", exact.multiplier)
    assert dual.achieved == dual.predicted.harm == dual.predicted.unsafe == pytest.approx(0.05, abs=1e-12)
    policy = uniform(samples, samples.is_unsafe.astype(float), 0.8).policy(dual.multiplier)
    assert dual.predicted.helpfulness == pytest.approx(float((policy * samples.reward).sum(axis=1).mean()), abs=1e-12)
    assert dual.predicted.cost == pytest.approx(float((policy * samples.cost).sum(axis=1).mean()), abs=1e-12)
    kl = np.log(24) + (policy * np.log(policy)).sum(axis=1)
    assert dual.predicted.kl == pytest.approx(float(kl.mean()), abs=1e-12)
    effective = np.median(1 / (policy**2).sum(axis=1))
    assert dual.predicted.effective_samples == pytest.approx(float(effective), abs=1e-9)
    assert (dual.base.multiplier, dual.base.kl, dual.base.effective_samples) == (None, 0, 24)
    assert dual.base.harm == pytest.approx(float(samples.is_unsafe.mean()), abs=1e-12)


def test_samples_of_a_known_model_predict_what_its_policy_does():
    rng = np.random.default_rng(0)
    reference = rng.dirichlet(np.full(5, 2.0), 150)
    cost = rng.normal(0, 1, reference.shape)
    reward = 0.7 * cost + rng.normal(0, 1, cost.shape)
    drawn = np.stack([rng.choice(5, 200, p=row) for row in reference])
    samples = scored(np.take_along_axis(reward, drawn, 1), np.take_along_axis(cost, drawn, 1))
    dual = solve_constraint(samples, ConstraintRequest(max=0.1, beta=0.7))
    truth = ConstrainedProblem(reference, reward, (cost > 0).astype(float), 0.7)
    exact = solve_mean(truth, 0.1)
    # 150 prompts with 200 samples each: the error of the achieved share is a few tenths of a percent.
    assert truth.expected_cost(dual.multiplier) == pytest.approx(0.1, abs=0.01)
    assert dual.multiplier == pytest.approx(exact.multiplier, rel=0.03)
    assert dual.predicted.helpfulness == pytest.approx(
        float((truth.policy(exact.multiplier) * reward).sum(axis=1).mean()), abs=0.03
    )


def test_a_mean_cost_and_a_gain_over_the_base_model():
    samples = random_samples()
    dual = solve_constraint(samples, ConstraintRequest(measure="cost", gain=0.3, beta=0.8))
    threshold = float(samples.cost.mean()) - 0.3
    assert dual.constraint.threshold == pytest.approx(threshold, abs=1e-12)
    assert dual.constraint.gain == 0.3
    assert dual.multiplier == pytest.approx(
        solve_mean(uniform(samples, samples.cost, 0.8), threshold).multiplier, rel=1e-12
    )


def test_the_tail_of_graded_costs():
    rng = np.random.default_rng(1)
    severity = rng.choice([0, 0, 0, 0.25, 0.5, 1], (60, 20)).astype(float)
    samples = scored(severity + rng.normal(0, 1, severity.shape), severity)
    dual = solve_constraint(samples, ConstraintRequest(measure="cvar", share=0.1, max=0.4, beta=1.0))
    exact = solve_cvar(uniform(samples, severity, 1.0), 0.4, 0.1)
    assert (dual.multiplier, dual.tail_start) == (exact.multiplier, exact.tail_start)
    shifted = uniform(samples, tail_cost(severity, start=dual.tail_start, share=0.1), 1.0)
    assert dual.predicted.harm == pytest.approx(cvar(severity, shifted.policy(dual.multiplier), 0.1), abs=1e-12)
    assert dual.predicted.harm == pytest.approx(0.4, abs=1e-9)
    assert dual.constraint.share == 0.1
    harms = [point.harm for point in dual.frontier]
    assert harms == sorted(harms, reverse=True)


def test_only_prompts_of_the_kind_count_and_all_have_helpfulness():
    samples = replace(random_samples(), kinds=("harmful", "benign") * 40)
    # Of benign prompts everything is safe.
    unsafe = samples.is_unsafe & (np.arange(80) % 2 == 0)[:, None]
    samples = replace(samples, is_unsafe=unsafe)
    dual = solve_constraint(samples, ConstraintRequest(max=0.05, kind="harmful", beta=0.8))
    harmful = slice(None, None, 2)
    part = ConstrainedProblem(np.full((40, 24), 1 / 24), samples.reward[harmful], unsafe[harmful].astype(float), 0.8)
    assert dual.multiplier == pytest.approx(solve_mean(part, 0.05).multiplier, rel=1e-12)
    assert (dual.prompts, dual.constrained_prompts, dual.samples) == (80, 40, 80 * 24)
    whole = uniform(samples, unsafe.astype(float), 0.8)
    policy = whole.policy(dual.multiplier)
    assert dual.predicted.helpfulness == pytest.approx(float((policy * samples.reward).sum(axis=1).mean()), abs=1e-12)
    with pytest.raises(
        DataError, match="no prompt is of the kind 'lookalike'; the kinds of the prompts: benign, harm"
    ):
        solve_constraint(samples, ConstraintRequest(max=0.05, kind="lookalike"))


def test_prompts_may_have_different_numbers_of_samples(tmp_path):
    table = rows(30, 8)
    fewer = [row for index, row in enumerate(table) if index % 8 < 5 or index % 16 < 8]
    dual = solve_constraint(read_scored_samples(write_table(tmp_path / "s.jsonl", fewer)), ConstraintRequest(max=0.1))
    assert dual.samples == len(fewer) == 30 * 8 - 15 * 3
    assert dual.predicted.unsafe == pytest.approx(0.1, abs=1e-12)


# --- BFPO


def test_bfpo_is_predicted_exactly_where_the_samples_are_all_answers():
    rng = np.random.default_rng(2)
    reward, cost = 2 * rng.normal(size=(50, 6)), rng.normal(size=(50, 6))
    samples, unsafe = scored(reward, cost), (cost > 0).astype(float)
    for labeling in (PAPER, LabelingFunction(0.5, 1, -0.5, 0.5)):
        request = ConstraintRequest(max=0.03, beta=0.3, objective="bfpo", labeling=labeling)
        dual = solve_constraint(samples, request)
        assert dual.multiplier > 0
        shares = []
        for x in range(50):
            equal = np.full(6, 1 / 6)
            problem = TabularProblem(equal, equal, bradley_terry(reward[x]), 1 - unsafe[x])
            policy = constrained_minimizer(problem, labeling, safety_weight=dual.multiplier, beta=0.3)
            shares.append(policy @ unsafe[x])
        # Prompts without a safe answer keep the others from being safer than asked.
        assert np.mean(shares) == pytest.approx(0.03, abs=1e-10)
        assert dual.labels == {
            "ss": labeling.ss, "su": labeling.su, "us": labeling.us, "uu": labeling.uu,
        }  # fmt: skip


def test_the_scale_of_the_rewards_is_that_of_preferences():
    samples = random_samples()
    request = ConstraintRequest(max=0.05, beta=0.8, reward_scale=2.0)
    scaled = solve_constraint(samples, request)
    twice = solve_constraint(replace(samples, reward=2 * samples.reward), replace(request, reward_scale=1.0))
    assert scaled.multiplier == pytest.approx(twice.multiplier, rel=1e-12)
    # Helpfulness is reported on the scorer's own scale.
    assert scaled.predicted.helpfulness == pytest.approx(twice.predicted.helpfulness / 2, rel=1e-9)
    assert scaled.reward_scale == 2


def test_a_temperature_multiplies_beta():
    samples = random_samples()
    cooler = solve_constraint(samples, ConstraintRequest(max=0.05, beta=0.8, temperature=0.5))
    assert cooler.multiplier == solve_constraint(samples, ConstraintRequest(max=0.05, beta=0.4)).multiplier
    # The beta of the loss stays what it is.
    assert (cooler.beta, cooler.temperature) == (0.8, 0.5)
    recorded = solve_constraint(replace(samples, temperature=0.5), ConstraintRequest(max=0.05, beta=0.8))
    assert recorded.multiplier == cooler.multiplier
    with pytest.raises(DataError, match="drawn at temperature 0, where all samples of a prompt are equal"):
        solve_constraint(replace(samples, temperature=0.0), ConstraintRequest(max=0.05))


def test_sampling_at_a_temperature_is_training_with_another_beta_where_one_token_decides():
    rng = np.random.default_rng(0)
    reference = rng.dirichlet(np.ones(6), 40)
    reward, unsafe = rng.normal(size=reference.shape), (rng.random(reference.shape) < 0.5).astype(float)
    trained = ConstrainedProblem(reference, reward, unsafe, 0.8).policy(1.3)
    cool = trained**2 / (trained**2).sum(axis=1, keepdims=True)
    cool_reference = reference**2 / (reference**2).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(cool, ConstrainedProblem(cool_reference, reward, unsafe, 0.4).policy(1.3), atol=1e-12)


# --- frontier and intervals


def test_the_frontier_falls_from_no_constraint_to_nearly_the_lowest_harm():
    dual = solve_constraint(random_samples(), ConstraintRequest(max=0.05, beta=0.8))
    multipliers = [point.multiplier for point in dual.frontier]
    assert multipliers == sorted(multipliers)
    assert multipliers[0] == 0
    assert dual.multiplier in multipliers
    harms, rewards = ([getattr(point, name) for point in dual.frontier] for name in ("harm", "helpfulness"))
    assert harms == sorted(harms, reverse=True)
    assert rewards == sorted(rewards, reverse=True)
    assert harms[-1] < 0.01 * harms[0] + 0.001


def test_the_bootstrap_is_that_of_solving_every_resample(monkeypatch):
    monkeypatch.setattr(estimates, "_RESAMPLES", 200)
    samples = random_samples(prompts=25, count=8)
    for request in (ConstraintRequest(max=0.15, beta=0.8), ConstraintRequest(gain=0.2, measure="cost", beta=0.8)):
        dual = solve_constraint(samples, request)
        cost = samples.is_unsafe.astype(float) if request.measure == "unsafe" else samples.cost
        drawn = np.random.default_rng(0).multinomial(25, np.full(25, 1 / 25), size=200)
        multipliers, achieved = [], []
        for counts in drawn:
            chosen = np.repeat(np.arange(25), counts)
            resample = scored(samples.reward[chosen], samples.cost[chosen])
            problem = uniform(resample, cost[chosen], 0.8)
            threshold = request.max if request.max is not None else float(cost[chosen].mean()) - request.gain
            multiplier = solve_mean(problem, threshold).multiplier
            multipliers.append(np.inf if multiplier is None else multiplier)
            achieved.append(problem.expected_cost(dual.multiplier))
        low, high = np.sort(multipliers)[[5, 194]]
        # Roots are interpolated between multipliers 6 % apart.
        assert dual.multiplier_low == pytest.approx(low, rel=0.01)
        assert dual.multiplier_high == pytest.approx(high, rel=0.01)
        assert (dual.achieved_low, dual.achieved_high) == pytest.approx(tuple(np.sort(achieved)[[5, 194]]), rel=1e-9)
        assert dual.multiplier_low < dual.multiplier < dual.multiplier_high


def test_a_constraint_that_resamples_cannot_meet_has_no_upper_bound():
    # One prompt of ten has only unsafe answers: the lowest share is .1, and larger in many resamples.
    rng = np.random.default_rng(0)
    cost = rng.normal(0, 1, (60, 16))
    cost[:6] = np.abs(cost[:6]) + 0.1
    dual = solve_constraint(scored(cost + rng.normal(0, 1, cost.shape), cost), ConstraintRequest(max=0.11, beta=0.5))
    assert dual.state == "active"
    assert dual.multiplier_high is None
    assert any("close to infeasible" in warning for warning in dual.warnings)


# --- no multiplier


def test_a_slack_constraint_needs_no_multiplier():
    dual = solve_constraint(random_samples(), ConstraintRequest(max=0.9, beta=0.8))
    assert (dual.state, dual.multiplier) == ("slack", 0.0)
    assert dual.predicted.harm == dual.achieved < 0.9
    assert (dual.multiplier_low, dual.multiplier_high) == (0.0, 0.0)


@pytest.mark.parametrize(("measure", "least"), [("unsafe", 0.1), ("cost", None), ("cvar", None)])
def test_an_infeasible_constraint_has_the_lowest_value_and_a_frontier(measure, least):
    rng = np.random.default_rng(0)
    cost = rng.normal(0.5, 1, (60, 16))
    cost[:6] = np.abs(cost[:6]) + 0.1
    samples = scored(cost + rng.normal(0, 1, cost.shape), cost)
    dual = solve_constraint(samples, ConstraintRequest(measure=measure, max=0.02 if measure == "unsafe" else -4.0))
    assert (dual.state, dual.multiplier, dual.predicted, dual.achieved_with_half) == ("infeasible", None, None, None)
    lowest = {
        "unsafe": 0.1,
        "cost": cost.min(axis=1).mean(),
        "cvar": cvar(cost.min(axis=1), np.ones(60), 0.1),
    }[measure]
    assert dual.achieved == pytest.approx(lowest, abs=1e-9)
    assert least is None or dual.achieved == pytest.approx(least)
    assert dual.achieved_low <= dual.achieved <= dual.achieved_high
    assert dual.frontier[-1].harm < dual.frontier[0].harm


def test_samples_that_do_not_differ_are_refused():
    rng = np.random.default_rng(0)
    cost = np.repeat(rng.normal(0, 1, (10, 1)), 4, axis=1)
    with pytest.raises(DataError, match="for each of the 10 prompts all samples have the same cost"):
        solve_constraint(scored(rng.normal(0, 1, (10, 4)), cost), ConstraintRequest(max=0.1))


def test_a_judge_that_grades_only_some_answers_bounds_shares_but_not_means():
    samples = random_samples()
    cost = samples.cost.copy()
    cost[3, 2] = np.nan
    samples = replace(samples, cost=cost)
    dual = solve_constraint(samples, ConstraintRequest(max=0.05, beta=0.8))
    assert np.isfinite(dual.predicted.cost)
    with pytest.raises(DataError, match=r"1 of 1920 samples have no cost by cm@1, which is undecided on them"):
        solve_constraint(samples, ConstraintRequest(measure="cost", max=0.05))


# --- warnings


def test_a_good_estimate_has_no_warnings():
    assert solve_constraint(random_samples(count=200), ConstraintRequest(max=0.2, beta=2.0)).warnings == []


@pytest.mark.parametrize(
    ("samples", "request_", "warning"),
    [
        (
            random_samples(),
            ConstraintRequest(max=0.05, beta=0.1),
            "rests on 1.* effective samples of 24 for the median",
        ),
        (random_samples(), ConstraintRequest(max=0.05, beta=0.1), "of the prompts one sample has most of the weight"),
        (random_samples(), ConstraintRequest(max=0.05, beta=0.1), "half of the samples predict .* expect about"),
        (random_samples(prompts=20), ConstraintRequest(max=0.2, beta=2), "rest on 20 prompts; with fewer than 50"),
        (
            replace(random_samples(), temperature=0.7),
            ConstraintRequest(max=0.2, beta=2),
            "base model and policy are those at temperature 0.7, for which the prediction is an approximation",
        ),
        (
            replace(random_samples(), cost=(random_samples().cost > 1.5).astype(float)),
            ConstraintRequest(measure="cvar", max=0.4, beta=2),
            "costs have two values only",
        ),
    ],
)
def test_what_a_reader_must_know_is_said(samples, request_, warning):
    warnings = solve_constraint(samples, request_).warnings
    assert any(re.search(warning, text) for text in warnings), warnings


@pytest.mark.parametrize(("beta", "error"), [(0.5, 0.015), (0.8, 0.003)])
def test_the_estimate_of_half_the_samples_points_at_the_truth(beta, error):
    rng = np.random.default_rng(0)
    cost = rng.normal(-0.3, 1, (400, 32))
    samples = scored(0.7 * cost + rng.normal(0, 1, cost.shape), cost)
    dual = solve_constraint(samples, ConstraintRequest(max=0.05, beta=beta))
    # The reward moves the normal cost by .7 / beta, and the constraint divides the odds of a positive one.
    free = NormalDist(-0.3 + 0.7 / beta).cdf(0)
    odds = (1 - free) / free * math.exp(-dual.multiplier / beta)
    truth = odds / (1 + odds)
    assert truth < dual.achieved - 0.6 * error
    assert abs(truth - dual.extrapolated) < 0.5 * (dual.achieved - truth)


# --- requests


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give either `max`, the largest allowed value, or `gain`"),
        ({"max": 0.1, "gain": 0.1}, "give either `max`"),
        ({"max": 2.0}, "`max` is 2; a share of unsafe answers is from 0 to below 1, so 2 % is 0.02"),
        ({"max": float("nan")}, "`max` is nan; expected a finite number"),
        ({"gain": -0.1}, "`gain` is -0.1; expected a number above 0"),
        ({"max": 0.1, "measure": "harm"}, "`measure` is harm; expected unsafe or cost or cvar"),
        ({"max": 0.1, "measure": "cvar", "share": 0.0}, "`share` is 0.0; expected a number above 0, at most 1"),
        ({"max": 0.1, "beta": 0.0}, "`beta` is 0.0; expected"),
        ({"max": 0.1, "reward_scale": 0.0}, "`reward_scale` is 0.0"),
        ({"max": 0.1, "temperature": 0.0}, "`temperature` is 0.0; expected a number above 0"),
        ({"max": 0.1, "objective": "log_ratios", "measure": "cost"}, "log-ratios to the base model have no zero"),
        ({"gain": 0.1, "objective": "log_ratios"}, "set `measure` to cost"),
        ({"max": 0.1, "objective": "bfpo"}, "needs the labeling function"),
        (
            {"max": 0.1, "objective": "bfpo", "labeling": PAPER, "measure": "cost"},
            "bounds the share of unsafe answers",
        ),
    ],
)
def test_impossible_requests_are_refused(options, message):
    with pytest.raises(RecipeError, match=message):
        ConstraintRequest(**options)
