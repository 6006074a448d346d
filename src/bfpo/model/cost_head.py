"""A small head on a model's hidden states: the probability that the answer that a text begins turns out unsafe."""

import hashlib
import re
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from bfpo.core.files import open_atomic
from bfpo.errors import DataError

_KEYS = ("weight", "bias", "hidden_weight", "hidden_bias")


@dataclass(frozen=True, slots=True, eq=False)
class CostHead:
    """Linear head, or one with a hidden layer of rectified linear units.

    Args:
        layers: Indices into the `hidden_states` that transformers returns: 1 to the number of layers, or -1, the
            normalized states that the logits are computed from. The states of several layers are concatenated.
        weight: Weights of the output, (1, inputs).
        bias: Bias of the output, (1,).
        hidden_weight: Weights of the hidden layer, (units, layers · width of the model); None for a linear head.
        hidden_bias: Bias of the hidden layer, (units,).
    """

    layers: tuple[int, ...]
    weight: Tensor
    bias: Tensor
    hidden_weight: Tensor | None = None
    hidden_bias: Tensor | None = None

    def __call__(self, states: Tensor) -> Tensor:
        """Return the logit of "unsafe" of each state.

        Args:
            states: Hidden states of the layers, (..., layers · width).

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
        """Width of the model's hidden states."""
        return (self.weight if self.hidden_weight is None else self.hidden_weight).shape[1] // len(self.layers)

    @property
    def is_linear(self) -> bool:
        """Whether the head has no hidden layer."""
        return self.hidden_weight is None

    @property
    def identity(self) -> str:
        """Hash of the layers and the weights."""
        return hashlib.sha256(self._to_bytes()).hexdigest()[:16]

    def after_affine(self, scale: Tensor, shift: Tensor) -> "CostHead":
        """Return the head that gives to x what this one gives to scale · x + shift.

        Args:
            scale: Factor of each coordinate of the states, (layers · width,), not 0.
            shift: Shift of each coordinate, (layers · width,).
        """
        if self.hidden_weight is None or self.hidden_bias is None:
            return replace(self, weight=self.weight * scale, bias=self.bias + self.weight @ shift)
        bias = self.hidden_bias + self.hidden_weight @ shift
        return replace(self, hidden_weight=self.hidden_weight * scale, hidden_bias=bias)

    def _to_bytes(self) -> bytes:
        tensors = {key: getattr(self, key) for key in _KEYS if getattr(self, key) is not None}
        contiguous = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        return save(contiguous, metadata={"layers": ",".join(map(str, self.layers))})

    def save(self, path: Path) -> None:
        """Write a safetensors file of the weights by the names of the fields, with `layers` in its metadata."""
        with open_atomic(path) as file:
            file.write(self._to_bytes())


def load_cost_head(path: Path) -> CostHead:
    """Read a head.

    Raises:
        DataError: If the file is missing, or isn't a head.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file; expected a cost head (safetensors)")
    try:
        with safe_open(path, framework="pt") as file:
            layers = (file.metadata() or {}).get("layers", "")
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
        and re.fullmatch(r"-?\d+(,-?\d+)*", layers) is not None
        and shapes["hidden_weight" if has_hidden else "weight"][-1] % len(layers.split(",")) == 0
    )
    if not is_head:
        raise DataError(
            f"{path}: layers {layers!r} and tensors {shapes}; expected the metadata `layers`, and weight (1, n), "
            "bias (1,), with a hidden layer also hidden_weight (n, inputs) and hidden_bias (n,)"
        )
    return CostHead(tuple(map(int, layers.split(","))), **tensors)
