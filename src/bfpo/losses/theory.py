"""The policy that BFPO converges to on one prompt with K answers, exactly and without training.

Two policies are compared. The first is the optimum of the paper's RL objective, with the bilinear reward
(safe + a1)·(win rate + a2) and a KL penalty; it has a closed form. The second minimizes the supervised loss over all
tabular policies. docs/method.md derives when they are equal, and their difference otherwise. Constraints on the cost
are in `bfpo.losses.constrained`.

Every population loss here is a weighted least-squares problem in the log-ratios u(y) = log π(y)/π_ref(y). A constant
added to u changes neither the loss nor, after normalization, the policy.
"""

from dataclasses import dataclass, fields, replace
from typing import Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from bfpo.errors import RecipeError
from bfpo.losses.combiners import bilinear
from bfpo.losses.label_errors import LabelErrors
from bfpo.losses.labeling import LabelingFunction

Array: TypeAlias = NDArray[np.float64]
PreferenceKind = Literal["bradley_terry", "unstructured"]

# Rounding error that is allowed in given probabilities.
_TOLERANCE = 1e-9


@dataclass(frozen=True, slots=True, eq=False)
class TabularProblem:
    """One prompt with K answers and their probabilities. Arrays are copied and made read-only.

    Args:
        reference: π_ref, probability of each answer, (K,); above 0, sums to 1.
        data_policy: μ, probability of drawing each answer for a comparison, (K,); above 0, sums to 1.
        preferences: p_h, probability in [0, 1] that answer i is more helpful than answer j, (K, K); p[i, j] +
            p[j, i] = 1, hence 1/2 on the diagonal.
        safe: 0 or 1, or the probability in [0, 1] that an answer is labeled safe, (K,).

    Raises:
        RecipeError: If a shape is wrong, a number isn't finite, or a probability is out of its range.
    """

    reference: Array
    data_policy: Array
    preferences: Array
    safe: Array

    def __post_init__(self) -> None:
        for field in fields(self):
            value = np.array(getattr(self, field.name), dtype=np.float64)
            value.flags.writeable = False
            object.__setattr__(self, field.name, value)
        if self.reference.ndim != 1 or self.reference.size < 2:
            raise RecipeError(f"problem: reference has shape {self.reference.shape}; expected (K,) with K at least 2")
        size = self.reference.size
        for name, shape in (("data_policy", (size,)), ("preferences", (size, size)), ("safe", (size,))):
            if getattr(self, name).shape != shape:
                raise RecipeError(f"problem: {name} has shape {getattr(self, name).shape}; expected {shape}")
        for field in fields(self):
            value = getattr(self, field.name)
            if not np.all((value >= 0) & (value <= 1)):  # false for NaN too
                raise RecipeError(f"problem: {field.name} is {value.tolist()}; expected probabilities from 0 to 1")
        for name in ("reference", "data_policy"):
            value = getattr(self, name)
            if not np.all(value > 0):
                raise RecipeError(f"problem: {name} is {value.tolist()}; leave out answers of probability 0")
            if abs(value.sum() - 1) > _TOLERANCE:
                raise RecipeError(f"problem: {name} sums to {value.sum():.12g}; expected 1")
        excess = np.abs(self.preferences + self.preferences.T - 1)
        if excess.max() > _TOLERANCE:
            i, j = np.unravel_index(excess.argmax(), excess.shape)
            raise RecipeError(
                f"problem: preferences[{i}, {j}] is {self.preferences[i, j]:.12g} and preferences[{j}, {i}] is "
                f"{self.preferences[j, i]:.12g}; expected a sum of 1"
            )

    @property
    def win_rates(self) -> Array:
        """p_h(y) = E_{y'~μ} p_h(y > y'), the probability of being more helpful than a random answer, (K,)."""
        return self.preferences @ self.data_policy

    @property
    def expected_safety(self) -> float:
        """E_s, the probability in [0, 1] that a random answer of the data policy is safe."""
        return float(self.data_policy @ self.safe)


def bilinear_reward(problem: TabularProblem, *, a1: float | None = None, a2: float = 0.5) -> Array:
    """Return (safe + a1)·(win rate + a2) for each answer, (K,).

    Args:
        problem: Prompt and answers.
        a1: Offset of safety; default E_s.
        a2: Offset of the win rate; corresponds to 1/(b1-1) of the labeling function.

    Source:
        Paper, RL objective (a1 = E_s, a2 = 1/2).
    """
    offset = problem.expected_safety if a1 is None else a1
    return bilinear(problem.safe, problem.win_rates, a1=offset, a2=a2)


