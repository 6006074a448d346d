"""How far the policy is from the reference at each position of a completion, over the whole vocabulary.

The reference's log-probabilities of all tokens at all N predictions of a batch are kept, which takes 4·N·V bytes:
0.5 GiB for 1,024 predictions and a vocabulary of 128k. The policy's are computed in chunks, and again in the backward
pass.
"""

from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bfpo.model.layout import Layout
from bfpo.model.logps import score_tokens, sum_by_completion


@torch.no_grad()
def vocabulary_logps(model: PreTrainedModel, layout: Layout) -> Tensor:
    """Return the log-probabilities of all tokens at each of N predictions, (N, V)."""
    return score_tokens(model, layout, partial(torch.log_softmax, dim=-1))


def logps_and_divergences(model: PreTrainedModel, layout: Layout, *, reference: Tensor, share: float) -> Tensor:
    """Return the log-probability of each completion, and its divergence from the reference summed over positions.

    Args:
        model: Policy.
        layout: Layout of S completions with N predictions.
        reference: The reference's log-probabilities of all tokens, (N, V).
        share: As in `tail_divergence`.

    Returns:
        Log-probabilities and divergences, nats, (S, 2).
    """

    def score(logits: Tensor, targets: Tensor, reference: Tensor) -> Tensor:
        logps = logits.log_softmax(-1)
        token_logps = logps.gather(-1, targets[:, None])[:, 0]
        return torch.stack([token_logps, tail_divergence(logps, reference, share=share)], dim=-1)

    return sum_by_completion(score_tokens(model, layout, score, layout.targets, reference), layout)


def reference_logps(reference: Tensor, layout: Layout) -> Tensor:
    """Return the log-probability of each completion from those of all tokens, (N, V) → (S,)."""
    return sum_by_completion(reference.gather(-1, layout.targets[:, None])[:, 0], layout)


def tail_divergence(logps: Tensor, reference: Tensor, *, share: float) -> Tensor:
    """Return the mean of log π_ref/π under π_ref over the tokens on which it is largest, (..., V) → (...).

    This is the conditional value at risk of log π_ref/π, of which each token has its probability under π_ref. A share
    of 1 gives KL(π_ref ‖ π).

    Args:
        logps: Log-probabilities of the policy, (..., V).
        reference: Log-probabilities of the reference, (..., V).
        share: Share of the reference's probability in the tail, in (0, 1].
    """
    probability, ratio = reference.exp(), reference - logps
    if share < 1:
        # The weights are constants of the gradient: it is that of the ratios in the tail.
        order = ratio.detach().argsort(-1, descending=True)
        ordered = probability.gather(-1, order)
        room = (share - (ordered.cumsum(-1) - ordered)).clamp(min=0)
        probability = torch.zeros_like(probability).scatter(-1, order, torch.minimum(ordered, room) / share)
    # A token without probability under the reference has an infinite ratio and counts for nothing.
    return (probability * ratio.masked_fill(probability == 0, 0)).sum(-1)
