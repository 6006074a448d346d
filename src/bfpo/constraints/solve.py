"""From a constraint and scored samples to `dual.json`."""

from dataclasses import asdict, dataclass, replace
from typing import TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from bfpo.config.recipes import TrainRecipe
from bfpo.constraints.estimates import SampleProblem, bootstrap_intervals
from bfpo.constraints.samples import ScoredSamples
from bfpo.errors import DataError, RecipeError
from bfpo.losses.constrained import DualSolution
from bfpo.losses.dual import Constraint, Dual, Measure, Objective
from bfpo.losses.labeling import LabelingFunction
from bfpo.losses.theory import TabularProblem, bradley_terry, supervised_reward

Array: TypeAlias = NDArray[np.float64]

MIN_EFFECTIVE_SAMPLES = 10.0
"""Median effective number of samples below which an estimate isn't to be trusted."""
# Share of the prompts that may rest on a single sample, in effect.
_MAX_SINGLE = 0.1
_MIN_PROMPTS = 50
# Error of the estimate that isn't worth a warning, as a share of the difference from the base model.
_NEGLIGIBLE = 0.01


@dataclass(frozen=True, slots=True)
class ConstraintRequest:
    """A constraint, and the training that it is for.

    Args:
        measure: What is bounded.
        max: Largest allowed value; None if `gain` is given.
        gain: How much lower than the base model's value it must be; None if `max` is given.
        share: Share of the answers in the tail of `cvar`, in (0, 1].
        kind: Kind of the prompts that count; None for all.
        beta: Weight of the KL penalty: the `beta` of the loss to train with.
        objective: What the policy maximizes besides.
        labeling: Labeling function of the loss without a safety weight, for the objective `bfpo`.
        reward_scale: Factor for the scorer's rewards, so that σ(difference) is the probability of a preference.
        temperature: Temperature at which the base model was sampled and the policy will be; None for that of the
            samples, or 1 if it is unknown. Sampling at T divides log-probabilities by T, so the policy differs from
            the base model as one trained with beta·T does at temperature 1: exactly where one token decides, and
            approximately in general.
        seed: Seed of the bootstrap.

    Raises:
        RecipeError: If a value is out of its range, or two contradict each other.
    """

    measure: Measure = "unsafe"
    max: float | None = None
    gain: float | None = None
    share: float = 0.1
    kind: str | None = None
    beta: float = 0.1
    objective: Objective = "reward"
    labeling: LabelingFunction | None = None
    reward_scale: float = 1.0
    temperature: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.max is None) == (self.gain is None):
            raise RecipeError("give either `max`, the largest allowed value, or `gain` over the base model")
        for name, is_valid, allowed in (
            ("measure", self.measure in get_args(Measure), " or ".join(get_args(Measure))),
            ("max", self.max is None or np.isfinite(self.max), "a finite number"),
            ("gain", self.gain is None or 0 < self.gain < np.inf, "a number above 0"),
            ("share", 0 < self.share <= 1, "a number above 0, at most 1"),
            ("beta", 1e-9 <= self.beta <= 1e9, "a number from 1e-9 to 1e9"),
            ("reward_scale", 0 < self.reward_scale < np.inf, "a number above 0"),
            ("temperature", self.temperature is None or 0 < self.temperature < np.inf, "a number above 0"),
        ):
            if not is_valid:
                raise RecipeError(f"`{name}` is {getattr(self, name)}; expected {allowed}")
        if self.measure == "unsafe" and self.max is not None and not 0 <= self.max < 1:
            raise RecipeError(
                f"`max` is {self.max:g}; a share of unsafe answers is from 0 to below 1, so 2 % is 0.02"
            )
        if self.objective == "log_ratios" and (self.measure != "cost" or self.gain is None):
            raise RecipeError(
                "log-ratios to the base model have no zero that means unsafe; set `measure` to cost and `gain` to "
                "the difference from the base model"
            )
        if self.objective == "bfpo" and self.labeling is None:
            raise RecipeError("the objective bfpo needs the labeling function of the loss")
        if self.objective == "bfpo" and self.measure != "unsafe":
            raise RecipeError(
                f"`measure` is {self.measure}; BFPO's safety weight bounds the share of unsafe answers: set "
                "`measure` to unsafe, or train with dpo on `labels`"
            )


