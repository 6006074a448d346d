"""Held-out quality of a cost head, by how much of the answer it has seen, with intervals over prompts."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from bfpo.core.terminal import show_table
from bfpo.judging.prefix_head import cross_entropy
from bfpo.judging.prefixes import Prefixes
from bfpo.judging.score_quality import share
from bfpo.stats.agreement import Bools, Floats, auroc, calibration_interval, has_enough_prompts, reliability

# Parts that answers are divided into.
_PARTS = 5


def prefix_quality(logits: Tensor, prefixes: Prefixes) -> dict[str, Any]:
    """Return how well logits of "unsafe" predict the verdicts on the whole answers.

    Args:
        logits: Logits of T beginnings of held-out answers, (T,).
        prefixes: The beginnings.

    Returns:
        `loss` and `constant_loss`, the binary cross-entropy of the head and of the share of unsafe answers, nats;
        `all`, `by_share` (of the answer that has been seen, in fifths) and `by_token` (tokens seen, `from` 1, 2, 3,
        5, 9, ...), each with the number of `prefixes`, the mean probability `mean_p`, the `unsafe_share`, `auroc`,
        `calibration_error` and the bins of a reliability diagram, `reliability`.
    """
    p, unsafe = logits.double().sigmoid().numpy(), prefixes.unsafe.numpy() > 0
    constant = prefixes.unsafe.mean().logit().expand_as(prefixes.unsafe)
    # A token belongs to the part in which its middle is.
    part = ((prefixes.tokens - 0.5) / prefixes.lengths * _PARTS).astype(int)
    power = np.ceil(np.log2(prefixes.tokens)).astype(int)
    return {
        "prompts": len({*prefixes.prompts.tolist()}),
        "loss": cross_entropy(logits, prefixes),
        "constant_loss": cross_entropy(constant, prefixes),
        "all": _quality(p, unsafe, prefixes.prompts.tolist()),
        "by_share": [
            {"from": index / _PARTS, "to": (index + 1) / _PARTS} | _of(part == index, p, unsafe, prefixes)
            for index in np.unique(part)
        ],
        "by_token": [
            {"from": int(2 ** (index - 1)) + 1 if index else 1, "to": int(2**index)}
            | _of(power == index, p, unsafe, prefixes)
            for index in np.unique(power)
        ],
    }


def _of(mask: Bools, p: Floats, unsafe: Bools, prefixes: Prefixes) -> dict[str, Any]:
    return _quality(p[mask], unsafe[mask], prefixes.prompts[mask].tolist())


def _quality(p: Floats, unsafe: Bools, prompts: Sequence[str]) -> dict[str, Any]:
    return {
        "prefixes": len(p),
        "mean_p": float(p.mean()),
        "unsafe_share": share(unsafe, prompts),
        "auroc": auroc(unsafe, p, prompts) if has_enough_prompts(unsafe, prompts) else None,
        "calibration_error": calibration_interval(unsafe, p, prompts),
        "reliability": [part._asdict() for part in reliability(unsafe, p, prompts)],
    }


def show_prefix_quality(quality: dict[str, Any]) -> None:
    """Print the calibration curve by share of the answer, and by number of tokens.

    Args:
        quality: Results of `prefix_quality`.
    """
    rows = [("all", *_cells(quality["all"]))]
    rows += [(f"{part['from']:.0%} to {part['to']:.0%}", *_cells(part)) for part in quality["by_share"]]
    rows += [
        (
            f"token {part['to']}" if part["from"] == part["to"] else f"tokens {part['from']}-{part['to']}",
            *_cells(part),
        )
        for part in quality["by_token"]
    ]
    show_table(
        f"Held-out answers: loss {quality['loss']:.3f}, without a head {quality['constant_loss']:.3f}",
        ("seen of the answer", "tokens", "mean p", "unsafe", "[95 %]", "AUROC", "calibration error"),
        rows,
    )


def _cells(part: dict[str, Any]) -> tuple[str, ...]:
    unsafe, area = part["unsafe_share"], part["auroc"]
    return (
        f"{part['prefixes']:,}",
        f"{part['mean_p']:.3f}",
        f"{unsafe.value:.3f}",
        f"[{unsafe.low:.3f}, {unsafe.high:.3f}]",
        "-" if area is None else f"{area.value:.3f}",
        f"{part['calibration_error'].value:.3f}",
    )
