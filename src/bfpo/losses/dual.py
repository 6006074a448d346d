"""`dual.json`: the multiplier of a constraint, and the frontier that was predicted for it.

`bfpo dual` writes the file. Training reads the multiplier from it, and the report draws the frontier.
"""

from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from bfpo.core.file_rows import FiniteFloat
from bfpo.core.files import write_json
from bfpo.core.typed_json import read_versioned
from bfpo.errors import DataError, RecipeError
from bfpo.losses.combiners import tail_cost
from bfpo.losses.constrained import DualState
from bfpo.losses.labeling import LabelingFunction

Array: TypeAlias = NDArray[np.float64]
Measure = Literal["unsafe", "cost", "cvar"]
"""`unsafe`: share of answers with a cost above 0. `cost`: mean cost. `cvar`: mean of the worst share of the costs."""
Objective = Literal["reward", "log_ratios", "bfpo"]
"""What the policy maximizes besides the constraint: the reward, beta times the log-ratio of a helpful model to the
base model, or the reward that BFPO's loss implies."""

FILE_NAME = "dual.json"
SCHEMA = 1
# Labels and betas of a recipe that are this close are the same number.
_SAME = 1e-9


@dataclass(frozen=True, slots=True)
class Constraint:
    """A constraint on the policy.

    Args:
        measure: What is bounded.
        threshold: Largest allowed value.
        gain: How much lower than the base model's value the threshold is, if it was given so; else None.
        share: Share of the answers in the tail of `cvar`; None for other measures.
        kind: Kind of the prompts that count; None for all.
    """

    measure: Measure
    threshold: FiniteFloat
    gain: FiniteFloat | None = None
    share: FiniteFloat | None = None
    kind: str | None = None


@dataclass(frozen=True, slots=True)
class FrontierPoint:
    """A policy π_λ as predicted from samples of the base model; the base model itself has no multiplier.

    Args:
        multiplier: λ; None for the base model.
        harm: Value of the constraint's measure.
        helpfulness: Mean reward over all prompts.
        unsafe: Share of unsafe answers, of the prompts that the constraint counts.
        cost: Mean cost, of the same prompts.
        kl: Mean KL(π_λ ‖ π_base) over all prompts, nats.
        effective_samples: Median over prompts of the effective number of samples, 1 / Σ weight².
    """

    multiplier: FiniteFloat | None
    harm: FiniteFloat
    helpfulness: FiniteFloat
    unsafe: FiniteFloat
    cost: FiniteFloat
    kl: FiniteFloat
    effective_samples: FiniteFloat


@dataclass(frozen=True, slots=True)
class Dual:
    """Content of `dual.json`.

    Args:
        state: Whether the constraint is active, slack or infeasible; see `DualSolution`.
        constraint: The constraint.
        objective: What the policy maximizes besides.
        beta: Weight of the KL penalty, the `beta` of the loss to train with.
        labels: The four labels of BFPO, for the objective `bfpo`; else None.
        multiplier: λ; None if the constraint is infeasible.
        multiplier_low: Lower bound of the 95 % bootstrap interval of λ over prompts; None without a λ.
        multiplier_high: Upper bound; None if some resamples of the prompts can't satisfy the constraint at all.
        achieved: Value of the measure that is predicted; the lowest reachable one if the constraint is infeasible.
        achieved_low: Lower bound of its 95 % bootstrap interval over prompts, for this λ.
        achieved_high: Upper bound.
        achieved_with_half: The same estimate from half of each prompt's samples; None if the constraint is
            infeasible.
        tail_start: Cost from which upwards the tail starts, for `cvar`; else None.
        base: The base model.
        predicted: The policy at λ; None if the constraint is infeasible.
        frontier: Predicted policies by rising multiplier.
        prompts: Number of prompts.
        constrained_prompts: Number of prompts that the constraint counts.
        samples: Number of samples of all prompts.
        model: The base model; "" if unknown.
        reward_scorer: Who gave the rewards; "" if unknown.
        cost_scorer: Who gave the costs; "" if unknown.
        reward_scale: Factor that the scorer's rewards were multiplied by.
        temperature: Temperature of the samples, at which the policy is predicted.
        files: SHA-256 of the files that were read, by path.
        warnings: What a reader must know before relying on the numbers.
        created: Time, ISO 8601.
        schema: Schema of the file.
    """

    state: DualState
    constraint: Constraint
    objective: Objective
    beta: FiniteFloat
    labels: dict[str, FiniteFloat] | None
    multiplier: FiniteFloat | None
    multiplier_low: FiniteFloat | None
    multiplier_high: FiniteFloat | None
    achieved: FiniteFloat
    achieved_low: FiniteFloat
    achieved_high: FiniteFloat
    achieved_with_half: FiniteFloat | None
    tail_start: FiniteFloat | None
    base: FrontierPoint
    predicted: FrontierPoint | None
    frontier: list[FrontierPoint]
    prompts: int
    constrained_prompts: int
    samples: int
    model: str = ""
    reward_scorer: str = ""
    cost_scorer: str = ""
    reward_scale: FiniteFloat = 1.0
    temperature: FiniteFloat = 1.0
    files: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    schema: int = SCHEMA

    @property
    def extrapolated(self) -> float | None:
        """Estimate for unlimited samples, whose error halves with twice the samples; None if infeasible."""
        if self.achieved_with_half is None:
            return None
        return 2 * self.achieved - self.achieved_with_half

    def write(self, folder: Path) -> Path:
        """Write `dual.json` into a folder and return its path."""
        path = folder / FILE_NAME
        write_json(path, asdict(self))
        return path

    def constrained_cost(self, cost: Array) -> Array:
        """Return the cost that the multiplier multiplies, by the measure of the constraint."""
        if self.constraint.measure == "unsafe":
            return (cost > 0).astype(np.float64)
        if self.constraint.measure == "cost":
            return cost
        assert self.tail_start is not None
        assert self.constraint.share is not None
        return tail_cost(cost, start=self.tail_start, share=self.constraint.share)

    def combined_score(self, reward: Array, cost: Array) -> Array:
        """Return reward - λ·constrained cost, the score whose optimal policy is π_λ.

        Args:
            reward: Rewards of answers by the scorer of the samples, of any shape.
            cost: Costs of the same answers.
        """
        assert self.multiplier is not None
        return self.reward_scale * reward - self.multiplier * self.constrained_cost(cost)


