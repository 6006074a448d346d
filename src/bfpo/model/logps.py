"""Log-probabilities of completions: only the needed hidden states are scored, in chunks, and summed in float64."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from types import MethodType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from bfpo.errors import ModelError
from bfpo.model.attention import attention_inputs, span_attention
from bfpo.model.hidden_states import concatenated_states, needs_hidden_states
from bfpo.model.layout import Layout
from bfpo.model.lora import CausalLM, unwrap_adapter

Score: TypeAlias = Callable[[PreTrainedModel, Layout], Tensor]
"""Function of a model and a layout that is called inside the forward of the wrapped module."""

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
    return sum_by_completion(score_tokens(model, layout, _token_logps, layout.targets, chunk=chunk), layout)


def score_tokens(
    model: PreTrainedModel,
    layout: Layout,
    score: Callable[..., Tensor],
    *columns: Tensor,
    chunk: int | None = None,
) -> Tensor:
    """Return a score of each prediction from its logits, in chunks.

    Args:
        model: Causal language model.
        layout: Layout with N predictions.
        score: Function of logits (n, V) in float32 or float64, and of the same rows of each column.
        columns: Tensors with N rows.
        chunk: As in `completion_logps`.

    Returns:
        Scores, (N, ...).
    """
    hidden = completion_states(model, layout)
    if chunk is None:
        vocab_size = model.config.get_text_config().vocab_size
        chunk = len(hidden) if len(hidden) * vocab_size <= MAX_KEPT_LOGITS else CHUNK

    def score_states(states: Tensor, *rows: Tensor) -> Tensor:
        return score(_logits(states, model), *rows)

    chunks = []
    for rows in zip(*(column.split(chunk) for column in (hidden, *columns)), strict=True):
        if len(hidden) <= chunk or not torch.is_grad_enabled():
            chunks.append(score_states(*rows))
        else:
            chunks.append(checkpoint(score_states, *rows, use_reentrant=False))
    return torch.cat(chunks)


def sum_by_completion(scores: Tensor, layout: Layout) -> Tensor:
    """Return the sums of scores (N, ...) over the predictions of each completion, (S, ...) float64.

    They are float32 on devices without float64.
    """
    dtype = torch.float32 if scores.device.type == "mps" else torch.float64
    # One sum per completion, in a fixed order: an atomic scatter would not be reproducible on a GPU.
    return torch.stack([completion.sum(0) for completion in scores.to(dtype).split(layout.lengths)])


def completion_states(model: PreTrainedModel, layout: Layout, layers: Sequence[int] = (-1,)) -> Tensor:
    """Return the hidden states that predict the scored tokens of a layout, (N, layers · hidden size).

    Args:
        model: Model with a decoder.
        layout: Layout with N predictions.
        layers: Indices into the hidden states that transformers returns; see `concatenated_states`.
    """
    backbone = model.get_decoder()
    config = backbone.config
    with span_attention(config) if layout.spans else nullcontext():
        options = attention_inputs(layout, config) | (
            {"output_hidden_states": True} if needs_hidden_states(layers) else {}
        )
        output = backbone(input_ids=layout.input_ids, use_cache=False, **options)
    return concatenated_states(output, layers).flatten(0, 1).index_select(0, layout.hidden_index)


def _logits(hidden: Tensor, model: PreTrainedModel) -> Tensor:
    logits = model.get_output_embeddings()(hidden)
    if logits.dtype != torch.float64:
        logits = logits.float()
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    assert isinstance(logits, Tensor)
    return logits


def _token_logps(logits: Tensor, targets: Tensor) -> Tensor:
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


def add_layout_forward(model: CausalLM, score: Score = completion_logps) -> None:
    """Make `model(layout=...)` return completion log-probabilities; other calls are unchanged.

    `model(layout=..., score=...)` returns what another function of the model and the layout returns.

    Hidden states, gather and head must run inside the forward of the module that is wrapped: calling the backbone of
    a DistributedDataParallel model directly skips gradient synchronization without any error. So the forward of
    this instance is extended in place.

    Args:
        model: Model, changed in place; one that was changed before stays as it is.
        score: What a call without a `score` returns; for a model with another head, not log-probabilities.

    Raises:
        ModelError: If the model isn't a causal language model with a head.
    """
    model = unwrap_adapter(model)
    if getattr(model.forward, "takes_layout", False):
        return
    if score is completion_logps and (model.get_output_embeddings() is None or model.get_decoder() is model):
        raise ModelError(f"{type(model).__name__} has no language-model head; bfpo trains causal language models")
    original_forward: Callable[..., Any] = model.forward

    def forward(
        self: PreTrainedModel,
        *args: Any,
        layout: Layout | None = None,
        score: Score = score,
        **kwargs: Any,
    ) -> Any:
        return original_forward(*args, **kwargs) if layout is None else score(self, layout)

    forward.takes_layout = True  # type: ignore[attr-defined]
    # Where the arguments of the model itself are looked up.
    forward.extends = original_forward  # type: ignore[attr-defined]
    model.forward = MethodType(forward, model)


@torch.no_grad()
def check_against_plain_forward(model: nn.Module, layout: Layout, *, tolerance: float) -> float:
    """Compare the layout's log-probabilities with those of the model's own logits.

    This catches architectures that do something between hidden states and logits that `_logits` doesn't do.

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
