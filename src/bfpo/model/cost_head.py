"""A small head on a model's hidden states: the probability that the answer that a text begins turns out unsafe."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from bfpo.core.files import open_atomic
from bfpo.errors import DataError
from bfpo.model.lora import CausalLM, unwrap_adapter

_KEYS = ("weight", "bias", "hidden_weight", "hidden_bias")


@dataclass(frozen=True, slots=True, eq=False)
class CostHead:
    """Linear head, or one with a hidden layer of rectified linear units.

    Args:
        layer: Index into the `hidden_states` that transformers returns: 1 to the number of layers, or -1, the
            normalized states that the logits are computed from.
        weight: Weights of the output, (1, inputs).
        bias: Bias of the output, (1,).
        hidden_weight: Weights of the hidden layer, (units, width of the model); None for a linear head.
        hidden_bias: Bias of the hidden layer, (units,).
    """

    layer: int
    weight: Tensor
    bias: Tensor
    hidden_weight: Tensor | None = None
    hidden_bias: Tensor | None = None

    def __call__(self, states: Tensor) -> Tensor:
        """Return the logit of "unsafe" of each state.

        Args:
            states: Hidden states of the layer, (..., width).

        Returns:
            Logits, (...), in the states' type, at least float32.
        """
        dtype = torch.promote_types(states.dtype, torch.float32)
        features = states.to(dtype)
        if self.hidden_weight is not None and self.hidden_bias is not None:
            features = torch.relu(features @ self.hidden_weight.to(features).T + self.hidden_bias.to(features))
        return (features @ self.weight.to(features).T + self.bias.to(features))[..., 0]

    @property
    def width(self) -> int:
        """Width of the hidden states."""
        return (self.weight if self.hidden_weight is None else self.hidden_weight).shape[1]

    @property
    def is_linear(self) -> bool:
        """Whether the head has no hidden layer."""
        return self.hidden_weight is None

    @property
    def identity(self) -> str:
        """Hash of the layer and the weights."""
        return hashlib.sha256(self._to_bytes()).hexdigest()[:16]

    def after_affine(self, scale: Tensor, shift: Tensor) -> "CostHead":
        """Return the head that gives to x what this one gives to scale · x + shift.

        Args:
            scale: Factor of each coordinate of a state, (width,), not 0.
            shift: Shift of each coordinate, (width,).
        """
        if self.hidden_weight is None or self.hidden_bias is None:
            return replace(self, weight=self.weight * scale, bias=self.bias + self.weight @ shift)
        bias = self.hidden_bias + self.hidden_weight @ shift
        return replace(self, hidden_weight=self.hidden_weight * scale, hidden_bias=bias)

    def _to_bytes(self) -> bytes:
        tensors = {key: getattr(self, key) for key in _KEYS if getattr(self, key) is not None}
        contiguous = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        return save(contiguous, metadata={"layer": str(self.layer)})

    def save(self, path: Path) -> None:
        """Write a safetensors file of the weights by the names of the fields, with `layer` in its metadata."""
        with open_atomic(path) as file:
            file.write(self._to_bytes())


@torch.inference_mode()
def hidden_states(model: CausalLM, token_ids: Sequence[int], layer: int) -> Tensor:
    """Return the hidden states after each token of a text, (tokens, width), in float32 on the CPU.

    Args:
        model: Language model.
        token_ids: Tokens of the text.
        layer: Index into the hidden states that transformers returns.
    """
    ids = torch.tensor([[*token_ids]], device=model.device)
    output = unwrap_adapter(model).get_decoder()(input_ids=ids, use_cache=False, output_hidden_states=True)
    states: Tensor = output.hidden_states[layer][0].float().cpu()
    return states


def load_cost_head(path: Path) -> CostHead:
    """Read a head.

    Raises:
        DataError: If the file is missing, or isn't a head.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file; expected a cost head (safetensors)")
    try:
        with safe_open(path, framework="pt") as file:
            layer = (file.metadata() or {}).get("layer", "")
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
    except SafetensorError as error:
        raise DataError(f"{path}: not a safetensors file ({error})") from None
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    units = shapes.get("weight", (0, 0))[-1]
    has_hidden = "hidden_weight" in shapes
    is_head = (
        set(shapes) == set(_KEYS[: 4 if has_hidden else 2])
        and shapes["weight"] == (1, units)
        and shapes["bias"] == (1,)
        and (not has_hidden or (shapes["hidden_weight"][0], shapes["hidden_bias"]) == (units, (units,)))
        and layer.removeprefix("-").isdecimal()
    )
    if not is_head:
        raise DataError(
            f"{path}: layer {layer!r} and tensors {shapes}; expected the metadata `layer`, and weight (1, n), bias "
            "(1,), with a hidden layer also hidden_weight (n, width) and hidden_bias (n,)"
        )
    return CostHead(int(layer), **tensors)
