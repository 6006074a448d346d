"""Least score of a small head over a box: interval bound, linear relaxation, and mixed-integer program.

The encoding of rectified linear units with one binary variable each is that of Tjeng, Xiao and Tedrake (2019, arXiv
1711.07356); with the binary variable relaxed to [0, 1] it is the triangle of Ehlers (2017, arXiv 1705.01320).
"""

from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from bfpo.model.cost_head import CostHead

Array: TypeAlias = NDArray[np.float64]

# HiGHS: tolerances of feasibility and integrality, and the size below which it drops a coefficient.
_TOLERANCE, _DROPPED = 1e-6, 1e-9
# Unit roundoff of float32.
_ROUNDOFF = 2.0**-24


class StateBox(NamedTuple):
    """Box of hidden states.

    Args:
        low: Lower bounds of the coordinates, (width,).
        high: Upper bounds, (width,).
    """

    low: Array
    high: Array


class LeastScore(NamedTuple):
    """Bound of a score over a box.

    Args:
        bound: No state of the box has a lower score, up to the tolerance of the solver.
        state: State of the lowest score that was found, (width,); None if none was.
    """

    bound: float
    state: Array | None


@dataclass(frozen=True, slots=True, eq=False)
class ScoreFunction:
    """A head in float64, or its negative, whose least score is minus the head's greatest.

    Args:
        weight: Weights of the output, (inputs,).
        bias: Bias of the output.
        hidden_weight: Weights of the rectified linear units, (units, width); None for a linear head.
        hidden_bias: Their biases, (units,).
    """

    weight: Array
    bias: float
    hidden_weight: Array | None = None
    hidden_bias: Array | None = None

    @classmethod
    def of(cls, head: CostHead, *, sign: int = 1) -> "ScoreFunction":
        """Return a head times 1 or -1."""
        parts = (head.hidden_weight, head.hidden_bias)
        hidden = [None if part is None else part.detach().cpu().double().numpy() for part in parts]
        weight = head.weight.detach().cpu().double().numpy()[0]
        return cls(sign * weight, sign * float(head.bias), *hidden)

    def __call__(self, states: Array) -> Array:
        """Return the score of each state, (...), of states (..., width)."""
        features = states
        if self.hidden_weight is not None and self.hidden_bias is not None:
            features = np.maximum(states @ self.hidden_weight.T + self.hidden_bias, 0.0)
        scores: Array = features @ self.weight + self.bias
        return scores


def interval_bound(function: ScoreFunction, box: StateBox) -> LeastScore:
    """Return the bound by interval arithmetic; for a linear head it is exact, and attained at the corner."""
    if function.hidden_weight is None:
        corner = np.where(function.weight > 0, box.low, box.high)
        return LeastScore(float(function(corner)), corner)
    low, high = _before_units(function, box)
    least, greatest = np.maximum(low, 0.0), np.maximum(high, 0.0)
    terms = np.where(function.weight > 0, function.weight * least, function.weight * greatest)
    return LeastScore(function.bias + float(terms.sum()), None)


def relaxed_bound(function: ScoreFunction, box: StateBox) -> LeastScore:
    """Return the bound by a linear program, in which the binary variables may be fractions.

    Args:
        function: Head with a hidden layer.
        box: The box.
    """
    return _solve(function, box, binary=False, time_limit=None)


def exact_bound(function: ScoreFunction, box: StateBox, *, time_limit: float | None = None) -> LeastScore:
    """Return the least score by a mixed-integer program.

    Args:
        function: Head with a hidden layer.
        box: The box.
        time_limit: Maximum time in seconds, after which the best bound so far is returned; None for no limit.
    """
    return _solve(function, box, binary=True, time_limit=time_limit)


