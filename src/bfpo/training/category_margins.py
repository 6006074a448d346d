"""The margins of Cat-DPO: one for each harm category, adapted after every step."""

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from bfpo.errors import TrainingError
from bfpo.losses.baselines import CatDPO
from bfpo.losses.inputs import PairLogps


class CategoryMargins(TrainerCallback, ExportableState):
    """Margins of harm categories. A step has the margins that the steps before it left.

    They depend on the pairs of a step only, not on how it is split into micro-batches and processes. Checkpoints have
    them in `trainer_state.json`.

    Args:
        loss: Loss whose margins they are.
        names: Names of the K categories.
        accelerator: Accelerator of the trainer.
    """

    def __init__(self, loss: CatDPO, names: Sequence[str], accelerator: Accelerator) -> None:
        self._loss, self._names, self._accelerator = loss, tuple(names), accelerator
        self.margins = torch.zeros(len(names), dtype=torch.float64, device=accelerator.device)
        # Sums of violations, and numbers of pairs, of the current step.
        self._sums = torch.zeros(2, len(names), dtype=torch.float64, device=accelerator.device)

    def of(self, categories: Tensor) -> Tensor:
        """Return the margin of each pair, (n,): the mean over its categories, 0 without a category.

        Args:
            categories: 1 for each category of each pair, else 0, (n, K).
        """
        shares = categories / categories.sum(dim=1, keepdim=True).clamp(min=1)
        return shares.to(self.margins) @ self.margins

    def add(self, pairs: PairLogps, categories: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Count the violations of a batch for the next update, and return its metrics as values and weights, (n,).

        Args:
            pairs: Log-probabilities of the n pairs.
            categories: As in `of`.
        """
        violations = self._loss.violation(pairs).detach().to(self.margins)
        self._sums += torch.stack([violations @ categories, categories.sum(dim=0)])
        metrics = {}
        for index, name in enumerate(self._names):
            metrics[f"cat_dpo/margin/{name}"] = (self.margins[index].expand(len(violations)), categories[:, index])
            metrics[f"cat_dpo/violation/{name}"] = (violations, categories[:, index])
        return metrics

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return {"args": {}, "attributes": {"margins": dict(zip(self._names, self.margins.tolist(), strict=True))}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start at 0, or with the margins of the checkpoint that training resumes from."""
        self._sums.zero_()
        self.margins.zero_()
        if state.global_step == 0:
            return
        try:
            saved = state.stateful_callbacks[type(self).__name__]["attributes"]["margins"]  # type: ignore[index, call-overload]
            self.margins += torch.tensor([saved[name] for name in self._names], dtype=torch.float64).to(self.margins)
        except (KeyError, TypeError):
            raise TrainingError(
                "the checkpoint has no margins of these harm categories; delete it to resume from the previous one"
            ) from None

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Move the margin of each category of the step's pairs by rate·(mean violation - tolerance)."""
        violations, counts = self._accelerator.reduce(self._sums, reduction="sum")
        moved = self.margins + self._loss.rate * (violations / counts.clamp(min=1) - self._loss.tolerance)
        self.margins = torch.where(counts > 0, moved.clamp(min=0), self.margins)
        self._sums = torch.zeros_like(self._sums)
