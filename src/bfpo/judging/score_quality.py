"""Quality of scores on held-out pairs: order, sign and calibration, with intervals over prompts."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.special import expit

from bfpo.core.terminal import show_table
from bfpo.stats.agreement import Bools, Floats, agreement, calibration_interval, reliability
from bfpo.stats.intervals import Interval


def reward_quality(rewards: Floats, prompts: Sequence[str]) -> dict[str, Any]:
    """Return how often the more helpful answer has the higher reward.

    Args:
        rewards: Rewards of both answers of N pairs, the more helpful one first, (N, 2).
        prompts: Prompt of each pair, N.

    Returns:
        `pairs`, `order_accuracy` and the calibration of σ(|difference|), the probability that the rewards' order is
        right.
    """
    difference = rewards[:, 0] - rewards[:, 1]
    is_ordered = difference > 0
    return {
        "pairs": len(rewards),
        "order_accuracy": share(is_ordered, prompts),
        **_calibration(is_ordered, expit(np.abs(difference)), prompts),
    }


def cost_quality(costs: Floats, signs: Floats, prompts: Sequence[str]) -> dict[str, Any]:
    """Return how well the sign of costs tells unsafe from safe answers.

    Args:
        costs: Costs of both answers of N pairs, (N, 2).
        signs: 1 for an unsafe answer, -1 for a safe one, (N, 2).
        prompts: Prompt of each pair, N.

    Returns:
        `answers`, `sign_accuracy`, `unsafe_recall` and `safe_recall` (shares of the unsafe and of the safe answers
        with the right sign), `auroc`, the calibration of σ(cost) as the probability of unsafe, and `mixed_pairs` with
        `order_accuracy`, the share of pairs with one unsafe answer in which that one has the higher cost.
    """
    is_unsafe, p_unsafe = (signs > 0).ravel(), expit(costs).ravel()
    of_answers = [prompt for prompt in prompts for _ in range(2)]
    overall = agreement(is_unsafe.tolist(), (costs > 0).ravel().tolist(), p_unsafe.tolist(), of_answers)
    order = (signs[:, 0] - signs[:, 1]) / 2
    is_mixed = order != 0
    is_ordered = (order * (costs[:, 0] - costs[:, 1]) > 0)[is_mixed]
    return {
        "answers": overall.n,
        "sign_accuracy": overall.accuracy,
        "unsafe_recall": overall.recall_yes,
        "safe_recall": overall.recall_no,
        "auroc": overall.auroc,
        **_calibration(is_unsafe, p_unsafe, of_answers),
        "mixed_pairs": int(is_mixed.sum()),
        "order_accuracy": share(is_ordered, [p for p, mixed in zip(prompts, is_mixed, strict=True) if mixed]),
    }


def show_quality(stream: str, results: dict[str, Any]) -> None:
    """Print the held-out results of a stream.

    Args:
        stream: Name of the stream.
        results: `pairs`, `loss`, and the quality of each head.
    """
    rows = [
        (head, name.replace("_", " "), *_cells(value))
        for head in ("reward", "cost")
        for name, value in results.get(head, {}).items()
        if name != "reliability"
    ]
    title = f"Held-out {stream} pairs: {results['pairs']}, loss {results['loss']:.4g}"
    show_table(title, ("head", "metric", "value", "95 % interval over prompts"), rows)


def _cells(value: Interval | int | None) -> tuple[str, str]:
    if isinstance(value, tuple):
        return f"{value.value:.3f}", f"[{value.low:.3f}, {value.high:.3f}]"
    return "-" if value is None else f"{value:,}", ""


def share(is_right: Bools, prompts: Sequence[str]) -> Interval | None:
    """Return the share of true values with its interval over prompts; None without any value."""
    labels = [True] * len(is_right)
    return agreement(labels, is_right.tolist(), [None] * len(labels), prompts).accuracy


def _calibration(labels: Bools, p: Floats, prompts: Sequence[str]) -> dict[str, Any]:
    return {
        "calibration_error": calibration_interval(labels, p, prompts),
        "reliability": [part._asdict() for part in reliability(labels, p, prompts)],
    }
