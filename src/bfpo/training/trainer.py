"""Preference training with safety labels, on two streams."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, TrainingArguments

from bfpo.data.adapters import pairs as read_pair
from bfpo.data.load import SourceReport
from bfpo.data.prepare import require_labels
from bfpo.data.rows import Row
from bfpo.data.table import PairTable, pair_table
from bfpo.data.tokenise import Encoder, check_special_tokens
from bfpo.errors import DataError
from bfpo.losses import BFPO, PairLogps, PairLoss
from bfpo.model.reference import SharedReference
from bfpo.pairs import PreferencePair
from bfpo.recipe import Source, TextSection
from bfpo.training.batches import Batch
from bfpo.training.metrics import MetricSums, pair_metrics
from bfpo.training.stream_trainer import StreamTrainer
from bfpo.training.streams import StepRows, Weights

logger = logging.getLogger(__name__)

Pairs = Iterable[PreferencePair | Mapping[str, Any]]


class BFPOTrainer(StreamTrainer):
    """Trains a causal language model on preference pairs with safety labels.

    The reference is the model as it is given. The step's loss is mean(main) + buffer_weight · mean(buffer), whatever
    the accumulation, the number of processes or the batch size per device.

    Args:
        model: Policy, and reference at step 0; changed in place.
        args: Training arguments.
        train_dataset: Labelled pairs of the main stream (and of the buffer, where a pair's stream says so): values,
            or rows with the columns of a pair file such as a `datasets.Dataset` has; or a finished `PairTable`.
        buffer_dataset: Pairs of the buffer stream; a table holds both streams already.
        eval_dataset: Pairs to evaluate on, a table, or several of them by name.
        processing_class: The tokenizer; needed to tokenise pairs, saved with checkpoints.
        loss: A loss of `bfpo.losses`, or your own `PairLoss`.
        buffer_weight: Weight of the buffer's mean loss; at least 0.
        train_only: Patterns of the parameters to train; None trains all.
        text: Length, truncation and chat template for pairs.
        callbacks: As in transformers.
        optimizers: As in transformers.

    Raises:
        DataError: If pairs are unlabelled, or lack a column that the loss needs.

    Example:
        >>> trainer = BFPOTrainer(  # doctest: +SKIP
        ...     model, TrainingArguments("out"), pairs, buffer_dataset=helpful_pairs, processing_class=tokenizer
        ... )
        >>> trainer.train()  # doctest: +SKIP
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainingArguments,
        train_dataset: Pairs | PairTable,
        buffer_dataset: Pairs | None = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        *,
        loss: PairLoss | None = None,
        buffer_weight: float = 1.0,
        train_only: list[str] | None = None,
        text: TextSection | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ) -> None:
        self.loss = loss or BFPO()
        self.buffer_weight = buffer_weight

        def table_of(pairs: Any) -> PairTable:
            if not isinstance(pairs, PairTable):
                pairs = encode_pairs(as_pairs(pairs), self.loss, processing_class, text)
            require_signals(pairs, self.loss)
            return pairs

        if isinstance(train_dataset, PairTable):
            table = table_of(train_dataset)
        else:
            table = table_of([*as_pairs(train_dataset), *map(as_buffer, as_pairs(buffer_dataset or []))])
        if eval_dataset is None:
            eval_tables = {}
        elif isinstance(eval_dataset, Mapping):
            eval_tables = {name: table_of(pairs) for name, pairs in eval_dataset.items()}
        else:
            eval_tables = {"": table_of(eval_dataset)}
        super().__init__(
            model,
            args,
            table,
            eval_tables,
            main=table.main_rows,
            buffer=table.buffer_rows,
            processing_class=processing_class,
            train_only=train_only,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        # Taken before any checkpoint is loaded: on resume the reference is still the model of step 0.
        self.reference = SharedReference(model)

    def row_weights(self, rows: StepRows) -> tuple[Weights, Weights]:
        """Return 1/B for main rows and buffer_weight/B for the buffer's."""
        main, buffer = rows
        return (
            np.full(len(main), 1 / max(len(main), 1)),
            np.full(len(buffer), self.buffer_weight / max(len(buffer), 1)),
        )

    def example_losses(self, model: nn.Module, batch: Batch, sums: MetricSums, *, training: bool) -> Tensor:
        """Return the loss of each pair, (n,)."""
        pairs = self.pair_logps(model, batch)
        losses = self.loss(pairs)
        columns, real = batch.columns, batch.weights > 0
        if training:
            main, buffer = ~columns["is_buffer"], columns["is_buffer"]
            metrics = pair_metrics(pairs, losses, self.loss, cells=columns["cells"], counted=main)
            metrics |= {"stream/main/loss": (losses, main), "stream/buffer/loss": (losses, buffer)}
        else:
            metrics = pair_metrics(pairs, losses, self.loss, cells=columns["cells"], counted=real)
            metrics["loss"] = (losses, real)
        sums.add(metrics)
        return losses

    def pair_logps(self, model: nn.Module, batch: Batch) -> PairLogps:
        """Return log-probabilities of policy and reference for a batch, with all that the loss may look at."""
        with torch.no_grad():
            reference = self.reference.logps(self.accelerator.unwrap_model(model), batch.layout)
        policy = model(layout=batch.layout)
        lengths = torch.tensor(batch.layout.lengths, dtype=policy.dtype, device=policy.device)
        columns = {name: values.to(policy.dtype) for name, values in batch.columns.items()}
        columns = {name: v for name, v in columns.items() if name not in ("cells", "is_buffer")}
        return PairLogps(
            chosen_logps=policy[0::2],
            rejected_logps=policy[1::2],
            ref_chosen_logps=reference[0::2],
            ref_rejected_logps=reference[1::2],
            chosen_lengths=lengths[0::2],
            rejected_lengths=lengths[1::2],
            **columns,
        )


def as_pairs(items: Pairs) -> list[PreferencePair]:
    """Return preference pairs from pairs or from rows with the columns of a pair file."""
    return [
        item if isinstance(item, PreferencePair) else read_pair(Row(item, f"row {number}"))
        for number, item in enumerate(items, start=1)
    ]


def as_buffer(pair: PreferencePair) -> PreferencePair:
    """Return the pair as one of the buffer stream."""
    return replace(pair, provenance=replace(pair.provenance, stream="buffer"))


def encode_pairs(
    pairs: Sequence[PreferencePair],
    loss: PairLoss,
    tokenizer: PreTrainedTokenizerBase | None,
    text: TextSection | None,
) -> PairTable:
    """Tokenise pairs for the Python interface, where no recipe sets a cap: a pair that is lost is an error.

    Raises:
        DataError: If pairs are unlabelled, there are none, or one doesn't fit.
    """
    if tokenizer is None:
        raise DataError("BFPOTrainer needs processing_class=tokenizer to tokenise pairs")
    require_labels(pairs)
    kept = [pair for pair in pairs if pair.labels is not None and loss.keeps(pair.labels)]
    if len(kept) < len(pairs):
        logger.warning("%s leaves out %d of %d pairs", type(loss).__name__, len(pairs) - len(kept), len(pairs))
    report = SourceReport("pairs", Source(path="-"), taken=len(kept))
    kept, examples = Encoder(tokenizer, text or TextSection()).encode(kept, report)
    report.check_cap(0.0)
    if not kept:
        raise DataError("there are no pairs to train on")
    check_special_tokens(examples, tokenizer)
    return pair_table(examples, kept)


def require_signals(table: PairTable, loss: PairLoss) -> None:
    """Refuse a loss that needs columns which not every pair has.

    Raises:
        DataError: Naming the columns.
    """
    missing = [name for name in loss.needs if name not in table.signals]
    if missing:
        raise DataError(
            f"{type(loss).__name__} needs {' and '.join(missing)} for every pair of both streams, and some pairs "
            "have no such value; add the columns to the data, or choose another loss"
        )
