"""The trainer that follows a stream plan: the common base of preference training and supervised fine-tuning."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property, partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from bfpo.config.recipes import LayoutSection
from bfpo.core.files import content_hash
from bfpo.core.terminal import progress
from bfpo.data.table import TokenTable
from bfpo.errors import BfpoError, TrainingError
from bfpo.model.attention import span_attention
from bfpo.model.layout import Layout
from bfpo.model.layout_check import PackingCheck, resolve_layout
from bfpo.model.logps import Score, add_layout_forward, completion_logps
from bfpo.model.lora import CausalLM, unwrap_adapter, without_base_config_warning
from bfpo.model.router_loss import router_loss_weight, scores_and_router_loss
from bfpo.model.selective import disable_dropout, select_parameters
from bfpo.model.vocabulary import check_token_ids
from bfpo.training.batches import Batch, Collator, KeyDataset
from bfpo.training.callbacks import Pauses
from bfpo.training.checkpoints import (
    CompletionMark,
    adapter_scales,
    check_same_run,
    check_state,
    find_checkpoint,
    optimizer_settings,
    read_mark,
    say_resuming,
    start_fingerprint,
    unmark_after,
)
from bfpo.training.metrics import FiniteLossCheck, MetricSums
from bfpo.training.processes import check_devices, check_sharding, equal_packs, no_gradient_sync
from bfpo.training.streams import MicroBatches, Rows, StepRows, StreamPlan, WeightedRow, Weights

# What transformers and torch raise for files of a checkpoint that are damaged.
_UNREADABLE = (
    *(SafetensorError, UnpicklingError, EOFError, ArithmeticError, AttributeError, LookupError),
    *(RuntimeError, TypeError, ValueError),
)
# Number of examples on which packed and padded rows are compared before training.
CHECKED_EXAMPLES = 4


class StreamTrainer(Trainer, ABC):
    """A `transformers.Trainer` that follows a stream plan. Subclasses implement the loss.

    Overridden public hooks: `get_train_dataloader`, `get_eval_dataloader`, `training_step`, `compute_loss`,
    `prediction_step`, `evaluation_loop`, `save_model`, `log`, `floating_point_ops`. Semi-private names in use:
    `_get_grad_norm` (to count clipped steps), `_train_batch_size` (to change it) and the class attribute
    `loss_is_scaled_for_ga`; a test checks that they exist.

    Args:
        model: Causal language model, changed in place (dropout off, `requires_grad`, a forward for layouts).
        args: Training arguments; `per_device_train_batch_size` counts rows of the main stream.
        table: Training data.
        eval_tables: Evaluation data by name; a single table named "" is reported as plain `eval_...`.
        main: Row indices of the main stream.
        buffer: Row indices of the buffer stream.
        processing_class: Tokenizer, saved with the checkpoints.
        train_only: Patterns of the parameters to train; None trains all.
        layout: How tokens are fed; None for packed rows. A model that can't be fed packed rows gets padded ones.
        router_aux_loss_coef: Weight of the load-balancing loss of a mixture of experts; None for the model's own.
        callbacks: Callbacks of transformers.
        optimizers: Optimizer and scheduler, as in transformers.

    Raises:
        ModelError: If a token of the data has no embedding.
        RecipeError: If a load-balancing loss is requested for a model without experts, or the launched processes or
            the requested sharding can't be used; see `bfpo.training.processes`.
    """

    # The loss of a micro-batch is already its part of the step's loss; transformers must not divide it again.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: CausalLM,
        args: TrainingArguments,
        table: TokenTable,
        eval_tables: Mapping[str, TokenTable],
        *,
        main: Rows | range,
        buffer: Rows | range,
        processing_class: PreTrainedTokenizerBase | None = None,
        train_only: list[str] | None = None,
        layout: LayoutSection | None = None,
        router_aux_loss_coef: float | None = 0.0,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ) -> None:
        check_devices(args)
        config = unwrap_adapter(model).config
        largest_ids = [[tokens.largest_id] for tokens in (table, *eval_tables.values())]
        check_token_ids(config, largest_ids, str(config._name_or_path or config.model_type))
        fingerprint = start_fingerprint(model)
        self.router_loss_weight = router_loss_weight(model, router_aux_loss_coef)
        self._router_loss: Tensor | None = None
        self.selection = select_parameters(model, train_only)
        trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        self._start_settings = {
            "start model": fingerprint,
            "trained": content_hash(trained)[:16],
            "adapter scales": adapter_scales(model),
        }
        disable_dropout(model)
        add_layout_forward(model)
        if args.logging_nan_inf_filter:
            # The filter would replace a loss that isn't finite by the average of the others.
            args.logging_nan_inf_filter = False
        self.table, self.eval_tables = table, dict(eval_tables)
        self.policy, self._requested_layout = model, layout or LayoutSection()
        super().__init__(
            model=model,
            args=args,
            data_collator=Collator(table, self._requested_layout),
            train_dataset=KeyDataset(len(main)),
            eval_dataset=self._eval_datasets(),
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        check_sharding(self.accelerator, model)
        batch_size = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        # As in transformers, `data_seed` decides the order of the data where it is set.
        self.plan = StreamPlan(main, buffer, batch_size, args.seed if args.data_seed is None else args.data_seed)
        self.add_callback(CompletionMark(self.resume_settings, keep=args.save_total_limit))
        args.save_total_limit = None
        # Last, so that a save includes the mark.
        self._pauses = Pauses()
        self.add_callback(self._pauses)
        self._train_sums, self._eval_sums = MetricSums(), MetricSums()
        self._found: Path | None = None
        self._finite_loss, self._has_stepped, self._is_resuming = FiniteLossCheck(), False, False
        self._advance_evaluation: Callable[[int], None] = lambda batches: None
        self._clipped_steps, self._steps_since_log = torch.zeros((), device=args.device), 0
        self._tokens_since_log, self._last_log = 0, time.monotonic()

    def set_micro_batch(self, size: int) -> None:
        """Change how many rows of a stream are fed at a time, but not the rows of a step.

        Args:
            size: Rows; a divisor of those that a process has of a step.
        """
        rows = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps
        assert rows % size == 0
        self.args.per_device_train_batch_size, self.args.gradient_accumulation_steps = size, rows // size
        self._train_batch_size = self.args.train_batch_size

    def enable_activation_checkpointing(self) -> None:
        """Switch activation checkpointing on if the arguments ask for it, as transformers does when training starts.

        What is measured or checked before then needs the memory of a step.
        """
        if self.args.activation_checkpointing:
            kwargs: dict[str, Any] = dict(cast(Any, self.args.activation_checkpointing_kwargs) or {})
            # As in `transformers.Trainer`: these are no keywords of PyTorch's function.
            options = {name: kwargs.pop(name) for name in ("every_n_layers", "offload") if name in kwargs}
            self.policy.activation_checkpointing_enable(activation_checkpointing_kwargs=kwargs or None, **options)

    def resume_settings(self) -> dict[str, Any]:
        """Return the settings that must not change when a run is resumed."""
        router = {"router_aux_loss_coef": self.router_loss_weight} if self.router_loss_weight else {}
        return router | {
            "world_size": self.args.world_size,
            "per_device_train_batch_size": self.args.per_device_train_batch_size,
            "gradient_accumulation_steps": self.args.gradient_accumulation_steps,
            "seed": self.args.seed,
            **({} if self.args.data_seed is None else {"data_seed": self.args.data_seed}),
            "data": self.table.fingerprint,
            "optimizer": optimizer_settings(self.args),
            **self._start_settings,
        }

    def find_checkpoint(self, resume: str | bool | None) -> Path | None:
        """Return the checkpoint that a run resumes from, after checking that it is this run's; None for step 0.

        Args:
            resume: Folder of a checkpoint, or True for the newest complete one in `output_dir`.

        Raises:
            RecipeError: If the checkpoint belongs to a run with other settings.
            TrainingError: If the folder isn't a complete checkpoint.
        """
        # The files of a large checkpoint are hashed once.
        if self._found is None or str(self._found) != resume:
            self._found = find_checkpoint(Path(str(self.args.output_dir)), resume)
        if self._found is not None:
            check_same_run(self._found, self.resume_settings())
        return self._found

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Train, or resume from a checkpoint.

        Args:
            resume_from_checkpoint: Folder of a checkpoint, or True for the newest complete one in `output_dir`; with
                True, training starts at step 0 if there is none.
            trial: As in transformers.
            ignore_keys_for_eval: As in transformers.

        Raises:
            RecipeError: If the checkpoint belongs to a run with other settings.
            TrainingError: If the folder isn't a complete checkpoint, or can't be read.
        """
        # Not the time of checks and measurements before the first step.
        self._tokens_since_log, self._last_log = 0, time.monotonic()
        out = Path(str(self.args.output_dir))
        folder = self.find_checkpoint(resume_from_checkpoint)
        if folder is None:
            unmark_after(out, 0)
            return super().train(None, trial, ignore_keys_for_eval)
        say_resuming(folder)
        unmark_after(out, read_mark(folder)["step"])
        self._has_stepped, self._is_resuming = False, True
        try:
            check_state(folder)
            return super().train(str(folder), trial, ignore_keys_for_eval)
        except _UNREADABLE as error:
            # After the first step, it isn't the checkpoint.
            if self._has_stepped or isinstance(error, BfpoError | torch.OutOfMemoryError):
                raise
            reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            raise TrainingError(
                f"{folder} can't be read ({reason}); delete it to resume from the previous checkpoint"
            ) from error
        finally:
            self._is_resuming = False

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model, as transformers does."""
        with without_base_config_warning():
            super().save_model(output_dir, _internal_call)

    # The loss, implemented by subclasses.

    @abstractmethod
    def row_weights(self, rows: StepRows) -> tuple[Weights, Weights]:
        """Return the weight of each row in the step's loss, for the main rows and the buffer rows."""

    @abstractmethod
    def example_losses(self, model: nn.Module, batch: Batch, sums: MetricSums, *, training: bool) -> Tensor:
        """Return the loss of each example of a batch, (n,), and add its metrics to `sums`.

        Args:
            model: Model, wrapped for training.
            batch: Batch on the model's device.
            sums: Running sums that the batch's metrics are added to.
            training: Whether this is a training step rather than an evaluation.
        """

    def step_share(self, batch: Batch) -> Tensor:
        """Return the part of the step's loss that a batch has, (); by default its weights."""
        return batch.weights.sum()

    def policy_scores(self, model: nn.Module, layout: Layout, score: Score = completion_logps) -> Tensor:
        """Return a score of the policy; where gradients are computed, its load-balancing loss is kept for the step.

        Args:
            model: Model, wrapped for training.
            layout: Layout of the completions.
            score: Function of the model and the layout.
        """
        if not self.router_loss_weight or not torch.is_grad_enabled():
            scores: Tensor = model(layout=layout, score=score)
        else:
            scores, self._router_loss = model(layout=layout, score=partial(scores_and_router_loss, score=score))
        return scores

    def reweighted(self, model: nn.Module, packs: list[Batch]) -> list[Batch]:
        """Return the packs of a micro-batch with the weights of the step's loss; by default those that they have.

        Args:
            model: Model, wrapped for training.
            packs: Packs of this process.
        """
        return packs

    # Data.

    @property
    def shards_weights(self) -> bool:
        """Whether a process holds only a part of the weights during training (FSDP, DeepSpeed)."""
        return bool(self.is_fsdp_enabled or self.is_deepspeed_enabled)

    @property
    def packing_check(self) -> PackingCheck | None:
        """Comparison of packed and padded rows on the first examples; None if rows are padded."""
        return self._resolved_layout[1]

    @property
    def layout_section(self) -> LayoutSection:
        """How tokens are fed: as requested, or padded rows if the model can't be fed packed ones.

        Raises:
            ModelError: If packed and padded rows of a verified model type give different numbers.
        """
        return self._resolved_layout[0]

    @cached_property
    def _resolved_layout(self) -> tuple[LayoutSection, PackingCheck | None]:
        examples = [self.table[int(row)] for row in self.plan.main[:CHECKED_EXAMPLES]]
        return resolve_layout(self.policy, self._requested_layout, examples, longest=self.table.longest)

    def attention_of_layout(self) -> AbstractContextManager[None]:
        """Return the context in which the layout's rows go forward and backward.

        It is needed around backward passes too, in which checkpointed layers are recomputed.
        """
        if self.layout_section.kind == "padded":
            return nullcontext()
        return span_attention(unwrap_adapter(self.policy).get_decoder().config)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return the micro-batches of this process for the epoch that training has reached."""
        args = self.args
        sampler = MicroBatches(
            self.plan,
            self.row_weights,
            per_device=args.per_device_train_batch_size,
            rank=args.process_index,
            world_size=args.world_size,
            steps_done=lambda: self.state.global_step,
            is_finished=lambda: self._is_resuming and self.state.global_step >= self.state.max_steps,
        )
        return self._loader(self.table, len(self.plan.main), sampler)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """Return this process's share of an evaluation table.

        Every process has the same number of batches; rows that only complete the last batch have weight 0.
        """
        table = self.eval_tables[self._eval_name(eval_dataset)]
        world, size = self.args.world_size, self.args.per_device_eval_batch_size
        share = -(-len(table) // world)
        start = self.args.process_index * share
        rows = [WeightedRow(min(row, len(table) - 1), float(row < len(table))) for row in range(start, start + share)]
        batches = [rows[first : first + size] for first in range(0, share, size)]
        return self._loader(table, len(table), batches)

    def _eval_name(self, eval_dataset: Any) -> str:
        """Return the name of an evaluation table.

        Raises:
            TypeError: If `eval_dataset` isn't one of the trainer's own.
        """
        if isinstance(eval_dataset, str) and eval_dataset in self.eval_tables:
            return eval_dataset
        if "" in self.eval_tables and (eval_dataset is None or eval_dataset is self.eval_dataset):
            return ""
        raise TypeError(
            "eval_dataset isn't one that the trainer was made with: it tokenizes them then. Make another trainer, or "
            f"give the name of one of {', '.join(filter(None, self.eval_tables)) or 'none'}"
        )

    def _eval_datasets(self) -> Any:
        if list(self.eval_tables) == [""]:
            return KeyDataset(len(self.eval_tables[""]))
        return {name: KeyDataset(len(table)) for name, table in self.eval_tables.items()} or None

    def _loader(self, table: TokenTable, num_rows: int, batches: Any) -> DataLoader[Any]:
        workers = self.args.dataloader_num_workers
        return DataLoader(
            KeyDataset(num_rows),
            batch_sampler=batches,
            collate_fn=Collator(table, self.layout_section),
            num_workers=workers,
            prefetch_factor=self.args.dataloader_prefetch_factor if workers else None,
            persistent_workers=workers > 0 and self.args.dataloader_persistent_workers,
        )

    # The step.

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Return the loss of a micro-batch, after a backward pass for each of its packs.

        Processes may have different numbers of packs: only the backward pass of the last pack synchronizes gradients,
        and nothing else waits for another process in between. Where weights are sharded, fillers are added instead.
        """
        self._has_stepped = True
        packs = equal_packs(self.accelerator, inputs["packs"], sharded=self.shards_weights)
        losses = []
        with self.attention_of_layout():
            for number, pack in enumerate(self.reweighted(model, packs), start=1):
                is_synchronized = number == len(packs) and self.accelerator.sync_gradients
                # Without synchronization FSDP would keep whole gradients on every process instead of shards.
                sync_in_every_pass = is_synchronized or self.is_fsdp_enabled
                with nullcontext() if sync_in_every_pass else no_gradient_sync(self.accelerator, model):
                    losses.append(super().training_step(model, {"pack": pack}, num_items_in_batch))
        self._finite_loss.check(self.accelerator, f"step {self.state.global_step}")
        return torch.stack(losses).sum()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return a pack's part of the step's loss, scaled for the mean that DDP takes over processes."""
        batch: Batch = inputs["pack"].to(self.args.device)
        sums = MetricSums() if batch.is_filler else self._train_sums
        losses = self.example_losses(model, batch, sums, training=True)
        if not batch.is_filler:
            self._finite_loss.add(batch.row_ids, losses)
            self._tokens_since_log += batch.layout.num_tokens
        loss = (losses * batch.weights).sum()
        if self._router_loss is not None:
            router_loss, self._router_loss = self._router_loss, None
            share = self.step_share(batch)
            loss = loss + self.router_loss_weight * router_loss * share
            sums.add({"router_aux_loss": (router_loss[None], share[None])})
        loss = loss * self.args.world_size
        return (loss, losses) if return_outputs else loss

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, None, None]:
        """Add a batch's loss and metrics to the running sums, without gathering anything per batch."""
        with torch.no_grad(), self.compute_loss_context_manager():
            for pack in equal_packs(self.accelerator, inputs["packs"], sharded=self.shards_weights):
                batch: Batch = pack.to(self.args.device)
                losses = self.example_losses(model, batch, self._eval_sums, training=False)
                if not batch.is_filler:
                    self._finite_loss.add(batch.row_ids, losses)
        self._finite_loss.check(self.accelerator, "evaluation")
        self._advance_evaluation(1)
        return None, None, None

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Evaluate; see `transformers.Trainer.evaluate`.

        Raises:
            TrainingError: If `metric_for_best_model` isn't among the metrics of all evaluation data.
        """
        metrics: dict[str, float] = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        metric = self.args.metric_for_best_model
        if metric is not None and eval_dataset is None and metric_key_prefix == "eval":
            name = metric if metric.startswith("eval_") else f"eval_{metric}"
            if name not in metrics:
                expected = ", ".join(sorted(metrics))
                raise TrainingError(f"metric_for_best_model is '{metric}'; expected one of {expected}")
        return metrics

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Evaluate and return exact means over the examples of all processes; a metric without examples is None."""
        prefix = metric_key_prefix.rstrip("_")
        name = "held-out data" if prefix == "eval" else prefix.removeprefix("eval_")
        with progress(f"evaluating {name}", len(dataloader)) as self._advance_evaluation:
            output = super().evaluation_loop(dataloader, description, True, ignore_keys, metric_key_prefix)
        means: dict[str, Any] = {
            f"{prefix}_{name}": value for name, value in self._eval_sums.means(self.accelerator).items()
        }
        return output._replace(metrics={**(output.metrics or {}), **means})

    # Logs.

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        """Log values; those of a training step get the mean metrics since the last log added."""
        if "loss" in logs and "grad_norm" in logs:
            logs |= {
                name: mean for name, mean in self._train_sums.means(self.accelerator).items() if mean is not None
            }
            logs["bfpo/clip_fraction"] = float(self._clipped_steps) / max(self._steps_since_log, 1)
            self._clipped_steps, self._steps_since_log = torch.zeros_like(self._clipped_steps), 0
            tokens = self.accelerator.reduce(torch.tensor(float(self._tokens_since_log), device=self.args.device))
            seconds = time.monotonic() - self._last_log - self._pauses.take()
            logs["tokens_per_second"] = float(tokens) / seconds
            self._tokens_since_log, self._last_log = 0, time.monotonic()
        super().log(logs, start_time)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)  # type: ignore[no-untyped-call]
        if self.args.max_grad_norm > 0 and norm is not None:
            self._clipped_steps += norm > self.args.max_grad_norm
        self._steps_since_log += 1
        return norm

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Return the floating-point operations of a step: 6 per weight and token, without padding.

        As in transformers, all weights count, trained or not.
        """
        return 6 * self.selection.total * sum(int(pack.layout.num_tokens) for pack in inputs["packs"])