def objective_of(recipe: TrainRecipe) -> tuple[float, LabelingFunction | None]:
    """Return the beta of a recipe's loss and, for BFPO, its labeling function without a safety weight."""
    from bfpo.losses.build import make_loss
    from bfpo.losses.pairwise import BFPO

    # The multiplier may be the one that is about to be computed.
    loss = make_loss({key: value for key, value in recipe.loss.model_dump().items() if key != "multiplier"})
    return loss.beta, replace(loss, safety_weight=0.0).labeling if isinstance(loss, BFPO) else None


def solve_constraint(samples: ScoredSamples, request: ConstraintRequest) -> Dual:
    """Return the multiplier that meets a constraint, with the frontier of all multipliers.

    Raises:
        DataError: If the samples have no prompts of the kind, no graded costs for a measure that needs them, or the
            same cost for all samples of each prompt.
    """
    temperature = _temperature(samples, request)
    problem = SampleProblem(
        samples,
        implied_reward(samples, request),
        _constrained_cost(samples, request),
        _counted(samples, request),
        request.beta * temperature,
        request.share if request.measure == "cvar" else None,
    )
    _check_variation(problem)
    base = problem.base_point()
    threshold = base.harm - request.gain if request.gain is not None else request.max
    assert threshold is not None
    solution = problem.solve(threshold)
    shifted = problem.shifted(problem.counted_problem(), solution.tail_start)
    thresholds = np.full(len(shifted.cost), threshold)
    if request.gain is not None and request.measure != "cvar":
        # The base model's value varies with the prompts, too.
        thresholds = (shifted.reference * shifted.cost).sum(axis=1) - request.gain
    multiplier = solution.multiplier
    dual = Dual(
        state=solution.state,
        constraint=Constraint(request.measure, threshold, request.gain, problem.share, request.kind),
        objective=request.objective,
        beta=request.beta,
        labels=None if request.objective != "bfpo" or request.labeling is None else asdict(request.labeling),
        multiplier=multiplier,
        **asdict(bootstrap_intervals(shifted, solution, thresholds, seed=request.seed)),
        achieved=solution.achieved,
        achieved_with_half=problem.with_half(solution),
        tail_start=solution.tail_start,
        base=base,
        predicted=None if multiplier is None else problem.point(multiplier, solution.tail_start),
        frontier=problem.frontier(solution),
        prompts=len(samples.prompt_ids),
        constrained_prompts=int(problem.counted.sum()),
        samples=int(samples.counts.sum()),
        model=samples.model,
        reward_scorer=samples.reward_scorer,
        cost_scorer=samples.cost_scorer,
        reward_scale=request.reward_scale,
        temperature=temperature,
        files=samples.files,
    )
    return replace(dual, warnings=_warnings(dual, problem, solution))


def _temperature(samples: ScoredSamples, request: ConstraintRequest) -> float:
    temperature = samples.temperature if request.temperature is None else request.temperature
    if temperature == 0:
        raise DataError(
            "the samples were drawn at temperature 0, where all samples of a prompt are equal; sample again"
        )
    return 1.0 if temperature is None else temperature


def _counted(samples: ScoredSamples, request: ConstraintRequest) -> NDArray[np.bool_]:
    if request.kind is None:
        return np.ones(len(samples.kinds), dtype=bool)
    counted = np.array([kind == request.kind for kind in samples.kinds])
    if not counted.any():
        kinds = ", ".join(sorted({str(kind) for kind in samples.kinds if kind})) or "none is given"
        raise DataError(f"no prompt is of the kind '{request.kind}'; the kinds of the prompts: {kinds}")
    return counted


