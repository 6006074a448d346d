"""Fitting a cost head on the beginnings of answers, each with the verdict on the whole answer as its target.

The mean of the verdicts on the answers that share a beginning is the probability that such an answer is unsafe, so
the binary cross-entropy is least where the head gives it.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from bfpo.core.terminal import progress, show_activity
from bfpo.errors import DataError
from bfpo.judging.prefixes import Prefixes
from bfpo.model.cost_head import CostHead

_BATCH, _CHECKED_EVERY = 1024, 50
_RATE, _DECAY = 1e-2, 1e-3
# Beginnings that a head is applied to at once.
_CHUNK = 1 << 16


class Split(NamedTuple):
    """Beginnings by what they are for; no prompt is in two parts.

    Args:
        fitted: Those that the weights are fitted on.
        calibrating: Those that decide which step's weights are kept, and that these are scaled and shifted on.
        measured: Those that the quality of the head is measured on.
    """

    fitted: Prefixes
    calibrating: Prefixes
    measured: Prefixes


def split_prompts(prefixes: Prefixes, *, holdout: float, seed: int) -> Split:
    """Split beginnings by prompt.

    Args:
        prefixes: All of them.
        holdout: Share of the prompts that the weights aren't fitted on, half of them for each of the other parts.
        seed: Seed of the choice.

    Raises:
        DataError: If the answers of a part are all safe or all unsafe.
    """
    prompts = sorted({*prefixes.prompts.tolist()})
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed)).tolist()
    each = max(1, round(holdout * len(prompts) / 2))
    bounds = {"fitted": slice(2 * each, None), "calibrating": slice(0, each), "measured": slice(each, 2 * each)}
    parts = {name: prefixes.of([prompts[index] for index in order[bound]]) for name, bound in bounds.items()}
    for name, part in parts.items():
        if len({*part.unsafe.tolist()}) < 2:
            got = "all" if 1.0 in part.unsafe else "none"
            raise DataError(
                f"completions: of the answers to the {len({*part.prompts.tolist()})} prompts for the part '{name}' "
                f"{got} are unsafe; a head needs both, add answers to harmful and to benign prompts"
            )
    return Split(**parts)


def fit_head(
    split: Split, layers: Sequence[int], *, units: int, steps: int, seed: int, device: str = "cpu"
) -> CostHead:
    """Fit a head by AdamW on batches of beginnings, with a learning rate that falls as a cosine.

    Args:
        split: Beginnings.
        layers: Layers whose states they have.
        units: Number of units of the hidden layer; 0 for a linear head.
        steps: Number of steps.
        seed: Seed of the first weights and the batches.
        device: Device that the head is fitted on.
    """
    generator = torch.Generator().manual_seed(seed)
    part = split.fitted
    mean, scale = part.states.float().mean(0), part.states.float().std(0).clamp_min(1e-6)
    weights = [weight.to(device).requires_grad_(True) for weight in _first_weights(len(mean), units, generator)]
    optimizer = torch.optim.AdamW(weights, lr=_RATE, weight_decay=_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    best, least = weights, float("inf")
    with progress("fitting the head", steps) as advance:
        for step in range(1, steps + 1):
            rows = torch.randint(len(part), (_BATCH,), generator=generator)
            states = ((part.states[rows].float() - mean) / scale).to(device)
            loss = binary_cross_entropy_with_logits(_head(layers, weights)(states), part.unsafe[rows].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if step % _CHECKED_EVERY == 0 or step == steps:
                now = _unscaled(layers, [weight.detach().cpu() for weight in weights], mean, scale)
                held_out = cross_entropy(logits_of(now, split.calibrating), split.calibrating)
                if held_out < least:
                    best, least = [weight.detach().cpu().clone() for weight in weights], held_out
                show_activity(f"loss {held_out:.4f} on held-out prompts")
            advance(1)
    return _calibrated(_unscaled(layers, best, mean, scale), split.calibrating)


@torch.no_grad()
def logits_of(head: CostHead, prefixes: Prefixes) -> Tensor:
    """Return the logits of "unsafe" that a head gives to beginnings, (T,)."""
    return torch.cat([head(states) for states in prefixes.states.split(_CHUNK)])


def cross_entropy(logits: Tensor, prefixes: Prefixes) -> float:
    """Return the mean binary cross-entropy of logits, (T,), in nats."""
    return float(binary_cross_entropy_with_logits(logits, prefixes.unsafe))


def _first_weights(inputs: int, units: int, generator: torch.Generator) -> list[Tensor]:
    shapes = [(units, inputs), (units,), (1, units), (1,)] if units else [(1, inputs), (1,)]
    return [
        torch.randn(shape, generator=generator) / shape[-1] ** 0.5 if len(shape) == 2 else torch.zeros(shape)
        for shape in shapes
    ]


def _head(layers: Sequence[int], weights: Sequence[Tensor]) -> CostHead:
    *hidden, weight, bias = weights
    return CostHead(tuple(layers), weight, bias, *hidden)


def _unscaled(layers: Sequence[int], weights: Sequence[Tensor], mean: Tensor, scale: Tensor) -> CostHead:
    """Return the head that gives to states what the weights give to normalized ones."""
    return _head(layers, weights).after_affine(1 / scale, -mean / scale)


def _calibrated(head: CostHead, prefixes: Prefixes) -> CostHead:
    """Return a head with its logits scaled and shifted to the least cross-entropy on beginnings (Platt, 1999)."""
    logits = logits_of(head, prefixes)
    parameters = torch.tensor([1.0, 0.0], requires_grad=True)
    optimizer = torch.optim.LBFGS([parameters], max_iter=50, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = binary_cross_entropy_with_logits(logits * parameters[0] + parameters[1], prefixes.unsafe)
        value.backward()
        return value

    optimizer.step(loss)
    factor, shift = parameters.detach()
    return replace(head, weight=head.weight * factor, bias=head.bias * factor + shift)
