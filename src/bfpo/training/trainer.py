"""Preference training with safety labels, on two streams."""

from collections.abc import Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate.utils import gather_object
from peft import PeftConfig
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainingArguments
from transformers.trainer_utils import TrainOutput

from bfpo.config.recipes import LayoutSection, ReferenceKind, TextSection
from bfpo.data.table import PairTable, TokenTable
from bfpo.errors import DataError, RecipeError, TrainingError
from bfpo.losses.baselines import CatDPO
from bfpo.losses.inputs import PairLogps
from bfpo.losses.pairwise import BFPO, PairLoss
from bfpo.losses.tail import tail_factors
from bfpo.model.divergence import logps_and_divergences, vocabulary_logps
from bfpo.model.layout import Layout, padded_layout
from bfpo.model.logps import Score, check_against_plain_forward, completion_states
from bfpo.model.lora import add_adapter
from bfpo.model.reference import AdapterOff, Reference, SharedReference
from bfpo.training.batches import Batch, Collator
from bfpo.training.category_margins import CategoryMargins
from bfpo.training.encode import Pairs, as_buffer, as_pairs, encode_pairs, named_datasets, numbered, require_signals
from bfpo.training.inputs import ModelOrPath, resolve_inputs
from bfpo.training.metrics import MetricSums, pair_metrics
from bfpo.training.reference_pass import ReferencePass, on_device, resolve_reference, tolerance
from bfpo.training.stream_trainer import StreamTrainer
from bfpo.training.streams import StepRows, WeightedRow, Weights, mean_weights


class StartCheck(NamedTuple):
    """Results of the checks before the first step.

    Args:
        largest_margin: Largest |margin| between policy and reference, nats; 0 on a CPU, or rounding if the
            reference's log-probabilities come from the cache.
        packing_difference: Largest difference between packed and padded log-probabilities of the first pairs, nats;
            None if rows are padded.
        plain_difference: Largest difference from log-probabilities computed from the model's own logits, nats.
        typical_logp: Median log-probability of a completion, nats.
        largest_target: Largest |target| of the loss on these pairs, nats; None if the loss has no targets.
    """

    largest_margin: float
    packing_difference: float | None
    plain_difference: float
    typical_logp: float
    largest_target: float | None

    @property
    def advice(self) -> str | None:
        """Advice about beta; None if the targets can be reached."""
        if self.largest_target is None or self.largest_target <= abs(self.typical_logp):
            return None
        return (
            f"targets of the first pairs are up to {self.largest_target:.3g} nats, larger than the log-probability "
            f"of a typical completion ({self.typical_logp:.3g} nats), and can't be reached; raise loss.beta, or "
            "lower loss.safety_weight if it is set"
        )


def check_tail(loss: PairLoss, args: TrainingArguments) -> None:
    """Check that all pairs of a step are fed at once if only those with the largest losses count.

    Raises:
        RecipeError: If gradients are accumulated.
    """
    if loss.tail < 1 and args.gradient_accumulation_steps > 1:
        raise RecipeError(
            f"loss.tail is {loss.tail:g} and gradient_accumulation_steps is {args.gradient_accumulation_steps}; the "
            "largest losses of a step are known only if its pairs are fed at once: raise per_device_train_batch_size "
            "instead, whose rows are fed in packs of at most layout.max_tokens_per_pack"
        )


