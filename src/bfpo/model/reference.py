"""The reference: the policy as it was at step 0, without a second model in memory."""

from typing import Protocol

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.func import functional_call

from bfpo.model.layout import Layout


class Reference(Protocol):
    """Gives the log-probabilities of the model that training started from."""

    @property
    def bytes(self) -> int:
        """Memory it takes beside the policy's own."""

    def logps(self, model: nn.Module, layout: Layout) -> Tensor:
        """Return the log-probability of each completion, nats, (S,).

        Args:
            model: The policy, unwrapped; its trainable weights are not used.
            layout: The completions.
        """


class AdapterOff:
    """The model with its adapter switched off: the reference of a new adapter."""

    bytes = 0

    @torch.no_grad()
    def logps(self, model: nn.Module, layout: Layout) -> Tensor:
        """Return the log-probabilities without the adapter; see `Reference`."""
        assert isinstance(model, PeftModel)
        with model.disable_adapter():
            logps: Tensor = model(layout=layout)
        return logps


class SharedReference:
    """The frozen weights are the policy's own; only the trainable tensors are copied.

    With selective training the copy is small; with full training it is as large as the model. An adapter that was
    trained before is copied like any other trainable tensor, so that the reference is the adapted model, not its
    base.

    Args:
        model: The policy before training starts, with `add_layout_forward` and `requires_grad` as it will be
            trained. Copies are taken now.
    """

    def __init__(self, model: nn.Module) -> None:
        self._tensors = {
            name: parameter.detach().clone()
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }

    @property
    def bytes(self) -> int:
        """Memory of the copies."""
        return sum(tensor.nbytes for tensor in self._tensors.values())

    @torch.no_grad()
    def logps(self, model: nn.Module, layout: Layout) -> Tensor:
        """Return the log-probabilities with the copied tensors in their places; see `Reference`."""
        device = next(model.parameters()).device
        if any(tensor.device != device for tensor in self._tensors.values()):
            self._tensors = {name: tensor.to(device) for name, tensor in self._tensors.items()}
        # tie_weights (the default) gives a tied head the copy of its embedding.
        logps: Tensor = functional_call(model, self._tensors, (), {"layout": layout})
        return logps
