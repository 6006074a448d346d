"""Constrained alignment on finite answer sets, exactly: the most helpful policy whose cost is at most a threshold.

    maximize   J(π) = E_x [ E_{y~π} reward(y) - beta·KL(π ‖ π_ref) ]
    subject to E_x E_{y~π} cost(y) ≤ threshold,   or CVaR_share(cost) ≤ threshold

**Signs.** A reward is higher for more helpful answers; a cost is above 0 for unsafe ones; the multiplier λ is at
least 0. The optimum is π_λ ∝ π_ref·exp((reward - λ·cost) / beta), so the expected cost falls as λ grows. The
literature on dual problems writes g = -cost and a lower bound -threshold: π_ref·exp((reward + λ·g) / beta) is the
same policy.

For a mean, λ minimizes the convex dual D(λ) = beta·E_x log E_{y~π_ref} exp((reward - λ·(cost - threshold)) / beta),
whose derivative is threshold - E cost(π_λ), so it is a root (Huang et al., One-Shot Safety Alignment, arXiv
2405.19544). A set of samples is such a problem too: `reference` is then 1/N for each of the N samples of a prompt,
and all expectations are self-normalized importance estimates.
"""

from dataclasses import dataclass, fields
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from bfpo.errors import RecipeError
from bfpo.losses.combiners import tail_cost

Array: TypeAlias = NDArray[np.float64]
DualState = Literal["active", "slack", "infeasible"]

_TOLERANCE = 1e-9
# Values at which a tail may start are tried one by one; of more distinct costs, evenly spaced ones by rank.
_TAIL_STARTS = 64
# Beyond this multiplier labels overflow, and the policy no longer changes.
_LARGEST = 1e9


@dataclass(frozen=True, slots=True, eq=False)
class ConstrainedProblem:
    """X prompts with K answers each. Arrays are copied and made read-only.

    Args:
        reference: π_ref, probability of each answer, (X, K); rows sum to 1. Answers of probability 0 don't exist, so
            prompts may have different numbers of answers.
        reward: Reward of each answer, (X, K).
        cost: Cost of each answer, (X, K); above 0 for unsafe answers.
        beta: Weight of the KL penalty, above 0.

    Raises:
        RecipeError: If a shape is wrong, a number isn't finite, or the reference isn't a distribution.
    """

    reference: Array
    reward: Array
    cost: Array
    beta: float

    def __post_init__(self) -> None:
        if not 0 < self.beta < np.inf:
            raise RecipeError(f"beta is {self.beta}; expected a finite number above 0")
        for field in fields(self):
            if field.name == "beta":
                continue
            value = np.array(getattr(self, field.name), dtype=np.float64)
            value.flags.writeable = False
            object.__setattr__(self, field.name, value)
            if value.ndim != 2 or not value.size or value.shape != self.reference.shape:
                raise RecipeError(f"problem: {field.name} has shape {value.shape}; expected (prompts, answers)")
            if not np.isfinite(value).all():
                raise RecipeError(f"problem: {field.name} has a number that isn't finite")
        if (self.reference < 0).any() or np.abs(self.reference.sum(axis=1) - 1).max() > _TOLERANCE:
            raise RecipeError("problem: reference is not a probability distribution for each prompt")

    def policy(self, multiplier: float) -> Array:
        """Return π_λ ∝ π_ref·exp((reward - λ·cost) / beta), (X, K)."""
        logits = self._logits(multiplier)
        unnormalized = np.exp(logits - logits.max(axis=1, keepdims=True))
        policy: Array = unnormalized / unnormalized.sum(axis=1, keepdims=True)
        return policy

    def expected_cost(self, multiplier: float) -> float:
        """Return E_x E_{y~π_λ} cost(y), which falls as the multiplier grows."""
        return expectation(self.policy(multiplier), self.cost)

    def least_cost(self) -> float:
        """Return the expected cost as the multiplier goes to infinity: the mean of each prompt's lowest cost."""
        return float(np.where(self.reference > 0, self.cost, np.inf).min(axis=1).mean())

    def objective(self, policy: Array) -> float:
        """Return J(π) of a policy, (X, K)."""
        return expectation(policy, self.reward) - self.beta * float(self.divergences(policy).mean())

    def divergences(self, policy: Array) -> Array:
        """Return KL(π ‖ π_ref) of each prompt in nats, (X,)."""
        ratio = np.divide(policy, self.reference, out=np.ones_like(policy), where=policy > 0)
        divergences: Array = (policy * np.log(ratio)).sum(axis=1)
        return divergences

    def dual(self, multiplier: float, threshold: float) -> float:
        """Return the dual D(λ) of the constraint on the mean cost."""
        logits = self._logits(multiplier)
        largest = logits.max(axis=1)
        log_partition = np.log(np.exp(logits - largest[:, None]).sum(axis=1)) + largest
        return self.beta * float(log_partition.mean()) + multiplier * threshold

    def with_cost(self, cost: Array) -> "ConstrainedProblem":
        """Return the problem with another cost."""
        return ConstrainedProblem(self.reference, self.reward, cost, self.beta)

    def _logits(self, multiplier: float) -> Array:
        with np.errstate(divide="ignore"):  # log 0 is -inf, an answer that doesn't exist
            logits: Array = np.log(self.reference) + (self.reward - multiplier * self.cost) / self.beta
        return logits