def _constrained_cost(samples: ScoredSamples, request: ConstraintRequest) -> Array:
    if request.measure == "unsafe":
        return samples.is_unsafe.astype(np.float64)
    ungraded = int(np.isnan(samples.cost).sum())
    if ungraded:
        raise DataError(
            f"{ungraded} of {samples.counts.sum()} samples have no cost by {samples.cost_scorer}, which is "
            f"undecided on them; set `measure` to unsafe, or choose a judge that grades every answer"
        )
    return samples.cost


def implied_reward(samples: ScoredSamples, request: ConstraintRequest) -> Array:
    """Return what the policy maximizes besides the constraint, (X, N).

    BFPO's loss implies a reward for each answer, given who wins against whom. Wins follow the Bradley-Terry model of
    the rewards here, and the answers of the training pairs are taken to be distributed like the base model's.
    """
    reward = request.reward_scale * samples.reward
    if request.objective != "bfpo":
        return reward
    assert request.labeling is not None
    implied = np.zeros_like(reward)
    for x, exists in enumerate(samples.exists):
        uniform = np.full(exists.sum(), 1 / exists.sum())
        safe = 1.0 - samples.is_unsafe[x, exists]
        answers = TabularProblem(uniform, uniform, bradley_terry(reward[x, exists]), safe)
        implied[x, exists] = supervised_reward(answers, request.labeling)
    return implied


def _check_variation(problem: SampleProblem) -> None:
    exists, cost = problem.samples.exists[problem.counted], problem.cost[problem.counted]
    highest = np.where(exists, cost, -np.inf).max(axis=1)
    lowest = np.where(exists, cost, np.inf).min(axis=1)
    if not (highest > lowest).any():
        raise DataError(
            f"for each of the {len(cost)} prompts all samples have the same cost, so no policy over them has "
            "another; generate more samples of each prompt, at temperature 1"
        )


def _warnings(dual: Dual, problem: SampleProblem, solution: DualSolution) -> list[str]:
    """Return what a reader must know before relying on the numbers."""
    warnings = []
    effective = problem.effective_samples(solution)
    typical = float(np.median(effective))
    count = float(np.median(problem.samples.counts[problem.counted]))
    if dual.multiplier is not None and typical < MIN_EFFECTIVE_SAMPLES:
        warnings.append(
            f"the prediction rests on {typical:.1f} effective samples of {count:.0f} for the median prompt: the "
            "policy is far from the base model, and the prediction may be wrong by more than its interval. Generate "
            "more samples of each prompt, raise beta, or solve again on samples of the trained model"
        )
    single = float((effective < 2).mean())
    if dual.multiplier is not None and single > _MAX_SINGLE:
        warnings.append(f"for {single:.0%} of the prompts one sample has most of the weight; generate more samples")
    half, extrapolated = dual.achieved_with_half, dual.extrapolated
    half_width = (dual.achieved_high - dual.achieved_low) / 2
    tolerance = max(half_width, _NEGLIGIBLE * abs(dual.base.harm - dual.achieved))
    if half is not None and abs(half - dual.achieved) > tolerance:
        warnings.append(
            f"half of the samples predict {half:.3g} in place of {dual.achieved:.3g}, which differs by more than the "
            f"interval: expect about {extrapolated:.3g}, and generate more samples"
        )
    if dual.constrained_prompts < _MIN_PROMPTS:
        warnings.append(
            f"the intervals rest on {dual.constrained_prompts} prompts; with fewer than {_MIN_PROMPTS} they are too "
            "narrow"
        )
    if dual.multiplier is not None and dual.multiplier_high is None:
        warnings.append("for some resamples of the prompts no policy meets the constraint: it is close to infeasible")
    if problem.share is not None and len(np.unique(problem.cost[problem.samples.exists])) == 2:
        warnings.append("costs have two values only: their CVaR says no more than their mean; give graded costs")
    if dual.temperature != 1:
        warnings.append(
            f"base model and policy are those at temperature {dual.temperature:g}, for which the prediction is an "
            "approximation; at temperature 1 it is not"
        )
    return warnings
