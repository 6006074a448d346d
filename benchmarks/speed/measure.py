"""Timing of variants on the same batches, and memory of each variant in its own process."""

import ctypes
import gc
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bfpo.data.table import PairTable

from .floor import matmul_rate, num_tokens, useful_flops
from .report import SYSTEM_MALLOC
from .variants import SHAPES, VARIANTS, Step, Variant, make_step

Timed = Callable[[Callable[[], object]], float]


@dataclass(frozen=True)
class Group:
    """Variants that are compared on the same batches.

    Args:
        data: Name of the data set; see `data`.
        shape: Key of `SHAPES`.
        batch_size: Number of pairs per step.
        variants: Keys of `VARIANTS`.
        rounds: Number of batches; every variant takes one step on each.
        selective: Whether all variants train `down_proj` only.
        lora: Whether all variants train an adapter.
        keeps_memory: Whether the process keeps freed memory; see `keep_memory`.
    """

    data: str
    shape: str
    batch_size: int
    variants: tuple[str, ...]
    rounds: int
    selective: bool = False
    lora: bool = False
    keeps_memory: bool = True

    @property
    def name(self) -> str:
        """Name of the group in the results."""
        name = f"{self.data}, {self.shape}, {self.batch_size} pairs"
        return name + ", down_proj" * self.selective + ", LoRA" * self.lora + SYSTEM_MALLOC * (not self.keeps_memory)

    @property
    def pairs(self) -> int:
        """Number of pairs of all rounds."""
        return self.rounds * self.batch_size

    def batches(self) -> list[list[int]]:
        """Return the rows of each round."""
        rows = list(range(self.pairs))
        return [rows[start : start + self.batch_size] for start in range(0, self.pairs, self.batch_size)]

    def variant(self, name: str) -> Variant:
        """Return a variant with this group's settings."""
        return replace(VARIANTS[name], selective=self.selective or VARIANTS[name].selective, lora=self.lora)


def cpu_seconds(run: Callable[[], object]) -> float:
    """Return the CPU time of a call, which other processes hardly affect."""
    gc.collect()
    start = time.process_time()
    run()
    return time.process_time() - start


def cuda_seconds(run: Callable[[], object]) -> float:
    """Return the time between two events on the GPU around a call."""
    gc.collect()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000


def keep_memory() -> None:
    """Make glibc's malloc keep freed memory for the rest of this process.

    By default the memory of large tensors is returned to the kernel, and that of every new one is faulted in page by
    page. In a virtual machine under load this doubled the time of TRL's steps, which have large temporary tensors; it
    didn't affect ours.
    """
    libc = ctypes.CDLL("libc.so.6")
    m_trim_threshold, m_mmap_max = -1, -4
    if not (libc.mallopt(m_mmap_max, 0) and libc.mallopt(m_trim_threshold, -1)):
        raise SystemExit("mallopt failed; the benchmark needs glibc's malloc")


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a new process and return its result."""
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as process:
        return process.submit(function, *arguments).result()


def measure_together(group: Group, table: PairTable) -> dict[str, Any]:
    """Time all variants of a group in rotation, batch by batch, on one thread of the CPU."""
    torch.set_num_threads(1)
    if group.keeps_memory:
        keep_memory()
    return measure_in_rotation(group, table, cpu_seconds, [shortest(table, group.batch_size)])


def measure_in_rotation(group: Group, table: PairTable, timed: Timed, warm_up: list[list[int]]) -> dict[str, Any]:
    """Time all variants of a group in rotation, batch by batch, each after a warm-up on other rows.

    With a GPU, the result has the memory between steps that each variant added (`static_mib`) and the peak above what
    all hold (`peak_mib`).
    """
    steps, models = {}, {}
    static: dict[str, float] = {}
    for name in group.variants:
        before = _allocated_mib()
        steps[name], models[name] = warmed_up(group, name, table, warm_up)
        static[name] = _allocated_mib() - before
    dtypes = {VARIANTS[name].matmul_dtype for name in group.variants}
    rates: dict[str, list[float]] = {_name(dtype): [] for dtype in dtypes}
    seconds: dict[str, list[float]] = {name: [] for name in group.variants}
    peaks = dict.fromkeys(group.variants, 0.0)
    for index, rows in enumerate(group.batches()):
        for dtype in dtypes:
            rates[_name(dtype)].append(matmul_rate(models[group.variants[0]], dtype, timed))
        for name in _rotated(group.variants, index):
            before = _allocated_mib()
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            seconds[name].append(timed(lambda step=steps[name], rows=rows: step(rows)))
            peaks[name] = max(peaks[name], _allocated_mib(peak=True) - before)
        print(f"  {group.name}: round {index + 1} of {group.rounds}", flush=True)
    flops = {name: [useful_flops(models[name], table, rows) for rows in group.batches()] for name in group.variants}
    result = _result(group, table, rates, seconds, flops)
    if torch.cuda.is_available():
        result |= {"static_mib": static, "peak_mib": peaks}
    return result


def _allocated_mib(*, peak: bool = False) -> float:
    if not torch.cuda.is_available():
        return 0.0
    return round((torch.cuda.max_memory_allocated if peak else torch.cuda.memory_allocated)() / 2**20, 1)


def warmed_up(group: Group, name: str, table: PairTable, batches: list[list[int]]) -> tuple[Step, Any]:
    """Return a variant's step function, called on these batches already, and its model."""
    step, model = make_step(group.variant(name), SHAPES[group.shape], table, batch_size=group.batch_size)
    for rows in batches:
        step(rows)
    return step, model


