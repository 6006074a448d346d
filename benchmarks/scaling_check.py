"""Check the formulas of docs/scaling.md at small scale: bytes and seconds per pair, training state, traffic.

    python benchmarks/scaling_check.py      # about six minutes; writes benchmarks/results/scaling.json

Each measurement runs in its own process, because peak memory is measured per process. `expected` is the value of the
formula in the docs. Pairs are random: 60 / 120 / 120 tokens for prompt / chosen / rejected, about 4 letters a token.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

RESULT = Path(__file__).parent / "results" / "scaling.json"
SEED = 42
TOKENS = (60, 120, 120)
SIZES = (100_000, 1_000_000)
MIB = 2**20


def resident() -> int:
    """Return the resident memory of this process, in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak() -> int:
    """Return the peak resident memory of this process, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def random_table(count: int) -> Any:
    """Return a table of random pairs, filled array by array."""
    from bfpo.data.table import PairTable

    rng = np.random.default_rng(SEED)
    bounds = np.arange(count)[:, None] * sum(TOKENS) + np.cumsum([0, *TOKENS])[None]
    bits = rng.random((2, count)).round()
    return PairTable(
        rng.integers(0, 30_000, count * sum(TOKENS), dtype=np.int32),
        bounds.astype(np.int64),
        tuple(f"{number:016x}" for number in range(count)),
        chosen_safe=bits[0],
        rejected_safe=bits[1],
        cells=np.zeros(count, np.int8),
        is_buffer=np.arange(count) % 2 == 1,
        signals={"expected_safety": np.full(count, 0.5)},
    )


def tokens_and_plan(count: int) -> dict[str, Any]:
    """Measure the memory of the token table and of the stream plan, and the time of hashing and planning."""
    from bfpo.training.streams import StreamPlan

    before = resident()
    table = random_table(count)
    table_bytes = resident() - before
    start = time.process_time()
    assert table.tokens_hash
    hash_seconds = time.process_time() - start

    def plan_steps(steps: int) -> StreamPlan:
        plan = StreamPlan(table.main_rows, table.buffer_rows, 64, SEED)
        for step in range(steps):
            plan.step(step)
        return plan

    start = time.process_time()
    plan = plan_steps(1)
    first_step_seconds = time.process_time() - start
    start = time.process_time()
    for step in range(1, 1001):
        plan.step(step)
    later_steps_seconds = time.process_time() - start
    tracemalloc.start()
    plan = plan_steps(1001)
    plan_bytes = tracemalloc.get_traced_memory()[0]
    return {
        "pairs": count,
        "table_bytes_a_pair": table_bytes / count,
        "expected_table_bytes_a_pair": 4 * sum(TOKENS) + 4 * 8 + 3 * 8 + 2 + 65 + 8,
        "hash_seconds": hash_seconds,
        "plan_first_step_seconds": first_step_seconds,
        # Of a thousand steps.
        "plan_step_microseconds": later_steps_seconds * 1e3,
        "plan_bytes_a_pair": plan_bytes / count,
        # Row numbers, and the passes over each stream so far.
        "expected_plan_bytes_a_pair": 8 + 8 * -(-1001 * 64 // (count // 2)),
    }


def mapped(count: int) -> dict[str, Any]:
    """Measure a table with memory-mapped token ids in steps of 64 + 64 pairs, each pair read for the first time."""
    from dataclasses import replace

    from bfpo.training.streams import StreamPlan

    steps = 200
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ids.npy"
        table = random_table(count)
        np.save(path, table.ids)
        # Removed from the page cache, so that the file is read from disk.
        with path.open("rb+") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        table = replace(table, ids=np.load(path, mmap_mode="r"))
        plan = StreamPlan(table.main_rows, table.buffer_rows, 64, SEED)
        plan.step(0)
        before, start, tokens = resident(), time.perf_counter(), 0
        for step in range(steps):
            for row in (row for rows in plan.step(step) for row in rows):
                prompt, (chosen, rejected) = table[row]
                tokens += len(np.concatenate([prompt, chosen, rejected]))
        seconds = time.perf_counter() - start
        return {
            "pairs": count,
            "milliseconds_a_step": seconds / steps * 1e3,
            "bytes_a_step": 4 * tokens / steps,
            "expected_bytes_a_step": 4 * 128 * sum(TOKENS),
            "held_bytes_a_pair_read": (resident() - before) / (128 * steps),
            "file_bytes_a_pair": path.stat().st_size / count,
        }


def cache(count: int) -> dict[str, Any]:
    """Measure the bytes of an entry of the reference cache, and the time to write, join and read it."""
    from bfpo.model.reference_cache import ReferenceEntry

    values = np.random.default_rng(SEED).normal(size=(count, 2))
    with tempfile.TemporaryDirectory() as folder:
        entry = ReferenceEntry(Path(folder), {"made": "up"}, (count, 2))
        start = time.process_time()
        for number, rows in enumerate(entry.parts):
            entry.write_part(number, values[rows])
        write_seconds = time.process_time() - start
        start = time.process_time()
        entry.finish()
        join_seconds = time.process_time() - start
        size = sum(file.stat().st_size for file in entry.folder.rglob("*"))
        del values
        before, start = resident(), time.process_time()
        read = entry.read()
        read_seconds, read_bytes = time.process_time() - start, resident() - before
        assert read.shape == (count, 2)
    return {
        "pairs": count,
        "bytes_a_pair": size / count,
        "expected_bytes_a_pair": 16,
        "write_seconds": write_seconds,
        "join_seconds": join_seconds,
        "read_seconds": read_seconds,
        "read_bytes_held": read_bytes,
    }


def start_up(count: int) -> dict[str, Any]:
    """Measure reading, cleaning and tokenizing a file of pairs, as `bfpo train` does before training."""
    from bfpo.config.loading import check_recipe
    from bfpo.config.recipes import DataRecipe, Source, TextSection
    from bfpo.data.load import SourceReport
    from bfpo.data.prepare import prepare
    from bfpo.data.table import pair_table
    from bfpo.data.tokenize import Encoder
    from bfpo.model.new import new_tokenizer

    rng = np.random.default_rng(SEED)
    words = ["".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz"), 3)) for _ in range(2000)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pairs.jsonl"
        sample: list[str] = []
        with path.open("w") as file:
            for _ in range(count):
                texts = [" ".join(words[index] for index in rng.integers(0, len(words), size)) for size in TOKENS]
                sample += texts if len(sample) < 3000 else []
                row = dict(zip(("prompt", "chosen", "rejected"), texts, strict=True))
                file.write(json.dumps(row | {"is_chosen_safe": True, "is_rejected_safe": False}) + "\n")
        tokenizer = new_tokenizer(sample, 8000)
        before, start = resident(), time.process_time()
        prepared = prepare(check_recipe({"data": [{"path": str(path)}]}, DataRecipe, "scaling"))
        read_seconds = time.process_time() - start
        read_bytes = resident() - before
        start = time.process_time()
        pairs, examples = Encoder(tokenizer, TextSection()).encode(
            prepared.train, SourceReport("pairs", Source(path="-"), taken=count)
        )
        table = pair_table(examples, pairs)
        tokenize_seconds = time.process_time() - start
        return {
            "pairs": count,
            "file_bytes_a_pair": path.stat().st_size / count,
            "read_seconds": read_seconds,
            "read_bytes_a_pair": read_bytes / count,
            "tokenize_seconds": tokenize_seconds,
            "tokens_a_pair": len(table.ids) / count,
            "peak_bytes_a_pair": (peak() - before) / count,
        }


def state(_: int) -> dict[str, Any]:
    """Sum the bytes of weights, gradients, optimizer and reference after a step, training all or selected weights."""
    from transformers import PrinterCallback, TrainingArguments

    from bfpo import BFPOTrainer
    from bfpo.config.recipes import NewModel
    from bfpo.model.new import new_model, new_tokenizer

    rows = [
        {"prompt": f"{n}", "chosen": "a b", "rejected": "c", "is_chosen_safe": True, "is_rejected_safe": n % 2 == 0}
        for n in range(8)
    ]
    tokenizer = new_tokenizer(["a b c"], 300)
    states: dict[str, Any] = {}
    for name, train_only in (("full", None), ("selective", ["down_proj"])):
        with tempfile.TemporaryDirectory() as folder:
            args = TrainingArguments(
                folder, max_steps=1, save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True
            )
            model = new_model(NewModel(shape="small"), tokenizer)
            trainer = BFPOTrainer(
                model, args, rows, processing_class=tokenizer, train_only=train_only, cache_dir=folder
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        assert trainer.optimizer is not None
        moments = [value for state in trainer.optimizer.state.values() for value in state.values() if value.dim()]
        trained, total = trainer.selection.trained, trainer.selection.total
        reference_bytes = trainer.reference.nbytes if trainer.reference else 0
        states[name] = {
            "weights": total,
            "trained": trained,
            "bytes": sum(parameter.nbytes for parameter in model.parameters())
            + sum(moment.nbytes for moment in moments)
            + reference_bytes
            + 4 * trained,
            "expected_bytes": 4 * total + (12 if name == "full" else 16) * trained,
        }
    return states


def traffic(_: int) -> dict[str, Any]:
    """Count the bytes that DDP all-reduces between two processes in a step: one number for each trained weight."""
    import torch
    from torch.multiprocessing.spawn import spawn

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        spawn(_count_traffic, (folder,), nprocs=2)
        return json.loads((Path(folder) / "traffic.json").read_text())  # type: ignore[no-any-return]


def _count_traffic(rank: int, folder: str) -> None:
    """Take a step as one of two processes; the first writes the bytes that it sent."""
    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    from bfpo.config.recipes import NewModel
    from bfpo.data.table import Example
    from bfpo.model.layout import packed_layout
    from bfpo.model.logps import add_layout_forward
    from bfpo.model.new import new_model, new_tokenizer
    from bfpo.model.selective import select_parameters

    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    model = new_model(NewModel(shape="small"), new_tokenizer(["a b c"], 300))
    selection = select_parameters(model, ["down_proj"])
    add_layout_forward(model)
    wrapped = DistributedDataParallel(model)
    bucket_bytes = []

    def reduce_and_count(_: object, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        bucket_bytes.append(bucket.buffer().nbytes)
        # Synchronous, because a callback in gloo's own thread can hang when the process ends.
        dist.all_reduce(bucket.buffer())
        future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    wrapped.register_comm_hook(None, reduce_and_count)
    ids = np.arange(5, dtype=np.int32)
    wrapped(layout=packed_layout([Example(ids, (ids, ids[:3]))])).sum().backward()
    if rank == 0:
        expected_bytes = 4 * selection.trained
        traffic = {"trained": selection.trained, "bytes": sum(bucket_bytes), "expected_bytes": expected_bytes}
        (Path(folder) / "traffic.json").write_text(json.dumps(traffic))
    # The process that ends first would close the other's connection.
    dist.barrier()
    dist.destroy_process_group()


MEASUREMENTS: dict[str, tuple[Callable[[int], dict[str, Any]], tuple[int, ...]]] = {
    "tokens_and_plan": (tokens_and_plan, SIZES),
    "mapped": (mapped, SIZES),
    "cache": (cache, SIZES),
    "start_up": (start_up, (10_000, 100_000)),
    "state": (state, (0,)),
    "traffic": (traffic, (0,)),
}


def main() -> None:
    """Run every measurement in a fresh process and write the results."""
    if len(sys.argv) == 3:
        print(json.dumps(MEASUREMENTS[sys.argv[1]][0](int(sys.argv[2]))))
        return
    from bfpo.core.environment import hardware, versions
    from bfpo.core.files import write_json

    results: dict[str, Any] = {}
    for name, (_, sizes) in MEASUREMENTS.items():
        for size in sizes:
            process = subprocess.run(
                [sys.executable, "-W", "ignore", __file__, name, str(size)],
                check=True,
                stdout=subprocess.PIPE,
                text=True,
            )
            results.setdefault(name, []).append(json.loads(process.stdout.splitlines()[-1]))
            print(name, results[name][-1], flush=True)
    write_json(
        RESULT,
        {
            "command": "python benchmarks/scaling_check.py",
            "seed": SEED,
            "versions": versions(),
            "hardware": hardware(),
            "measured": results,
        },
    )


if __name__ == "__main__":
    main()
