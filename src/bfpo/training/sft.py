"""Supervised fine-tuning on completions, with the plan and machinery of preference training."""

from typing import Any

import numpy as np
import torch
from peft import PeftConfig
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainingArguments

from bfpo.config.recipes import LayoutSection, TextSection
from bfpo.data.table import TokenTable
from bfpo.model.lora import add_adapter
from bfpo.training.batches import Batch
from bfpo.training.encode import Demonstrations, as_demonstrations, encode_demonstrations, named_datasets
from bfpo.training.inputs import ModelOrPath, resolve_inputs
from bfpo.training.metrics import MetricSums
from bfpo.training.stream_trainer import StreamTrainer
from bfpo.training.streams import StepRows, Weights


class SFTTrainer(StreamTrainer):
    """Trainer for completions: the loss of a step is the mean negative log-probability of their tokens.

    Args:
        model: Folder or hub id of a model or adapter, loaded in float32; or a causal language model, changed in
            place.
        args: Training arguments. By default those of transformers, with the output folder `{model name}-SFT`,
            `learning_rate=2e-5`, `logging_steps=10` and `report_to="none"`.
        train_dataset: Demonstrations: a `datasets.Dataset` or a list of rows with the columns `prompt` and
            `completion`, or `messages`; or a list of `Demonstration`; or a `TokenTable` with one completion each.
        eval_dataset: Demonstrations to evaluate on, in the same formats, or several such data sets by name.
        processing_class: Tokenizer, saved with checkpoints; by default the model's own.
        peft_config: peft's configuration of a new adapter to train. If the model already has an adapter, that one is
            trained further.
        train_only: Patterns of the parameters to train; None trains all.
        layout: How tokens are fed; None for packed rows. A model that can't be fed packed rows gets padded ones.
        router_aux_loss_coef: Weight of the load-balancing loss of a mixture of experts, as in TRL; None for the
            model's own.
        text: Maximum length, truncation and chat template for demonstrations.
        callbacks: Callbacks of transformers.
        optimizers: Optimizer and scheduler, as in transformers.

    Raises:
        DataError: If demonstrations are malformed or don't fit.
        ModelError: If the model or its tokenizer can't be loaded.
        TypeError: If an argument has the wrong type.

    Examples:
        >>> trainer = SFTTrainer(model="org/model", train_dataset=rows)  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP
    """

    def __init__(
        self,
        model: ModelOrPath,
        args: TrainingArguments | None = None,
        train_dataset: Demonstrations | TokenTable | None = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        *,
        peft_config: PeftConfig | None = None,
        train_only: list[str] | None = None,
        layout: LayoutSection | None = None,
        router_aux_loss_coef: float | None = None,
        text: TextSection | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ) -> None:
        if train_dataset is None:
            raise TypeError("SFTTrainer needs a train_dataset")
        eval_datasets = named_datasets(eval_dataset)
        model, args, tokenizer = resolve_inputs(
            model,
            args,
            processing_class,
            method="SFT",
            learning_rate=2e-5,
            datasets=[train_dataset, *eval_datasets.values()],
        )
        if peft_config is not None:
            model = add_adapter(model, peft_config, seed=args.seed)

        def as_table(dataset: Any, name: str) -> TokenTable:
            if isinstance(dataset, TokenTable):
                return dataset
            assert tokenizer is not None
            return encode_demonstrations(as_demonstrations(dataset, name), tokenizer, text, name)

        table = as_table(train_dataset, "train_dataset")
        super().__init__(
            model,
            args,
            table,
            {name: as_table(dataset, "eval_dataset") for name, dataset in eval_datasets.items()},
            main=np.arange(len(table)),
            buffer=np.arange(0),
            processing_class=tokenizer,
            train_only=train_only,
            layout=layout,
            router_aux_loss_coef=router_aux_loss_coef,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self._scored_tokens = table.scored[:, 0]

    def row_weights(self, rows: StepRows) -> tuple[Weights, Weights]:
        """Return 1 / (number of scored tokens of the step) for every row, which gives the mean over tokens."""
        tokens = self._scored_tokens[rows.main].sum()
        return np.full(len(rows.main), 1 / tokens), np.zeros(0)

    def step_share(self, batch: Batch) -> Tensor:
        """Return the share of the step's scored tokens that a batch has, ()."""
        return (batch.weights * torch.tensor(batch.layout.lengths, device=batch.weights.device)).sum()

    def example_losses(self, model: nn.Module, batch: Batch, sums: MetricSums, *, training: bool) -> Tensor:
        """Return the negative log-probability of each completion, nats, (n,)."""
        losses = -self.policy_scores(model, batch.layout)
        lengths = torch.tensor(batch.layout.lengths, dtype=losses.dtype, device=losses.device)
        counted = (batch.weights > 0).to(losses.dtype)
        name = "stream/main/loss" if training else "loss"
        sums.add({name: (losses / lengths, lengths * counted)})
        return losses