def rl_objective(problem: TabularProblem, policy: Array, *, reward: Array, beta: float) -> float:
    """Return J(π) = E_{y~π} reward(y) - beta·KL(π ‖ π_ref) for policy and reward of shape (K,) and beta above 0."""
    policy = _vector(problem, policy, "policy")
    support = policy > 0  # 0·log 0 is 0
    divergence = float(policy[support] @ np.log(policy[support] / problem.reference[support]))
    return float(policy @ _vector(problem, reward, "reward")) - _positive(beta) * divergence


def rl_optimum(problem: TabularProblem, reward: Array, *, beta: float) -> Array:
    """Return the policy that maximizes `rl_objective`: π ∝ π_ref·exp(reward / beta), (K,)."""
    return _tilt(problem, _vector(problem, reward, "reward") / _positive(beta))


def supervised_minimizer(problem: TabularProblem, labeling: LabelingFunction, *, beta: float) -> Array:
    """Return the tabular policy that minimizes the BFPO loss, (K,).

    This is the training loss in the limit of infinite data: two answers are drawn independently from μ, p_h decides
    which one is more helpful and becomes `chosen`, and the pair contributes `(h - label / beta)²`. If the safety
    labels are probabilities, they are drawn independently for both answers. Only the mean of the label matters, which
    is the value of the bilinear labeling function at the two probabilities.

    Args:
        problem: Prompt and answers.
        labeling: Labeling function; IPO if all four cells are 1/2.
        beta: The paper's tau; above 0.
    """
    label = labeling(problem.safe[:, None], problem.safe[None, :])
    return _tilt(problem, _average_target(problem, label / _positive(beta)))


def judged_problem(problem: TabularProblem, errors: LabelErrors) -> TabularProblem:
    """Return the problem with the labels of a judge that errs, independently on the two answers of a pair.

    Its minimizer for `labeling.corrected(errors)` is that of the problem itself for `labeling`.
    """
    return replace(problem, safe=1 - errors.specificity + errors.youden * problem.safe)


def supervised_reward(problem: TabularProblem, labeling: LabelingFunction) -> Array:
    """Return beta·u of the policy that minimizes the BFPO loss, the reward that it maximizes up to a constant, (K,).

    This is E_{y'~μ}[p_h(y > y')·label(y, y') - p_h(y' > y)·label(y', y)], for any correlation of safety and winning.
    """
    label = labeling(problem.safe[:, None], problem.safe[None, :])
    return _average_target(problem, label)


def constrained_minimizer(
    problem: TabularProblem, labeling: LabelingFunction, *, safety_weight: float, beta: float
) -> Array:
    """Return π_BFPO·exp(safety_weight·safe / beta) / Z, the minimizer of constrained BFPO, (K,).

    It minimizes the BFPO loss whose label is increased by safety_weight·(s_chosen - s_rejected), for any correlation
    of safety and winning. The probability of an unsafe answer falls as the weight grows. A weight is the multiplier λ
    of a constraint on P(unsafe): exp(λ·safe / beta) differs from exp(-λ·unsafe / beta) by a constant only.

    Args:
        problem: Prompt and answers.
        labeling: Labeling function without the weight.
        safety_weight: λ, at least 0.
        beta: The paper's tau; above 0.
    """
    reward = supervised_reward(problem, labeling) + safety_weight * problem.safe
    return rl_optimum(problem, reward, beta=beta)


def soft_minimizer(problem: TabularProblem, reward: Array, *, beta: float) -> Array:
    """Return the tabular policy that minimizes the `bfpo_soft` loss, (K,).

    Pairs are drawn as for `supervised_minimizer`; the margin is regressed onto the difference of rewards over beta.
    """
    reward = _vector(problem, reward, "reward")
    return _tilt(problem, _average_target(problem, (reward[:, None] - reward[None, :]) / _positive(beta)))


