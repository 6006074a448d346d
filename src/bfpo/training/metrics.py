"""Metrics as sums and counts, so that means over packs, micro-batches, steps and ranks are exact; and bad losses."""

from collections.abc import Mapping, Sequence

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from bfpo.core.pairs import CELLS
from bfpo.errors import TrainingError
from bfpo.losses.pairwise import PairLogps, PairLoss


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


class LossWatch:
    """Looks for losses that aren't finite, once for all packs of a micro-batch: each look waits for the device."""

    def __init__(self) -> None:
        self._row_ids: list[str] = []
        self._losses: list[Tensor] = []

    def add(self, row_ids: Sequence[str], losses: Tensor) -> None:
        """Remember losses, (n,), with the names of their examples."""
        self._row_ids += row_ids
        self._losses.append(losses.detach())

    def stop_unless_finite(self, accelerator: Accelerator, when: str) -> None:
        """Look at the losses since the last look. Every process must call this equally often.

        Args:
            accelerator: Of the run.
            when: For the message.

        Raises:
            TrainingError: On every process, if a loss of any process isn't finite.
        """
        bad = ~torch.isfinite(torch.cat(self._losses))
        row_ids, self._row_ids, self._losses = self._row_ids, [], []
        if accelerator.reduce(bad.any().to(torch.float32), reduction="sum") > 0:
            rows = gather_object([row_id for row_id, is_bad in zip(row_ids, bad.tolist(), strict=True) if is_bad])
            raise TrainingError(
                f"{when}: the loss is not finite for rows {', '.join(rows)}; lower the learning rate, or look at "
                "these rows"
            )


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
