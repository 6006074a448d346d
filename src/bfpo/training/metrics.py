"""Metrics as sums and counts, so that means over packs, micro-batches, steps and processes are exact."""

from collections.abc import Mapping, Sequence

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from bfpo.core.pairs import CELLS
from bfpo.errors import TrainingError
from bfpo.losses.inputs import PairLogps
from bfpo.losses.pairwise import PairLoss


class MetricSums:
    """Running sums and counts by name, kept on the device until the means are read."""

    def __init__(self) -> None:
        self._totals: dict[str, Tensor] = {}

    def add(self, values: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Add the values of a batch.

        Args:
            values: Name → values (n,) and their weights (n,), bool or float. Values with weight 0 are ignored.
        """
        for name, (value, weight) in values.items():
            value = torch.where(weight > 0, value.detach().to(torch.float64), 0.0)
            weight = weight.to(torch.float64)
            total = torch.stack([(value * weight).sum(), weight.sum()])
            self._totals[name] = self._totals[name] + total if name in self._totals else total

    def means(self, accelerator: Accelerator) -> dict[str, float | None]:
        """Return the mean of each metric over all processes, and reset the sums.

        Every process must have added the same names. A metric whose weights are all 0 is None.
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


class FiniteLossCheck:
    """Check for losses that aren't finite, once per micro-batch, because every check waits for the device."""

    def __init__(self) -> None:
        self._row_ids: list[str] = []
        self._losses: list[Tensor] = []

    def add(self, row_ids: Sequence[str], losses: Tensor) -> None:
        """Add losses, (n,), with the row ids of their examples."""
        self._row_ids += row_ids
        self._losses.append(losses.detach())

    def check(self, accelerator: Accelerator, stage: str) -> None:
        """Check the losses added since the last check. Every process must call this equally often.

        Args:
            accelerator: Accelerator of the run.
            stage: Stage of the run, for the message.

        Raises:
            TrainingError: On every process, if a loss of any process isn't finite.
        """
        is_bad = ~torch.isfinite(torch.cat(self._losses))
        row_ids, self._row_ids, self._losses = self._row_ids, [], []
        if accelerator.reduce(is_bad.any().to(torch.float32), reduction="sum") > 0:
            bad_rows = gather_object([row_id for row_id, bad in zip(row_ids, is_bad.tolist(), strict=True) if bad])
            raise TrainingError(
                f"{stage}: the loss is not finite for rows {', '.join(bad_rows)}; lower the learning rate, or check "
                "these rows"
            )


def pair_metrics(
    pairs: PairLogps, losses: Tensor, loss: PairLoss, *, cells: Tensor, counted: Tensor
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the metrics of a batch of pairs, with TRL's names for the metrics that TRL has.

    Args:
        pairs: Log-probabilities and labels of n pairs.
        losses: Loss of each pair, (n,).
        loss: Loss function, for targets and directions.
        cells: Cell of each pair as an index into `CELLS`, (n,).
        counted: Whether a pair counts, bool (n,).

    Returns:
        Name → values (n,) and whether they count (n,); the same names for every batch.
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
        in_cell = counted & (cells == index)
        metrics[f"bfpo/fraction/{cell}"] = (in_cell.to(margin), counted)
        metrics[f"bfpo/margin/{cell}"] = (margin, in_cell)
        metrics[f"bfpo/sign_agreement/{cell}"] = (agrees, in_cell & (direction != 0))
        if target is not None:
            metrics[f"bfpo/target_gap/{cell}"] = (margin - target, in_cell)
    return metrics