def covariance_gap(problem: TabularProblem) -> Array:
    """Return Cov_{y'~μ}(p_h(y > y'), safe(y')) for each answer y, (K,).

    Up to a constant, this is beta times the log-ratio of the supervised minimizer minus the bilinear reward. The two
    policies are therefore equal if it doesn't depend on y.
    """
    both = problem.preferences @ (problem.data_policy * problem.safe)
    return both - problem.expected_safety * problem.win_rates


def bradley_terry(scores: Array) -> Array:
    """Return preferences p[i, j] = σ(scores[i] - scores[j]), (K, K), from log-strengths (K,)."""
    scores = np.asarray(scores, dtype=np.float64)
    return 0.5 * (1 + np.tanh(0.5 * (scores[:, None] - scores[None, :])))


def random_problem(
    rng: np.random.Generator, answers: int = 6, *, kind: PreferenceKind = "bradley_terry"
) -> TabularProblem:
    """Return a random problem in which safety and winning may be correlated in any way; labels are 0 or 1.

    Args:
        rng: Random generator.
        answers: Number of answers, K; at least 2.
        kind: Whether preferences come from a score per answer, or are drawn independently for each pair of answers.
    """
    return TabularProblem(
        reference=_probabilities(rng, answers),
        data_policy=_probabilities(rng, answers),
        preferences=_preferences(rng, answers, kind),
        safe=rng.integers(0, 2, answers).astype(np.float64),
    )


def random_factorized_problem(
    rng: np.random.Generator, levels: int = 4, *, kind: PreferenceKind = "bradley_terry"
) -> TabularProblem:
    """Return a random problem in which safety and helpfulness are independent under μ, so that `covariance_gap` is 0.

    Each level of helpfulness has a safe and an unsafe answer, and the share of safe answers under μ is the same at
    all levels. The reference policy is arbitrary.

    Args:
        rng: Random generator.
        levels: Number of levels, K / 2.
        kind: As in `random_problem`, for levels.
    """
    return TabularProblem(
        reference=_probabilities(rng, 2 * levels),
        data_policy=np.outer(_probabilities(rng, 2), _probabilities(rng, levels)).ravel(),
        preferences=np.tile(_preferences(rng, levels, kind), (2, 2)),
        safe=np.repeat([1.0, 0.0], levels),
    )


def _average_target(problem: TabularProblem, target: Array) -> Array:
    """Return the u with μ·u = 0 that minimizes Σ_ij μ_i·μ_j·p_ij·(u_i - u_j - target_ij)²; i beats j."""
    weight = np.outer(problem.data_policy, problem.data_policy) * problem.preferences
    pull = weight * target
    right: Array = pull.sum(axis=1) - pull.sum(axis=0)
    # With p_ij + p_ji = 1 the normal matrix is diag(μ) - μμᵀ, which is singular along constants. Fixing the constant
    # by μ·u = 0 adds μμᵀ, which leaves diag(μ)·u = right.
    return right / problem.data_policy


def _tilt(problem: TabularProblem, log_ratio: Array) -> Array:
    """Return π ∝ π_ref·exp(log_ratio)."""
    logits = np.log(problem.reference) + log_ratio
    unnormalized = np.exp(logits - logits.max())
    policy: Array = unnormalized / unnormalized.sum()
    return policy


def _vector(problem: TabularProblem, values: Array, name: str) -> Array:
    vector = np.asarray(values, dtype=np.float64)
    if vector.shape != problem.reference.shape:
        raise RecipeError(f"{name} has shape {vector.shape}; expected {problem.reference.shape}, one per answer")
    return vector


def _positive(beta: float) -> float:
    if not 0 < beta < np.inf:
        raise RecipeError(f"beta is {beta}; expected a finite number above 0")
    return beta


def _probabilities(rng: np.random.Generator, size: int) -> Array:
    # The floor keeps answers from being so rare that rounding decides their log-ratios.
    draw: Array = (rng.dirichlet(np.ones(size)) + 0.05) / (1 + 0.05 * size)
    return draw


def _preferences(rng: np.random.Generator, size: int, kind: PreferenceKind) -> Array:
    if kind == "bradley_terry":
        return bradley_terry(rng.normal(0, 1.5, size))
    if kind == "unstructured":
        upper = np.triu(rng.random((size, size)), 1)
        return upper + np.tril(1 - upper.T, -1) + 0.5 * np.eye(size)
    raise RecipeError(f"kind is {kind!r}; expected one of {get_args(PreferenceKind)}")
