"""Bounds of a head's score over a box: against enumeration, sampling and the closed form."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from bfpo.certificates.bounds import (
    ScoreFunction,
    StateBox,
    exact_bound,
    interval_bound,
    relaxed_bound,
    tolerance,
)
from bfpo.model.cost_head import CostHead


def random_case(seed, width=None, units=None):
    """Return a random small head with a hidden layer, and a box; some coordinates of it may be points."""
    rng = np.random.default_rng(seed)
    width, units = width or int(rng.integers(1, 5)), units or int(rng.integers(1, 6))
    function = ScoreFunction(
        rng.normal(size=units), float(rng.normal()), rng.normal(size=(units, width)), rng.normal(size=units)
    )
    center, radius = 2 * rng.normal(size=width), rng.exponential(size=width) * (rng.random(width) > 0.1)
    return function, StateBox(center - radius, center + radius)


def least_by_enumeration(function, box):
    """Return the least score over all patterns of units that are on or off: in each the score is linear."""
    scores = []
    for pattern in itertools.product((0, 1), repeat=len(function.weight)):
        on = np.array(pattern)
        # The units' inputs are at least 0 where they are on, and at most 0 where they are off.
        sides = np.where(on, -1.0, 1.0)
        result = linprog(
            (function.weight * on) @ function.hidden_weight,
            A_ub=sides[:, None] * function.hidden_weight,
            b_ub=-sides * function.hidden_bias,
            bounds=list(zip(box.low, box.high, strict=True)),
        )
        if result.status == 0:
            scores.append(result.fun + function.bias + (function.weight * on) @ function.hidden_bias)
    return min(scores)


@settings(max_examples=30)
@given(st.integers(0, 10**9))
def test_the_exact_bound_is_the_least_over_all_activation_patterns(seed):
    function, box = random_case(seed)
    least = exact_bound(function, box)
    assert least.bound == pytest.approx(least_by_enumeration(function, box), abs=1e-5)
    # It is attained at the state that is returned.
    assert np.all((box.low <= least.state) & (least.state <= box.high))
    assert float(function(least.state)) == pytest.approx(least.bound, abs=1e-5)


@settings(max_examples=50)
@given(st.integers(0, 10**9))
def test_every_bound_contains_the_next_tighter_one(seed):
    function, box = random_case(seed, units=8)
    bounds = [
        interval_bound(function, box).bound,
        relaxed_bound(function, box).bound,
        exact_bound(function, box).bound,
    ]
    slack = tolerance(function, box)
    assert bounds[0] <= bounds[1] + slack
    assert bounds[1] <= bounds[2] + slack
    states = box.low + (box.high - box.low) * np.random.default_rng(seed).random((2000, len(box.low)))
    assert bounds[2] <= function(states).min() + slack


@settings(max_examples=20)
@given(st.integers(0, 10**9), st.floats(0, 1))
def test_a_smaller_box_has_no_lower_score(seed, share):
    function, box = random_case(seed)
    center = (box.low + box.high) / 2
    inner = StateBox(center + share * (box.low - center), center + share * (box.high - center))
    assert exact_bound(function, box).bound <= exact_bound(function, inner).bound + tolerance(function, box)


@given(st.integers(0, 10**9))
def test_a_linear_head_has_the_closed_form(seed):
    rng = np.random.default_rng(seed)
    weight, bias = rng.normal(size=6), float(rng.normal())
    center, radius = rng.normal(size=6), rng.exponential(size=6)
    least = interval_bound(ScoreFunction(weight, bias), StateBox(center - radius, center + radius))
    assert least.bound == pytest.approx(weight @ center + bias - np.abs(weight) @ radius, abs=1e-12)
    assert float(weight @ least.state + bias) == least.bound


def test_a_known_head_has_its_known_least_score():
    # 1 - relu(x) - relu(-x) is 1 - |x|: least -2 at x = -3. Intervals forget that only one of both is on.
    function = ScoreFunction(np.array([-1.0, -1.0]), 1.0, np.array([[1.0], [-1.0]]), np.zeros(2))
    box = StateBox(np.array([-3.0]), np.array([2.0]))
    assert exact_bound(function, box).bound == pytest.approx(-2.0, abs=1e-6)
    assert exact_bound(function, box).state == pytest.approx([-3.0], abs=1e-5)
    assert interval_bound(function, box).bound == pytest.approx(-4.0)
    # Chords of both units: relu(x) ≤ 2 (x + 3) / 5 and relu(-x) ≤ 3 (2 - x) / 5, whose sum is greatest at -3.
    assert relaxed_bound(function, box).bound == pytest.approx(-2.0, abs=1e-6)
    wide = StateBox(np.array([-2.0]), np.array([2.0]))
    assert relaxed_bound(function, wide).bound == pytest.approx(-1.0, abs=1e-6)


@pytest.mark.parametrize("units", [0, 7])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_tolerance_covers_the_rounding_of_float32(units, sign):
    generator = torch.Generator().manual_seed(units)
    width = 300
    shapes = [(1, units), (1,), (units, width), (units,)] if units else [(1, width), (1,)]
    head = CostHead((-1,), *(10 * torch.randn(shape, generator=generator) for shape in shapes))
    function = ScoreFunction.of(head, sign=sign)
    states = 5 * torch.randn(2000, width, generator=generator)
    low, high = states.amin(0).double().numpy(), states.amax(0).double().numpy()
    gaps = np.abs(sign * head(states).double().numpy() - function(states.double().numpy()))
    assert 0 < gaps.max() < tolerance(function, StateBox(low, high))


def test_a_time_limit_leaves_a_bound_that_holds():
    function, box = random_case(3, width=12, units=40)
    limited, exact = exact_bound(function, box, time_limit=1e-3), exact_bound(function, box)
    assert interval_bound(function, box).bound - 1e-6 <= limited.bound <= exact.bound + tolerance(function, box)
