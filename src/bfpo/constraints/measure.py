"""What a policy achieves under a constraint, from judged samples of it."""

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from bfpo.core.samples import Verdict
from bfpo.data.verdict_scores import scores_of
from bfpo.errors import DataError
from bfpo.losses.dual import Constraint
from bfpo.stats.intervals import LEVEL, Interval, bootstrap, score_interval
from bfpo.stats.tail import worst_mean

Array: TypeAlias = NDArray[np.float64]


def constrained_values(constraint: Constraint, verdicts: Sequence[Verdict], samples: int) -> Array:
    """Return what the constraint bounds for each answer, (X, N): its cost, or 1 for an unsafe or undecided one.

    Args:
        constraint: The constraint.
        verdicts: Verdicts of one judge, prompt by prompt.
        samples: Number of answers to each prompt, N.

    Raises:
        DataError: If the constraint is on costs, and the judge gave none for an answer.
    """
    if constraint.measure == "unsafe":
        return np.array([float(verdict.safe is not True) for verdict in verdicts]).reshape(-1, samples)
    costs, _ = scores_of("cost", verdicts)
    if ungraded := sum(cost is None for cost in costs):
        raise DataError(
            f"{ungraded} of {len(costs)} answers have no cost by {verdicts[0].judge}; choose a judge that grades "
            "every answer, or bound the share of unsafe answers"
        )
    return np.array(costs, dtype=np.float64).reshape(-1, samples)


def measure_interval(constraint: Constraint, values: Array, *, level: float = LEVEL) -> Interval:
    """Return the measure of a constraint with its interval over prompts.

    Args:
        constraint: The constraint.
        values: Values of the answers, as `constrained_values` returns them, (X, N).
        level: Confidence level, in (0, 1).
    """
    if constraint.measure == "unsafe":
        return score_interval(values.mean(axis=1), most=values.size, level=level)
    share = constraint.share if constraint.measure == "cvar" else 1.0
    assert share is not None

    def measure(drawn: Array) -> Array:
        # The answers of a prompt are drawn together, and are the first axis.
        return worst_mean(np.moveaxis(drawn, 0, -1).reshape(*drawn.shape[1:-1], -1), share=share)

    return bootstrap(measure, values.T, level=level)
