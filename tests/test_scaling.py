"""docs/scaling.md contains the measured numbers, and its formulas agree with them."""

import json
from pathlib import Path
from statistics import median

import pytest

from bfpo.training.launch_plan import find_hardware

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/scaling.md").read_text()
MEASURED = json.loads((ROOT / "benchmarks/results/scaling.json").read_text())["measured"]
WEIGHTS, DOWN_PROJ = 7.24e9, 1.88e9


def row(start: str) -> list[str]:
    """Return the remaining cells of the only row that starts with these cells."""
    (line,) = [line for line in PAGE.splitlines() if line.startswith(f"| {start}")]
    return [cell.strip() for cell in line.removeprefix(f"| {start} |").rstrip("| ").split("|")]


def test_the_formulas_agree_with_the_measurements():
    for state in MEASURED["state"][0].values():
        assert state["bytes"] == state["expected_bytes"]
    assert MEASURED["traffic"][0]["bytes"] == MEASURED["traffic"][0]["expected_bytes"]
    for measured in MEASURED["cache"]:
        assert measured["bytes_a_pair"] == pytest.approx(measured["expected_bytes_a_pair"], rel=1e-3)
    for measured in MEASURED["mapped"]:
        assert measured["bytes_a_step"] == measured["expected_bytes_a_step"]
        assert measured["file_bytes_a_pair"] == pytest.approx(4 * 300, rel=1e-3)
    for measured in MEASURED["tokens_and_plan"]:
        assert measured["table_bytes_a_pair"] == pytest.approx(measured["expected_table_bytes_a_pair"], rel=0.05)
        assert measured["plan_bytes_a_pair"] == pytest.approx(measured["expected_plan_bytes_a_pair"], rel=0.05)


def test_the_page_has_the_measured_numbers():
    small, large = MEASURED["tokens_and_plan"]
    table_bytes = [f"{measured['table_bytes_a_pair']:,.0f} bytes a pair" for measured in (small, large)]
    assert row("token table, in memory")[1:] == table_bytes
    seconds = [f"{measured['hash_seconds']:.2f} s" for measured in (small, large)]
    assert row("hash of the table")[1:] == seconds
    assert row("plan, in memory")[1:] == [
        f"{measured['plan_bytes_a_pair']:.1f} bytes a pair" for measured in (small, large)
    ]
    assert row("plan, first step")[1:] == [
        f"{measured['plan_first_step_seconds']:.3f} s" for measured in (small, large)
    ]
    assert row("plan, any later step")[1:] == [
        f"{measured['plan_step_microseconds']:.0f} µs" for measured in (small, large)
    ]
    assert row("reference cache, on disk")[1:] == [
        f"{measured['bytes_a_pair']:.2f} bytes a pair" for measured in MEASURED["cache"]
    ]
    assert row("reference cache, to read")[1:] == [
        f"{measured['read_seconds']:.3f} s" for measured in MEASURED["cache"]
    ]
    first, last = MEASURED["start_up"]
    assert row("read and clean") == [f"{measured['read_seconds']:.2f} s" for measured in (first, last)]
    assert row("tokenize") == [f"{measured['tokenize_seconds']:.1f} s" for measured in (first, last)]
    for start, name in (("memory, pairs only", "read_bytes_a_pair"), ("memory, at the peak", "peak_bytes_a_pair")):
        assert row(start) == [f"{measured[name]:,.0f} bytes a pair" for measured in (first, last)]
    near, far = MEASURED["mapped"]
    assert row("mapped file")[1:3] == [
        f"{measured['file_bytes_a_pair']:,.0f} bytes a pair" for measured in (near, far)
    ]
    assert row("mapped, read in a step")[1:3] == [
        f"{measured['bytes_a_step'] / 1000:.1f} kB" for measured in (near, far)
    ]
    assert row("mapped, time of a step")[1:3] == [
        f"{measured['milliseconds_a_step']:.1f} ms" for measured in (near, far)
    ]
    assert f"({far['held_bytes_a_pair_read'] / 1000:.0f} kB around each pair)" in PAGE
    for state in MEASURED["state"][0].values():
        assert f"{state['bytes']:,}" in PAGE
    assert f"{MEASURED['traffic'][0]['bytes']:,}" in PAGE


def test_the_tables_for_seven_billion_weights_are_their_formulas():
    def gib(size: float) -> list[str]:
        return [f"{size / num_gpus / 2**30:.1f} GiB" for num_gpus in (1, 8, 64)]

    full, selective = 16 * WEIGHTS, 4 * WEIGHTS + 12 * DOWN_PROJ
    assert row("all, cache | DDP") == gib(full)[:1] * 3
    assert row("all, cache | FSDP2") == gib(full)
    assert row("`down_proj`, shared | DDP") == gib(selective + 4 * DOWN_PROJ)[:1] * 3
    assert row("`down_proj`, cache | FSDP2") == gib(selective)
    for name, trained in (("all", WEIGHTS), ("`down_proj`", DOWN_PROJ)):
        shares = [(num_gpus - 1) / num_gpus / 1e9 for num_gpus in (8, 64)]
        assert row(f"{name} | DDP, a step") == [f"{share * 2 * 4 * trained:.1f} GB" for share in shares]
        assert row(f"{name} | FSDP2, a pack") == [f"{share * (4 * WEIGHTS + 2 * trained):.1f} GB" for share in shares]


def test_the_rate_of_a_cpu_is_the_measured_one():
    groups = json.loads((ROOT / "benchmarks/results/step_speed.json").read_text())["groups"].values()
    rate = median(rate for group in groups for rate in group["matmul_flops_per_second"]["float32"])
    assert find_hardware("cpu", 1).flops == pytest.approx(rate, rel=0.01)
    assert f"80 % of {rate / 1e9:.0f} GFLOP/s" in PAGE


def test_the_memory_page_has_the_measured_ratios():
    page = (ROOT / "docs/performance.md").read_text()
    measured = json.loads((ROOT / "benchmarks/results/memory_estimate.json").read_text())["measured"]
    assert len(measured) == 6
    for run in measured:
        sizes = f"{run['peak_gib']:.2f} | {run['estimate_gib']:.2f} | {run['ratio']:.2f}"
        assert f"| {run['family']} | {run['trained']} | {sizes} |" in page
    ratios = [run["ratio"] for run in measured]
    assert f"{min(ratios):.2f} to {max(ratios):.2f}" in page
    assert 0.8 <= min(ratios) <= max(ratios) <= 1.2
    alone = [run["ratio_without_process"] for run in measured]
    assert f"({measured[0]['process_gib']:.2f} in these runs), {min(alone):.2f} to {max(alone):.2f}" in page
