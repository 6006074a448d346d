"""How many pairs of each cell the methods of a comparison see, and which of them two methods order differently."""

from collections.abc import Mapping
from typing import Any

import torch

from bfpo.core.pairs import CELLS, Cell, SafetyLabels
from bfpo.losses.build import make_loss
from bfpo.losses.inputs import PairLogps


def preferred(changes: Mapping[str, Any]) -> dict[Cell, bool | None]:
    """Return, by cell, whether a method prefers the more helpful answer where the policy is the reference.

    Args:
        changes: Its `changes` in the protocol: the loss, and whether pairs are ordered by safety before.

    Returns:
        None for a cell that it drops.
    """
    loss = make_loss(changes["loss"])
    orders: dict[Cell, bool | None] = {}
    for cell in CELLS:
        is_swapped = "labels" in changes and cell == "us"
        labels = [bit == "s" for bit in (reversed(cell) if is_swapped else cell)]
        if not loss.keeps(SafetyLabels(*labels)):
            orders[cell] = None
            continue
        chosen, zero = torch.zeros(1, dtype=torch.float64, requires_grad=True), torch.zeros(1, dtype=torch.float64)
        safe = [torch.tensor([float(label)], dtype=torch.float64) for label in labels]
        loss(PairLogps(chosen, zero, zero, zero, *safe)).sum().backward()
        assert chosen.grad is not None
        orders[cell] = bool(chosen.grad < 0) != is_swapped
    return orders


def compare_orders(counts: Mapping[int, Mapping[Cell, int]], methods: Mapping[str, Any]) -> dict[str, Any]:
    """Return the counts by seed and cell, and how many pairs two methods order differently in each seed.

    Args:
        counts: Pairs of the main stream by seed and cell, before any method orders them.
        methods: The protocol's methods.
    """
    orders = {name: preferred(method["changes"]) for name, method in methods.items()}
    seeds = sorted(counts)

    def differing(first: str, second: str) -> list[int]:
        cells = [cell for cell in CELLS if {orders[first][cell], orders[second][cell]} == {True, False}]
        return [sum(counts[seed][cell] for cell in cells) for seed in seeds]

    return {
        "counts": {str(seed): dict(counts[seed]) for seed in seeds},
        "prefers_more_helpful": orders,
        "ordered_differently": {first: {second: differing(first, second) for second in methods} for first in methods},
    }