def tolerance(function: ScoreFunction, box: StateBox) -> float:
    """Return how much lower than a bound a forward pass in float32 can be.

    It is the sum of the solver's tolerances and of the rounding of inner products in float32, in any order of the
    sums (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1).
    """
    reach = np.maximum(np.abs(box.low), np.abs(box.high))
    sizes = np.abs(function.weight)
    if function.hidden_weight is None or function.hidden_bias is None:
        return _rounding(len(reach)) * (float(sizes @ reach) + abs(function.bias))
    low, high = _before_units(function, box)
    before = _rounding(len(reach)) * (np.abs(function.hidden_weight) @ reach + np.abs(function.hidden_bias))
    after = np.maximum(high, 0.0) + before
    rounding = float(sizes @ before) + _rounding(len(sizes)) * (float(sizes @ after) + abs(function.bias))
    solver = _TOLERANCE * float(sizes @ (1.0 + high - low)) + _DROPPED * len(reach) * float(sizes.sum())
    return rounding + solver


def _rounding(terms: int) -> float:
    """Return the relative error of an inner product with a bias."""
    return (terms + 1) * _ROUNDOFF / (1 - (terms + 1) * _ROUNDOFF)


def _before_units(function: ScoreFunction, box: StateBox) -> tuple[Array, Array]:
    """Return the bounds of the units' inputs, (units,) each."""
    assert function.hidden_weight is not None
    assert function.hidden_bias is not None
    center = function.hidden_weight @ ((box.low + box.high) / 2) + function.hidden_bias
    radius = np.abs(function.hidden_weight) @ ((box.high - box.low) / 2)
    return center - radius, center + radius


def _solve(function: ScoreFunction, box: StateBox, *, binary: bool, time_limit: float | None) -> LeastScore:
    """Minimize the score over v in [-1, 1]^n, outputs z of the units and their switches s.

    Units that are on everywhere in the box are linear, those that are off are left out. A unit with a positive weight
    is pushed down to max(x, 0), x its input, so only those with negative weights need switches:
    z ≤ x - low (1 - s) and z ≤ high s.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    assert function.hidden_weight is not None
    assert function.hidden_bias is not None
    low, high = _before_units(function, box)
    center, radius = (box.low + box.high) / 2, (box.high - box.low) / 2
    gradients = function.hidden_weight * radius
    at_center = function.hidden_weight @ center + function.hidden_bias
    is_on = low >= 0
    is_open = ~is_on & (high > 0)
    pushed_up = np.flatnonzero(is_open & (function.weight < 0))
    units = np.concatenate([np.flatnonzero(is_open & (function.weight > 0)), pushed_up])
    constant = function.bias + float(function.weight[is_on] @ at_center[is_on])
    width, count, switches = len(center), len(units), len(pushed_up)
    cost = np.concatenate([function.weight[is_on] @ gradients[is_on], function.weight[units], np.zeros(switches)])
    # z - x ≥ 0 for all, then both upper bounds for those with switches.
    rows = [np.hstack([-gradients[units], np.eye(count), np.zeros((count, switches))])]
    bounds = [(at_center[units], np.full(count, np.inf))]
    if switches:
        last = np.eye(count)[count - switches :]
        rows.append(np.hstack([-gradients[pushed_up], last, -np.diag(low[pushed_up])]))
        bounds.append((np.full(switches, -np.inf), at_center[pushed_up] - low[pushed_up]))
        rows.append(np.hstack([np.zeros((switches, width)), last, -np.diag(high[pushed_up])]))
        bounds.append((np.full(switches, -np.inf), np.zeros(switches)))
    lower, upper = (np.concatenate(parts) for parts in zip(*bounds, strict=True))
    result = milp(
        cost,
        constraints=[LinearConstraint(np.vstack(rows), lower, upper)] if count else [],
        integrality=np.concatenate([np.zeros(width + count), np.full(switches, int(binary))]),
        bounds=Bounds(
            np.concatenate([-np.ones(width), np.zeros(count + switches)]),
            np.concatenate([np.ones(width), high[units], np.ones(switches)]),
        ),
        options={"mip_rel_gap": 0.0} | ({} if time_limit is None else {"time_limit": time_limit}),
    )
    state = None if result.x is None else np.clip(center + radius * result.x[:width], box.low, box.high)
    proved = result.mip_dual_bound if binary and switches else (result.fun if result.status == 0 else None)
    if proved is None or not np.isfinite(proved):
        return LeastScore(interval_bound(function, box).bound, state)
    return LeastScore(constant + float(proved), state)
