"""Preference training with safety labels, on two streams."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainingArguments
from transformers.trainer_utils import TrainOutput

from bfpo.config.recipes import LayoutSection, ReferenceKind, Source, TextSection
from bfpo.core.pairs import PreferencePair
from bfpo.data.load import SourceReport
from bfpo.data.pair_formats import read_pair
from bfpo.data.prepare import require_labels
from bfpo.data.rows import SourceRow
from bfpo.data.table import PairTable, pair_table
from bfpo.data.tokenize import Encoder, check_special_tokens
from bfpo.errors import DataError, TrainingError
from bfpo.losses.pairwise import BFPO, PairLogps, PairLoss
from bfpo.model.layout import padded_layout
from bfpo.model.logps import check_against_plain_forward
from bfpo.model.lora import CausalLM, add_adapter
from bfpo.model.reference import AdapterOff, Reference, SharedReference
from bfpo.training.batches import Batch, Collator
from bfpo.training.metrics import MetricSums, pair_metrics
from bfpo.training.reference_values import ReferencePass, on_device, resolve_reference, tolerance
from bfpo.training.stream_trainer import StreamTrainer
from bfpo.training.streams import StepRows, WeightedRow, Weights

logger = logging.getLogger(__name__)

Pairs = Iterable[PreferencePair | Mapping[str, Any]]


class StartCheck(NamedTuple):
    """What is known before the first step.

    Args:
        largest_margin: Largest |margin| between policy and reference, nats; 0 on a CPU, and rounding where the
            reference's log-probabilities come from the cache.
        packing_difference: Largest difference between packed and padded log-probabilities of the first pairs, nats;
            None when rows are padded.
        plain_difference: Largest difference from the log-probabilities of the model's own logits, nats.
        typical_logp: Median log-probability of a completion, nats.
        largest_target: Largest |target| of the loss on these pairs, nats; None when the loss has none.
    """

    largest_margin: float
    packing_difference: float | None
    plain_difference: float
    typical_logp: float
    largest_target: float | None

    @property
    def advice(self) -> str | None:
        """What to say about beta: None when the targets can be reached."""
        if self.largest_target is None or self.largest_target <= abs(self.typical_logp):
            return None
        return (
            f"targets of up to {self.largest_target:.3g} nats are larger than the whole log-probability of a typical "
            f"completion ({self.typical_logp:.3g} nats): they can't be reached; raise loss.beta"
        )


class BFPOTrainer(StreamTrainer):
    """Trains a causal language model on preference pairs with safety labels.

    The reference is the model as it is given. The step's loss is mean(main) + buffer_weight · mean(buffer), whatever
    the accumulation, the number of processes or the batch size per device.

    Args:
        model: Policy, and reference at step 0; changed in place.
        args: Training arguments.
        train_dataset: Labeled pairs of the main stream (and of the buffer, where a pair's stream says so): values,
            or rows with the columns of a pair file such as a `datasets.Dataset` has; or a finished `PairTable`.
        buffer_dataset: Pairs of the buffer stream; a table holds both streams already.
        eval_dataset: Pairs to evaluate on, a table, or several of them by name.
        processing_class: The tokenizer; needed to tokenize pairs, saved with checkpoints.
        loss: A loss of `bfpo.losses.pairwise`, or your own `PairLoss`.
        buffer_weight: Weight of the buffer's mean loss; at least 0.
        peft_config: Adapter to put on the model and train; the reference is then the model without it. A model that
            comes with an adapter needs none: the adapter is trained on, and the reference is the adapted model.
        train_only: Patterns of the parameters to train; None trains all.
        layout: How tokens are fed; None for packed rows, which any model falls back from that can't be fed them.
        text: Length, truncation and chat template for pairs.
        reference: What gives the log-probabilities of the model at step 0. `auto`: an adapter switched off; frozen
            weights shared with the policy for `train_only`; numbers from a cache on disk when all is trained or
            weights are sharded.
        cache_dir: Where that cache is; default `cache/reference` beside the output folder.
        callbacks: As in transformers.
        optimizers: As in transformers.

    Raises:
        DataError: If pairs are unlabeled, or lack a column that the loss needs.

    Example:
        >>> trainer = BFPOTrainer(  # doctest: +SKIP
        ...     model, TrainingArguments("out"), pairs, buffer_dataset=helpful_pairs, processing_class=tokenizer
        ... )
        >>> trainer.train()  # doctest: +SKIP
    """

    def __init__(
        self,
        model: CausalLM,
        args: TrainingArguments,
        train_dataset: Pairs | PairTable,
        buffer_dataset: Pairs | None = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        *,
        loss: PairLoss | None = None,
        buffer_weight: float = 1.0,
        peft_config: Any = None,
        train_only: list[str] | None = None,
        layout: LayoutSection | None = None,
        text: TextSection | None = None,
        reference: ReferenceKind = "auto",
        cache_dir: str | Path | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ) -> None:
        self.loss = loss or BFPO()
        if peft_config is not None:
            model = add_adapter(model, peft_config, seed=args.seed)
        self.buffer_weight = buffer_weight

        def table_of(pairs: Any) -> PairTable:
            given = isinstance(pairs, PairTable)
            table: PairTable = pairs if given else encode_pairs(as_pairs(pairs), self.loss, processing_class, text)
            require_signals(table, self.loss)
            return table

        if isinstance(train_dataset, PairTable):
            if buffer_dataset is not None:
                raise DataError("a PairTable holds both streams already; give buffer_dataset only with pairs")
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
            layout=layout,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        # Taken before any checkpoint is loaded: on resume the reference is still the model of step 0.
        self.reference_kind = resolve_reference(reference, self, new_adapter=peft_config is not None)
        self.reference: Reference | None = None
        if self.reference_kind == "cache":
            folder = Path(cache_dir) if cache_dir else Path(str(args.output_dir)).parent / "cache" / "reference"
            values = ReferencePass(self, model, folder)
            self.table = table = replace(table, reference_logps=values.values(table, "training"))
            for name, one in eval_tables.items():
                known = values.values(one, f"{name} evaluation".strip())
                self.eval_tables[name] = replace(one, reference_logps=known)
        else:
            self.reference = AdapterOff() if self.reference_kind == "adapter" else SharedReference(model)
        self.start_check: StartCheck | None = None

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Check that policy and reference agree, then train; see `StreamTrainer.train`.

        Raises:
            TrainingError: If they don't.
        """
        if self.start_check is None:
            self.start_check = self.check_start()
        return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    def check_start(self) -> StartCheck:
        """Compare packed and padded rows, then policy and reference, on the first pairs, as the first step will.

        On a CPU every margin must be exactly 0. On an accelerator kernels may differ with and without gradients, and
        numbers from the cache were computed in other packs; the tolerance there is 1e-3 of the log-probability's
        size (2e-2 below float32).

        Raises:
            TrainingError: If a margin is larger.
            ModelError: If log-probabilities differ from those of the model's own logits, or packed from padded ones.
        """
        model, args = self.model, self.args
        assert model is not None
        rows = [WeightedRow(int(row), 1.0) for row in self.plan.step(0).main[: args.per_device_train_batch_size]]
        packs = [pack.to(args.device) for pack in Collator(self.table, self.layout)(rows)["packs"]]
        low_precision = self.accelerator.mixed_precision != "no" or model.dtype in (torch.bfloat16, torch.float16)
        allowed = tolerance(low_precision=low_precision)
        model.train()
        with on_device(model, args.device), self.accelerator.autocast():
            by_pack = [self.pair_logps(model, pack) for pack in packs]
            first = padded_layout([self.table[rows[0].row]]).to(args.device)
            plain = check_against_plain_forward(model, first, tolerance=allowed)
        margin = torch.cat([logps.margin.detach().abs() for logps in by_pack])
        sizes = torch.cat([logps.ref_chosen_logps.abs() for logps in by_pack])
        exact = args.device.type == "cpu" and self.reference is not None
        if bool((margin > (0.0 if exact else allowed * (sizes + 1))).any()):
            raise TrainingError(
                f"policy and reference differ before the first step: margins up to {margin.max():.3g} nats, "
                "expected 0; the model isn't deterministic"
            )
        targets = [target.abs().max() for logps in by_pack if (target := self.loss.target(logps)) is not None]
        return StartCheck(
            largest_margin=float(margin.max()),
            packing_difference=self.packing_check.difference if self.packing_check else None,
            plain_difference=plain,
            typical_logp=float(
                torch.cat([logps for p in by_pack for logps in (p.ref_chosen_logps, p.ref_rejected_logps)]).median()
            ),
            largest_target=float(max(targets)) if targets else None,
        )

    def shared_with_a_resumed_run(self) -> dict[str, Any]:
        """Return what must not change when a run is resumed: the plan, and what the loss is."""
        return super().shared_with_a_resumed_run() | {"loss": repr(self.loss), "buffer_weight": self.buffer_weight}

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
        known: dict[str, Tensor] = {}
        if self.reference is not None:
            with torch.no_grad():
                reference = self.reference.logps(self.accelerator.unwrap_model(model), batch.layout)
            known = {"ref_chosen_logps": reference[0::2], "ref_rejected_logps": reference[1::2]}
        policy = model(layout=batch.layout)
        lengths = torch.tensor(batch.layout.lengths, dtype=policy.dtype, device=policy.device)
        columns = {name: values.to(policy.dtype) for name, values in (batch.columns | known).items()}
        columns = {name: v for name, v in columns.items() if name not in ("cells", "is_buffer")}
        return PairLogps(
            chosen_logps=policy[0::2],
            rejected_logps=policy[1::2],
            chosen_lengths=lengths[0::2],
            rejected_lengths=lengths[1::2],
            **columns,
        )


def as_pairs(items: Pairs) -> list[PreferencePair]:
    """Return preference pairs from pairs or from rows with the columns of a pair file."""
    return [
        item if isinstance(item, PreferencePair) else read_pair(SourceRow(item, f"row {number}"))
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
    """Tokenize pairs for the Python interface, where no recipe sets a cap: a pair that is lost is an error.

    Raises:
        DataError: If pairs are unlabeled, there are none, or one doesn't fit.
    """
    if tokenizer is None:
        raise DataError("BFPOTrainer needs processing_class=tokenizer to tokenize pairs")
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
