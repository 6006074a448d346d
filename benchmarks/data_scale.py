"""Measure data at scale: reading, cleaning, splitting, writing, tokenizing, and the plan, in seconds and in memory.

    python benchmarks/data_scale.py                  # up to 10,000,000 rows and 1,000,000 tokenized pairs
    python benchmarks/data_scale.py --rows 1e4 1e5   # other sizes
    python benchmarks/data_scale.py --quick          # a check of the script, in seconds; writes nothing
    python benchmarks/data_scale.py --docs           # only the tables and the figure of docs/scaling.md

Writes `benchmarks/results/data_scale.json` and `docs/data_scale.svg`. Every measurement runs in a process of its own,
because peak memory is measured per process, and is kept in `--folder`: the same command goes on where it was stopped.
Rows are made up: two files, a labeled main stream and an unlabeled buffer, of 187 bytes a row on average, with 3 %
duplicates and 1 % contradictions. Tokenized pairs have 60 / 120 / 120 tokens.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parent / "results" / "data_scale.json"
FIGURE = Path(__file__).parents[1] / "docs" / "data_scale.svg"
PAGE = Path(__file__).parents[1] / "docs" / "scaling.md"
MARKS = ("<!-- benchmarks/data_scale.py writes this -->", "<!-- end -->")
SEED = 42
TOKENS = (60, 120, 120)
MAIN = 0.7
# Sizes, and how often they are measured.
ROWS = {10_000: 5, 100_000: 5, 1_000_000: 3, 10_000_000: 1}
LARGER = 100_000_000
"""Size that the largest measured ones are extrapolated to."""
PLANS = (10_000, 100_000, 1_000_000, 10_000_000, 100_000_000)
# Phases of preparing, each needs those before it.
PREPARING = ("read", "write", "read again")
# The rows that are tokenized, too: what a row costs besides its bytes weighs less.
READ_LONG = "read, long rows"


def words(count: int) -> list[str]:
    """Return made-up words of four letters."""
    rng = np.random.default_rng(SEED)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    return ["".join(row) for row in letters[rng.integers(0, 26, (count, 4))]]


def make_rows(path: Path, count: int, lengths: tuple[int, int, int], *, labeled: bool, seed: int) -> None:
    """Write a file of random rows, unless it is there."""
    if path.exists():
        return
    vocabulary, rng = np.array(words(3000)), np.random.default_rng(seed)
    temporary = path.with_suffix(".tmp")
    last = ""
    with temporary.open("w") as file:
        for start in range(0, count, 10_000):
            size = min(10_000, count - start)
            columns = [
                [" ".join(row) for row in vocabulary[rng.integers(0, len(vocabulary), (size, length))].tolist()]
                for length in lengths
            ]
            labels, kinds = rng.random((size, 2)) < 0.7, rng.random(size)
            for prompt, chosen, rejected, (safe, other), kind in zip(*columns, labels.tolist(), kinds, strict=True):
                row: dict[str, Any] = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
                line = json.dumps(row | ({"is_chosen_safe": safe, "is_rejected_safe": other} if labeled else {}))
                if kind < 0.03 and last:
                    line = last
                elif kind < 0.04 and labeled and last:
                    row = json.loads(last)
                    line = json.dumps(row | {"is_chosen_safe": not row["is_chosen_safe"]})
                file.write(line + "\n")
                last = line
    temporary.rename(path)


def recipe_of(folder: Path, phase: str) -> Any:
    """Return a recipe with both streams, or with the file of long rows."""
    from bfpo.config.recipes import DataRecipe, Source

    if phase == READ_LONG:
        return DataRecipe(data=[Source(path=str(folder / "long.jsonl"))], holdout=0.01)
    return DataRecipe(
        data=[Source(path=str(folder / "main.jsonl"))],
        buffer=[Source(path=str(folder / "buffer.jsonl"), assume_safe=True)],
        holdout=0.01,
    )


@contextmanager
def measured(result: dict[str, Any]) -> Iterator[None]:
    """Add the seconds of a block, of the processor and of the clock, and the peak memory of all its processes."""
    start, cpu = time.perf_counter(), used_seconds()
    ended, peaks, watching = threading.Event(), [0], [0.0]

    def watch() -> None:
        while not ended.wait(0.5):
            peaks.append(resident_bytes())
        watching.append(time.thread_time())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()
    (peak,) = (line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line)
    result |= {
        "seconds": time.perf_counter() - start,
        "cpu_seconds": used_seconds() - cpu - sum(watching),
        # The peak of this process is exact; that of all is looked at twice a second.
        "peak_bytes": max(1024 * int(peak), *peaks),
    }


def resident_bytes() -> int:
    """Return the memory of this process and its workers; what several share counts once."""
    workers = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    total = 0
    for process in ("self", *workers):
        # A worker may have ended.
        with suppress(OSError):
            lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
            total += sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total


def used_seconds() -> float:
    """Return the seconds of the processor that this process and its finished workers have used."""
    usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def preparing(folder: Path, count: int, phase: str, cores: int | None) -> dict[str, Any]:
    """Measure reading and cleaning, or writing, or a later start."""
    from bfpo.data import scan
    from bfpo.data.prepare import prepare, write_prepared

    if cores is not None:
        scan._cores = lambda: cores  # type: ignore[assignment]
    recipe = recipe_of(folder, phase)
    size = sum(Path(source.path).stat().st_size for source in (*recipe.data, *recipe.buffer))
    result: dict[str, Any] = {"file_bytes": size}
    # Tokenizing has its own.
    cache = folder / ("cache-long" if phase == READ_LONG else "cache")
    if phase in ("read", READ_LONG):
        for file in cache.rglob("*.npz"):
            file.unlink()
    if phase == "write":
        # What is read for it isn't measured.
        prepared = prepare(recipe, max_held=0, cache=cache)
        with measured(result):
            write_prepared(prepared, folder / "out")
        return result
    with measured(result):
        prepared = prepare(recipe, max_held=0, cache=cache)
    return result | {"trained": len(prepared.train), "held_out": len(prepared.eval)}


def tokenizing(folder: Path, count: int, phase: str, cores: int | None) -> dict[str, Any]:
    """Measure tokenizing into the cache, or the start of a later run: both read, clean and make the table."""
    from bfpo.config.loading import check_recipe
    from bfpo.config.recipes import TrainRecipe
    from bfpo.data.prepare import prepare
    from bfpo.losses.build import make_loss
    from bfpo.model.new import new_tokenizer
    from bfpo.training.tables import remove_untrained, tokenize_pairs

    content = {
        "model": {"new": {}},
        "data": [{"path": str(folder / "long.jsonl")}],
        "holdout": 0.01,
        "text": {"max_length": 1024},
    }
    recipe = check_recipe(content, TrainRecipe, "scale")
    loss = make_loss(recipe.loss.model_dump())
    with (folder / "long.jsonl").open() as file:
        rows = [json.loads(line) for _, line in zip(range(1000), file, strict=False)]
    tokenizer = new_tokenizer([row[name] for row in rows for name in ("prompt", "chosen", "rejected")], 8000)
    result: dict[str, Any] = {"file_bytes": (folder / "long.jsonl").stat().st_size}
    with measured(result):
        prepared = prepare(recipe, max_held=0, cache=folder / "cache")
        remove_untrained(prepared, loss)
        tables = tokenize_pairs(recipe, prepared, tokenizer, loss, cache=folder / "cache" / "tokens")
        fingerprint = tables.train.fingerprint
    return result | {"tokens": len(tables.train.ids), "fingerprint": fingerprint}


def planning(folder: Path, count: int, phase: str, cores: int | None) -> dict[str, Any]:
    """Measure the plan of as many pairs in each of two streams, without data."""
    import tracemalloc

    from bfpo.training.streams import StreamPlan

    tracemalloc.start()
    start = time.process_time()
    plan = StreamPlan(range(count), range(count, 2 * count), 64, SEED)
    plan.step(0)
    first = time.process_time() - start
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    start = time.process_time()
    for step in range(1, 1001):
        plan.step(step)
    return {
        "first_step_seconds": first,
        "microseconds_a_step": (time.process_time() - start) * 1e3,
        "held_bytes": held,
    }


MEASUREMENTS: dict[str, Callable[[Path, int, str, int | None], dict[str, Any]]] = {
    **dict.fromkeys((*PREPARING, READ_LONG), preparing),
    **dict.fromkeys(("first start", "start again"), tokenizing),
    "plan": planning,
}


def slope(sizes: list[int], values: list[float]) -> dict[str, float]:
    """Return the exponent of a power law of the size, with its 95 % interval by Student's t."""
    from scipy.stats import linregress, t

    fit = linregress(np.log10(sizes), np.log10(values))
    half = float(t.ppf(0.975, len(sizes) - 2) * fit.stderr)
    return {"exponent": float(fit.slope), "low": float(fit.slope) - half, "high": float(fit.slope) + half}


