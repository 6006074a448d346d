"""Log-probabilities of completions: hidden states gathered where they count, scored in chunks, summed in float64."""

from collections.abc import Callable
from contextlib import nullcontext
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from bfpo.errors import ModelError
from bfpo.model.attention import attention_inputs, span_attention
from bfpo.model.layout import Layout
from bfpo.model.lora import CausalLM, under_adapter

# Log-probabilities over the vocabulary that are kept for the backward pass: 128 MiB in float32.
KEPT = 2**25
# Beyond that, predictions scored at a time, once more in the backward pass: with a vocabulary of 128k 0.5 GiB.
CHUNK = 1024


def completion_logps(model: PreTrainedModel, layout: Layout, *, chunk: int | None = None) -> Tensor:
    """Return the log-probability of each completion, summed over its tokens.

    Args:
        model: A causal language model.
        layout: S completions with N predictions in all.
        chunk: Predictions scored at a time; when there are more, nothing of the vocabulary's size is kept for the
            backward pass. Default all while that is little, else `CHUNK`.

    Returns:
        Nats, (S,) float64 (float32 on devices that have no float64).
    """
    backbone, head = model.get_decoder(), model.get_output_embeddings()
    config = backbone.config
    with span_attention(config) if layout.spans else nullcontext():
        output = backbone(input_ids=layout.input_ids, use_cache=False, **attention_inputs(layout, config))
    hidden = output.last_hidden_state.flatten(0, 1).index_select(0, layout.places)
    if chunk is None:
        chunk = len(hidden) if len(hidden) * model.config.get_text_config().vocab_size <= KEPT else CHUNK
    scored = []
    for states, targets in zip(hidden.split(chunk), layout.targets.split(chunk), strict=True):
        if len(hidden) <= chunk or not torch.is_grad_enabled():
            scored.append(_token_logps(states, targets, head, model))
        else:
            scored.append(checkpoint(_token_logps, states, targets, head, model, use_reentrant=False))
    token_logps = torch.cat(scored)
    exact = torch.float32 if token_logps.device.type == "mps" else torch.float64
    # One sum per completion, in a fixed order: an atomic scatter would not be reproducible on a GPU.
    return torch.stack([values.sum() for values in token_logps.to(exact).split(layout.lengths)])


def _token_logps(hidden: Tensor, targets: Tensor, head: nn.Module, model: PreTrainedModel) -> Tensor:
    logits = head(hidden)
    if logits.dtype != torch.float64:
        logits = logits.float()
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    picked: Tensor = _PickedLogSoftmax.apply(logits, targets)  # type: ignore[no-untyped-call]
    return picked


class _PickedLogSoftmax(torch.autograd.Function):
    """One entry of each row's log-softmax: (N, V), (N,) → (N,). Its backward pass writes one (N, V), not four."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        logps = logits.log_softmax(-1)
        ctx.save_for_backward(logps, targets)
        return logps.gather(-1, targets[:, None])[:, 0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        logps, targets = ctx.saved_tensors
        grad = grad[:, None]
        return logps.exp().mul_(-grad).scatter_add_(-1, targets[:, None], grad), None


def add_layout_forward(model: CausalLM) -> None:
    """Let `model(layout=...)` return completion log-probabilities; any other call works as before.

    Hidden states, gather and head must run inside the forward of the module that is wrapped: calling the backbone of
    a DistributedDataParallel model directly skips gradient synchronization without any error. So the forward of
    this one instance is extended, in place.

    Raises:
        ModelError: If the model isn't a causal language model with a head.
    """
    model = under_adapter(model)
    if model.get_output_embeddings() is None or model.get_decoder() is model:
        raise ModelError(f"{type(model).__name__} has no language-model head; bfpo trains causal language models")
    if getattr(model.forward, "takes_layout", False):
        return
    plain: Callable[..., Any] = model.forward

    def forward(self: PreTrainedModel, *args: Any, layout: Layout | None = None, **kwargs: Any) -> Any:
        return plain(*args, **kwargs) if layout is None else completion_logps(self, layout)

    forward.takes_layout = True  # type: ignore[attr-defined]
    model.forward = MethodType(forward, model)


@torch.no_grad()
def check_against_plain_forward(model: nn.Module, layout: Layout, *, tolerance: float) -> float:
    """Compare the layout's log-probabilities with those of the model's own logits.

    It catches what an architecture does between hidden states and logits that `_token_logps` doesn't know of.

    Args:
        model: With `add_layout_forward`.
        layout: A padded layout of a few completions.
        tolerance: Largest difference allowed, as a share of the log-probability's size.

    Returns:
        The largest difference found, in nats.

    Raises:
        ModelError: If a difference is larger.
    """
    ours = model(layout=layout)
    logits = model(input_ids=layout.input_ids).logits.double().cpu()
    tokens = logits.log_softmax(-1).flatten(0, 1)[layout.places.cpu(), layout.targets.cpu()]
    theirs = torch.stack([values.sum() for values in tokens.split(layout.lengths)])
    difference = (ours.double().cpu() - theirs).abs()
    if bool((difference > tolerance * theirs.abs().clamp(min=1)).any()):
        raise ModelError(
            f"{type(model).__name__}: log-probabilities computed from hidden states differ from the model's own by "
            f"{difference.max():.3g} nats; its head does something that bfpo doesn't know. Please report it"
        )
    return float(difference.max())
