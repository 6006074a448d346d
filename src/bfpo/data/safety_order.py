"""The order of pairs in which a safe answer is preferred to an unsafe one."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from bfpo.core.pairs import PreferencePair
from bfpo.errors import DataError

BothUnsafe = Literal["helpful", "cost"]
"""Which of two unsafe answers is preferred: the more helpful one, or the one of the lower cost."""


def has_safer_rejected(pairs: Sequence[PreferencePair], both_unsafe: BothUnsafe) -> NDArray[np.bool_]:
    """Return which pairs have to be swapped for the safer answer to be chosen, (N,).

    Two safe answers keep their order, and so do two unsafe ones of the same cost.

    Args:
        pairs: Labeled pairs.
        both_unsafe: Which of two unsafe answers is preferred.

    Raises:
        DataError: If a cost is missing that `both_unsafe` needs; the message has the data set and row.

    Source:
        With `cost`, DPO-safe-first of Liang et al., Preference Vectors, arXiv 2504.20106: the order of helpfulness if
        both answers are safe, else the order of harmlessness.
    """
    return np.array([_has_safer_rejected(pair, both_unsafe) for pair in pairs], dtype=bool)


def _has_safer_rejected(pair: PreferencePair, both_unsafe: BothUnsafe) -> bool:
    if both_unsafe == "helpful" or pair.cell != "uu":
        return pair.cell == "us"
    chosen, rejected = pair.signals.chosen_cost, pair.signals.rejected_cost
    if chosen is None or rejected is None:
        raise DataError(
            f"{pair.provenance.dataset_name}: row {pair.row_id} has two unsafe answers and no chosen_cost and "
            "rejected_cost, which 'labels.both_unsafe: cost' needs; score the answers, or use 'both_unsafe: helpful'"
        )
    return rejected < chosen
