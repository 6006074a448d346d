"""A training step of 1 and 8 billion random weights, with LoRA and with `down_proj`, against TRL's trainer."""

import gc
from dataclasses import replace
from functools import partial
from statistics import median

import numpy as np
import torch
from speed.data import PROFILES, synthetic_pairs
from speed.measure import Group, cpu_seconds, cuda_seconds, measure_in_rotation
from speed.report import ratios, utilization

from bfpo.data.table import PairTable

from .cases import Cases, Result, Setting, require

# TRL first: ratios are to it. Both recompute activations, as by default.
COMPARED = ("TRL, SDPA", "bfpo, checkpointed")
ALONE = ("bfpo, not checkpointed", "TRL, Liger's kernels", "TRL, FlashAttention")
NEEDED = {"TRL, Liger's kernels": "liger_kernel", "TRL, FlashAttention": "flash_attn"}
PAIRS = 8


def cases(setting: Setting) -> Cases:
    """Return first the comparisons of both sizes, then other variants."""
    groups = [
        Group(profile, shape, PAIRS, COMPARED, rounds=6, selective=trained == "down_proj", lora=trained == "LoRA")
        for profile, shape, trained in (
            ("ultrafeedback", "8B", "LoRA"),
            ("ultrafeedback", "8B", "down_proj"),
            ("ultrafeedback", "1B", "down_proj"),
            ("ultrafeedback", "1B", "LoRA"),
            ("pku", "1B", "down_proj"),
        )
    ]
    if setting.dry:
        groups = [replace(group, shape="tiny", batch_size=2, rounds=1, data="pku") for group in groups[:2]]
    compared = {group.name: partial(_compare, group, setting) for group in groups}
    alone = {
        f"{group.name}: {name}": partial(_compare, replace(group, variants=(name,)), setting)
        for group in groups[: 1 if setting.dry else 2]
        for name in ALONE
    }
    return compared | alone


def _compare(group: Group, setting: Setting) -> Result:
    for name in group.variants:
        require("trl", *([NEEDED[name]] if name in NEEDED else []))
    # Two batches more than there are rounds, for the warm-up: kernels are compiled for a length, then for any.
    table = synthetic_pairs(
        PROFILES[group.data], group.pairs + 2 * group.batch_size, np.random.default_rng(setting.seed)
    )
    last = list(range(group.pairs, group.pairs + 2 * group.batch_size))
    warm_up = [last[: group.batch_size], last[group.batch_size :]][: 1 if setting.dry else 2]
    try:
        return _with_rates(group, _measure(group, table, warm_up, setting), setting) | {"interleaved": True}
    except torch.OutOfMemoryError:
        if len(group.variants) == 1:
            raise
    # Outside the handler, which keeps the tensors of the failed call alive.
    parts = []
    for name in group.variants:
        gc.collect()
        torch.cuda.empty_cache()
        parts.append(_measure(replace(group, variants=(name,)), table, warm_up, setting))
    result = parts[0]
    for part in parts[1:]:
        for key in ("seconds", "useful_flops", "matmul_dtype", "static_mib", "peak_mib"):
            result[key] |= part[key]
    return _with_rates(group, result, setting) | {"interleaved": False}


def _measure(group: Group, table: PairTable, warm_up: list[list[int]], setting: Setting) -> Result:
    return measure_in_rotation(group, table, cpu_seconds if setting.dry else cuda_seconds, warm_up)


def _with_rates(group: Group, result: Result, setting: Setting) -> Result:
    """Add tokens per second, utilization and ratios to a result."""
    device = "" if setting.dry else torch.cuda.get_device_name()
    rates = {}
    for name, seconds in result["seconds"].items():
        tokens = [count / second for count, second in zip(result["num_tokens"], seconds, strict=True)]
        rates[name] = {
            "ms": round(1000 * median(seconds), 1),
            "useful tokens/s": round(median(tokens)),
            "times as fast": round(median(ratios(result, group.variants[0], name)), 2),
        } | {key: result[key][name] for key in ("static_mib", "peak_mib") if key in result}
        if (share := utilization(result, name, device)) is not None:
            rates[name]["MFU"] = round(share, 4)
    return rates | {"measured": result}
