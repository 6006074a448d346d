"""What the backbone must be told so that every token of a layout attends to what it should.

Rows of their own need nothing. For a packed row the backbone's attention is switched, while it runs, to a function
registered with transformers' `AttentionInterface`; what it needs to know travels through the backbone's forward as a
keyword argument, so that a checkpointed layer finds it again when it is recomputed in the backward pass:

- on a CPU a few SDPA calls per span, which leave out most of what is masked;
- on CUDA FlexAttention, with one `BlockMask` for the whole row (not run on a GPU yet);
- elsewhere one SDPA call with a dense mask of the whole row: right, but slow for long rows.

Scores that are capped (Gemma 2) are computed without SDPA, which can't cap.

`config._attn_implementation` and the registry are soft-private names of transformers; tests hold both.
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
Rule: TypeAlias = Callable[[Any, Any, Tensor, Tensor], Tensor]

# Spans of fewer tokens attend in one call: below this, measured on a CPU, calls cost more than masked scores do.
SPLIT = 128
LAYER_TYPES = {"full_attention", "sliding_attention"}
# What a layer may tell the attention function without changing who attends to whom, or how.
HARMLESS = {"cache_position", "output_attentions", "output_hidden_states", "output_router_logits", "use_cache"}


class UnknownFeature(ModelError):
    """The model's attention does something that a packed row doesn't know."""


class Segment(NamedTuple):
    """Neighboring tokens of a packed row that attend in one call.

    Args:
        size: How many.
        borrowed: How many tokens at the start of the last run that borrows nothing they see as well: the prompt, for
            a further branch.
    """

    size: int
    borrowed: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class SpanMasks:
    """Who sees whom in a packed row; made once per pack, for all layers.

    Args:
        runs: What the row is cut into.
        masks: By sliding window, a mask for each run: (size, borrowed + size) bool, True where the query (row) sees
            the key (column); None for plain causal attention. Or a `BlockMask` for the whole row.
    """

    runs: tuple[Segment, ...]
    masks: dict[Window, list[Tensor | None] | BlockMask]


def attention_inputs(layout: Layout, config: PretrainedConfig) -> dict[str, Any]:
    """Return the keyword arguments of the backbone's forward that go with a layout.

    Rows padded on the right need none: under a causal mask no real token sees the padding behind it, and
    positions count from the row's start. (With explicit `position_ids` and no mask, transformers would guess at
    packed sequences and be silently wrong.)

    Args:
        layout: On the model's device.
        config: Of the backbone; it says which layers have a sliding window.

    Raises:
        UnknownFeature: If a packed row meets layers other than full or sliding attention.
    """
    if not layout.spans:
        return {}
    device, windows = layout.input_ids.device, windows_of(config)
    if device.type == "cuda" and find_spec("triton") is not None:
        spans = SpanMasks((), {window: block_mask(layout.spans, window, device) for window in windows})
    elif device.type == "cpu":
        spans = span_masks(layout.spans, windows, device)
    else:
        whole = (Segment(layout.num_tokens),)
        spans = SpanMasks(whole, {window: [dense_mask(layout.spans, window, device)] for window in windows})
    # A 4-D mask is handed down as it is. This one is empty: any other attention function fails on it, where with the
    # right shape it would be silently wrong.
    nothing = torch.empty(0, 0, 0, 0, device=device)
    return {"attention_mask": nothing, "position_ids": layout.positions, "spans": spans}


def windows_of(config: PretrainedConfig) -> set[Window]:
    """Return the sliding windows that a model's layers have; None stands for full attention.

    Raises:
        UnknownFeature: If there are layers of another type.
    """
    window: Window = getattr(config, "sliding_window", None)
    types: list[str] | None = getattr(config, "layer_types", None)
    if types is None:
        return {window}
    if unknown := set(types) - LAYER_TYPES:
        raise UnknownFeature(f"layers of type {', '.join(sorted(unknown))}")
    return {window if kind == "sliding_attention" else None for kind in types}


def sight(spans: Sequence[Span], window: Window, device: torch.device) -> Rule:
    """Return the rule of who sees whom: (batch, head, query, key) → bool, as FlexAttention asks for it.

    A token sees itself and what stands before it in its own span, but not another branch. A window is counted in
    positions, not in places: a branch stands behind its siblings, and continues the prompt all the same.
    """
    pieces = [
        (owner, branch, span.prompt if branch else 0, size)
        for owner, span in enumerate(spans)
        for branch, size in enumerate((span.prompt, *span.branches))
    ]
    owner, branch, first, size = np.array(pieces, dtype=np.int32).T
    place = np.arange(size.sum()) - np.repeat(size.cumsum() - size, size)
    tokens = np.stack([np.repeat(owner, size), np.repeat(branch, size), np.repeat(first, size) + place])
    # Flex attention writes (L, L) arrays of these before it has its blocks: small numbers, small arrays.
    owners, branches, positions = torch.from_numpy(tokens.astype(np.int32)).to(device)

    def sees(batch: Any, head: Any, query: Tensor, key: Tensor) -> Tensor:
        allowed: Tensor = (key <= query) & (owners[query] == owners[key])
        allowed = allowed & ((branches[key] == 0) | (branches[key] == branches[query]))
        return allowed if window is None else allowed & (positions[query] - positions[key] < window)

    return sees


def dense_mask(spans: Sequence[Span], window: Window, device: torch.device) -> Tensor:
    """Return who sees whom as a matrix, (n, n) bool."""
    places = torch.arange(sum(span.size for span in spans), device=device)
    return sight(spans, window, device)(None, None, places[:, None], places[None, :])


def span_masks(spans: Sequence[Span], windows: Iterable[Window], device: torch.device) -> SpanMasks:
    """Return masks run by run, so that little is computed only to be masked.

    A prompt with its first branch is plain causal attention, which needs no mask; a further branch sees the prompt
    and itself. Small spans stay whole.
    """
    runs = tuple(run for span in spans for run in _runs(span))
    masks = {window: [mask for span in spans for mask in _masks(span, window, device)] for window in windows}
    return SpanMasks(runs, {**masks})


def _masks(span: Span, window: Window, device: torch.device) -> tuple[Tensor | None, ...]:
    return _small_masks(span, window, device) if span.size < SPLIT else _masks_of_runs(span, window, device)


def _masks_of_runs(span: Span, window: Window, device: torch.device) -> tuple[Tensor | None, ...]:
    seen, start, masks = dense_mask([span], window, device), 0, []
    for size, borrowed in _runs(span):
        rows = seen[start : start + size]
        mask = torch.cat([rows[:, :borrowed], rows[:, start : start + size]], dim=1)
        masks.append(None if torch.equal(mask, torch.ones_like(mask).tril()) else mask)
        start += size
    return tuple(masks)


# Lengths of small spans come again and again, in the reference's pass at once: a fifth of a small model's step.
_small_masks = lru_cache(maxsize=1024)(_masks_of_runs)


def _runs(span: Span) -> list[Segment]:
    if span.size < SPLIT:
        return [Segment(span.size)]
    first, *others = span.branches
    return [Segment(span.prompt + first), *(Segment(size, span.prompt) for size in others if size > 0)]


def block_mask(spans: Sequence[Span], window: Window, device: torch.device) -> BlockMask:
    """Return who sees whom as FlexAttention's sparse blocks."""
    tokens = sum(span.size for span in spans)
    mask: BlockMask = create_block_mask(sight(spans, window, device), None, None, tokens, tokens, device=device)
    return mask


