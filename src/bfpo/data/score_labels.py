"""Preferences that follow from the scores of a pair's answers, in place of the order of the data."""

from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from bfpo.core.files import content_hash
from bfpo.core.pairs import PreferencePair
from bfpo.errors import DataError
from bfpo.losses.dual import Dual

Draw = Literal["soft", "probability", "argmax"]
"""How preferences follow from scores. `soft`: as probabilities, by the loss. `probability`: each pair's order is
drawn once. `argmax`: the higher score is preferred."""

SCORES = ("chosen_reward", "rejected_reward", "chosen_cost", "rejected_cost")


def require_scores(pairs: Iterable[PreferencePair]) -> None:
    """Check that all pairs have a reward and a cost for both answers.

    Raises:
        DataError: If a pair lacks one; the message has its data set and row.
    """
    for pair in pairs:
        missing = [name for name in SCORES if getattr(pair.signals, name) is None]
        if missing:
            raise DataError(
                f"{pair.provenance.dataset_name}: row {pair.row_id} has no {' and '.join(missing)}; labels from "
                f"scores need {', '.join(SCORES)} for every pair of both streams: score the answers, or leave the "
                "source out"
            )


def score_margins(pairs: Sequence[PreferencePair], dual: Dual) -> NDArray[np.float64]:
    """Return by how much the score of chosen exceeds that of rejected, (N,).

    The score is reward - λ·cost, with the multiplier, the measure and the scale of the rewards of a constraint.
    """
    rewards, costs = (
        np.array([[getattr(pair.signals, f"{side}_{name}") for side in ("chosen", "rejected")] for pair in pairs])
        for name in ("reward", "cost")
    )
    scores = dual.combined_score(rewards.reshape(-1, 2), costs.reshape(-1, 2))
    margins: NDArray[np.float64] = scores[:, 0] - scores[:, 1]
    return margins


def is_reordered(pairs: Sequence[PreferencePair], dual: Dual, draw: Draw, *, seed: int) -> NDArray[np.bool_]:
    """Return which pairs have the other order by their scores, (N,).

    Args:
        pairs: Pairs with scores.
        dual: Constraint with a multiplier.
        draw: How preferences follow from scores.
        seed: Seed of `probability`. The draw of a pair depends on nothing else than the seed and the pair.
    """
    margins = score_margins(pairs, dual)
    if draw == "argmax":
        return margins < 0
    if draw == "probability":
        drawn = np.array([int(content_hash(seed, pair.row_id), 16) / 16**16 for pair in pairs])
        return drawn >= 0.5 * (1 + np.tanh(0.5 * margins))
    return np.zeros(len(pairs), dtype=bool)
