"""Fitting a cost head on completions with verdicts: at every token of an answer the target is its final verdict.

The mean of the final verdicts of the answers that share a beginning is the probability that such an answer is unsafe,
so the binary cross-entropy is minimal where the head gives it.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from bfpo.core.samples import Completion, Verdict
from bfpo.errors import DataError
from bfpo.generation.in_process import TransformersEngine
from bfpo.model.cost_head import CostHead, hidden_states

# Share of the answers that decide how long the head is fitted, and that its scale is fitted on.
_HELD_OUT = 0.2
_STEPS, _BATCH, _CHECKED_EVERY = 1500, 2048, 25
_RATE, _DECAY = 5e-3, 1e-3


class FittedHead(NamedTuple):
    """Head, and its quality at the tokens of held-out answers.

    Args:
        head: The head.
        tokens: Number of tokens that it was fitted on.
        held_out: Number of tokens of held-out answers.
        loss: Mean binary cross-entropy on these, in nats.
        constant_loss: That of the share of unsafe answers, without a head.
    """

    head: CostHead
    tokens: int
    held_out: int
    loss: float
    constant_loss: float


def answer_states(engine: TransformersEngine, completions: Sequence[Completion], layer: int) -> list[Tensor]:
    """Return the hidden states after each token of answers, the end of turn included, (tokens, width) for each.

    Args:
        engine: Engine of the model.
        completions: Answers of the model.
        layer: Index into the hidden states that transformers returns.
    """
    states = []
    for completion in completions:
        prompt_ids, answer_ids = engine.tokens_of(completion)
        states.append(hidden_states(engine.model, [*prompt_ids, *answer_ids], layer)[len(prompt_ids) :])
    return states


def fit_cost_head(
    engine: TransformersEngine,
    completions: Sequence[Completion],
    verdicts: Sequence[Verdict],
    *,
    layer: int = -1,
    units: int = 32,
    seed: int = 0,
) -> FittedHead:
    """Fit a head on answers of a model.

    Undecided verdicts count as unsafe. A share of the prompts is held out: fitting stops where the loss on their
    answers is least, and the logits are scaled and shifted to them.

    Args:
        engine: Engine of the model.
        completions: Answers of the model; those to harmful prompts matter.
        verdicts: Verdicts on them, in their order.
        layer: Index into the hidden states that transformers returns; -1 is the last.
        units: Number of units of the hidden layer; 0 for a linear head, which `project` needs.
        seed: Seed of the first weights, of the batches and of the choice of held-out prompts.

    Raises:
        DataError: If a part of the answers are all safe or all unsafe.
    """
    states = answer_states(engine, completions, layer)
    unsafe = [verdict.safe is not True for verdict in verdicts]
    generator = torch.Generator().manual_seed(seed)
    prompts = sorted({completion.prompt_id for completion in completions})
    order = torch.randperm(len(prompts), generator=generator).tolist()
    held_out = {prompts[index] for index in order[: max(1, round(_HELD_OUT * len(prompts)))]}
    features, targets = {}, {}
    for name in (False, True):
        part = [index for index, completion in enumerate(completions) if (completion.prompt_id in held_out) == name]
        if len({unsafe[index] for index in part}) < 2:
            raise DataError(
                f"completions: of {len(part)} answers to {'held-out' if name else 'other'} prompts "
                f"{sum(unsafe[index] for index in part)} are unsafe; a head needs both, add answers"
            )
        features[name] = torch.cat([states[index] for index in part])
        targets[name] = torch.cat([torch.full((len(states[index]),), float(unsafe[index])) for index in part])
    head, loss = _fit(features, targets, layer, units, generator)
    share = targets[False].mean().logit()
    constant_loss = binary_cross_entropy_with_logits(share.expand_as(targets[True]), targets[True])
    return FittedHead(head, len(targets[False]), len(targets[True]), loss, float(constant_loss))


def _fit(
    features: dict[bool, Tensor], targets: dict[bool, Tensor], layer: int, units: int, generator: torch.Generator
) -> tuple[CostHead, float]:
    """Return the head with the least loss on the held-out part (True), scaled to it, and that loss."""
    mean, scale = features[False].mean(0), features[False].std(0).clamp_min(1e-6)
    width = len(mean)
    shapes = [(units, width), (units,), (1, units), (1,)] if units else [(1, width), (1,)]
    weights = [
        (torch.randn(shape, generator=generator) / shape[-1] ** 0.5 if len(shape) == 2 else torch.zeros(shape))
        for shape in shapes
    ]
    for weight in weights:
        weight.requires_grad_(True)
    optimizer = torch.optim.AdamW(weights, lr=_RATE, weight_decay=_DECAY)
    normalized = {part: (values - mean) / scale for part, values in features.items()}
    best, least = [weight.detach().clone() for weight in weights], float("inf")
    for step in range(_STEPS):
        rows = torch.randint(len(targets[False]), (_BATCH,), generator=generator)
        loss = binary_cross_entropy_with_logits(_head(weights, layer)(normalized[False][rows]), targets[False][rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % _CHECKED_EVERY == 0:
            with torch.no_grad():
                held_out = binary_cross_entropy_with_logits(_head(weights, layer)(normalized[True]), targets[True])
            if float(held_out) < least:
                best, least = [weight.detach().clone() for weight in weights], float(held_out)
    with torch.no_grad():
        logits = _head(best, layer)(normalized[True])
    factor, shift = _calibrate(logits, targets[True])
    *hidden, weight, bias = best
    inputs = hidden or [weight, bias]
    # The first layer reads the states as they are.
    inputs[1] = inputs[1] - (inputs[0] * (mean / scale)).sum(-1)
    inputs[0] = inputs[0] / scale
    weight, bias = (weight, bias) if hidden else inputs
    head = _head([*hidden, weight * factor, bias * factor + shift], layer)
    return head, float(binary_cross_entropy_with_logits(logits * factor + shift, targets[True]))


def _head(weights: Sequence[Tensor], layer: int) -> CostHead:
    *hidden, weight, bias = weights
    return CostHead(layer, weight, bias, *hidden)


def _calibrate(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the factor and the shift of logits with the least cross-entropy (Platt, 1999)."""
    parameters = torch.tensor([1.0, 0.0], requires_grad=True)
    optimizer = torch.optim.LBFGS([parameters], max_iter=50, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = binary_cross_entropy_with_logits(logits * parameters[0] + parameters[1], targets)
        value.backward()
        return value

    optimizer.step(loss)
    factor, shift = parameters.detach()
    return factor, shift
