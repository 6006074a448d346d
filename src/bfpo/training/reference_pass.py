"""The reference of a run: its kind, and the pass that computes its log-probabilities for the cache."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from bfpo.config.recipes import LayoutSection, ReferenceKind
from bfpo.core.terminal import progress, say
from bfpo.data.table import Example, Floats, PairTable
from bfpo.errors import RecipeError, TrainingError
from bfpo.model.layout import packed_layout, packs, padded_layout
from bfpo.model.lora import CausalLM
from bfpo.model.reference_cache import ReferenceEntry, hash_model, make_cache_key, prefers_cache

# Rows of an entry that are computed again before it is used.
CHECKED_ROWS = 8
# Examples that are fed together when rows are padded.
PADDED_EXAMPLES = 8


def resolve_reference(
    requested: ReferenceKind,
    model: torch.nn.Module,
    *,
    new_adapter: bool,
    shards_weights: bool,
    whole_vocabulary: bool = False,
) -> ReferenceKind:
    """Return the kind of reference: the requested one, or the one that `auto` stands for.

    Args:
        requested: Kind of reference of the recipe.
        model: Policy after `select_parameters`.
        new_adapter: Whether training starts from an adapter that doesn't change the model yet.
        shards_weights: Whether a process holds only a part of the weights.
        whole_vocabulary: Whether the loss needs the reference's probabilities of all tokens.

    Raises:
        RecipeError: If the requested kind would give wrong numbers, or doesn't have what the loss needs.
    """
    if requested == "adapter" and not new_adapter:
        raise RecipeError(
            "reference: adapter means the model without its adapter, but this run doesn't start with a new one "
            "(lora:); use reference: auto"
        )
    if whole_vocabulary and (shards_weights or requested == "cache"):
        cause = "weights are sharded, which needs the cache" if shards_weights else "reference is cache"
        raise RecipeError(
            f"this loss needs the reference's probabilities of all tokens, and {cause}, which has those of the given "
            "answers only; use reference: shared, or adapter with lora, or another loss such as dpo"
        )
    if shards_weights and requested in ("adapter", "shared"):
        raise RecipeError(
            f"reference: {requested} needs whole weights on every process, but FSDP or DeepSpeed shards them; use "
            "reference: cache"
        )
    if requested != "auto":
        return requested
    if shards_weights:
        return "cache"
    if new_adapter:
        return "adapter"
    return "cache" if prefers_cache(model) and not whole_vocabulary else "shared"


class ReferencePass:
    """Log-probabilities of the reference for whole tables, read from the cache or computed in one pass.

    Every process computes its share of the parts. The model must be as it is at step 0, and not be wrapped yet.

    Args:
        model: Model that training starts from, after `add_layout_forward`.
        folder: Folder of the cache.
        layout_section: How tokens are fed.
        accelerator: Accelerator of the run.
    """

    def __init__(
        self, model: CausalLM, folder: Path, layout_section: LayoutSection, accelerator: Accelerator
    ) -> None:
        self._model, self._folder = model, folder
        self._layout_section, self._accelerator = layout_section, accelerator
        # Autocast as set by the launcher or by trainer.bf16.
        autocast = {"bf16": "bfloat16", "fp16": "float16"}.get(accelerator.mixed_precision)
        self._arithmetic = str(model.dtype).removeprefix("torch.") + (f" under {autocast}" if autocast else "")
        self.low_precision = autocast is not None or model.dtype in (torch.bfloat16, torch.float16)
        # One process hashes all weights and sends the hash to the others.
        model_hash = [hash_model(model) if accelerator.process_index == 0 else ""]
        self._model_hash = broadcast_object_list(model_hash)[0] if accelerator.num_processes > 1 else model_hash[0]

    def score(self, table: PairTable, name: str) -> Floats:
        """Return the log-probabilities of a table's completions, nats, (N, 2).

        Args:
            table: Pairs to score.
            name: Name of the table, for messages.

        Raises:
            DataError: If the entry in the cache is damaged or stale.
            TrainingError: If a log-probability isn't finite.
        """
        key = make_cache_key(self._model_hash, table, arithmetic=self._arithmetic, layout=self._layout_section.kind)
        entry = ReferenceEntry(self._folder, key, (len(table), table.completions))
        is_cached = entry.is_finished
        # All processes must decide before any of them computes: another run could finish the entry in between.
        self._accelerator.wait_for_everyone()
        if not is_cached:
            self._compute(entry, table, name)
        self._accelerator.wait_for_everyone()
        if self._accelerator.process_index == 0:
            entry.finish()
        self._accelerator.wait_for_everyone()
        values = entry.read()
        self._check(entry, values, table)
        say(f"reference of {len(table):,} {name} pairs: {'read from' if is_cached else 'saved in'} {entry.folder}")
        return values

    def _compute(self, entry: ReferenceEntry, table: PairTable, name: str) -> None:
        parts = entry.parts
        own_parts = range(self._accelerator.process_index, len(parts), self._accelerator.num_processes)
        num_rows = sum(parts[number].stop - parts[number].start for number in own_parts)
        with self._as_in_training(), progress(f"reference of {name} pairs", num_rows) as advance:
            for number in own_parts:
                rows = range(parts[number].start, parts[number].stop)
                if not entry.has_part(number):
                    entry.write_part(number, self._score_rows(table, list(rows)))
                advance(len(rows))

    def _check(self, entry: ReferenceEntry, values: Floats, table: PairTable) -> None:
        """Compare a few values with those of the model now: other library versions may compute something else."""
        rows = np.unique(np.linspace(0, len(table) - 1, CHECKED_ROWS).astype(int)).tolist()
        with self._as_in_training():
            expected = self._score_rows(table, rows)
        cached = np.asarray(values[rows])
        is_stale = np.abs(expected - cached) > tolerance(low_precision=self.low_precision) * (np.abs(cached) + 1)
        if is_stale.any():
            row, completion = np.argwhere(is_stale)[0]
            raise entry.error(
                f"it is stale: pair {table.row_ids[rows[row]]} has {cached[row, completion]:.6g} nats in it, the "
                f"model now gives {expected[row, completion]:.6g}"
            )

    def _score_rows(self, table: PairTable, rows: list[int]) -> Floats:
        values = self._score_examples([table[row] for row in rows]).reshape(len(rows), table.completions)
        bad = [table.row_ids[rows[index]] for index in np.flatnonzero(~np.isfinite(values).all(axis=1))]
        if bad:
            raise TrainingError(
                f"the reference's log-probability is not finite for rows {', '.join(bad[:5])}; check these rows, and "
                "the model that training starts from"
            )
        return values

    def _score_examples(self, examples: list[Example]) -> Floats:
        if self._layout_section.kind == "packed":
            max_tokens = self._layout_section.max_tokens_per_pack
            layouts = [packed_layout(examples[part]) for part in packs(examples, max_tokens)]
        else:
            starts = range(0, len(examples), PADDED_EXAMPLES)
            layouts = [padded_layout(examples[start : start + PADDED_EXAMPLES]) for start in starts]
        device = self._accelerator.device
        return np.concatenate([self._model(layout=layout.to(device)).double().cpu().numpy() for layout in layouts])

    @contextmanager
    def _as_in_training(self) -> Iterator[None]:
        """Compute in the same mode, precision and device as in training, without gradients."""
        # The trainer's autocast comes with wrapping the model, which hasn't happened yet.
        with (
            torch.no_grad(),
            on_device(self._model, self._accelerator.device),
            self._accelerator.autocast(),
        ):
            self._model.train()
            yield


@contextmanager
def on_device(model: torch.nn.Module, device: torch.device) -> Iterator[None]:
    """Move a model to a device inside a `with` block: a model that will be sharded is still in the CPU's memory."""
    original = next(model.parameters()).device
    if original.type != device.type:
        model.to(device)
    try:
        yield
    finally:
        if original.type != device.type:
            model.to(original)


def tolerance(*, low_precision: bool) -> float:
    """Return the allowed difference of log-probabilities computed in different ways, as a share of their size."""
    return 2e-2 if low_precision else 1e-3
