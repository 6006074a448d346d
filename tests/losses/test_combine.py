"""Combiners: their equations, what they prefer, how they adapt, and refused ones."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bfpo.errors import DataError, RecipeError
from bfpo.losses import combiners
from bfpo.losses.combine import (
    COMBINERS,
    Bilinear,
    Combiner,
    Lagrangian,
    Multiplicative,
    Tail,
    make_combiner,
    read_solved_multiplier,
)
from bfpo.losses.constrained import ConstrainedProblem, cvar
from bfpo.losses.dual import Constraint, Dual, FrontierPoint
from bfpo.losses.theory import bilinear_reward, random_problem

NAN = math.nan
# Helpfulness and p(unsafe) of the four cases: safe and helpful, safe and not, unsafe and helpful, unsafe and not.
HELPFUL, UNSAFE = np.array([[1.0, 0.0, 1.0, 0.0]]), np.array([[0.0, 0.0, 1.0, 1.0]])
POINT = FrontierPoint(None, 0, 0, 0, 0, 0, 0)
DUAL = Dual(
    "active",
    Constraint("cost", 0.1),
    "reward",
    0.5,
    None,
    2.5,
    2,
    3,
    0.1,
    0.1,
    0.1,
    0.1,
    None,
    POINT,
    POINT,
    [],
    3,
    3,
    9,
)


class Sum(Combiner):
    """A combiner of one's own."""

    reads = "cost"

    def __call__(self, reward, cost):
        return reward + cost


class Unfinished(Combiner):
    """A combiner without an equation."""

    reads = "cost"


def scores(seed=0, shape=(5, 4)):
    rng = np.random.default_rng(seed)
    return rng.uniform(0, 1, shape), rng.uniform(0, 1, shape)


def test_the_bilinear_combiner_is_the_reward_of_the_theory():
    problem = random_problem(np.random.default_rng(0))
    safe, win_rates = problem.safe[None], problem.win_rates[None]
    value = Bilinear(a1=problem.expected_safety)(win_rates, 1 - safe)
    np.testing.assert_allclose(value[0], bilinear_reward(problem), atol=1e-15)
    # With answers of the data policy, E_s is the mean safety.
    drawn = np.random.default_rng(1).choice(6, (100, 64), p=problem.data_policy)
    combiner = Bilinear().after(problem.win_rates[drawn], 1 - problem.safe[drawn])
    assert combiner.a1 == problem.safe[drawn].mean()
    assert combiner.after(win_rates, safe) is combiner


def test_the_lagrangian_is_the_objective_of_the_constrained_problem():
    reward, cost = scores()
    value = Lagrangian(start=2.0, normalize=False)(reward, cost)
    problem = ConstrainedProblem(np.full(reward.shape, 0.25), reward, cost, 0.3)
    tilted = np.exp(value / 0.3)
    np.testing.assert_allclose(tilted / tilted.sum(axis=1, keepdims=True), problem.policy(2.0), atol=1e-14)
    np.testing.assert_allclose(Lagrangian(start=2.0)(reward, cost), value / 3, atol=1e-15)


def test_the_multiplicative_combiner_is_the_bilinear_one_with_other_offsets():
    reward, cost = scores()
    np.testing.assert_allclose(Multiplicative(-0.5)(reward, cost), Bilinear(0.0, 0.5)(reward, cost), atol=1e-15)


@pytest.mark.parametrize("share", [0.2, 0.5, 1.0])
def test_the_mean_of_the_tail_is_that_of_the_worst_share(share):
    reward, cost = scores(shape=(20, 50))
    values = reward - 3 * cost
    combiner = Tail(share=share, multiplier=3.0).after(reward, cost)
    # The quantile is between two of 1,000 values, so the identity is exact to the gap between them.
    worst = -cvar(-values, np.ones_like(values), share)
    assert combiner(reward, cost).mean() + combiner.tail_start == pytest.approx(worst, abs=1e-4)


def test_the_tail_over_prompts_consists_of_whole_prompts():
    reward = np.array([[0.0, 0.2], [0.1, 0.3], [0.5, 0.7], [0.8, NAN]])
    combiner = Tail(share=0.5, over="prompts").after(reward, 0 * reward)
    # Means of the prompts are .1, .2, .6 and .8, and their median .4.
    assert combiner.tail_start == pytest.approx(0.4)
    expected = [[-0.8, -0.4], [-0.6, -0.2], [0, 0], [0, NAN]]
    np.testing.assert_allclose(combiner(reward, 0 * reward), expected, atol=1e-15)


def order(value):
    return [int(rank) for rank in np.unique(value[0].round(12), return_inverse=True)[1].ravel()]


def test_what_each_combiner_prefers_in_the_four_cases():
    # Ranks of: safe and helpful, safe and unhelpful, unsafe and helpful, unsafe and unhelpful.
    assert order(Lagrangian(start=2.0)(HELPFUL, UNSAFE)) == [3, 2, 1, 0]
    assert order(Lagrangian(start=0.5)(HELPFUL, UNSAFE)) == [3, 1, 2, 0]
    assert order(Bilinear(a1=0.4, a2=0.5)(HELPFUL, UNSAFE)) == [3, 2, 1, 0]
    assert order(Bilinear(a1=0.6, a2=0.5)(HELPFUL, UNSAFE)) == [3, 1, 2, 0]
    assert order(Multiplicative()(HELPFUL, UNSAFE)) == [1, 0, 0, 0]
    assert order(Multiplicative(floor=-0.5)(HELPFUL, UNSAFE)) == [2, 1, 0, 0]
    assert order(Tail(multiplier=2.0, tail_start=-0.5)(HELPFUL, UNSAFE)) == [2, 2, 1, 0]


