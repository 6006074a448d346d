"""Layouts: the token ids of a batch, and the indices of the hidden states that predict its completions.

The path from token ids to log-probabilities is `layout → attention → logps`: a layout contains the ids and the
indices, `attention.attention_inputs` makes the other inputs of the backbone, and `logps.completion_logps` gathers
hidden states and scores the completions.

There are two layouts with the same log-probabilities. *Packed*: one row of spans `[prompt | chosen | rejected]`
without padding, every prompt once. *Padded*: one row per completion, preceded by its prompt. In both, the last token
of a completion is never fed, because nothing is predicted from it. The hidden state of the prompt's last token
predicts the first token of every completion, so a packed row reads it once per completion.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from bfpo.data.table import Example, token_ids

# Part of the reference cache's key. Increase it when cached log-probabilities no longer match what a layout feeds.
VERSION = 1

Integers: TypeAlias = np.ndarray[Any, np.dtype[np.integer[Any]]]


class Span(NamedTuple):
    """One example in a packed row: its prompt, then branches that attend to the prompt but not to one another.

    Args:
        prompt: Number of tokens of the prompt.
        branches: Number of tokens fed of each completion: one less than it has, so possibly 0.
    """

    prompt: int
    branches: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of tokens of the span."""
        return self.prompt + sum(self.branches)


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """A batch of S completions, ready for the model.

    Args:
        input_ids: Token ids, (R, L) int64.
        hidden_index: Indices of the hidden states that predict the scored completion tokens, into the R·L tokens
            flattened row by row, (N,) int64.
        targets: Ids of the scored tokens, completion by completion, (N,) int64.
        lengths: Number of scored tokens of each of the S completions, at least 1 each; they add up to N.
        num_tokens: Number of tokens fed, without padding.
        spans: Spans of the one row of a packed layout, in order; empty for a padded layout.
        positions: Position of each token of a packed row within its sequence, (1, L) int64; every branch continues
            the positions of the prompt. None for a padded layout, whose rows count from 0.
        row_lengths: Number of tokens of each row of a padded layout, without padding; empty for a packed layout.
    """

    input_ids: Tensor
    hidden_index: Tensor
    targets: Tensor
    lengths: tuple[int, ...]
    num_tokens: int
    spans: tuple[Span, ...] = ()
    positions: Tensor | None = None
    row_lengths: tuple[int, ...] = ()

    def to(self, device: torch.device) -> "Layout":
        """Return the layout on a device."""
        names = ("input_ids", "hidden_index", "targets", *(() if self.positions is None else ("positions",)))
        return replace(self, **{name: getattr(self, name).to(device, non_blocking=True) for name in names})


def packed_layout(examples: Sequence[Example]) -> Layout:
    """Put examples into one row, each prompt once.

    Args:
        examples: Prompts with their completions; the layout's completions are in the same order.

    Returns:
        A layout with one row and no padding.
    """
    ids: list[Integers] = []
    positions: list[Integers] = []
    hidden_index: list[Integers] = []
    spans = []
    start = 0
    for prompt, completions in examples:
        span = Span(len(prompt), tuple(len(completion) - 1 for completion in completions))
        ids.append(prompt)
        positions.append(np.arange(span.prompt))
        last_of_prompt = start + span.prompt - 1
        start += span.prompt
        for completion, size in zip(completions, span.branches, strict=True):
            ids.append(token_ids(completion[:-1]))
            positions.append(np.arange(span.prompt, span.prompt + size))
            index = np.concatenate([[last_of_prompt], np.arange(start, start + size)])
            hidden_index.append(index[completion >= 0])
            start += size
        spans.append(span)
    targets = [completion[completion >= 0] for _, completions in examples for completion in completions]
    return Layout(
        input_ids=_int64(ids)[None],
        hidden_index=_int64(hidden_index),
        targets=_int64(targets),
        lengths=tuple(map(len, targets)),
        num_tokens=start,
        spans=tuple(spans),
        positions=_int64(positions)[None],
    )


def padded_layout(examples: Sequence[Example]) -> Layout:
    """Give every completion a row of its own, preceded by its prompt and padded on the right.

    Args:
        examples: Prompts with their completions; the layout's completions are in the same order.

    Returns:
        A layout with one row per completion.
    """
    rows = [
        np.concatenate([prompt, token_ids(completion[:-1])])
        for prompt, completions in examples
        for completion in completions
    ]
    prompt_lengths = [len(prompt) for prompt, completions in examples for _ in completions]
    scored = [np.flatnonzero(completion >= 0) for _, completions in examples for completion in completions]
    targets = [completion[completion >= 0] for _, completions in examples for completion in completions]
    input_ids = np.zeros((len(rows), max(map(len, rows))), dtype=np.int64)
    for padded_row, row in zip(input_ids, rows, strict=True):
        padded_row[: len(row)] = row
    last_of_prompt = np.arange(len(rows)) * input_ids.shape[1] + np.array(prompt_lengths) - 1
    return Layout(
        input_ids=torch.from_numpy(input_ids),
        hidden_index=_int64([first + offsets for first, offsets in zip(last_of_prompt, scored, strict=True)]),
        targets=_int64(targets),
        lengths=tuple(map(len, targets)),
        num_tokens=sum(map(len, rows)),
        row_lengths=tuple(map(len, rows)),
    )


def packs(examples: Sequence[Example], max_tokens: int) -> Iterator[slice]:
    """Split examples, in order, into packs of at most `max_tokens` tokens.

    Args:
        examples: Examples to pack.
        max_tokens: Maximum number of tokens of a pack. A longer example gets a pack of its own.

    Yields:
        Consecutive slices of the examples.
    """
    start, tokens = 0, 0
    for index, (prompt, completions) in enumerate(examples):
        size = len(prompt) + sum(len(completion) - 1 for completion in completions)
        if index > start and tokens + size > max_tokens:
            yield slice(start, index)
            start, tokens = index, 0
        tokens += size
    yield slice(start, len(examples))


def _int64(pieces: Sequence[Integers]) -> Tensor:
    return torch.from_numpy(np.concatenate(pieces).astype(np.int64, copy=False))
