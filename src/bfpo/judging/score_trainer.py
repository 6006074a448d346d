"""Training of score heads on pairs, on the packed step of preference training."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, TrainingArguments
from transformers.trainer_utils import TrainOutput

from bfpo.config.recipes import LayoutSection
from bfpo.data.table import Floats, ScoreTable
from bfpo.data.verdict_scores import ScoreName
from bfpo.errors import RecipeError
from bfpo.losses.scores import cost_loss, reward_loss
from bfpo.model.logps import add_layout_forward
from bfpo.model.lora import CausalLM
from bfpo.model.score_heads import check_against_classifier, completion_scores, with_heads
from bfpo.training.batches import Batch, Collator
from bfpo.training.metrics import MetricSums
from bfpo.training.reference_pass import on_device, tolerance
from bfpo.training.stream_trainer import CHECKED_EXAMPLES, StreamTrainer
from bfpo.training.streams import StepRows, WeightedRow, Weights, mean_weights


class ScoreTrainer(StreamTrainer):
    """Trainer of a reward, a cost or both on one backbone.

    The loss of a step is mean(main) + buffer_weight · mean(buffer). A pair of the main stream has the losses of all
    heads, one of the buffer that of the reward.

    Args:
        model: Model of `add_score_heads`, with one output for each head, or an adapter on it; changed in place.
        args: Training arguments.
        table: Pairs to train on.
        eval_tables: Pairs to evaluate on, by name.
        processing_class: Tokenizer, saved with checkpoints.
        heads: Names of the scores, in the order of the outputs.
        regularization: Weight of the squares of scores.
        center_rewards_coefficient: Weight of the square of the sum of a pair's rewards.
        buffer_weight: Weight of the buffer's mean loss, at least 0.
        train_only: Patterns of the parameters to train besides the heads; None trains all.
        layout: How tokens are fed; None for packed rows.

    Raises:
        RecipeError: If weights are sharded.
    """

    def __init__(
        self,
        model: CausalLM,
        args: TrainingArguments,
        table: ScoreTable,
        eval_tables: Mapping[str, ScoreTable],
        processing_class: PreTrainedTokenizerBase,
        *,
        heads: Sequence[ScoreName],
        regularization: float = 0.0,
        center_rewards_coefficient: float = 0.0,
        buffer_weight: float = 1.0,
        train_only: list[str] | None = None,
        layout: LayoutSection | None = None,
    ) -> None:
        self.heads, self.buffer_weight = tuple(heads), buffer_weight
        self._coefficients = {
            "regularization": regularization,
            "center_rewards_coefficient": center_rewards_coefficient,
        }
        add_layout_forward(model, completion_scores)
        super().__init__(
            model,
            args,
            table,
            eval_tables,
            main=np.flatnonzero(~table.is_buffer),
            buffer=np.flatnonzero(table.is_buffer),
            processing_class=processing_class,
            train_only=with_heads(train_only),
            layout=layout,
        )
        if self.shards_weights:
            raise RecipeError(
                "score heads need whole weights on every process, but FSDP or DeepSpeed shards them; launch without "
                "sharding, and set lora if memory is short"
            )

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Check that scores are those that a saved head gives, then train; see `StreamTrainer.train`.

        Raises:
            ModelError: If they aren't.
        """
        model = self.accelerator.unwrap_model(self.model)
        low_precision = model.dtype in (torch.bfloat16, torch.float16)
        examples = [self.table[int(row)] for row in self.plan.main[:CHECKED_EXAMPLES]]
        with on_device(model, self.args.device):
            check_against_classifier(model, examples, tolerance=tolerance(low_precision=low_precision))
        return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    def resume_settings(self) -> dict[str, Any]:
        """Return the settings that must not change when a run is resumed, including those of the loss."""
        loss = {"heads": list(self.heads), **self._coefficients, "buffer_weight": self.buffer_weight}
        return super().resume_settings() | loss

    def row_weights(self, rows: StepRows) -> tuple[Weights, Weights]:
        """Return 1/B for main rows and buffer_weight/B for buffer rows."""
        return mean_weights(rows, self.buffer_weight)

    def example_losses(self, model: nn.Module, batch: Batch, sums: MetricSums, *, training: bool) -> Tensor:
        """Return the loss of each pair, (n,)."""
        scores: Tensor = model(layout=batch.layout).unflatten(0, (-1, 2))
        by_head = {name: scores[..., index] for index, name in enumerate(self.heads)}
        counted, signs = batch.weights > 0, batch.columns["signs"].to(scores)
        losses = scores.new_zeros(len(scores))
        metrics: dict[str, tuple[Tensor, Tensor]] = {}
        if (rewards := by_head.get("reward")) is not None:
            loss = reward_loss(rewards[:, 0], rewards[:, 1], **self._coefficients)
            losses = losses + loss
            is_ordered = (rewards[:, 0] > rewards[:, 1]).to(scores)
            metrics |= {"reward/loss": (loss, counted), "reward/order_accuracy": (is_ordered, counted)}
        if (costs := by_head.get("cost")) is not None:
            order = batch.columns["order"].to(scores)
            loss = cost_loss(costs, signs, order, regularization=self._coefficients["regularization"])
            losses = losses + loss
            is_right = ((costs > 0) == (signs > 0)).to(scores).mean(-1)
            known = counted & (signs != 0).any(-1)
            metrics |= {"cost/loss": (loss, known), "cost/sign_accuracy": (is_right, known)}
        if training:
            is_buffer = batch.columns["is_buffer"]
            metrics |= {"stream/main/loss": (losses, ~is_buffer), "stream/buffer/loss": (losses, is_buffer)}
        else:
            metrics["loss"] = (losses, counted)
        sums.add(metrics)
        return losses

    @torch.no_grad()
    def scores(self, table: ScoreTable) -> Floats:
        """Return the scores of all answers of a table, chosen first, (N, 2, heads)."""
        model, size = self.accelerator.unwrap_model(self.model), self.args.per_device_eval_batch_size
        collate = Collator(table, self.layout_section)
        scores = []
        with on_device(model, self.args.device), self.compute_loss_context_manager():
            for start in range(0, len(table), size):
                rows = [WeightedRow(row, 1.0) for row in range(start, min(start + size, len(table)))]
                scores += [model(layout=pack.to(self.args.device).layout) for pack in collate(rows)["packs"]]
        return torch.cat(scores).double().cpu().numpy().reshape(len(table), 2, len(self.heads))