class BFPOTrainer(StreamTrainer):
    """Trainer for preference pairs with safety labels.

    The reference is the model before training. The loss of a step is mean(main) + buffer_weight · mean(buffer),
    independent of accumulation, number of processes and batch size per device.

    Args:
        model: Folder or hub id of a model or adapter, loaded in float32; or a causal language model, changed in
            place.
        args: Training arguments. By default those of transformers, with the output folder `{model name}-BFPO`,
            `learning_rate=1e-6`, `logging_steps=10` and `report_to="none"`.
        train_dataset: Labeled pairs: a `datasets.Dataset` or a list of rows with the columns `prompt`, `chosen`,
            `rejected`, `is_chosen_safe` and `is_rejected_safe`; or a list of `PreferencePair`; or a `PairTable`.
            Pairs belong to the main stream, unless their column `stream` is `buffer`.
        buffer_dataset: Pairs of the buffer stream, in the same formats; not allowed with a `PairTable`, which
            contains both streams.
        eval_dataset: Pairs to evaluate on, in the same formats, or several such data sets by name.
        processing_class: Tokenizer, saved with checkpoints; by default the model's own.
        loss: Loss of `bfpo.losses.pairwise` or a custom `PairLoss`; by default `BFPO()`.
        buffer_weight: Weight of the buffer's mean loss, at least 0.
        peft_config: peft's configuration of a new adapter to train; the reference is then the model without it. If
            the model already has an adapter, that one is trained further, and the reference is the adapted model.
        train_only: Patterns of the parameters to train; None trains all.
        layout: How tokens are fed; None for packed rows. A model that can't be fed packed rows gets padded ones.
        router_aux_loss_coef: Weight of the load-balancing loss of a mixture of experts, as in TRL; None for the
            model's own.
        text: Maximum length, truncation and chat template for pairs.
        reference: Source of the reference's log-probabilities. `auto` uses the model with its adapter switched off
            for a new adapter, frozen weights shared with the policy for `train_only`, and a cache on disk if all
            weights are trained or weights are sharded.
        cache_dir: Folder of that cache; by default `cache/reference` beside the output folder.
        callbacks: Callbacks of transformers.
        optimizers: Optimizer and scheduler, as in transformers.

    Raises:
        DataError: If pairs are malformed, unlabeled, or lack a column that the loss needs.
        ModelError: If the model or its tokenizer can't be loaded.
        TypeError: If an argument has the wrong type.

    Examples:
        >>> trainer = BFPOTrainer(model="org/model", train_dataset=rows)  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP
        >>> trainer.save_model()  # doctest: +SKIP
    """

    def __init__(
        self,
        model: ModelOrPath,
        args: TrainingArguments | None = None,
        train_dataset: Pairs | PairTable | None = None,
        buffer_dataset: Pairs | None = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        *,
        loss: PairLoss | None = None,
        buffer_weight: float = 1.0,
        peft_config: PeftConfig | None = None,
        train_only: list[str] | None = None,
        layout: LayoutSection | None = None,
        router_aux_loss_coef: float | None = None,
        text: TextSection | None = None,
        reference: ReferenceKind = "auto",
        cache_dir: str | Path | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ) -> None:
        if train_dataset is None:
            raise TypeError("BFPOTrainer needs a train_dataset")
        eval_datasets = named_datasets(eval_dataset)
        model, args, tokenizer = resolve_inputs(
            model,
            args,
            processing_class,
            method="BFPO",
            learning_rate=1e-6,
            datasets=[train_dataset, *eval_datasets.values()],
        )
        if peft_config is not None:
            model = add_adapter(model, peft_config, seed=args.seed)
        self.loss = loss or BFPO()
        check_tail(self.loss, args)
        self.buffer_weight = buffer_weight

        def as_table(dataset: Any, name: str, buffer: Any = (), categories: Sequence[str] | None = None) -> PairTable:
            if isinstance(dataset, PairTable):
                table = dataset
            else:
                main, added = as_pairs(dataset, name), as_pairs(buffer, "buffer_dataset")
                row_names = [*numbered(name, len(main)), *numbered("buffer_dataset", len(added))]
                assert tokenizer is not None
                pairs = [*main, *map(as_buffer, added)]
                table = encode_pairs(pairs, self.loss, tokenizer, text, categories, row_names)
            require_signals(table, self.loss)
            return table

        if isinstance(train_dataset, PairTable) and buffer_dataset is not None:
            raise DataError("a PairTable contains both streams; buffer_dataset is allowed only with pairs")
        table = as_table(train_dataset, "train_dataset", buffer_dataset if buffer_dataset is not None else ())
        eval_tables = {
            name: as_table(dataset, "eval_dataset", categories=table.category_names)
            for name, dataset in eval_datasets.items()
        }
        super().__init__(
            model,
            args,
            table,
            eval_tables,
            main=table.main_rows,
            buffer=table.buffer_rows,
            processing_class=tokenizer,
            train_only=train_only,
            layout=layout,
            router_aux_loss_coef=router_aux_loss_coef,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.category_margins: CategoryMargins | None = None
        if isinstance(self.loss, CatDPO):
            self.category_margins = CategoryMargins(self.loss, table.category_names, self.accelerator)
            self.add_callback(self.category_margins)
        # Taken before any checkpoint is loaded, so that the reference of a resumed run is the model of step 0.
        self.reference_kind = resolve_reference(
            reference,
            model,
            new_adapter=peft_config is not None,
            shards_weights=self.shards_weights,
            whole_vocabulary=self.loss.divergence_share is not None,
        )
        self.reference: Reference | None = None
        if self.reference_kind == "cache":
            folder = Path(cache_dir) if cache_dir else Path(str(args.output_dir)).parent / "cache" / "reference"
            self._add_reference_logps(ReferencePass(model, folder, self.layout_section, self.accelerator))
        else:
            self.reference = AdapterOff() if self.reference_kind == "adapter" else SharedReference(model)
        self.start_check: StartCheck | None = None

    def _add_reference_logps(self, reference_pass: ReferencePass) -> None:
        """Add the reference's log-probabilities to the tables."""

        def scored(table: TokenTable, name: str) -> PairTable:
            assert isinstance(table, PairTable)
            return replace(table, reference_logps=reference_pass.score(table, name))

        self.table = scored(self.table, "training")
        for name, table in self.eval_tables.items():
            self.eval_tables[name] = scored(table, f"{name} evaluation".strip())

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Check that policy and reference agree, then train; see `StreamTrainer.train`.

        Raises:
            TrainingError: If policy and reference differ before the first step.
        """
        if self.start_check is None:
            self.start_check = self.check_start()
        return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    def check_start(self) -> StartCheck:
        """Compare packed and padded rows, and policy and reference, on the first pairs.

        On a CPU every margin must be exactly 0. On an accelerator kernels may differ with and without gradients, and
        log-probabilities from the cache were computed in other packs. The tolerance is then 1e-3 of the
        log-probability's size (2e-2 below float32).

        Raises:
            TrainingError: If a margin is larger.
            ModelError: If log-probabilities differ from those of the model's own logits, or packed from padded ones.
        """
        model, args = self.model, self.args
        assert model is not None
        rows = [WeightedRow(int(row), 1.0) for row in self.plan.step(0).main[: args.per_device_train_batch_size]]
        packs = [pack.to(args.device) for pack in Collator(self.table, self.layout_section)(rows)["packs"]]
        low_precision = self.accelerator.mixed_precision != "no" or model.dtype in (torch.bfloat16, torch.float16)
        relative_tolerance = tolerance(low_precision=low_precision)
        self.enable_activation_checkpointing()
        model.train()
        with on_device(model, args.device), self.accelerator.autocast():
            # In the kernels of training, which may differ without gradients, and one pack at a time, as in training.
            pack_logps = [_detached(self.pair_logps(model, pack)) for pack in packs]
            first = padded_layout([self.table[rows[0].row]]).to(args.device)
            plain_difference = check_against_plain_forward(model, first, tolerance=relative_tolerance)
        margins = torch.cat([pairs.margin.abs() for pairs in pack_logps])
        chosen = torch.cat([pairs.ref_chosen_logps for pairs in pack_logps])
        rejected = torch.cat([pairs.ref_rejected_logps for pairs in pack_logps])
        is_exact = args.device.type == "cpu" and self.reference is not None
        if bool((margins > (0.0 if is_exact else relative_tolerance * (chosen.abs() + 1))).any()):
            raise TrainingError(
                f"policy and reference differ before the first step: margins up to {margins.max():.3g} nats, "
                "expected 0; the model isn't deterministic"
            )
        targets = [target.abs().max() for pairs in pack_logps if (target := self.loss.target(pairs)) is not None]
        return StartCheck(
            largest_margin=float(margins.max()),
            packing_difference=self.packing_check.difference if self.packing_check else None,
            plain_difference=plain_difference,
            typical_logp=float(torch.cat([chosen, rejected]).median()),
            largest_target=float(max(targets)) if targets else None,
        )

    def resume_settings(self) -> dict[str, Any]:
        """Return the settings that must not change when a run is resumed, including those of the loss."""
        settings = super().resume_settings() | {"loss": repr(self.loss), "buffer_weight": self.buffer_weight}
        assert isinstance(self.table, PairTable)
        signals = self.table.hash_signals(self.loss.needs)
        return settings if signals is None else settings | {"signals": signals}

    def row_weights(self, rows: StepRows) -> tuple[Weights, Weights]:
        """Return 1/B for main rows and buffer_weight/B for buffer rows."""
        return mean_weights(rows, self.buffer_weight)

    def reweighted(self, model: nn.Module, packs: list[Batch]) -> list[Batch]:
        """Return the packs with the weights of the largest losses of each stream's step; see `PairLoss.tail`.

        The losses of all packs of all processes are needed first, which costs a forward pass.
        """
        if self.loss.tail == 1:
            return packs
        with torch.no_grad(), self.compute_loss_context_manager():
            losses = [self.loss.total(self.pair_logps(model, pack.to(self.args.device))) for pack in packs]
        columns = (
            torch.cat(losses).double().cpu().numpy(),
            torch.cat([pack.weights for pack in packs]).numpy(),
            torch.cat([pack.columns["is_buffer"] for pack in packs]).numpy(),
        )
        by_process: list[tuple[np.ndarray[Any, Any], ...]] = gather_object([columns])
        all_losses, weights, is_buffer = (np.concatenate(column) for column in zip(*by_process, strict=True))
        if not np.isfinite(all_losses).all():
            # The check of the step names the rows.
            return packs
        factors = np.ones_like(all_losses)
        for stream in (is_buffer, ~is_buffer):
            factors[stream] = tail_factors(all_losses[stream], weights[stream], share=self.loss.tail)
        sizes = [len(process_losses) for process_losses, *_ in by_process]
        own = np.split(factors, np.cumsum(sizes)[:-1])[self.accelerator.process_index]
        of_packs = torch.from_numpy(own).split([len(pack_losses) for pack_losses in losses])
        return [replace(pack, weights=pack.weights * of_pack) for pack, of_pack in zip(packs, of_packs, strict=True)]

    def example_losses(self, model: nn.Module, batch: Batch, sums: MetricSums, *, training: bool) -> Tensor:
        """Return the loss of each pair, (n,)."""
        pairs = self.pair_logps(model, batch)
        losses = self.loss.total(pairs)
        cells, is_buffer = batch.columns["cells"], batch.columns["is_buffer"]
        if training:
            metrics = pair_metrics(pairs, losses, self.loss, cells=cells, counted=~is_buffer)
            metrics |= {"stream/main/loss": (losses, ~is_buffer), "stream/buffer/loss": (losses, is_buffer)}
            if self.category_margins is not None and not batch.is_filler:
                # All pairs that have a weight in the step, whatever share of them `tail` trains on.
                counted = ~is_buffer | (self.buffer_weight > 0)
                metrics |= self.category_margins.add(pairs, batch.columns["categories"] * counted[:, None])
        else:
            counted = batch.weights > 0
            metrics = pair_metrics(pairs, losses, self.loss, cells=cells, counted=counted)
            metrics["loss"] = (losses, counted)
        sums.add(metrics)
        return losses

    def pair_logps(self, model: nn.Module, batch: Batch) -> PairLogps:
        """Return log-probabilities of policy and reference for a batch, with all columns that losses use."""
        columns = {name: values for name, values in batch.columns.items() if name not in ("cells", "is_buffer")}
        categories = columns.pop("categories", None)
        if self.category_margins is not None and categories is not None:
            columns["category_margin"] = self.category_margins.of(categories)
        if (share := self.loss.divergence_share) is not None:
            score = self._divergence_score(self.accelerator.unwrap_model(model), batch.layout, share)
            policy, divergence, reference = self.policy_scores(model, batch.layout, score).unbind(-1)
            reference = reference.detach()
            columns |= {"chosen_divergence": divergence[0::2], "rejected_divergence": divergence[1::2]}
        else:
            if self.reference is not None:
                with torch.no_grad():
                    reference = self.reference.logps(self.accelerator.unwrap_model(model), batch.layout)
            policy = self.policy_scores(model, batch.layout)
        if self.reference is not None:
            columns |= {"ref_chosen_logps": reference[0::2], "ref_rejected_logps": reference[1::2]}
        lengths = torch.tensor(batch.layout.lengths, dtype=policy.dtype, device=policy.device)
        return PairLogps(
            chosen_logps=policy[0::2],
            rejected_logps=policy[1::2],
            chosen_lengths=lengths[0::2],
            rejected_lengths=lengths[1::2],
            **{name: values.to(policy.dtype) for name, values in columns.items()},
        )

    def _divergence_score(self, model: nn.Module, layout: Layout, share: float) -> Score:
        """Return the score that a loss with a divergence from the reference needs, for one batch."""
        reference = self.reference
        assert reference is not None

        def reference_logps(states: Tensor) -> Tensor:
            return reference.logps(model, layout, lambda model, layout: vocabulary_logps(model, states))

        states = reference.logps(model, layout, completion_states)
        return partial(logps_and_divergences, reference_states=states, reference_logps=reference_logps, share=share)


def _detached(pairs: PairLogps) -> PairLogps:
    """Return the values of a batch without the graph behind them."""
    values: dict[str, Any] = {field.name: getattr(pairs, field.name) for field in fields(pairs)}
    return replace(pairs, **{name: value.detach() for name, value in values.items() if value is not None})
