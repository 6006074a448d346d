"""How far the policy is from the reference at each position of a completion, over the whole vocabulary.

Of the reference the hidden states are kept, 1/30 or less of the size of its log-probabilities. Both models' logits
are computed in chunks, and again in the backward pass if there is more than one; see `bfpo.model.logps.chunk_size`.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bfpo.model.layout import Layout
from bfpo.model.logps import completion_states, score_states, sum_by_completion, vocabulary_logits


def vocabulary_logps(model: PreTrainedModel, states: Tensor) -> Tensor:
    """Return the log-probabilities of all tokens from hidden states, (n, hidden size) → (n, V)."""
    return vocabulary_logits(model, states).log_softmax(-1)


def logps_and_divergences(
    model: PreTrainedModel,
    layout: Layout,
    *,
    reference_states: Tensor,
    reference_logps: Callable[[Tensor], Tensor],
    share: float,
) -> Tensor:
    """Return log-probabilities of completions, and the policy's divergence from the reference summed over positions.

    Args:
        model: Policy.
        layout: Layout of S completions with N predictions.
        reference_states: The reference's `completion_states`, (N, hidden size).
        reference_logps: Function from some of these, (n, hidden size), to the reference's log-probabilities of all
            tokens, (n, V).
        share: As in `tail_divergence`.

    Returns:
        The policy's log-probability, the divergence, and the reference's log-probability, which has no gradient;
        nats, (S, 3).
    """

    def score(logits: Tensor, targets: Tensor, states: Tensor) -> Tensor:
        logps, reference = logits.log_softmax(-1), reference_logps(states).detach()
        divergence = tail_divergence(logps, reference, share=share)
        policy_logps, own_logps = (of_tokens.gather(-1, targets[:, None])[:, 0] for of_tokens in (logps, reference))
        return torch.stack([policy_logps, divergence, own_logps], dim=-1)

    states = completion_states(model, layout)
    return sum_by_completion(score_states(model, states, score, layout.targets, reference_states), layout)


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