@contextmanager
def span_attention(config: PretrainedConfig) -> Iterator[None]:
    """Let a model attend by spans, for as long as this lasts.

    It must last until the backward pass is over if layers are checkpointed, because they are run again there. At
    any other time (generation, saving) the model keeps the attention it was loaded with.

    Args:
        config: Of the backbone.
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
    spans: SpanMasks | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: Window = None,
    softcap: float | None = None,
    position_ids: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attend within the spans of a packed row; what transformers calls in each layer.

    Args:
        module: The attention layer.
        query: (1, heads, L, width).
        key: (1, groups of heads, L, width).
        value: The same.
        attention_mask: Not looked at.
        spans: Who sees whom.
        scaling: Of the scores; None for 1/√width.
        dropout: 0.
        sliding_window: Of this layer.
        softcap: Bound of the scores.
        position_ids: Not looked at: rotary embeddings are in query and key already.
        others: Whatever else the model tells its attention; nothing that matters is allowed.

    Returns:
        (1, L, heads, width), and no weights.

    Raises:
        UnknownFeature: Naming what isn't understood.
    """
    named = sorted(name for name, value in others.items() if name not in HARMLESS and value is not None)
    if dropout or not getattr(module, "is_causal", True):
        named += ["attention dropout" if dropout else "attention that isn't causal"]
    if named:
        raise UnknownFeature(f"{type(module).__name__} uses {', '.join(named)}")
    if spans is None or sliding_window not in spans.masks:
        what = "hands no spans down to its attention" if spans is None else f"has a window of {sliding_window}"
        raise UnknownFeature(f"{type(module).__name__} {what}")
    masks = spans.masks[sliding_window]
    if isinstance(masks, BlockMask):
        if torch.is_autocast_enabled(query.device.type):
            # SDPA does this by itself; rotary embeddings may have left query and key in float32.
            dtype = torch.get_autocast_dtype(query.device.type)
            query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        output, _ = flex_attention_forward(module, query, key, value, masks, scaling=scaling, softcap=softcap)
        return output, None
    if value.dtype in (torch.bfloat16, torch.float16) and value.device.type == "cpu":
        # Half precision is the slower one for spans of this size (docs/performance.md), and the less exact one.
        with torch.autocast("cpu", enabled=False):
            output = _attend_run_by_run(
                query.float(), key.float(), value.float(), spans.runs, masks, scaling, softcap
            )
        return output.to(value.dtype), None
    return _attend_run_by_run(query, key, value, spans.runs, masks, scaling, softcap), None


def _attend_run_by_run(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    runs: Sequence[Segment],
    masks: Sequence[Tensor | None],
    scaling: float | None,
    softcap: float | None,
) -> Tensor:
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1:
        key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    outputs = []
    sizes = [run.size for run in runs]
    pieces = (states.split(sizes, dim=2) for states in (query, key, value))
    for run, mask, q, k, v in zip(runs, masks, *pieces, strict=True):
        if run.borrowed == 0:
            first_k, first_v = k, v
        else:
            k = torch.cat([first_k[:, :, : run.borrowed], k], dim=2)
            v = torch.cat([first_v[:, :, : run.borrowed], v], dim=2)
        if softcap is None:
            output = scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling)
        else:
            output = _capped_attention(q, k, v, mask, scaling, softcap)
        outputs.append(output.transpose(1, 2))
    return torch.cat(outputs, dim=1)


def _capped_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None, softcap: float
) -> Tensor:
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = softcap * torch.tanh(scores / softcap)
    seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril() if mask is None else mask
    scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
    exact = torch.promote_types(scores.dtype, torch.float32)
    return scores.softmax(-1, dtype=exact).to(value.dtype) @ value


AttentionInterface.register(NAME, attend_by_spans)
