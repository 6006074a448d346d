"""The order of the pairs of a run, where a recipe takes it from scores or from safety."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from bfpo.config.recipes import SafeFirstSection, TrainRecipe
from bfpo.core.pairs import PreferencePair
from bfpo.core.terminal import say
from bfpo.data.clean import count_reasons
from bfpo.data.load import Reason
from bfpo.data.prepare import Pairs, PreparedData
from bfpo.data.safety_order import has_safer_rejected
from bfpo.data.score_labels import is_reordered, require_scores
from bfpo.data.stored_pairs import StoredPairs, chain_pairs
from bfpo.training.loss_files import ScoreLabels

ChooseSwapped: TypeAlias = Callable[[Sequence[PreferencePair]], NDArray[np.bool_]]


def relabel(recipe: TrainRecipe, prepared: PreparedData, labels: ScoreLabels | None) -> dict[str, Any]:
    """Reorder pairs as `labels` of a recipe asks for, in place, and count those that were.

    Args:
        recipe: Recipe of the run.
        prepared: Cleaned pairs.
        labels: Preferences from scores, if the recipe asks for them.

    Returns:
        What `data_manifest.json` says about it; nothing if the order of the data counts.

    Raises:
        DataError: If a pair lacks scores that are needed, or they are by other scorers than those of the samples.
    """
    if labels is not None:
        require_scores(chain_pairs([prepared.train, prepared.eval]), labels.dual)
        counts = _reorder(
            prepared,
            lambda pairs: is_reordered(pairs, labels.dual, labels.draw, seed=labels.seed),
            "reordered by its scores",
        )
        measure = labels.dual.constraint.measure
        name = f"labels from reward - {labels.metadata['lambda']:.6g}·{measure} ({labels.draw})"
        # Evaluations read here which judges are circular.
        metadata = labels.metadata | {"scorers": _scorers(chain_pairs([prepared.train, prepared.eval]))}
    elif isinstance(section := recipe.labels, SafeFirstSection):
        counts = _reorder(
            prepared, lambda pairs: has_safer_rejected(pairs, section.both_unsafe), "reordered by its safety"
        )
        name = f"labels from safety (both unsafe: {section.both_unsafe})"
        metadata = section.model_dump()
    else:
        return {}
    say(f"{name}: {counts['reordered']:,} of {counts['pairs']:,} pairs were reordered")
    return {"labels": metadata | counts}


def _scorers(pairs: Sequence[PreferencePair]) -> list[str]:
    """Return who gave the scores of pairs: one judge of rewards, and one of costs, as `require_scores` checked."""
    provenance = pairs[0].provenance
    return sorted({name for name in (provenance.reward_scorer, provenance.cost_scorer) if name})


def _reorder(prepared: PreparedData, choose_swapped: ChooseSwapped, reason: str) -> dict[str, int]:
    num_pairs = num_reordered = 0

    def reordered(pairs: Pairs, counts: Counter[Reason]) -> Pairs:
        nonlocal num_pairs, num_reordered
        swapped = choose_swapped(pairs)
        num_pairs, num_reordered = num_pairs + len(pairs), num_reordered + int(swapped.sum())
        if isinstance(pairs, StoredPairs):
            count_reasons(counts, (reason,), swapped, pairs.cells)
            return pairs.exchange(swapped)
        counts.update(Reason(reason, pairs[row].cell) for row in swapped.nonzero()[0])
        return [pair.swapped() if is_swapped else pair for pair, is_swapped in zip(pairs, swapped, strict=True)]

    for part in prepared.parts:
        part.train, part.eval = (reordered(pairs, part.report.noted) for pairs in (part.train, part.eval))
    return {"pairs": num_pairs, "reordered": num_reordered}
