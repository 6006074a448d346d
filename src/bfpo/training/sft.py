"""Supervised fine-tuning on completions, with the same plan and machinery as preference training."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainingArguments

from bfpo.config.recipes import LayoutSection
from bfpo.data.table import TokenTable
from bfpo.model.lora import CausalLM
from bfpo.training.batches import Batch
from bfpo.training.metrics import MetricSums
from bfpo.training.stream_trainer import StreamTrainer
from bfpo.training.streams import StepRows, Weights


class SFTTrainer(StreamTrainer):
    """Trains on completions only: the step's loss is the mean negative log-probability of their tokens.

    Args:
        model: A causal language model; changed in place.
        args: Training arguments.
        train_dataset: Tokenized demonstrations, one completion each.
        eval_dataset: The same, to evaluate on.
        processing_class: Saved with checkpoints.
        train_only: Patterns of the parameters to train; None trains all.
        layout: How tokens are fed; None for packed rows.
        callbacks: As in transformers.
        optimizers: As in transformers.
    """

    def __init__(
        self,
        model: CausalLM,
        args: TrainingArguments,
        train_dataset: TokenTable,
        eval_dataset: TokenTable | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        *,
        train_only: list[str] | None = None,
        layout: LayoutSection | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ) -> None:
        super().__init__(
            model,
            args,
            train_dataset,
            {} if eval_dataset is None else {"": eval_dataset},
            main=np.arange(len(train_dataset)),
            buffer=np.arange(0),
            processing_class=processing_class,
            train_only=train_only,
            layout=layout,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self._scored = train_dataset.scored[:, 0]

    def row_weights(self, rows: StepRows) -> tuple[Weights, Weights]:
        """Return 1 / (scored tokens of the step) for every row: the mean is over tokens."""
        tokens = self._scored[rows.main].sum()
        return np.full(len(rows.main), 1 / tokens), np.zeros(0)

    def example_losses(self, model: nn.Module, batch: Batch, sums: MetricSums, *, training: bool) -> Tensor:
        """Return the negative log-probability of each completion, nats, (n,)."""
        losses: Tensor = -model(layout=batch.layout)
        lengths = torch.tensor(batch.layout.lengths, dtype=losses.dtype, device=losses.device)
        real = (batch.weights > 0).to(losses.dtype)
        name = "stream/main/loss" if training else "loss"
        sums.add({name: (losses / lengths, lengths * real)})
        return losses
