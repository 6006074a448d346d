"""The reference of a run: which kind it is, and the pass that fills the cache."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from accelerate.utils import broadcast_object_list

from bfpo.config.recipes import ReferenceKind
from bfpo.core.terminal import progress, say
from bfpo.data.table import Example, Floats, PairTable
from bfpo.errors import RecipeError, TrainingError
from bfpo.model.layout import Layout, packed_layout, packs, padded_layout
from bfpo.model.lora import CausalLM
from bfpo.model.reference_cache import ReferenceEntry, cache_key, model_content, wants_cache

if TYPE_CHECKING:
    from bfpo.training.trainer import BFPOTrainer

# Values of an entry that are computed again before it is used.
RECHECKED = 8
# Examples that are fed together when rows are padded.
PADDED = 8


def resolve_reference(asked: ReferenceKind, trainer: "BFPOTrainer", *, new_adapter: bool) -> ReferenceKind:
    """Return what the reference is: the kind asked for, or the one that `auto` means here.

    Args:
        asked: Of the recipe.
        trainer: With its model and what of it is trained.
        new_adapter: Whether training starts from an adapter that changes nothing yet.

    Raises:
        RecipeError: If the kind asked for would be wrong here.
    """
    if asked == "adapter" and not new_adapter:
        raise RecipeError(
            "reference: adapter means the model without its adapter, and this run starts without a new one (lora:); "
            "use reference: auto"
        )
    if trainer.shards_weights and asked in ("adapter", "shared"):
        raise RecipeError(
            f"reference: {asked} needs whole weights on every process, and FSDP or DeepSpeed shards them; use "
            "reference: cache"
        )
    if asked != "auto":
        return asked
    if trainer.shards_weights:
        return "cache"
    if new_adapter:
        return "adapter"
    assert trainer.model is not None
    return "cache" if wants_cache(trainer.model) else "shared"


class ReferencePass:
    """Gives the reference's log-probabilities of tables, from the cache or by a pass over them.

    Every process computes its share of the parts. The model must be as it is at step 0, and not be wrapped yet.

    Args:
        trainer: Its layout, precision and processes.
        model: The trainer's model.
        folder: Of the cache.
    """

    def __init__(self, trainer: "BFPOTrainer", model: CausalLM, folder: Path) -> None:
        self._trainer, self._model, self._folder = trainer, model, folder
        args = trainer.args
        # Of the launcher, or trainer.bf16.
        autocast = {"bf16": "bfloat16", "fp16": "float16"}.get(trainer.accelerator.mixed_precision)
        self._arithmetic = str(self._model.dtype).removeprefix("torch.") + (f" under {autocast}" if autocast else "")
        self.low_precision = autocast is not None or self._model.dtype in (torch.bfloat16, torch.float16)
        # One process reads all weights, the others hear what it found.
        content = [model_content(self._model) if args.process_index == 0 else ""]
        self._model_hash = broadcast_object_list(content)[0] if args.world_size > 1 else content[0]

    def values(self, table: PairTable, what: str) -> Floats:
        """Return the log-probabilities of a table's completions, nats, (N, 2).

        Args:
            table: What to score.
            what: The table's name, for messages.

        Raises:
            DataError: If the entry in the cache is cut, damaged or stale.
            TrainingError: If a log-probability isn't finite.
        """
        key = cache_key(self._model_hash, table, arithmetic=self._arithmetic, layout=self._trainer.layout.kind)
        entry = ReferenceEntry(self._folder, key, (len(table), table.completions))
        found = entry.finished
        # No process may see the entry finished by another run while others wait for it to join the pass.
        self._trainer.accelerator.wait_for_everyone()
        if not found:
            self._make(entry, table, what)
        self._trainer.accelerator.wait_for_everyone()
        if self._trainer.args.process_index == 0:
            entry.finish()
        self._trainer.accelerator.wait_for_everyone()
        values = entry.read()
        self._recheck(entry, values, table)
        say(f"reference of {len(table):,} {what} pairs: {'found in' if found else 'kept in'} {entry.folder}")
        return values

    def _make(self, entry: ReferenceEntry, table: PairTable, what: str) -> None:
        args, parts = self._trainer.args, entry.parts
        mine = range(args.process_index, len(parts), args.world_size)
        size = sum(parts[number].stop - parts[number].start for number in mine)
        with self._ready(), progress(f"reference of {what} pairs", size) as advance:
            for number in mine:
                rows = range(parts[number].start, parts[number].stop)
                if not entry.has_part(number):
                    entry.write_part(number, self._finite(table, list(rows)))
                advance(len(rows))

    def _recheck(self, entry: ReferenceEntry, values: Floats, table: PairTable) -> None:
        """Compare a few values with what the model gives now: other libraries may compute something else."""
        rows = np.unique(np.linspace(0, len(table) - 1, RECHECKED).astype(int)).tolist()
        with self._ready():
            now = self._finite(table, rows)
        kept = np.asarray(values[rows])
        off = np.abs(now - kept) > tolerance(low_precision=self.low_precision) * (np.abs(kept) + 1)
        if off.any():
            row, answer = np.argwhere(off)[0]
            raise entry.refused(
                f"it is stale: pair {table.row_ids[rows[row]]} has {kept[row, answer]:.6g} nats in it, the model now "
                f"gives {now[row, answer]:.6g}"
            )

    def _finite(self, table: PairTable, rows: list[int]) -> Floats:
        values = self._logps([table[row] for row in rows]).reshape(len(rows), table.completions)
        bad = [table.row_ids[rows[place]] for place in np.flatnonzero(~np.isfinite(values).all(axis=1))]
        if bad:
            raise TrainingError(
                f"the reference's log-probability is not finite for rows {', '.join(bad[:5])}; look at these rows, "
                "or at the model that training starts from"
            )
        return values

    def _logps(self, examples: list[Example]) -> Floats:
        layout = self._trainer.layout
        layouts: list[Layout]
        if layout.kind == "packed":
            layouts = [packed_layout(examples[part]) for part in packs(examples, layout.max_tokens_per_pack)]
        else:
            layouts = [padded_layout(examples[n : n + PADDED]) for n in range(0, len(examples), PADDED)]
        device = self._trainer.args.device
        scored = [self._model(layout=one.to(device)).double().cpu().numpy() for one in layouts]
        return np.concatenate(scored)

    @contextmanager
    def _ready(self) -> Iterator[None]:
        """Compute as in training: the same mode, precision and device, without gradients."""
        device = self._trainer.args.device
        # Without it the model would compute in its weights' type: autocast comes with the wrapper.
        with torch.no_grad(), on_device(self._model, device), self._trainer.accelerator.autocast():
            self._model.train()
            yield


@contextmanager
def on_device(model: torch.nn.Module, device: torch.device) -> Iterator[None]:
    """Hold a model on a device for a while: one that will be sharded waits in the CPU's memory."""
    home = next(model.parameters()).device
    if home.type != device.type:
        model.to(device)
    try:
        yield
    finally:
        if home.type != device.type:
            model.to(home)


def tolerance(*, low_precision: bool) -> float:
    """Return how far equal log-probabilities may be apart, as a share of their size, when not computed in one way."""
    return 2e-2 if low_precision else 1e-3
