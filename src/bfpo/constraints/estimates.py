"""What scored samples of the base model say about the policy π_λ, for any multiplier λ.

The samples of a prompt stand for the base model's distribution: π_λ gives each the weight
exp((reward - λ·cost) / beta), normalized over the prompt's samples. All expectations are therefore self-normalized
importance estimates, which are good as long as the weight is spread over many samples.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from bfpo.constraints.samples import ScoredSamples
from bfpo.losses.combiners import tail_cost
from bfpo.losses.constrained import ConstrainedProblem, DualSolution, cvar, expectation, solve_cvar, solve_mean
from bfpo.losses.dual import FrontierPoint
from bfpo.stats.intervals import LEVEL

Array: TypeAlias = NDArray[np.float64]

# Policies on the frontier, evenly spaced in the constrained cost, up to this share of the way to the lowest one.
_POINTS, _FURTHEST = 24, 0.99
# Multipliers at which resamples of the prompts are evaluated; roots between them are interpolated.
_GRID, _RESAMPLES = 200, 2000


@dataclass(frozen=True, slots=True, eq=False)
class SampleProblem:
    """Samples with the reward and the cost of a constrained problem. Arrays are (X, N).

    Args:
        samples: Scored samples.
        reward: What the policy maximizes: the reward, or what a loss implies.
        cost: Cost that the multiplier multiplies.
        counted: Whether the constraint counts a prompt, (X,).
        beta: Weight of the KL penalty.
        share: Share of the answers in the tail of a constraint on CVaR; None for one on the mean.
    """

    samples: ScoredSamples
    reward: Array
    cost: Array
    counted: NDArray[np.bool_]
    beta: float
    share: float | None = None

    def problem(self, exists: NDArray[np.bool_] | None = None) -> ConstrainedProblem:
        """Return the problem of all prompts, with the samples in a mask, (X, N); default all of them."""
        exists = self.samples.exists if exists is None else exists
        reference = exists / exists.sum(axis=1, keepdims=True)
        return ConstrainedProblem(reference, self.reward, self.cost, self.beta)

    def counted_problem(self, exists: NDArray[np.bool_] | None = None) -> ConstrainedProblem:
        """Return the problem of the prompts that the constraint counts."""
        whole, counted = self.problem(exists), self.counted
        return ConstrainedProblem(whole.reference[counted], whole.reward[counted], whole.cost[counted], self.beta)

    def shifted(self, problem: ConstrainedProblem, tail_start: float | None) -> ConstrainedProblem:
        """Return the problem with the cost that the multiplier multiplies: that of the tail, for CVaR."""
        if self.share is None or tail_start is None:
            return problem
        return problem.with_cost(tail_cost(problem.cost, start=tail_start, share=self.share))

    def measure(self, policy: Array) -> float:
        """Return the mean or the CVaR of the cost over the prompts that the constraint counts."""
        policy, cost = policy[self.counted], self.cost[self.counted]
        return expectation(policy, cost) if self.share is None else cvar(cost, policy, self.share)

    def solve(self, threshold: float) -> DualSolution:
        """Return the multiplier that brings the measure down to the threshold."""
        problem = self.counted_problem()
        return solve_mean(problem, threshold) if self.share is None else solve_cvar(problem, threshold, self.share)

    def base_point(self) -> FrontierPoint:
        """Return the base model as a point of the frontier."""
        return self._point(None, self.problem().reference)

    def point(self, multiplier: float, tail_start: float | None) -> FrontierPoint:
        """Return the policy of a multiplier as a point of the frontier."""
        return self._point(multiplier, self.shifted(self.problem(), tail_start).policy(multiplier))

    def _point(self, multiplier: float | None, policy: Array) -> FrontierPoint:
        samples, counted = self.samples, self.counted
        # A judge of safety need not grade the harm.
        cost = np.where(np.isnan(samples.cost), samples.is_unsafe, samples.cost)
        return FrontierPoint(
            multiplier=multiplier,
            harm=self.measure(policy),
            helpfulness=expectation(policy, samples.reward),
            unsafe=expectation(policy[counted], samples.is_unsafe[counted].astype(np.float64)),
            cost=expectation(policy[counted], cost[counted]),
            kl=float(self.problem().divergences(policy).mean()),
            effective_samples=float(np.median(effective_samples(policy[counted]))),
        )

    def frontier(self, solution: DualSolution) -> list[FrontierPoint]:
        """Return policies from no constraint to nearly the lowest cost, and that of the solution."""
        problem = self.shifted(self.counted_problem(), solution.tail_start)
        unconstrained, least = problem.expected_cost(0.0), problem.least_cost()
        steps = np.linspace(0, _FURTHEST, _POINTS + 1)
        multipliers = {
            solve_mean(problem, unconstrained + step * (least - unconstrained)).multiplier for step in steps
        }
        multipliers.add(solution.multiplier)
        return [
            self.point(multiplier, solution.tail_start)
            for multiplier in sorted(multiplier for multiplier in multipliers if multiplier is not None)
        ]

    def with_half(self, solution: DualSolution) -> float | None:
        """Return the measure at the solution as estimated from half of the samples, averaged over both halves.

        The error of a self-normalized estimate is about proportional to 1/N, so the estimate from all samples differs
        from the truth by about as much as it differs from this one.
        """
        if solution.multiplier is None:
            return None
        return float(
            np.mean(
                [
                    self.measure(self.shifted(self.problem(half), solution.tail_start).policy(solution.multiplier))
                    for half in self._halves()
                ]
            )
        )

    def _halves(self) -> Iterator[NDArray[np.bool_]]:
        numbers = np.cumsum(self.samples.exists, axis=1)
        for parity in (0, 1):
            yield self.samples.exists & (numbers % 2 == parity)

    def effective_samples(self, solution: DualSolution) -> Array:
        """Return the effective number of samples of each prompt that the constraint counts."""
        problem = self.shifted(self.counted_problem(), solution.tail_start)
        return effective_samples(problem.policy(solution.multiplier or 0.0))


def effective_samples(policy: Array) -> Array:
    """Return 1 / Σ weight² of each prompt, (X,): the number of equally weighted samples that would be as good."""
    effective: Array = 1 / (policy**2).sum(axis=1)
    return effective


@dataclass(frozen=True, slots=True)
class DualIntervals:
    """95 % bootstrap intervals over prompts.

    Args:
        multiplier_low: Lower bound of λ; None if the constraint is infeasible.
        multiplier_high: Upper bound of λ; None if it is infeasible in more than 2.5 % of the resamples.
        achieved_low: Lower bound of the measure at λ, or of its lowest value if the constraint is infeasible.
        achieved_high: Upper bound.
    """

    multiplier_low: float | None
    multiplier_high: float | None
    achieved_low: float
    achieved_high: float


def bootstrap_intervals(
    problem: ConstrainedProblem, solution: DualSolution, thresholds: Array, *, seed: int
) -> DualIntervals:
    """Return intervals of the multiplier and of what it achieves, over resamples of the prompts.

    The start of a tail is held fixed.

    Args:
        problem: Problem of the prompts that the constraint counts, with the cost that the multiplier multiplies.
        solution: Its solution.
        thresholds: Threshold of each prompt, (X,): the same for all, or the base model's cost less a gain.
        seed: Seed of the resamples.
    """
    size = len(problem.cost)
    resamples = np.random.default_rng(seed).multinomial(size, np.full(size, 1 / size), size=_RESAMPLES) / size
    if solution.multiplier is None:
        lowest = np.where(problem.reference > 0, problem.cost, np.inf).min(axis=1)
        return DualIntervals(None, None, *_percentiles(resamples @ lowest))
    achieved = (problem.policy(solution.multiplier) * problem.cost).sum(axis=1)
    grid = _multiplier_grid(problem, solution.multiplier)
    costs = np.stack([(problem.policy(multiplier) * problem.cost).sum(axis=1) for multiplier in grid], axis=1)
    low, high = _percentiles(_roots(resamples @ (costs - thresholds[:, None]), grid))
    return DualIntervals(low, None if np.isinf(high) else high, *_percentiles(resamples @ achieved))


def _multiplier_grid(problem: ConstrainedProblem, multiplier: float) -> Array:
    unconstrained, least = problem.expected_cost(0.0), problem.least_cost()
    far = solve_mean(problem, unconstrained + _FURTHEST * (least - unconstrained)).multiplier or problem.beta
    furthest = 20 * max(multiplier, far)
    return np.concatenate([[0.0], np.geomspace(1e-5 * furthest, furthest, _GRID)])


def _roots(excess: Array, grid: Array) -> Array:
    """Return the multiplier at which the excess of each resample becomes 0, (R,); infinity where it doesn't.

    Args:
        excess: Excess over the threshold at each multiplier, falling, (R, G).
        grid: Multipliers, rising, (G,).
    """
    rows, index = np.arange(len(excess)), np.argmax(excess <= 0, axis=1)
    before = np.maximum(index - 1, 0)
    above, below = excess[rows, before], excess[rows, index]
    step = np.divide(above, above - below, out=np.zeros_like(above), where=above > below)
    roots = grid[before] + step * (grid[index] - grid[before])
    return np.where(excess[:, -1] > 0, np.inf, np.where(index == 0, 0.0, roots))


def _percentiles(values: Array) -> tuple[float, float]:
    """Return the 2.5 % and the 97.5 % percentile; values may be infinite."""
    ordered, tail = np.sort(values), (1 - LEVEL) / 2
    return float(ordered[int(tail * len(values))]), float(ordered[int(np.ceil((1 - tail) * len(values))) - 1])
