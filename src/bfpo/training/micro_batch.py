"""The micro-batch of a run by measured memory: `per_device_train_batch_size: auto`.

Micro-batches of the longest rows go forward and backward before training, from the smallest on. The rows of a step
stay the same whatever is chosen: a larger micro-batch means fewer of them.
"""

import gc
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch
from accelerate.utils import gather_object

from bfpo.core.terminal import say, timed
from bfpo.data.table import TokenTable
from bfpo.errors import RecipeError
from bfpo.training.arguments import is_auto
from bfpo.training.batches import Batch, Collator
from bfpo.training.checkpoints import micro_batch_of_run
from bfpo.training.estimate import max_micro_batch_tokens
from bfpo.training.metrics import MetricSums
from bfpo.training.reference_pass import on_device
from bfpo.training.stream_trainer import StreamTrainer
from bfpo.training.streams import WeightedRow

SHARE = 0.9
"""Share of the memory that a run may fill; the rest is for fragmentation, saving and evaluation."""
# Container limits, of cgroup v2 and v1.
_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
_INTERVAL = 0.005


class MicroBatch(NamedTuple):
    """The chosen micro-batch.

    Args:
        size: Rows of each stream that a process feeds at a time.
        accumulation: Micro-batches of a step.
        peak: Bytes that a step needs, measured with the longest rows; None if the size is that of a checkpoint.
        limit: Bytes that a step may need.
    """

    size: int
    accumulation: int
    peak: int | None
    limit: int


