"""Combiners: how a reward and a cost become the one number that a policy maximizes.

Each is a pure function of arrays of one shape. `reward` is higher for more helpful answers, `cost` is above 0 for
unsafe ones, `safe` is 0 or 1, or the probability that an answer is safe.

With `safe = 1 - p(unsafe)`, the multiplicative combiner is the bilinear one with a1 = 0 and a2 = -floor; the
Lagrangian is the additive one, in which safety is worth the same however helpful the answer is.
"""

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from bfpo.errors import RecipeError

Array: TypeAlias = NDArray[np.float64]


def lagrangian(
    reward: Array, cost: Array, *, multiplier: float, threshold: float = 0.0, normalize: bool = False
) -> Array:
    """Return reward - multiplier·(cost - threshold).

    Args:
        reward: Rewards.
        cost: Costs.
        multiplier: λ, at least 0.
        threshold: Largest allowed cost; a constant, which doesn't change the optimal policy.
        normalize: Whether to divide by 1 + multiplier, which keeps the scale when the multiplier grows.

    Source:
        Safe RLHF, arXiv 2310.12773, with (reward - λ·cost) / (1 + λ) as the advantage.
    """
    value = reward - _multiplier(multiplier) * (cost - threshold)
    return value / (1 + multiplier) if normalize else value


def bilinear(safe: Array, helpfulness: Array, *, a1: float, a2: float) -> Array:
    """Return (safe + a1)·(helpfulness + a2).

    Args:
        safe: Safety of each answer, in [0, 1].
        helpfulness: Win rate of each answer, in [0, 1].
        a1: Offset of safety; E_s in the paper.
        a2: Offset of helpfulness; 1/2 in the paper.

    Source:
        Paper, RL objective.
    """
    return (safe + a1) * (helpfulness + a2)


def multiplicative(reward: Array, p_unsafe: Array, *, floor: float = 0.0) -> Array:
    """Return (reward - floor)·(1 - p_unsafe): an unsafe answer is worth as much as the worst safe one.

    Args:
        reward: Rewards.
        p_unsafe: Probability that each answer is unsafe, in [0, 1].
        floor: Reward of a worthless answer. Answers with a lower reward are worth more if they are unsafe.

    Source:
        Multiplicative value function, arXiv 2303.04118, on whole answers.
    """
    return (reward - floor) * (1 - p_unsafe)


def tail(value: Array, *, start: float, share: float) -> Array:
    """Return -(start - value)₊ / share: only values below `start` count.

    Its mean plus `start` is the mean of the lowest `share` of the values if `start` is their quantile of that level
    (Rockafellar and Uryasev 2000). Its policy gradient at that `start` is the gradient of that mean.

    Args:
        value: Values, higher is better.
        start: Value from which downwards the tail starts.
        share: Share of the values in the tail, in (0, 1].
    """
    return -np.maximum(start - value, 0) / _share(share)


def tail_cost(cost: Array, *, start: float, share: float) -> Array:
    """Return start + (cost - start)₊ / share, whose mean is the mean of the worst `share` of the costs.

    More precisely, it is the smallest over all `start`, reached where `start` is the quantile of level 1 - share; at
    any other `start` the mean is larger. So a bound on the mean of this cost bounds the conditional value at risk.

    Args:
        cost: Costs.
        start: Cost from which upwards the tail starts.
        share: Share of the answers in the tail, in (0, 1].
    """
    return start + np.maximum(cost - start, 0) / _share(share)


def _multiplier(multiplier: float) -> float:
    if not 0 <= multiplier < np.inf:
        raise RecipeError(f"multiplier is {multiplier}; expected a finite number of at least 0")
    return multiplier


def _share(share: float) -> float:
    if not 0 < share <= 1:
        raise RecipeError(f"share is {share}; expected a number above 0, at most 1")
    return share
