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
# If there are more, this many predictions are scored at a time, fewer if the vocabulary is so large that they would
# have more logits than the second number: 0.5 GiB in float32. Up to three such tensors exist at once.
CHUNK, MAX_CHUNK_LOGITS = 1024, 2**27


def chunk_size(vocab_size: int, predictions: int) -> int:
    """Return how many predictions are scored at a time: all of them, if their logits can be kept."""
    if predictions * vocab_size <= MAX_KEPT_LOGITS:
        return predictions
    # Matrix products on a GPU are made of tiles of 128 rows.
    return min(CHUNK, max(128, MAX_CHUNK_LOGITS // vocab_size // 128 * 128))


def completion_logps(model: PreTrainedModel, layout: Layout, *, chunk: int | None = None) -> Tensor:
    """Return the log-probability of each completion, summed over its tokens.

    Args:
        model: Causal language model.
        layout: Layout of S completions with N predictions in total.
        chunk: As in `token_logps`.

    Returns:
        Log-probabilities in nats, (S,) float64 (float32 on devices without float64).
    """
    return sum_by_completion(
        token_logps(model, completion_states(model, layout), layout.targets, chunk=chunk), layout
    )


def token_logps(model: PreTrainedModel, states: Tensor, targets: Tensor, *, chunk: int | None = None) -> Tensor:
    """Return the log-probability of the target of each prediction.

    With more than one chunk no logits are kept for the backward pass: if the head is frozen, the gradient is taken
    in the forward pass, otherwise the logits are computed again.

    Args:
        model: Causal language model, of which only the head is used.
        states: Hidden states, (N, hidden size).
        targets: Token ids, (N,) int64.
        chunk: Number of predictions scored at a time; by default `chunk_size`.

    Returns:
        Log-probabilities in nats, (N,) float32 or float64.
    """
    chunk = chunk or chunk_size(model.config.get_text_config().vocab_size, len(states))
    if len(states) > chunk and torch.is_grad_enabled() and _is_frozen(model.get_output_embeddings()):
        logps: Tensor = _FrozenHeadLogps.apply(states, targets, model, chunk)  # type: ignore[no-untyped-call]
        return logps
    return score_states(model, states, _target_logps, targets, chunk=chunk)


def score_states(
    model: PreTrainedModel,
    states: Tensor,
    score: Callable[..., Tensor],
    *columns: Tensor,
    chunk: int | None = None,
) -> Tensor:
    """Return a score of each prediction from its logits, in chunks.

    Args:
        model: Causal language model, of which only the head is used.
        states: Hidden states, (N, hidden size).
        score: Function of logits (n, V) in float32 or float64, and of the same rows of each column.
        columns: Tensors with N rows.
        chunk: As in `token_logps`.

    Returns:
        Scores, (N, ...).
    """
    chunk = chunk or chunk_size(model.config.get_text_config().vocab_size, len(states))

    def score_rows(states: Tensor, *rows: Tensor) -> Tensor:
        return score(vocabulary_logits(model, states), *rows)

    chunks = []
    for rows in zip(*(column.split(chunk) for column in (states, *columns)), strict=True):
        if len(states) <= chunk or not torch.is_grad_enabled():
            chunks.append(score_rows(*rows))
        else:
            chunks.append(checkpoint(score_rows, *rows, use_reentrant=False))
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


def vocabulary_logits(model: PreTrainedModel, states: Tensor) -> Tensor:
    """Return what a model's head makes of hidden states, with its factor and its soft cap, in float32 or float64.

    Args:
        model: Causal language model.
        states: Hidden states, (n, hidden size).

    Returns:
        Logits, (n, V).
    """
    logits: Tensor = model.get_output_embeddings()(states)
    if logits.dtype != torch.float64:
        logits = logits.float()
    config = model.config.get_text_config()
    if (factor := _logit_factor(config)) != 1:
        logits = logits * factor
    cap = getattr(config, "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


def _logit_factor(config: Any) -> float:
    """Return what a family multiplies its logits by: Cohere, Falcon-H1 and HyperCLOVA X multiply, Granite divides."""
    for name in ("logit_scale", "lm_head_multiplier"):
        if (factor := getattr(config, name, None)) is not None:
            return float(factor)
    factor = float(getattr(config, "logits_scaling", None) or 1)
    return factor if config.model_type == "hyperclovax" else 1 / factor


def _is_frozen(head: nn.Module) -> bool:
    # DeepSpeed gathers the weights that it shards (`ds_id`) for its own backward pass only.
    return not any(weight.requires_grad or hasattr(weight, "ds_id") for weight in head.parameters())


def _target_logps(logits: Tensor, targets: Tensor) -> Tensor:
    logps: Tensor = _SelectiveLogSoftmax.apply(logits, targets)  # type: ignore[no-untyped-call]
    return logps


class _FrozenHeadLogps(torch.autograd.Function):
    """Log-probabilities of targets under a frozen head: (N, H), (N,) → (N,).

    The gradient of a log-probability with respect to its hidden state depends on no other row nor on the loss, so it
    is computed along with it: (N, H) numbers are kept, and no logits have to be computed again.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, targets: Tensor, model: PreTrainedModel, chunk: int) -> Tensor:
        logps, gradients = [], []
        for rows, row_targets in zip(states.split(chunk), targets.split(chunk), strict=True):
            with torch.enable_grad():
                leaf = rows.detach().requires_grad_()
                row_logps = _target_logps(vocabulary_logits(model, leaf), row_targets)
                gradients += torch.autograd.grad(row_logps.sum(), leaf)
            logps.append(row_logps.detach())
        ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(logps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (gradients,) = ctx.saved_tensors
        return (gradients * grad[:, None]).to(gradients.dtype), None, None, None


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

    This catches architectures that do something between hidden states and logits that `vocabulary_logits` doesn't do.

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
