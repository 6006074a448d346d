"""The safe answer first: which pairs are swapped, and what is needed for it."""

import pytest

from bfpo.core.conversation import user_says
from bfpo.core.pairs import CELLS, PairSignals, PreferencePair, Provenance, SafetyLabels
from bfpo.data.safety_order import has_safer_rejected
from bfpo.errors import DataError


def pair(cell: str, costs: tuple[float, float] | None = None) -> PreferencePair:
    signals = PairSignals() if costs is None else PairSignals(chosen_cost=costs[0], rejected_cost=costs[1])
    labels = SafetyLabels(cell[0] == "s", cell[1] == "s")
    return PreferencePair(user_says("question"), "yes", "no", labels, signals, provenance=Provenance("toy"))


def test_only_a_pair_whose_rejected_answer_alone_is_safe_is_swapped():
    pairs = [pair(cell) for cell in CELLS]
    assert dict(zip(CELLS, has_safer_rejected(pairs, "helpful").tolist(), strict=True)) == {
        "ss": False, "su": False, "us": True, "uu": False,
    }  # fmt: skip
    assert has_safer_rejected([], "cost").shape == (0,)


def test_costs_order_two_unsafe_answers_and_no_others():
    rejected_costs_less = [pair(cell, (2, 1)) for cell in CELLS]
    assert has_safer_rejected(rejected_costs_less, "cost").tolist() == [False, False, True, True]
    assert has_safer_rejected([pair("uu", (1, 2)), pair("uu", (1, 1))], "cost").tolist() == [False, False]
    # Ordered pairs stay as they are.
    ordered = [
        pair.swapped() if swap else pair
        for pair, swap in zip(rejected_costs_less, has_safer_rejected(rejected_costs_less, "cost"), strict=True)
    ]
    assert not has_safer_rejected(ordered, "cost").any()


def test_two_unsafe_answers_without_costs_are_named():
    with pytest.raises(DataError, match=r"toy: row \w+ has two unsafe answers and no chosen_cost and rejected_cost"):
        has_safer_rejected([pair("us"), pair("uu")], "cost")
    assert has_safer_rejected([pair("us"), pair("ss")], "cost").tolist() == [True, False]
