"""Attention for packed rows: what the backbone's forward needs so that every token attends to the right tokens.

Padded rows need nothing extra. For a packed row the attention implementation of the backbone is switched, while it
runs, to a function registered with transformers' `AttentionInterface`. The masks are passed through the backbone's
forward as a keyword argument, so that a checkpointed layer gets them again when it is recomputed in the backward
pass:

- on a CPU a few SDPA calls per span, which skip most of the masked scores;
- on CUDA FlexAttention, with one `BlockMask` for the whole row (not yet run on a GPU);
- elsewhere one SDPA call with a dense mask of the whole row, which is correct but slow for long rows.

Soft-capped scores (Gemma 2) are computed without SDPA, which has no soft cap.

`config._attn_implementation` and the registry are semi-private names of transformers; tests check that both exist.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PretrainedConfig
from transformers.integrations.flex_attention import flex_attention_forward

from bfpo.errors import ModelError
from bfpo.model.layout import Layout, Span

NAME = "bfpo_spans"

Window: TypeAlias = int | None
MaskMod: TypeAlias = Callable[[Any, Any, Tensor, Tensor], Tensor]

# Shorter spans attend in one call: measured on a CPU, below this size extra calls cost more than masked scores.
MIN_SPLIT_TOKENS = 128
LAYER_TYPES = {"full_attention", "sliding_attention"}
# Arguments of a layer's attention call that don't change which tokens attend to which, or how.
IGNORED_ARGUMENTS = {
    "cache_position",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "use_cache",
}


class UnsupportedFeature(ModelError):
    """The model's attention uses a feature that packed rows don't support."""


class Segment(NamedTuple):
    """Consecutive tokens of a packed row that attend in one call.

    Args:
        size: Number of tokens.
        prefix_len: Number of tokens that they attend to at the start of the last segment without a prefix: the length
            of the prompt for every branch but the first, otherwise 0.
    """

    size: int
    prefix_len: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class SpanMasks:
    """Attention masks of a packed row, made once per pack for all layers.

    Args:
        segments: The segments of the row, in order.
        masks: Sliding window → one mask per segment, (size, prefix_len + size) bool, True where the query (row)
            attends to the key (column), None for plain causal attention; or a `BlockMask` for the whole row.
    """

    segments: tuple[Segment, ...]
    masks: dict[Window, list[Tensor | None] | BlockMask]


def attention_inputs(layout: Layout, config: PretrainedConfig) -> dict[str, Any]:
    """Return the keyword arguments of the backbone's forward that go with a layout.

    Right-padded rows need none: under a causal mask no real token attends to the padding after it, and positions
    count from the start of the row. (With explicit `position_ids` and no mask, transformers would take the row for
    packed sequences and silently compute something else.)

    Args:
        layout: Layout on the model's device.
        config: Configuration of the backbone, which says which layers have a sliding window.

    Raises:
        UnsupportedFeature: If the layout is packed and a layer has neither full nor sliding attention.
    """
    if not layout.spans:
        return {}
    device, windows = layout.input_ids.device, windows_of(config)
    if device.type == "cuda" and find_spec("triton") is not None:
        span_masks = SpanMasks((), {window: block_mask(layout.spans, window, device) for window in windows})
    elif device.type == "cpu":
        span_masks = make_span_masks(layout.spans, windows, device)
    else:
        whole_row = (Segment(layout.num_tokens),)
        span_masks = SpanMasks(whole_row, {window: [dense_mask(layout.spans, window, device)] for window in windows})
    # transformers passes a 4-D mask on unchanged. This one is empty, so that any other attention function fails on
    # it: with a mask of the right shape the numbers would be silently wrong.
    empty_mask = torch.empty(0, 0, 0, 0, device=device)
    return {"attention_mask": empty_mask, "position_ids": layout.positions, "span_masks": span_masks}


def windows_of(config: PretrainedConfig) -> set[Window]:
    """Return the sliding windows of a model's layers; None stands for full attention.

    Raises:
        UnsupportedFeature: If there are layers of another type.
    """
    window: Window = getattr(config, "sliding_window", None)
    layer_types: list[str] | None = getattr(config, "layer_types", None)
    if layer_types is None:
        return {window}
    if unsupported := set(layer_types) - LAYER_TYPES:
        raise UnsupportedFeature(f"layers of type {', '.join(sorted(unsupported))}")
    return {window if layer_type == "sliding_attention" else None for layer_type in layer_types}


def mask_mod(spans: Sequence[Span], window: Window, device: torch.device) -> MaskMod:
    """Return FlexAttention's `mask_mod` of a packed row: (batch, head, query, key) → whether query attends to key.

    A token attends to itself and to the earlier tokens of its own span, except those of other branches. The window
    counts positions rather than indices: a branch comes after its siblings in the row, but directly follows the
    prompt in its positions.
    """
    pieces = [
        (span_index, branch, span.prompt if branch else 0, size)
        for span_index, span in enumerate(spans)
        for branch, size in enumerate((span.prompt, *span.branches))
    ]
    span_index, branch, first_position, size = np.array(pieces, dtype=np.int32).T
    offset = np.arange(size.sum()) - np.repeat(size.cumsum() - size, size)
    tokens = np.stack(
        [np.repeat(span_index, size), np.repeat(branch, size), np.repeat(first_position, size) + offset]
    )
    # FlexAttention expands these to (L, L) arrays before it has its blocks, hence the small integer type.
    span_of, branch_of, position_of = torch.from_numpy(tokens.astype(np.int32)).to(device)

    def attends(batch: Any, head: Any, query: Tensor, key: Tensor) -> Tensor:
        allowed: Tensor = (key <= query) & (span_of[query] == span_of[key])
        allowed = allowed & ((branch_of[key] == 0) | (branch_of[key] == branch_of[query]))
        return allowed if window is None else allowed & (position_of[query] - position_of[key] < window)

    return attends


def dense_mask(spans: Sequence[Span], window: Window, device: torch.device) -> Tensor:
    """Return the mask of a packed row as a matrix, (n, n) bool."""
    index = torch.arange(sum(span.size for span in spans), device=device)
    return mask_mod(spans, window, device)(None, None, index[:, None], index[None, :])


def block_mask(spans: Sequence[Span], window: Window, device: torch.device) -> BlockMask:
    """Return the mask of a packed row as FlexAttention's sparse blocks."""
    tokens = sum(span.size for span in spans)
    mask: BlockMask = create_block_mask(mask_mod(spans, window, device), None, None, tokens, tokens, device=device)
    return mask


