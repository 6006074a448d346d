"""Metrics as sums and counts, so that means over micro-batches, steps and ranks are exact."""

from collections.abc import Mapping

import torch
from accelerate import Accelerator
from torch import Tensor

from bfpo.losses import PairLogps, PairLoss
from bfpo.pairs import CELLS


class MetricSums:
    """Running sums and counts by name; kept on the device, read only when asked."""

    def __init__(self) -> None:
        self._totals: dict[str, Tensor] = {}

    def add(self, values: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Add a batch.

        Args:
            values: Name → values (n,) and which of them count (n,), bool or weights.
        """
        for name, (value, counts) in values.items():
            weight = counts.to(torch.float64)
            value = torch.where(counts > 0, value.detach().to(torch.float64), 0.0)
            total = torch.stack([(value * weight).sum(), weight.sum()])
            self._totals[name] = self._totals[name] + total if name in self._totals else total

    def means(self, accelerator: Accelerator) -> dict[str, float | None]:
        """Return the mean of each metric over all ranks, and start anew.

        Every rank must have added the same names. A metric that nothing counted for is None.
        """
        if not self._totals:
            return {}
        names = sorted(self._totals)
        totals = accelerator.reduce(torch.stack([self._totals[name] for name in names]), reduction="sum")
        self._totals = {}
        return {
            name: None if count == 0 else total / count
            for name, (total, count) in zip(names, totals.tolist(), strict=True)
        }


def pair_metrics(
    pairs: PairLogps, losses: Tensor, loss: PairLoss, *, cells: Tensor, counted: Tensor
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the metrics of a batch of pairs, named as in TRL where TRL has them.

    Args:
        pairs: Log-probabilities and labels of n pairs.
        losses: Loss of each pair, (n,).
        loss: Gives targets and directions.
        cells: Cell of each pair, as an index into `CELLS`, (n,).
        counted: Which pairs count, bool (n,).

    Returns:
        Name → (values, which count); the same names for every batch.
    """
    chosen = loss.beta * (pairs.chosen_logps - pairs.ref_chosen_logps)
    rejected = loss.beta * (pairs.rejected_logps - pairs.ref_rejected_logps)
    margin, target, direction = pairs.margin, loss.target(pairs), loss.direction(pairs)
    agrees = (margin.sign() == direction).to(margin)
    metrics = {
        "rewards/chosen": (chosen, counted),
        "rewards/rejected": (rejected, counted),
        "rewards/margins": (chosen - rejected, counted),
        "rewards/accuracies": ((margin > 0).to(margin), counted),
        "logps/chosen": (pairs.chosen_logps, counted),
        "logps/rejected": (pairs.rejected_logps, counted),
        "bfpo/sign_agreement": (agrees, counted & (direction != 0)),
    }
    if target is not None:
        metrics["bfpo/normalized_loss"] = (loss.beta**2 * losses, counted)
    for index, cell in enumerate(CELLS):
        here = counted & (cells == index)
        metrics[f"bfpo/fraction/{cell}"] = (here.to(margin), counted)
        metrics[f"bfpo/margin/{cell}"] = (margin, here)
        metrics[f"bfpo/sign_agreement/{cell}"] = (agrees, here & (direction != 0))
        if target is not None:
            metrics[f"bfpo/target_gap/{cell}"] = (margin - target, here)
    return metrics
