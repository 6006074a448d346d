"""Log-probabilities of completions: only the needed hidden states are scored, in chunks, and summed in float64."""

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
from bfpo.model.lora import CausalLM, unwrap_adapter

# Maximum number of logits kept for the backward pass: 128 MiB in float32.
MAX_KEPT_LOGITS = 2**25
# Predictions scored at a time when there are more logits than that; they are recomputed in the backward pass. With a
# vocabulary of 128k a chunk takes 0.5 GiB.
CHUNK = 1024


def completion_logps(model: PreTrainedModel, layout: Layout, *, chunk: int | None = None) -> Tensor:
    """Return the log-probability of each completion, summed over its tokens.

    Args:
        model: Causal language model.
        layout: Layout of S completions with N predictions in total.
        chunk: Number of predictions scored at a time; with more than one chunk, logits are recomputed in the backward
            pass instead of kept. Default: all of them up to `MAX_KEPT_LOGITS` logits, otherwise `CHUNK`.

    Returns:
        Log-probabilities in nats, (S,) float64 (float32 on devices without float64).
    """
    head, hidden = model.get_output_embeddings(), completion_states(model, layout)
    if chunk is None:
        vocab_size = model.config.get_text_config().vocab_size
        chunk = len(hidden) if len(hidden) * vocab_size <= MAX_KEPT_LOGITS else CHUNK
    chunks = []
    for states, targets in zip(hidden.split(chunk), layout.targets.split(chunk), strict=True):
        if len(hidden) <= chunk or not torch.is_grad_enabled():
            chunks.append(_token_logps(states, targets, head, model))
        else:
            chunks.append(checkpoint(_token_logps, states, targets, head, model, use_reentrant=False))
    token_logps = torch.cat(chunks)
    dtype = torch.float32 if token_logps.device.type == "mps" else torch.float64
    # One sum per completion, in a fixed order: an atomic scatter would not be reproducible on a GPU.
    return torch.stack([completion.sum() for completion in token_logps.to(dtype).split(layout.lengths)])


def completion_states(model: PreTrainedModel, layout: Layout) -> Tensor:
    """Return the hidden states that predict the scored tokens of a layout, (N, hidden size).

    Args:
        model: Model with a decoder.
        layout: Layout with N predictions.
    """
    backbone = model.get_decoder()
    config = backbone.config
    with span_attention(config) if layout.spans else nullcontext():
        output = backbone(input_ids=layout.input_ids, use_cache=False, **attention_inputs(layout, config))
    states: Tensor = output.last_hidden_state.flatten(0, 1).index_select(0, layout.hidden_index)
    return states


def _token_logps(hidden: Tensor, targets: Tensor, head: nn.Module, model: PreTrainedModel) -> Tensor:
    logits = head(hidden)
    if logits.dtype != torch.float64:
        logits = logits.float()
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    logps: Tensor = _SelectiveLogSoftmax.apply(logits, targets)  # type: ignore[no-untyped-call]
    return logps


class _SelectiveLogSoftmax(torch.autograd.Function):
    """One entry of each row's log-softmax: (N, V), (N,) → (N,). The backward pass writes one (N, V), not four."""

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


def add_layout_forward(
    model: CausalLM, compute: Callable[[PreTrainedModel, Layout], Tensor] = completion_logps
) -> None:
    """Make `model(layout=...)` return completion log-probabilities; other calls are unchanged.

    Hidden states, gather and head must run inside the forward of the module that is wrapped: calling the backbone of
    a DistributedDataParallel model directly skips gradient synchronization without any error. So the forward of
    this instance is extended in place.

    Args:
        model: Model, changed in place; one that was changed before stays as it is.
        compute: Function that computes other numbers than log-probabilities, for a model with another head.

    Raises:
        ModelError: If the model isn't a causal language model with a head.
    """
    model = unwrap_adapter(model)
    if getattr(model.forward, "takes_layout", False):
        return
    if compute is completion_logps and (model.get_output_embeddings() is None or model.get_decoder() is model):
        raise ModelError(f"{type(model).__name__} has no language-model head; bfpo trains causal language models")
    original_forward: Callable[..., Any] = model.forward

    def forward(self: PreTrainedModel, *args: Any, layout: Layout | None = None, **kwargs: Any) -> Any:
        return original_forward(*args, **kwargs) if layout is None else compute(self, layout)

    forward.takes_layout = True  # type: ignore[attr-defined]
    # Where the arguments of the model itself are looked up.
    forward.extends = original_forward  # type: ignore[attr-defined]
    model.forward = MethodType(forward, model)


@torch.no_grad()
def check_against_plain_forward(model: nn.Module, layout: Layout, *, tolerance: float) -> float:
    """Compare the layout's log-probabilities with those of the model's own logits.

    This catches architectures that do something between hidden states and logits that `_token_logps` doesn't do.

    Args:
        model: Model after `add_layout_forward`.
        layout: Padded layout of a few completions.
        tolerance: Largest allowed difference, as a share of the log-probability.

    Returns:
        The largest difference, nats.

    Raises:
        ModelError: If a difference is larger than allowed.
    """
    logps = model(layout=layout).double().cpu()
    logits = model(input_ids=layout.input_ids).logits.double().cpu()
    token_logps = logits.log_softmax(-1).flatten(0, 1)[layout.hidden_index.cpu(), layout.targets.cpu()]
    expected = torch.stack([completion.sum() for completion in token_logps.split(layout.lengths)])
    difference = (logps - expected).abs()
    if bool((difference > tolerance * expected.abs().clamp(min=1)).any()):
        raise ModelError(
            f"{type(model).__name__}: log-probabilities computed from hidden states differ from the model's own by "
            f"{difference.max():.3g} nats; its head does something that bfpo doesn't support, report it as a bug"
        )
    return float(difference.max())