class DualSolution(NamedTuple):
    """Solution of a constrained problem.

    Args:
        state: `active`: the constraint holds with equality. `slack`: it holds without a multiplier. `infeasible`: no
            policy over these answers satisfies it.
        multiplier: λ; 0 if the constraint is slack, None if it is infeasible.
        achieved: Mean or CVaR of the cost of π_λ; the lowest value of all policies if the constraint is infeasible.
        tail_start: Cost from which upwards the tail of a CVaR starts; None for a mean. The policy is that of the cost
            `tail_cost(cost, start=tail_start, share=share)`.
    """

    state: DualState
    multiplier: float | None
    achieved: float
    tail_start: float | None = None


def expectation(policy: Array, values: Array) -> float:
    """Return E_x E_{y~π} values(y) for arrays (X, K)."""
    return float((policy * values).sum(axis=1).mean())


def cvar(values: Array, weights: Array, share: float) -> float:
    """Return the mean of the largest values that together have a share of the weight.

    Args:
        values: Values of any shape.
        weights: Weights of the same shape, at least 0; they need not sum to 1.
        share: Share, in (0, 1].
    """
    order = np.argsort(-values, axis=None)
    sorted_values, mass = values.ravel()[order], np.cumsum(weights.ravel()[order])
    in_tail = np.diff(np.minimum(mass / mass[-1], share), prepend=0.0)
    return float(in_tail @ sorted_values / share)


def solve_mean(problem: ConstrainedProblem, threshold: float) -> DualSolution:
    """Return the multiplier of the constraint E cost ≤ threshold, by a bracketed root search.

    The bracket grows until the cost is below the threshold. It must be once the threshold is above the lowest cost
    that any policy has, which is also how an infeasible constraint is recognized.
    """
    from scipy.optimize import brentq

    unconstrained = problem.expected_cost(0.0)
    if unconstrained <= threshold:
        return DualSolution("slack", 0.0, unconstrained)
    least = problem.least_cost()
    high = problem.beta
    while least < threshold and problem.expected_cost(high) > threshold and high < _LARGEST:
        high *= 2
    # At the threshold itself, and for a few roundings above, the multiplier would be infinite.
    if high >= _LARGEST or problem.expected_cost(high) > threshold:
        return DualSolution("infeasible", None, least)

    def excess(multiplier: float) -> float:
        return problem.expected_cost(multiplier) - threshold

    multiplier = float(brentq(excess, 0.0, high, xtol=1e-300, rtol=4 * np.finfo(float).eps, maxiter=1000))
    return DualSolution("active", multiplier, problem.expected_cost(multiplier))


def solve_cvar(problem: ConstrainedProblem, threshold: float, share: float) -> DualSolution:
    """Return the multiplier of the constraint CVaR_share(cost) ≤ threshold, over the answers to all prompts.

    CVaR is the minimum over `start` of the mean of `tail_cost(cost, start, share)`, so the constraint holds if the
    mean of one of these costs is at most the threshold. The best `start` is found by trying those that can be: the
    distinct costs up to the threshold. Each is a problem of `solve_mean`, and the one with the highest objective is
    the solution. Where costs take more than a few dozen values, only some are tried, and the best is refined by
    alternating between the policy and the start of its tail. The constraint then holds still, but the policy may be
    slightly less helpful than the best one.
    """
    unconstrained = cvar(problem.cost, problem.policy(0.0), share)
    if unconstrained <= threshold:
        return DualSolution("slack", 0.0, unconstrained, _tail_start(problem, problem.policy(0.0), share))
    best: tuple[float, DualSolution] | None = None
    starts = _tail_starts(problem, threshold)
    for start in starts:
        candidate = _solve_at(problem, threshold, share, start)
        if candidate is not None and (best is None or candidate[0] > best[0]):
            best = candidate
    if best is None:
        cheapest = problem.policy(_LARGEST)
        return DualSolution(
            "infeasible", None, cvar(problem.cost, cheapest, share), _tail_start(problem, cheapest, share)
        )
    while len(starts) >= _TAIL_STARTS:
        shifted = problem.with_cost(_costs(problem, best[1].tail_start, share))
        start = _tail_start(problem, shifted.policy(best[1].multiplier or 0.0), share)
        candidate = _solve_at(problem, threshold, share, start)
        if candidate is None or candidate[0] <= best[0] + _TOLERANCE:
            break
        best = candidate
    return best[1]


def _costs(problem: ConstrainedProblem, start: float | None, share: float) -> Array:
    assert start is not None
    return tail_cost(problem.cost, start=start, share=share)


def _solve_at(
    problem: ConstrainedProblem, threshold: float, share: float, start: float
) -> tuple[float, DualSolution] | None:
    """Return the objective and the solution for a given start of the tail; None if it is infeasible."""
    shifted = problem.with_cost(_costs(problem, start, share))
    solution = solve_mean(shifted, threshold)
    if solution.multiplier is None:
        return None
    policy = shifted.policy(solution.multiplier)
    achieved = cvar(problem.cost, policy, share)
    return problem.objective(policy), DualSolution("active", solution.multiplier, achieved, start)


def _tail_starts(problem: ConstrainedProblem, threshold: float) -> list[float]:
    """Return the costs at which the tail of a feasible policy may start; those above the threshold can't be."""
    costs = np.unique(problem.cost[problem.reference > 0])
    costs = costs[costs <= threshold]
    if len(costs) > _TAIL_STARTS:
        costs = costs[np.linspace(0, len(costs) - 1, _TAIL_STARTS).round().astype(int)]
    return [float(cost) for cost in costs]


def _tail_start(problem: ConstrainedProblem, policy: Array, share: float) -> float:
    """Return the quantile of level 1 - share of a policy's cost."""
    order = np.argsort(-problem.cost, axis=None)
    mass = np.cumsum(policy.ravel()[order])
    index = int(np.searchsorted(mass / mass[-1], share))
    return float(problem.cost.ravel()[order][min(index, len(order) - 1)])