def make_span_masks(spans: Sequence[Span], windows: Iterable[Window], device: torch.device) -> SpanMasks:
    """Return masks segment by segment, so that few scores are computed only to be masked.

    A prompt and its first branch form one segment of plain causal attention, which needs no mask. Every further
    branch is a segment that attends to the prompt and to itself. Short spans are not split.
    """
    segments = tuple(segment for span in spans for segment in _segments(span))
    masks: dict[Window, list[Tensor | None] | BlockMask] = {
        window: [mask for span in spans for mask in _masks(span, window, device)] for window in windows
    }
    return SpanMasks(segments, masks)


def _masks(span: Span, window: Window, device: torch.device) -> tuple[Tensor | None, ...]:
    make_masks = _cached_segment_masks if span.size < MIN_SPLIT_TOKENS else _segment_masks
    return make_masks(span, window, device)


def _segment_masks(span: Span, window: Window, device: torch.device) -> tuple[Tensor | None, ...]:
    span_mask, start, masks = dense_mask([span], window, device), 0, []
    for size, prefix_len in _segments(span):
        rows = span_mask[start : start + size]
        mask = torch.cat([rows[:, :prefix_len], rows[:, start : start + size]], dim=1)
        masks.append(None if torch.equal(mask, torch.ones_like(mask).tril()) else mask)
        start += size
    return tuple(masks)


# The same short lengths recur, already in the forward pass of the reference: a fifth of a small model's step.
_cached_segment_masks = lru_cache(maxsize=1024)(_segment_masks)


def _segments(span: Span) -> list[Segment]:
    if span.size < MIN_SPLIT_TOKENS:
        return [Segment(span.size)]
    first, *others = span.branches
    return [Segment(span.prompt + first), *(Segment(size, span.prompt) for size in others if size > 0)]


@contextmanager
def span_attention(config: PretrainedConfig) -> Iterator[None]:
    """Switch a model to attention by spans inside a `with` block.

    If layers are checkpointed, the block must include the backward pass, in which they are recomputed. Outside of it
    (generation, saving) the model has the attention it was loaded with.

    Args:
        config: Configuration of the backbone.
    """
    before = config._attn_implementation
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before


