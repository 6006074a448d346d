"""Generation with seeded noise on the device: speed against `model.generate`, and the answers of a CPU."""

from dataclasses import replace
from functools import partial

import numpy as np
import torch
from generation_speed import WAYS, decode
from speed.variants import SHAPES, Variant, new_model

from bfpo.generation.decoding import DecodeRequest

from .cases import Cases, Result, Setting, time_and_peak


def cases(setting: Setting) -> Cases:
    """Return the comparison of answers, then the speeds."""
    return {
        "answers of CPU and device": partial(_same_answers, setting),
        "tokens per second": partial(_speed, setting),
    }


def _requests(setting: Setting, count: int, shortest: int, longest: int) -> list[DecodeRequest]:
    """Return requests with random prompts and lengths between two numbers of tokens."""
    rng = np.random.default_rng(setting.seed)
    return [
        DecodeRequest(
            tuple(rng.integers(3, 8000, rng.integers(8, 96)).tolist()),
            seed,
            int(rng.integers(shortest, longest, endpoint=True)),
        )
        for seed in range(count)
    ]


def _same_answers(setting: Setting) -> Result:
    """Decode the same requests on a CPU and on the device, in other batches, in float32."""
    shape = SHAPES["tiny" if setting.dry else "25M"]
    requests = _requests(setting, 4 if setting.dry else 32, 8, 16 if setting.dry else 64)
    # Larger weights than usual: otherwise the noise decides alone.
    model = new_model(shape, replace(Variant("bfpo"), attention="sdpa")).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(3)
    shares = {}
    for temperature in (0.0, 1.0):
        on_cpu = decode(model.cpu(), requests, temperature, rows=3)
        on_device = decode(model.to(setting.device), requests, temperature, rows=len(requests))
        tokens = [list(zip(*answers, strict=True)) for answers in zip(on_cpu, on_device, strict=True)]
        equal = sum(token == other for answer in tokens for token, other in answer)
        shares[f"temperature {temperature:g}"] = {
            "equal tokens": equal / sum(map(len, tokens)),
            "equal answers": sum(cpu == device for cpu, device in zip(on_cpu, on_device, strict=True))
            / len(requests),
        }
    # A rounding error can turn one token, and then the rest of that answer.
    return shares | {"passed": all(share["equal tokens"] > 0.95 for share in shares.values())}


def _speed(setting: Setting) -> Result:
    shape, rows = ("tiny", 2) if setting.dry else ("1B", 64)
    model = new_model(SHAPES[shape], Variant("bfpo", precision="fp32" if setting.dry else "bf16", attention="sdpa"))
    model.eval()
    result: Result = {}
    for lengths, (shortest, longest) in {"mixed": (16, 96), "equal": (64, 64)}.items():
        if setting.dry:
            shortest, longest = shortest // 16, longest // 16
        requests = _requests(setting, 2 * rows, shortest, longest)
        tokens = sum(request.max_new_tokens for request in requests)
        for name, run in WAYS.items():
            way = partial(run, model, requests, 1.0, rows)  # type: ignore[call-arg]
            measured = time_and_peak(way, repeats=1 if setting.dry else 3)
            result[f"{lengths}, {name}"] = measured | {"tokens/s": round(1000 * tokens / measured["ms"])}
    return result
