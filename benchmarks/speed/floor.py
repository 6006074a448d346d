"""Lower bound of the time of a step: its useful matrix products at the rate that this machine reaches on them."""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn.functional import linear

from bfpo.data.table import PairTable


def num_tokens(table: PairTable, rows: list[int]) -> int:
    """Return the number of input tokens: each prompt once, and each completion without its last token."""
    return sum(prompt + chosen + rejected - 2 for prompt, chosen, rejected in table.lengths[rows].tolist())


def useful_flops(model: nn.Module, table: PairTable, rows: list[int]) -> float:
    """Return the floating-point operations of a step that every layout needs.

    Per weight of the body and token: 2 in each forward pass (policy and reference), 2 for the gradient of the input,
    2 for that of the weight if it is trained. The head: the same, at completion tokens only. Weights of an adapter:
    not in the reference. Attention: products of queries with keys and of weights with values, for causal pairs of
    positions within the tokens of a pair. What a trainer computes again in the backward pass doesn't count.

    Args:
        model: Llama-type model, possibly with an adapter in its layers, whose trained weights have `requires_grad`.
        table: Token table.
        rows: Rows of one step.
    """
    config, head = model.config, model.get_output_embeddings().weight
    body = 0
    for name, weight in model.get_decoder().layers.named_parameters():
        if "norm" not in name:
            body += weight.numel() * ((4 if "lora_" in name else 6) + 2 * weight.requires_grad)
    scored = int(table.lengths[rows][:, 1:].sum())
    attended = sum(_causal_pairs(*lengths) for lengths in table.lengths[rows].tolist())
    width = config.num_hidden_layers * config.num_attention_heads * config.head_dim
    return (
        body * num_tokens(table, rows)
        + (6 + 2 * head.requires_grad) * head.numel() * scored
        # Per pair of positions and unit of width: 4 in each of two forward passes, 8 in the backward pass.
        + 16 * width * attended
    )


def _causal_pairs(prompt: int, chosen: int, rejected: int) -> int:
    pairs = prompt * (prompt + 1) // 2
    for length in (chosen - 1, rejected - 1):
        pairs += length * prompt + length * (length + 1) // 2
    return pairs


def matmul_rate(
    model: nn.Module, dtype: torch.dtype, timed: Callable[[Callable[[], object]], float], *, tokens: int = 1024
) -> float:
    """Return the FLOP/s of matrix products with the shapes of the model's body, from the best of three runs each."""
    hidden, intermediate = model.config.hidden_size, model.config.intermediate_size
    device = next(model.parameters()).device
    flops = seconds = 0.0
    for n_in, n_out in ((hidden, hidden), (hidden, intermediate), (intermediate, hidden)):
        left = torch.ones(tokens, n_in, dtype=dtype, device=device)
        right = torch.ones(n_out, n_in, dtype=dtype, device=device)
        seconds += min(timed(lambda left=left, right=right: linear(left, right)) for _ in range(3))
        flops += 2 * tokens * n_in * n_out
    return flops / seconds
