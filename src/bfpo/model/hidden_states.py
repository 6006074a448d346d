"""Hidden states of one layer or of several, side by side."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bfpo.model.lora import CausalLM, unwrap_adapter


def concatenated_states(output: Any, layers: Sequence[int]) -> Tensor:
    """Return the hidden states of layers side by side, (rows, tokens, layers · width).

    Args:
        output: Output of a decoder, made with `needs_hidden_states`.
        layers: Indices into the `hidden_states` that transformers returns; -1 is the last, after the final norm.
    """
    return torch.cat(
        [output.last_hidden_state if layer == -1 else output.hidden_states[layer] for layer in layers], dim=-1
    )


def needs_hidden_states(layers: Sequence[int]) -> bool:
    """Return whether the decoder must be called with `output_hidden_states`, which costs memory."""
    return any(layer != -1 for layer in layers)


@torch.inference_mode()
def hidden_states(model: CausalLM, token_ids: Sequence[int], layers: Sequence[int]) -> Tensor:
    """Return the hidden states after each token of a text, (tokens, layers · width), in float32 on the CPU.

    Args:
        model: Language model.
        token_ids: Tokens of the text.
        layers: Indices into the hidden states that transformers returns; see `concatenated_states`.
    """
    ids = torch.tensor([[*token_ids]], device=model.device)
    options = {"use_cache": False, "output_hidden_states": needs_hidden_states(layers)}
    output = unwrap_adapter(model).get_decoder()(input_ids=ids, **options)
    return concatenated_states(output, layers)[0].float().cpu()
