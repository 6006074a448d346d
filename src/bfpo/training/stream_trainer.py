"""The trainer that follows a stream plan: what preference training and supervised fine-tuning share."""

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import nullcontext
from functools import cached_property
from json import JSONDecodeError
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from bfpo.config.recipes import LayoutSection
from bfpo.core.terminal import say
from bfpo.data.table import TokenTable
from bfpo.errors import TrainingError
from bfpo.model.attention import span_attention
from bfpo.model.layout_check import PackingCheck, settle_layout
from bfpo.model.logps import add_layout_forward
from bfpo.model.lora import CausalLM, under_adapter
from bfpo.model.selective import disable_dropout, select_parameters
from bfpo.training.batches import Batch, Collator, RowNumbers
from bfpo.training.checkpoints import (
    MARK,
    CompletionMark,
    check_same_run,
    folder_to_resume,
    start_fingerprint,
    unmark_after,
)
from bfpo.training.metrics import LossWatch, MetricSums
from bfpo.training.processes import check_devices, check_sharding, equal_packs, gradients_held_back
from bfpo.training.streams import MicroBatches, Rows, StepRows, StreamPlan, WeightedRow, Weights

# Examples on which packed and padded rows are compared before anything is trained.
CHECKED = 4


class StreamTrainer(Trainer, ABC):
    """A `transformers.Trainer` that follows a stream plan. Subclasses say what the loss is.

    Overridden public hooks: `get_train_dataloader`, `get_eval_dataloader`, `training_step`, `compute_loss`,
    `prediction_step`, `evaluation_loop`, `log`, `floating_point_ops`. Soft-private names in use: `_get_grad_norm` (to
    count clipped steps) and the class attribute `loss_is_scaled_for_ga`; a test holds both to the installed version.

    Args:
        model: A causal language model; changed in place (dropout off, `requires_grad`, a forward for layouts).
        args: Training arguments; `per_device_train_batch_size` counts rows of the main stream.
        table: What to train on.
        eval_tables: What to evaluate on, by name; a single one named "" is reported as plain `eval_...`.
        main: Rows of the main stream.
        buffer: Rows of the buffer.
        processing_class: Saved with the checkpoints.
        train_only: Patterns of the parameters to train; None trains all.
        layout: How tokens are fed; None for packed rows. A model that can't be fed them gets padded ones.
        callbacks: As in transformers.
        optimizers: As in transformers.

    Raises:
        RecipeError: If what the launcher asks for isn't what would run; see `bfpo.training.processes`.
    """

    # The loss of a micro-batch is already its part of the step's loss: transformers must not divide it again.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: CausalLM,
        args: TrainingArguments,
        table: TokenTable,
        eval_tables: Mapping[str, TokenTable],
        *,
        main: Rows,
        buffer: Rows,
        processing_class: PreTrainedTokenizerBase | None = None,
        train_only: list[str] | None = None,
        layout: LayoutSection | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ) -> None:
        check_devices(args)
        start = start_fingerprint(model)
        self.selection = select_parameters(model, train_only)
        disable_dropout(model)
        add_layout_forward(model)
        if args.logging_nan_inf_filter:
            # It would replace a bad loss by the average of the good ones.
            args.logging_nan_inf_filter = False
        self.table, self.eval_tables = table, dict(eval_tables)
        self._policy, self._asked_layout = model, layout or LayoutSection()
        super().__init__(
            model=model,
            args=args,
            data_collator=Collator(table, self._asked_layout),
            train_dataset=RowNumbers(len(main)),
            eval_dataset=self._eval_names(),
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        check_sharding(self.accelerator, model)
        batch_size = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        self.plan = StreamPlan(main, buffer, batch_size, args.seed)
        self._start = start
        self.add_callback(CompletionMark(self.shared_with_a_resumed_run(), keep=args.save_total_limit))
        args.save_total_limit = None
        self._train_sums, self._eval_sums = MetricSums(), MetricSums()
        self._watch = LossWatch()
        self._clipped_steps, self._steps_since_log = torch.zeros((), device=args.device), 0
        self._tokens_since_log, self._last_log = 0, time.monotonic()

    def shared_with_a_resumed_run(self) -> dict[str, Any]:
        """Return what must not change when a run is resumed."""
        return {
            "world_size": self.args.world_size,
            "per_device_train_batch_size": self.args.per_device_train_batch_size,
            "gradient_accumulation_steps": self.args.gradient_accumulation_steps,
            "seed": self.args.seed,
            "data": self.table.fingerprint,
            "start model": self._start,
        }

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Train, or go on from a checkpoint.

        Args:
            resume_from_checkpoint: A checkpoint's folder, or True for the newest whole one in `output_dir` (from
                step 0 if there is none).
            trial: As in transformers.
            ignore_keys_for_eval: As in transformers.

        Raises:
            RecipeError: If the checkpoint belongs to another plan.
            TrainingError: If the folder isn't a whole checkpoint, or can't be read.
        """
        out = Path(str(self.args.output_dir))
        folder = folder_to_resume(out, resume_from_checkpoint)
        if folder is None:
            unmark_after(out, 0)
            return super().train(None, trial, ignore_keys_for_eval)
        check_same_run(folder, self.shared_with_a_resumed_run())
        say(f"going on from {folder}")
        unmark_after(out, json.loads((folder / MARK).read_text(encoding="utf-8"))["step"])
        try:
            return super().train(str(folder), trial, ignore_keys_for_eval)
        except (SafetensorError, UnpicklingError, EOFError, JSONDecodeError, RuntimeError) as error:
            # torch has no class of its own for a file it can't read.
            if isinstance(error, RuntimeError) and "StreamReader" not in str(error):
                raise
            reason = str(error).splitlines()[0]
            raise TrainingError(
                f"{folder} can't be read ({reason}); delete it to go on from the one before"
            ) from error

    # What a subclass says.

    @abstractmethod
    def row_weights(self, rows: StepRows) -> tuple[Weights, Weights]:
        """Return each row's weight in the step's loss, for the main rows and the buffer's."""

    @abstractmethod
    def example_losses(self, model: nn.Module, batch: Batch, sums: MetricSums, *, training: bool) -> Tensor:
        """Return the loss of each example of a batch, (n,), and add its metrics to `sums`.

        Args:
            model: The model as it is wrapped for training.
            batch: On the model's device.
            sums: Where metrics go.
            training: Whether this is a training step.
        """

    # Data.

    @property
    def shards_weights(self) -> bool:
        """Whether a process holds only a part of the weights, or will (FSDP, DeepSpeed)."""
        return bool(self.is_fsdp_enabled or self.is_deepspeed_enabled)

    @property
    def packing_check(self) -> PackingCheck | None:
        """How packed and padded rows compare on the first examples; None if rows are padded."""
        return self._settled[1]

    @property
    def layout(self) -> LayoutSection:
        """How tokens are fed: what was asked for, or padded rows if the model can't be fed packed ones.

        Raises:
            ModelError: If packed and padded numbers differ where they should not.
        """
        return self._settled[0]

    @cached_property
    def _settled(self) -> tuple[LayoutSection, PackingCheck | None]:
        examples = [self.table[int(row)] for row in self.plan.main[:CHECKED]]
        return settle_layout(self._policy, self._asked_layout, examples, longest=self.table.longest)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return the micro-batches of this rank, epoch by epoch, from the step that training has reached."""
        args = self.args
        sampler = MicroBatches(
            self.plan,
            self.row_weights,
            per_device=args.per_device_train_batch_size,
            rank=args.process_index,
            world_size=args.world_size,
            steps_done=lambda: self.state.global_step,
        )
        return self._loader(RowNumbers(len(self.plan.main)), sampler, Collator(self.table, self.layout))

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """Return this rank's share of an evaluation table.

        Every rank has the same number of batches; rows that only fill up the last one have weight 0.
        """
        table = self.eval_tables[eval_dataset if isinstance(eval_dataset, str) else ""]
        world, size = self.args.world_size, self.args.per_device_eval_batch_size
        share = -(-len(table) // world)
        start = self.args.process_index * share
        rows = [WeightedRow(min(row, len(table) - 1), float(row < len(table))) for row in range(start, start + share)]
        batches = [rows[first : first + size] for first in range(0, share, size)]
        return self._loader(RowNumbers(len(table)), batches, Collator(table, self.layout))

    def _eval_names(self) -> Any:
        if list(self.eval_tables) == [""]:
            return RowNumbers(len(self.eval_tables[""]))
        return {name: RowNumbers(len(table)) for name, table in self.eval_tables.items()} or None

    def _loader(self, rows: RowNumbers, batches: Any, collator: Collator) -> DataLoader[Any]:
        workers = self.args.dataloader_num_workers
        return DataLoader(
            rows,
            batch_sampler=batches,
            collate_fn=collator,
            num_workers=workers,
            persistent_workers=workers > 0 and self.args.dataloader_persistent_workers,
        )

    # The step.

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Return the loss of a micro-batch, with a backward pass for each of its packs.

        Processes may have different numbers of packs: only the last one's backward pass synchronizes gradients, and
        nothing else waits for another process in between; where weights are sharded they are filled up.
        """
        packs = equal_packs(self.accelerator, inputs["packs"], sharded=self.shards_weights)
        losses = []
        # Backward passes included: a checkpointed layer attends once more there.
        config = under_adapter(self._policy).get_decoder().config
        with nullcontext() if self.layout.kind == "padded" else span_attention(config):
            for number, pack in enumerate(packs, start=1):
                # Held back under FSDP they would be whole on every process, and no longer in shards.
                exchanges = number == len(packs) and self.accelerator.sync_gradients
                with (
                    nullcontext()
                    if exchanges or self.is_fsdp_enabled
                    else gradients_held_back(self.accelerator, model)
                ):
                    losses.append(super().training_step(model, {"pack": pack}, num_items_in_batch))
        self._watch.stop_unless_finite(self.accelerator, f"step {self.state.global_step}")
        return torch.stack(losses).sum()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return a pack's part of the step's loss, scaled for the mean that DDP takes over ranks."""
        batch: Batch = inputs["pack"].to(self.args.device)
        sums = MetricSums() if batch.is_filler else self._train_sums
        losses = self.example_losses(model, batch, sums, training=True)
        if not batch.is_filler:
            self._watch.add(batch.row_ids, losses)
            self._tokens_since_log += batch.layout.num_tokens
        loss = (losses * batch.weights).sum() * self.args.world_size
        return (loss, losses) if return_outputs else loss

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, None, None]:
        """Add a batch's loss and metrics to the running sums; nothing is gathered batch by batch."""
        with torch.no_grad(), self.compute_loss_context_manager():
            for pack in equal_packs(self.accelerator, inputs["packs"], sharded=self.shards_weights):
                batch: Batch = pack.to(self.args.device)
                losses = self.example_losses(model, batch, self._eval_sums, training=False)
                if not batch.is_filler:
                    self._watch.add(batch.row_ids, losses)
        self._watch.stop_unless_finite(self.accelerator, "evaluation")
        return None, None, None

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Evaluate, and return exact means over all examples of all ranks; a metric without examples is None."""
        output = super().evaluation_loop(dataloader, description, True, ignore_keys, metric_key_prefix)
        prefix = metric_key_prefix.rstrip("_")
        means: dict[str, Any] = {
            f"{prefix}_{name}": value for name, value in self._eval_sums.means(self.accelerator).items()
        }
        return output._replace(metrics={**(output.metrics or {}), **means})

    # What a run tells.

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        """Log, with the mean metrics since the last log added to a training step's line."""
        if "loss" in logs and "grad_norm" in logs:
            logs |= {
                name: mean for name, mean in self._train_sums.means(self.accelerator).items() if mean is not None
            }
            logs["bfpo/clip_fraction"] = float(self._clipped_steps) / max(self._steps_since_log, 1)
            self._clipped_steps, self._steps_since_log = torch.zeros_like(self._clipped_steps), 0
            tokens = self.accelerator.reduce(torch.tensor(float(self._tokens_since_log), device=self.args.device))
            logs["tokens_per_second"] = float(tokens) / (time.monotonic() - self._last_log)
            self._tokens_since_log, self._last_log = 0, time.monotonic()
        super().log(logs, start_time)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)  # type: ignore[no-untyped-call]
        if self.args.max_grad_norm > 0 and norm is not None:
            self._clipped_steps += norm > self.args.max_grad_norm
        self._steps_since_log += 1
        return norm

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Return the matrix-multiplication work of a step on useful tokens: 6 per trained weight and token."""
        return 6 * self.selection.total * sum(int(pack.layout.num_tokens) for pack in inputs["packs"])