@given(st.floats(0, 0.9), st.floats(0.1, 2))
def test_lambda_rises_above_the_bound_and_falls_below_it(bound, rate):
    reward, cost = scores()
    combiner = Lagrangian(cost_at_most=bound, rate=rate, max=100.0)
    excess = cost.mean() - bound
    assert combiner.after(reward, cost).multiplier == pytest.approx(math.exp(rate * excess), rel=1e-12)


def test_lambda_stays_in_its_bounds_and_is_kept_at_rate_0():
    reward, cost = scores()
    assert Lagrangian(rate=100.0).after(reward, cost + 1e6).multiplier == 5.0
    assert Lagrangian(rate=100.0).after(reward, cost - 1e6).multiplier == 0.01
    fixed = Lagrangian(rate=0.0, start=3.0)
    assert fixed.after(reward, cost) is fixed
    assert fixed.multiplier == 3.0


def test_the_quantile_of_the_tail_runs():
    reward, cost = scores()
    first = Tail(rate=0.25, multiplier=0.0).after(reward, cost)
    assert first.tail_start == pytest.approx(np.quantile(reward, 0.2))
    later = first.after(reward + 1, cost)
    assert later.tail_start == pytest.approx(first.tail_start + 0.25)


@pytest.mark.parametrize("name", COMBINERS)
def test_missing_scores_have_no_value_and_change_nothing_else(name):
    combiner = make_combiner({"name": name})
    reward, cost = scores()
    reward[0, 1] = cost[0, 1] = NAN
    kept = ~np.isnan(reward)
    after = combiner.after(reward, cost)
    if name != "tail":
        # A quantile of other samples is another one.
        alone = reward[kept][None], cost[kept][None]
        assert after == combiner.after(*alone)
        np.testing.assert_array_equal(combiner(reward, cost)[kept], combiner(*alone)[0])
    assert np.isnan(after(reward, cost))[0, 1]
    assert np.isfinite(after(reward, cost)[kept]).all()
    nothing = np.full((2, 2), NAN)
    assert combiner.after(nothing, nothing) == combiner
    assert np.isnan(combiner(nothing, nothing)).all()


@pytest.mark.parametrize("name", COMBINERS)
def test_the_state_is_what_changes(name):
    combiner = make_combiner({"name": name})
    after = combiner.after(*scores())
    restored = replace(combiner, **{field: getattr(after, field) for field in combiner.state})
    assert restored == after
    assert (after == combiner) == (not combiner.state)


def test_a_combiner_of_ones_own():
    assert make_combiner({"name": f"{__name__}:Sum"})(1, 2) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "lagrange"}, r"combine\.name is 'lagrange'; did you mean 'lagrangian'\?"),
        ({"name": 3}, r"combine\.name is 3"),
        ({"name": "tail", "shares": 0.1}, r"combine\.shares is not an option of 'tail'; did you mean 'share'\?"),
        ({"name": "bfpo.losses.combine:COMBINERS"}, "not a subclass of"),
        ({"name": f"{__name__}:Unfinished"}, "doesn't define __call__"),
        ({"name": "bfpo.losses.nothing:Sum"}, "No module named"),
    ],
)
def test_impossible_combiners_are_refused(options, message):
    with pytest.raises(RecipeError, match=message):
        make_combiner(options)


def test_a_solved_multiplier_is_read_for_the_run_that_it_is_for(tmp_path):
    DUAL.write(tmp_path)
    assert read_solved_multiplier(str(tmp_path), measure="cost", beta=0.5) == 2.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beta": 0.1}, r"was computed for beta 0\.1, and trainer\.beta is 0\.5"),
        ({"constraint": Constraint("unsafe", 0.1)}, r"bounds unsafe .* needs a bound on cost"),
        ({"objective": "log_ratios"}, r"for the objective log_ratios"),
        ({"reward_scale": 2.0}, r"for rewards times 2"),
        ({"state": "infeasible", "multiplier": None}, r"no policy over the samples reaches 0\.1"),
    ],
)
def test_a_multiplier_of_another_run_is_refused(tmp_path, change, message):
    replace(DUAL, **change).write(tmp_path)
    with pytest.raises(RecipeError, match=message):
        read_solved_multiplier(str(tmp_path), measure="cost", beta=0.5)
    with pytest.raises(DataError, match="bfpo dual"):
        read_solved_multiplier(str(Path(tmp_path) / "nothing"), measure="cost", beta=0.5)


def test_combiners_are_the_functions():
    reward, cost = scores()
    np.testing.assert_array_equal(
        Tail(tail_start=0.1)(reward, cost), combiners.tail(reward - cost, start=0.1, share=0.2)
    )