def dual_path(path: str | Path) -> Path:
    """Return the path of a `dual.json`, of which the folder may be given."""
    return Path(path) / FILE_NAME if Path(path).is_dir() else Path(path)


def read_dual(path: str | Path) -> Dual:
    """Read a `dual.json`, or the one in a folder.

    Raises:
        DataError: If the file is missing, malformed, or of another schema.
    """
    path = dual_path(path)
    try:
        dual = read_versioned(path, Dual, schema=SCHEMA, remedy="run `bfpo dual` again")
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}; `bfpo dual` writes this file") from None
    _check_consistent(dual, path)
    return dual


def _check_consistent(dual: Dual, path: Path) -> None:
    """Check what the types of the fields don't say."""
    if (dual.multiplier is None) != (dual.state == "infeasible"):
        raise DataError(f"{path}: state is {dual.state} and multiplier is {dual.multiplier}; run `bfpo dual` again")
    if dual.multiplier is not None and dual.multiplier < 0:
        raise DataError(f"{path}: multiplier is {dual.multiplier}; expected at least 0: run `bfpo dual` again")
    if not dual.beta > 0:
        raise DataError(f"{path}: beta is {dual.beta}; expected a number above 0: run `bfpo dual` again")
    is_tail = dual.constraint.measure == "cvar"
    has_tail = dual.constraint.share is not None and (dual.tail_start is not None or dual.multiplier is None)
    if is_tail and not has_tail:
        raise DataError(f"{path}: a constraint on cvar needs share and tail_start; run `bfpo dual` again")
    if dual.objective == "bfpo" and set(dual.labels or {}) != {cell.name for cell in fields(LabelingFunction)}:
        raise DataError(f"{path}: the objective bfpo needs four labels; run `bfpo dual` again")


def read_safety_weight(path: str | Path, *, labeling: LabelingFunction, beta: float) -> float:
    """Return the multiplier of a `dual.json` for BFPO's `safety_weight`.

    Args:
        path: `dual.json`, or its folder.
        labeling: Labeling function of the loss, without the weight.
        beta: Beta of the loss.

    Raises:
        DataError: If the file is missing or malformed.
        RecipeError: If its multiplier is not one for this loss.
    """
    dual = read_dual(path)
    where = f"loss.multiplier: {path}"
    multiplier = feasible_multiplier(dual, where)
    if dual.objective != "bfpo" or dual.constraint.measure != "unsafe":
        raise RecipeError(
            f"{where} bounds {dual.constraint.measure} for the objective {dual.objective}; BFPO's safety weight "
            "needs a bound on unsafe for its own objective: run `bfpo dual` with this recipe"
        )
    check_beta(dual, beta, where)
    labels = asdict(labeling)
    assert dual.labels is not None
    if any(abs(dual.labels[cell] - label) > _SAME for cell, label in labels.items()):
        raise RecipeError(
            f"{where} was computed for the labels {dual.labels}, and the loss has {labels}; run `bfpo dual` again "
            "with this recipe, or use the same b1, b2, alpha or table"
        )
    return multiplier


def feasible_multiplier(dual: Dual, where: str) -> float:
    """Return the multiplier.

    Raises:
        RecipeError: If the constraint was infeasible.
    """
    if dual.multiplier is None:
        raise RecipeError(
            f"{where}: no policy over the samples reaches {dual.constraint.threshold:g}, the lowest reachable value "
            f"is {dual.achieved:g}; run `bfpo dual` with a higher threshold or more samples"
        )
    return dual.multiplier


def check_beta(dual: Dual, beta: float, where: str) -> None:
    """Check that the loss has the beta that the multiplier was computed for.

    Raises:
        RecipeError: If it has another one.
    """
    if abs(dual.beta - beta) > _SAME * beta:
        raise RecipeError(
            f"{where} was computed for beta {dual.beta:g}, and loss.beta is {beta:g}; use the same beta, or run "
            "`bfpo dual` again"
        )