def attend_by_spans(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    span_masks: SpanMasks | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: Window = None,
    softcap: float | None = None,
    position_ids: Tensor | None = None,
    **other_arguments: Any,
) -> tuple[Tensor, None]:
    """Attend within the spans of a packed row; transformers calls this function in each layer.

    Args:
        module: Attention layer.
        query: Queries, (1, heads, L, width).
        key: Keys, (1, groups of heads, L, width).
        value: Values, (1, groups of heads, L, width).
        attention_mask: Not used.
        span_masks: Masks of the packed row.
        scaling: Factor of the scores; None for 1/√width.
        dropout: Dropout probability; must be 0.
        sliding_window: Sliding window of this layer, in tokens; None for full attention.
        softcap: Bound of the scores; None for no bound.
        position_ids: Not used: query and key already contain the rotary embeddings.
        other_arguments: Other arguments of the layer; must be None or in `IGNORED_ARGUMENTS`.

    Returns:
        Outputs, (1, L, heads, width), and None for the attention weights.

    Raises:
        UnsupportedFeature: If the layer uses a feature that packed rows don't support; the message names it.
    """
    if unsupported := _unsupported_features(module, dropout, other_arguments):
        raise UnsupportedFeature(f"{type(module).__name__} uses {', '.join(unsupported)}")
    if span_masks is None:
        raise UnsupportedFeature(f"{type(module).__name__} gets no span masks from the model")
    if sliding_window not in span_masks.masks:
        raise UnsupportedFeature(f"{type(module).__name__} has a window of {sliding_window}")
    masks = span_masks.masks[sliding_window]
    if isinstance(masks, BlockMask):
        if torch.is_autocast_enabled(query.device.type):
            # SDPA casts under autocast, FlexAttention doesn't: rotary embeddings may leave query and key in float32.
            dtype = torch.get_autocast_dtype(query.device.type)
            query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        output, _ = flex_attention_forward(module, query, key, value, masks, scaling=scaling, softcap=softcap)
        return output, None
    segments = span_masks.segments
    if value.dtype in (torch.bfloat16, torch.float16) and value.device.type == "cpu":
        # For spans of this size half precision is slower (docs/performance.md), and less exact.
        with torch.autocast("cpu", enabled=False):
            output = _attend_by_segment(query.float(), key.float(), value.float(), segments, masks, scaling, softcap)
        return output.to(value.dtype), None
    return _attend_by_segment(query, key, value, segments, masks, scaling, softcap), None


def _unsupported_features(module: nn.Module, dropout: float, other_arguments: dict[str, Any]) -> list[str]:
    names = sorted(
        name for name, value in other_arguments.items() if name not in IGNORED_ARGUMENTS and value is not None
    )
    if dropout:
        names.append("attention dropout")
    elif not getattr(module, "is_causal", True):
        names.append("attention that isn't causal")
    return names


def _attend_by_segment(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Sequence[Segment],
    masks: Sequence[Tensor | None],
    scaling: float | None,
    softcap: float | None,
) -> Tensor:
    heads_per_group = query.shape[1] // key.shape[1]
    if heads_per_group > 1:
        key, value = key.repeat_interleave(heads_per_group, dim=1), value.repeat_interleave(heads_per_group, dim=1)
    outputs = []
    sizes = [segment.size for segment in segments]
    pieces = (states.split(sizes, dim=2) for states in (query, key, value))
    for segment, mask, q, k, v in zip(segments, masks, *pieces, strict=True):
        if segment.prefix_len == 0:
            first_k, first_v = k, v
        else:
            k = torch.cat([first_k[:, :, : segment.prefix_len], k], dim=2)
            v = torch.cat([first_v[:, :, : segment.prefix_len], v], dim=2)
        if softcap is None:
            output = scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling)
        else:
            output = _softcapped_attention(q, k, v, mask, scaling, softcap)
        outputs.append(output.transpose(1, 2))
    return torch.cat(outputs, dim=1)


def _softcapped_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None, softcap: float
) -> Tensor:
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = softcap * torch.tanh(scores / softcap)
    allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril() if mask is None else mask
    scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
    dtype = torch.promote_types(scores.dtype, torch.float32)
    return scores.softmax(-1, dtype=dtype).to(value.dtype) @ value


AttentionInterface.register(NAME, attend_by_spans)