def summarize(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the exponents of seconds and of memory by phase, where at least three sizes were measured."""
    by_phase: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for result in results:
        if "cpu_seconds" in result:
            by_phase[result["phase"]].append(result)
    return {
        phase: {
            name: slope([result["rows"] for result in of], [result[name] for result in of])
            for name in ("cpu_seconds", "peak_bytes")
        }
        for phase, of in by_phase.items()
        if len({result["rows"] for result in of}) >= 3
    }


def tables(results: list[dict[str, Any]], exponents: dict[str, Any]) -> str:
    """Return the tables of docs/scaling.md."""
    lines = [
        "| phase | rows | CPU seconds | µs a row | MB/s of JSON Lines | peak memory, all processes |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for phase in dict.fromkeys(result["phase"] for result in results if "cpu_seconds" in result):
        of_phase = [result for result in results if result["phase"] == phase]
        for size in sorted({result["rows"] for result in of_phase}):
            of = [result for result in of_phase if result["rows"] == size]
            seconds = float(np.mean([result["cpu_seconds"] for result in of]))
            peak, file_bytes = max(result["peak_bytes"] for result in of), of[0]["file_bytes"]
            lines.append(
                f"| {phase} | {size:,} | {seconds:.2f} | {seconds / size * 1e6:.1f} | "
                f"{file_bytes / seconds / 1e6:,.0f} | {peak / 1e6:,.0f} MB |"
            )
    lines += [
        "",
        "Exponents of a power law of the number of rows, with 95 % intervals:",
        "",
        "| phase | seconds | memory |",
        "| --- | ---: | ---: |",
    ]
    for phase, of_names in exponents.items():
        cells = (
            f"{of_names[name]['exponent']:.2f} [{of_names[name]['low']:.2f}, {of_names[name]['high']:.2f}]"
            for name in ("cpu_seconds", "peak_bytes")
        )
        lines.append(f"| {phase} | {' | '.join(cells)} |")
    lines += ["", "| plan of two streams | first step | each later step | memory |", "| ---: | ---: | ---: | ---: |"]
    lines += [
        f"| {result['rows']:,} pairs each | {result['first_step_seconds']:.3f} s | "
        f"{result['microseconds_a_step']:,.0f} µs | {result['held_bytes'] / 1e6:,.1f} MB |"
        for result in results
        if result["phase"] == "plan"
    ]
    return "\n".join([*lines, "", *_at_larger_size(results)]) + "\n"


def _at_larger_size(results: list[dict[str, Any]]) -> list[str]:
    """Return the table of what 10⁸ rows would need: seconds by proportion, memory by what more rows added."""
    lines = [
        "10⁸ rows, by proportion to the largest size (not run):",
        "",
        "| phase | CPU time | memory, all processes |",
        "| --- | ---: | ---: |",
    ]
    for phase in ("read", "write", "first start", "start again"):
        by_size: dict[int, list[dict[str, Any]]] = defaultdict(list)
        for result in results:
            if result["phase"] == phase:
                by_size[result["rows"]].append(result)
        before, last = sorted(by_size)[-2:]
        seconds = float(np.mean([result["cpu_seconds"] for result in by_size[last]])) * LARGER / last
        peaks = [max(result["peak_bytes"] for result in by_size[size]) for size in (before, last)]
        grown = peaks[1] + (peaks[1] - peaks[0]) / (last - before) * (LARGER - last)
        time = f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.0f} min"
        lines.append(f"| {phase} | {time} | {grown / 1e9:.0f} GB |")
    tokens, rows = next(
        (result["tokens"], result["rows"]) for result in reversed(results) if result["phase"] == "start again"
    )
    return [*lines, f"| token ids, on disk | | {4 * tokens / rows * LARGER / 1e9:.0f} GB |"]


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Draw seconds and memory against the number of rows."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "data_scale"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6))
    for phase in dict.fromkeys(result["phase"] for result in results if "cpu_seconds" in result):
        of = [result for result in results if result["phase"] == phase]
        sizes = sorted({result["rows"] for result in of})
        for axis, name, scale in zip(axes, ("cpu_seconds", "peak_bytes"), (1, 2**30), strict=True):
            means = [np.mean([result[name] for result in of if result["rows"] == size]) / scale for size in sizes]
            axis.plot(sizes, means, "o-", label=phase, markersize=4)
    axes[0].set(xscale="log", yscale="log", xlabel="rows", ylabel="CPU seconds", title="Time")
    axes[1].axhline(2, color="gray", linestyle=":", linewidth=1)
    axes[1].set(xscale="log", xlabel="rows", ylabel="GiB", title="Peak memory", ylim=(0, 2.2))
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def jobs(rows: list[int], max_tokenized: int, *, quick: bool) -> Iterator[tuple[str, int, int]]:
    """Yield phase, size and round of each measurement."""
    for size in rows:
        for number in range(1 if quick else ROWS.get(size, 1)):
            yield from ((phase, size, number) for phase in PREPARING)
    for size in rows:
        if size <= max_tokenized:
            yield from ((READ_LONG, size, number) for number in range(1 if quick else ROWS.get(size, 1)))
            yield "first start", size, 0
            for number in range(1 if quick else ROWS.get(size, 1)):
                yield "start again", size, number
    for size in PLANS[-1:] if quick else PLANS:
        yield "plan", size, 0


def main() -> None:
    """Run what hasn't been measured yet, each in a process of its own, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=float, nargs="+", default=list(map(float, ROWS)))
    parser.add_argument("--max-tokenized", type=float, default=1e6, help="largest size that is tokenized, too")
    parser.add_argument("--quick", action="store_true", help="small sizes; write nothing")
    parser.add_argument("--docs", action="store_true", help="only write docs/scaling.md from the results")
    parser.add_argument("--cores", type=int, help="number of processes that read; default all cores")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "bfpo-data-scale")
    parser.add_argument("--measure", nargs=2, metavar=("PHASE", "SIZE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        phase, size = options.measure[0], int(options.measure[1])
        print(json.dumps(MEASUREMENTS[phase](options.folder, size, phase, options.cores)))
        return
    if options.docs:
        write_page(json.loads(RESULTS.read_text())["measured"])
        return
    if options.quick:
        with tempfile.TemporaryDirectory() as folder:
            results = run(Path(folder), [2000], 2000, options.cores, quick=True)
        assert {result["phase"] for result in results} == set(MEASUREMENTS)
        return
    from bfpo.core.environment import hardware, versions
    from bfpo.core.files import write_json

    rows, most = list(map(int, options.rows)), int(options.max_tokenized)
    results = run(options.folder, rows, most, options.cores, quick=False)
    write_json(
        RESULTS,
        {
            "command": "python benchmarks/data_scale.py",
            "sizes": {"rows": rows, "tokenized": most},
            "cores": options.cores,
            "seed": SEED,
            "versions": versions(),
            "hardware": hardware(),
            "measured": results,
            "exponents": summarize(results),
        },
    )
    write_page(results)


def write_page(results: list[dict[str, Any]]) -> None:
    """Write the tables of docs/scaling.md, and its figure."""
    draw(results, FIGURE)
    before, start, rest = PAGE.read_text().partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    assert start
    assert end
    PAGE.write_text(f"{before}{start}\n\n{tables(results, summarize(results))}\n{end}{after}")


def run(folder: Path, rows: list[int], most: int, cores: int | None, *, quick: bool) -> list[dict[str, Any]]:
    """Return all measurements; those that are in the folder aren't made again."""
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "measured.jsonl"
    done = {}
    for line in log.read_text().splitlines() if log.exists() else ():
        result = json.loads(line)
        done[result["phase"], result["rows"], result["round"]] = result
    results = []
    for phase, size, number in jobs(rows, most, quick=quick):
        data = folder / str(size)
        if (phase, size, number) not in done:
            data.mkdir(exist_ok=True)
            if phase in PREPARING:
                make_rows(data / "main.jsonl", int(MAIN * size), (6, 8, 8), labeled=True, seed=1)
                make_rows(data / "buffer.jsonl", size - int(MAIN * size), (6, 8, 8), labeled=False, seed=2)
            elif phase != "plan":
                make_rows(data / "long.jsonl", size, TOKENS, labeled=True, seed=3)
            command = [sys.executable, "-W", "ignore", __file__, "--folder", str(data), "--measure", phase, str(size)]
            command += [] if cores is None else ["--cores", str(cores)]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            result = {"phase": phase, "rows": size, "round": number} | json.loads(output.splitlines()[-1])
            with log.open("a") as file:
                file.write(json.dumps(result) + "\n")
            done[phase, size, number] = result
            print(json.dumps(result), flush=True)
        results.append(done[phase, size, number])
    return results


if __name__ == "__main__":
    main()
