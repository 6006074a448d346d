"""Profile a selective training step in bfloat16 on HH-RLHF: the share of each kind of operation, and attention alone.

    python benchmarks/step_profile.py            # under a minute

Writes `benchmarks/results/step_profile.json` and the table in docs/performance.md. The step is that of
`step_speed.py`; times are those of the operations themselves, by `torch.profiler`, on one thread.
"""

import argparse
import json
import os
import timeit
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch reads it when it is imported

import torch
from torch.nn.functional import scaled_dot_product_attention

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "step_profile.json"
PAGE = ROOT / "docs" / "performance.md"
SEED, STEPS = 42, 6
# Attention of the model with 9 M weights.
HEADS, WIDTH, SIZES = 6, 64, (64, 128, 256, 512)
# Kind → parts of the names of its operations; the first that fits counts.
KINDS = {
    "attention": ("scaled_dot_product",),
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::linear", "mkldnn_linear"),
    "casts and copies": ("aten::copy_", "aten::_to_copy", "aten::cat", "aten::index"),
    "log-softmax": ("log_softmax", "logsumexp"),
    "optimizer": ("Optimizer", "_fused_adam", "_foreach"),
}
OTHER = "element-wise operations and the rest"


def kind_of(name: str) -> str:
    """Return the kind of an operation."""
    return next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), OTHER)


def measure(data: Path) -> dict[str, Any]:
    """Return the seconds of a step by kind of operation, and of the most expensive operations."""
    from speed.data import make_pairs
    from speed.measure import Group, keep_memory, warmed_up
    from torch.profiler import ProfilerActivity, profile

    name = "bfpo, selective bf16"
    group = Group("hh", "9M", 4, (name,), rounds=STEPS + 1)
    table = make_pairs(group.data, data, count=group.pairs, seed=SEED)
    first, *batches = group.batches()
    keep_memory()
    step, _ = warmed_up(group, name, table, [first, first])
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        for rows in batches:
            step(rows)
    by_kind: Counter[str] = Counter()
    by_operation: Counter[str] = Counter()
    for event in profiled.key_averages():
        by_kind[kind_of(event.key)] += event.self_cpu_time_total / 1e6 / len(batches)
        by_operation[event.key] += event.self_cpu_time_total / 1e6 / len(batches)
    return {
        "group": group.name,
        "variant": name,
        "steps": len(batches),
        "seconds_by_kind": dict(by_kind.most_common()),
        "seconds_by_operation": dict(by_operation.most_common(12)),
        "attention_seconds": {
            str(size): {
                str(dtype).removeprefix("torch."): attention_seconds(dtype, size)
                for dtype in (torch.float32, torch.bfloat16)
            }
            for size in SIZES
        },
    }


def attention_seconds(dtype: torch.dtype, size: int) -> float:
    """Return the seconds of PyTorch's causal attention on a span, forward and backward; the best of several times.

    Half precision is converted before and after, if it isn't computed in.
    """
    shape = (1, HEADS, size, WIDTH)
    states = [torch.randn(shape, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]

    def run() -> None:
        output = scaled_dot_product_attention(*(state.to(dtype) for state in states), is_causal=True)
        output.to(torch.bfloat16).sum().backward()

    return min(timeit.repeat(run, number=50, repeat=9)) / 50


def as_table(results: dict[str, Any]) -> str:
    """Return the shares as a table of docs/performance.md."""
    seconds: dict[str, float] = results["seconds_by_kind"]
    total = sum(seconds.values())
    lines = ["| operations of a selective step in bf16 | ms a step | share |", "| --- | ---: | ---: |"]
    lines += [f"| {kind} | {1e3 * value:,.0f} | {value / total:.0%} |" for kind, value in seconds.items()]
    lines += ["", "| tokens of a span | attention in float32, µs | in bfloat16, µs |", "| ---: | ---: | ---: |"]
    lines += [
        f"| {size} | {1e6 * of['float32']:,.0f} | {1e6 * of['bfloat16']:,.0f} |"
        for size, of in results["attention_seconds"].items()
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure, and write results and table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="folder of real data")
    options = parser.parse_args()
    if not options.data.is_dir():
        raise SystemExit(f"--data: {options.data} is not a folder")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    from speed.report import with_section

    from bfpo.core.environment import hardware, versions

    head = {"command": "python benchmarks/step_profile.py", "seed": SEED}
    results = head | {"versions": versions(), "hardware": hardware()} | measure(options.data)
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")
    PAGE.write_text(with_section(PAGE.read_text(), "profile", as_table(results)))


if __name__ == "__main__":
    main()