def _result(group: Group, table: PairTable, rates: Any, seconds: Any, flops: Any) -> dict[str, Any]:
    sequence_lengths = table.lengths[:, :1] + table.lengths[:, 1:]
    return {
        "data": group.data,
        "shape": group.shape,
        "batch_size": group.batch_size,
        "mean_lengths": [round(float(mean), 1) for mean in table.lengths[: group.pairs].mean(axis=0)],
        "num_tokens": [num_tokens(table, rows) for rows in group.batches()],
        "padded_slots": [2 * len(rows) * int(sequence_lengths[rows].max()) for rows in group.batches()],
        "matmul_flops_per_second": rates,
        "seconds": {name: [round(value, 4) for value in values] for name, values in seconds.items()},
        "useful_flops": flops,
        "matmul_dtype": {name: _name(VARIANTS[name].matmul_dtype) for name in seconds},
    }


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _rotated(names: tuple[str, ...], index: int) -> Iterator[str]:
    start = index % len(names)
    yield from names[start:] + names[:start]


def shortest(table: PairTable, count: int) -> list[int]:
    """Return the rows of the shortest pairs: enough to create the optimizer's state, and fast."""
    return [int(row) for row in np.argsort(table.lengths.sum(axis=1), kind="stable")[:count]]


def measure_memory(group: Group, table: PairTable) -> dict[str, dict[str, float]]:
    """Return the memory of each variant of a group in MiB, each measured in a fresh process."""
    memory = {}
    for name in group.variants:
        memory[name] = in_fresh_process(_memory_of_variant, group, name, table)
        print(f"  {group.name}: memory of {name}: {memory[name]}", flush=True)
    return memory


def _memory_of_variant(group: Group, name: str, table: PairTable) -> dict[str, float]:
    """Take the steps in this process; return the memory between steps (static) and the peak above it."""
    torch.set_num_threads(1)
    step, _ = warmed_up(group, name, table, [shortest(table, group.batch_size)])
    gc.collect()
    # Memory that the allocator keeps would reduce the measured peak.
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    # Resets the high-water mark to the resident memory.
    Path("/proc/self/clear_refs").write_text("5")
    static = _status_mib("VmRSS")
    for rows in group.batches():
        step(rows)
    return {"static_mib": round(static, 1), "peak_mib": round(_status_mib("VmHWM") - static, 1)}


def _status_mib(field: str) -> float:
    """Return a memory field of this process's status in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024
