"""The reference: the policy at step 0, without a second model in memory."""

from typing import Protocol

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.func import functional_call

from bfpo.model.layout import Layout
from bfpo.model.logps import Score, completion_logps


class Reference(Protocol):
    """Log-probabilities of the model that training started from."""

    @property
    def nbytes(self) -> int:
        """Memory needed in addition to the policy's, in bytes."""

    def logps(self, model: nn.Module, layout: Layout, score: Score = completion_logps) -> Tensor:
        """Return the log-probability of each completion, nats, (S,).

        Args:
            model: Policy, unwrapped; its trained weights are not used.
            layout: Layout of S completions.
            score: Other function of the model and the layout, whose value is returned instead.
        """


class AdapterOff:
    """The model with its adapter switched off: the reference for a new adapter."""

    nbytes = 0

    @torch.no_grad()
    def logps(self, model: nn.Module, layout: Layout, score: Score = completion_logps) -> Tensor:
        """Return log-probabilities without the adapter; see `Reference`."""
        assert isinstance(model, PeftModel)
        with model.disable_adapter():
            logps: Tensor = model(layout=layout, score=score)
        return logps


class SharedReference:
    """Reference that shares the policy's frozen weights and copies only the trained tensors.

    With selective training the copy is small; with full training it is as large as the model. An adapter that was
    trained before is copied like any other trained tensor: the reference is the adapted model, not its base.

    Args:
        model: Policy before training starts, after `add_layout_forward` and `select_parameters`. Its trained tensors
            are copied now.
    """

    def __init__(self, model: nn.Module) -> None:
        self._tensors = {
            name: parameter.detach().clone()
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }

    @property
    def nbytes(self) -> int:
        """Memory of the copies, in bytes."""
        return sum(tensor.nbytes for tensor in self._tensors.values())

    @torch.no_grad()
    def logps(self, model: nn.Module, layout: Layout, score: Score = completion_logps) -> Tensor:
        """Return log-probabilities of the model with the copied tensors; see `Reference`."""
        device = next(model.parameters()).device
        if any(tensor.device != device for tensor in self._tensors.values()):
            self._tensors = {name: tensor.to(device) for name, tensor in self._tensors.items()}
        # tie_weights=True, the default, makes a tied head use the copy of its embedding.
        logps: Tensor = functional_call(model, self._tensors, (), {"layout": layout, "score": score})
        return logps
