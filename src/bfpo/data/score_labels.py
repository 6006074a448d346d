"""Preferences that follow from the scores of a pair's answers, in place of the order of the data."""

from collections.abc import Sequence
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


def require_scores(pairs: Sequence[PreferencePair], dual: Dual) -> None:
    """Check that all pairs have a reward and a cost for both answers, by the scorers of the multiplier's samples.

    Raises:
        DataError: If a pair lacks one, with its data set and row; or if scores are of different scorers.
    """
    for pair in pairs:
        missing = [name for name in SCORES if getattr(pair.signals, name) is None]
        if missing:
            raise DataError(
                f"{pair.provenance.dataset_name}: row {pair.row_id} has no {' and '.join(missing)}; labels from "
                f"scores need {', '.join(SCORES)} for every pair of both streams: score the answers, or leave the "
                "source out"
            )
    _require_one_scorer("reward", {pair.provenance.reward_scorer or "" for pair in pairs}, dual.reward_scorer)
    _require_one_scorer("cost", {pair.provenance.cost_scorer or "" for pair in pairs}, dual.cost_scorer)


def _require_one_scorer(column: str, scorers: set[str], of_samples: str) -> None:
    if len(scorers) > 1:
        raise DataError(
            f"column '{column}_scorer' has {len(scorers)} values ({', '.join(sorted(map(repr, scorers))[:3])}); "
            "scores of different scorers can't be compared: score all pairs with one judge"
        )
    (scorer,) = scorers
    # Scores from elsewhere need not name their scorer.
    if scorer and of_samples and scorer != of_samples:
        raise DataError(
            f"the {column}s of the pairs are by {scorer}, those of the samples of the multiplier by {of_samples}; "
            "score both with one judge (bfpo score apply), and run `bfpo dual` again"
        )


def score_margins(pairs: Sequence[PreferencePair], dual: Dual) -> NDArray[np.float64]:
    """Return by how much the score of chosen exceeds that of rejected, (N,).

    The score is reward - λ·cost, with the multiplier, the measure and the scale of the rewards of a constraint.
    """
    values = np.fromiter((getattr(pair.signals, name) for pair in pairs for name in SCORES), dtype=np.float64)
    scores = values.reshape(-1, 2, 2)
    return margins_of(scores[:, 0], scores[:, 1], dual)


def margins_of(rewards: NDArray[np.float64], costs: NDArray[np.float64], dual: Dual) -> NDArray[np.float64]:
    """Return the margins of `score_margins`, (N,), from rewards and costs of chosen and rejected, (N, 2)."""
    scores = dual.combined_score(rewards, costs)
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