def fit_micro_batch(trainer: StreamTrainer, resume: str | bool | None = None) -> MicroBatch:
    """Choose the largest micro-batch whose measured memory fits, and set it; the pairs of a step stay the same.

    Args:
        trainer: Trainer of a run that hasn't started. A step of a process has
            `per_device_train_batch_size · gradient_accumulation_steps` rows of each stream.
        resume: Folder of a checkpoint that will be resumed from, or True for the newest one; its micro-batch is
            taken.

    Returns:
        The micro-batch.

    Raises:
        RecipeError: If weights are sharded, or not even one row of each stream fits.
    """
    if trainer.shards_weights:
        raise RecipeError(
            "trainer.per_device_train_batch_size is auto, which measures whole weights, and FSDP or DeepSpeed shards "
            "them; set the number that `bfpo train RECIPE --plan` shows"
        )
    args = trainer.args
    rows = args.per_device_train_batch_size * args.gradient_accumulation_steps
    limit = int(SHARE * memory_limit(args.device))
    resumed = micro_batch_of_run(Path(str(args.output_dir)), resume)
    if resumed is not None and rows % resumed == 0:
        chosen = MicroBatch(resumed, rows // resumed, None, limit)
        say(f"micro-batch: {chosen.size} rows of each stream, as in the checkpoint")
    else:
        with timed("measuring the memory of micro-batches"):
            size, peak = _largest(trainer, rows, limit)
        chosen = MicroBatch(size, rows // size, peak, limit)
        say(
            f"micro-batch: {chosen.size} x {chosen.accumulation} rows of each stream; a step needs "
            f"{peak / 2**30:,.2f} GiB of {limit / 2**30:,.1f}"
        )
    trainer.set_micro_batch(chosen.size)
    return chosen


def fit_if_auto(trainer: StreamTrainer, options: Mapping[str, Any], resume: str | bool | None) -> dict[str, Any]:
    """Choose the micro-batch if a recipe leaves it to be measured, and return it for `run.json`.

    Args:
        trainer: Trainer of a run that hasn't started.
        options: Keys of the recipe's `trainer`.
        resume: As in `fit_micro_batch`.
    """
    return {"micro_batch": fit_micro_batch(trainer, resume)._asdict()} if is_auto(options) else {}


def memory_limit(device: torch.device) -> int:
    """Return the bytes that this process may use in all: on a CPU with what it already uses, and its container's."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        reserved: int = torch.cuda.memory_reserved(device)
        return int(free) + reserved
    limits: list[int] = [psutil.virtual_memory().available + _memory(device)]
    for file in _LIMITS:
        text = file.read_text(encoding="utf-8").strip() if file.is_file() else "max"
        limits += [int(text)] if text.isdecimal() else []
    return min(limits) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _largest(trainer: StreamTrainer, rows: int, limit: int) -> tuple[int, int]:
    """Return the largest divisor of a step's rows that fits on every process, and its peak in bytes."""
    sizes = [size for size in range(1, rows + 1) if rows % size == 0]
    best, best_peak, fed = 0, 0, 0
    before = _memory(trainer.args.device)
    # AdamW's moments, and DDP's copy of the gradients.
    later = (2 + (trainer.args.world_size > 1)) * sum(
        parameter.numel() * parameter.element_size()
        for parameter in trainer.policy.parameters()
        if parameter.requires_grad
    )
    for size in sizes:
        tokens = max_micro_batch_tokens(trainer.table, _streams(trainer) * size, trainer.layout_section)
        if tokens > fed:
            # Not tried if it is bound to fail: on a CPU the system would end the process.
            expected = before + (best_peak - before) * tokens / fed if fed else 0
            peak = _measure(trainer, size, tokens) + later if expected <= limit else int(expected)
            if not _agree(peak <= limit):
                if not best:
                    raise RecipeError(
                        f"not even one row of each stream fits into {limit / 2**30:,.2f} GiB: lower "
                        "layout.max_tokens_per_pack or text.max_length, set trainer.activation_checkpointing=true, "
                        "or train an adapter (lora.r=16)"
                    )
                break
            best_peak, fed = peak, tokens
        # Packed rows have a maximum length: a larger micro-batch then takes no more memory.
        best = size
    return best, best_peak


def _measure(trainer: StreamTrainer, size: int, tokens: int) -> int:
    """Return the peak of memory, bytes, of a pass forward and backward with the longest rows.

    Args:
        trainer: The trainer.
        size: Rows of each stream.
        tokens: Maximum number of tokens fed at a time; that of the pass is smaller if no rows add up to it.
    """
    streams = (trainer.plan.main, trainer.plan.buffer)
    rows = [row for stream in streams if len(stream) for row in _longest(trainer.table, np.asarray(stream), size)]
    weighted = [WeightedRow(row, 1 / len(rows)) for row in rows]
    packs = Collator(trainer.table, trainer.layout_section)(weighted)["packs"]
    pack = max(packs, key=lambda pack: pack.layout.num_tokens)
    device = trainer.args.device
    before = _memory(device)
    with peak_memory(device) as peak:
        try:
            _forward_and_backward(trainer, pack)
        except torch.OutOfMemoryError:
            return sys.maxsize
        finally:
            trainer.policy.zero_grad(set_to_none=True)
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    return before + int((peak() - before) * max(1.0, tokens / pack.layout.num_tokens))


def _forward_and_backward(trainer: StreamTrainer, pack: Batch) -> None:
    args, model = trainer.args, trainer.policy
    trainer.enable_activation_checkpointing()
    model.train()
    with on_device(model, args.device), trainer.accelerator.autocast(), trainer.attention_of_layout():
        batch = pack.to(args.device)
        losses = trainer.example_losses(model, batch, MetricSums(), training=False)
        (losses * batch.weights).sum().backward()


def _longest(table: TokenTable, rows: np.ndarray[tuple[int], np.dtype[np.int64]], size: int) -> list[int]:
    """Return the rows with the most tokens."""
    lengths = table.lengths[rows].sum(axis=1)
    return [int(row) for row in rows[np.argsort(-lengths, kind="stable")[:size]]]


def _streams(trainer: StreamTrainer) -> int:
    return 2 if len(trainer.plan.buffer) else 1


def _agree(fits: bool) -> bool:
    """Return whether something fits on every process."""
    return all(gather_object([fits]))


def _memory(device: torch.device) -> int:
    """Return the bytes that this process uses on a device."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    used: int = psutil.Process().memory_info().rss
    return used


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Callable[[], int]]:
    """Measure the peak of this process's memory inside a `with` block.

    Args:
        device: Device whose memory is measured. A CPU process is asked every few milliseconds, because not every
            system can start its peak anew.

    Yields:
        Function that returns the peak until now, in bytes.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield lambda: torch.cuda.max_memory_allocated(device)
        return
    largest, is_done = [_memory(device)], threading.Event()

    def watch() -> None:
        while not is_done.is_set():
            largest[0] = max(largest[0], _memory(device))
            time.sleep(_INTERVAL)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield lambda: max(largest[0], _memory(device))
    finally:
        is_done.set()
        thread.join()
