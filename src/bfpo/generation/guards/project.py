"""The guard `project`: hidden states are moved to where a linear head calls them safe."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from bfpo.core.files import content_hash
from bfpo.errors import ModelError
from bfpo.model.cost_head import CostHead
from bfpo.model.lora import CausalLM, unwrap_adapter


@dataclass(frozen=True, slots=True)
class Projection:
    """Moves each hidden state from which a token is predicted the shortest way into the half-space w·h + b ≤ t.

    h becomes h - max(0, w·h + b - t) w / |w|², which is exact and minimal. Of layer -1 this is a change of the logits
    by a multiple of W w, with W the model's output embedding.

    It guarantees what the head says of the state, and nothing about the answer.

    Args:
        head: Linear head on one layer.
        at_most: Largest probability of "unsafe" by the head, in (0, 1); t is its logit.

    Raises:
        ModelError: If the head has a hidden layer, or reads several layers.
    """

    head: CostHead
    at_most: float

    def __post_init__(self) -> None:
        if not self.head.is_linear or len(self.head.layers) > 1:
            got = f"{len(self.head.layers)} layers" if self.head.is_linear else "a hidden layer"
            raise ModelError(
                f"the guard project needs a linear head on one layer, and this one has {got}; train one with units: "
                "0 and a single number in layers"
            )

    @property
    def settings_hash(self) -> str:
        """Hash of the head and the bound."""
        return content_hash("project", self.head.identity, self.at_most)

    def move(self, states: Tensor) -> Tensor:
        """Return the nearest states of which the head says at most `at_most`.

        Args:
            states: Hidden states, (..., width).
        """
        excess = (self.head(states) - math.log(self.at_most / (1 - self.at_most))).clamp_min(0)
        direction = self.head.weight[0].to(excess)
        return states - (excess[..., None] * direction / direction.square().sum()).to(states.dtype)

    @contextmanager
    def applied(self, model: CausalLM) -> Iterator[None]:
        """Apply the guard to the forward passes of a model in a `with` block.

        Only the last position of a pass is moved, so each pass must end with a token that the next is predicted from.

        Raises:
            ModelError: If the model's layers can't be found.
        """
        handle = self._add_hook(model)
        try:
            yield
        finally:
            handle.remove()

    def _add_hook(self, model: CausalLM) -> RemovableHandle:
        base = unwrap_adapter(model)
        handle: RemovableHandle
        (layer,) = self.head.layers
        if layer == -1:
            handle = base.get_output_embeddings().register_forward_pre_hook(
                lambda module, inputs: (self.move(inputs[0]), *inputs[1:])
            )
            return handle
        layers: Any = getattr(base.get_decoder(), "layers", None)
        if layers is None:
            raise ModelError(f"the guard project finds no layers in a {type(base).__name__}; use a head on layer -1")
        handle = layers[layer - 1].register_forward_hook(self._move_last)
        return handle

    def _move_last(self, module: Any, inputs: Any, output: Any) -> Any:
        states = output[0] if isinstance(output, tuple) else output
        moved = states.clone()
        moved[:, -1] = self.move(states[:, -1])
        return (moved, *output[1:]) if isinstance(output, tuple) else moved
