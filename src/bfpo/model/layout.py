"""Layouts: where the tokens of a batch stand, and where to read the predictions of its completions.

The way from token ids to log-probabilities is `layout → attention → logps`: a layout says what is fed and where to
read, `attention.attention_inputs` turns it into what the backbone needs to attend rightly, and
`logps.completion_logps` gathers hidden states and scores the completions.

There are two. *Packed*: one row of spans `[prompt | chosen | rejected]`, no padding, every prompt once. *Padded*: a
row for each completion with the prompt before it. Both give the same log-probabilities. In both, the last token of a
completion is never fed, because nothing is predicted from it; and the state of the prompt's last token predicts the
first token of every completion, so in a packed row it is read once for each.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from bfpo.data.table import Example, token_ids

# Raised when the same tokens would be fed so differently that kept log-probabilities no longer fit.
VERSION = 1

Numbers: TypeAlias = np.ndarray[Any, np.dtype[np.integer[Any]]]


class Span(NamedTuple):
    """One example in a packed row: its prompt, then branches that each see the prompt and not one another.

    Args:
        prompt: Tokens of the prompt.
        branches: Tokens fed of each completion: one less than it has, so possibly 0.
    """

    prompt: int
    branches: tuple[int, ...]

    @property
    def size(self) -> int:
        """Tokens of the span."""
        return self.prompt + sum(self.branches)


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """A batch of S completions, ready to be fed.

    Args:
        input_ids: Tokens, (R, L) int64.
        places: Where the hidden state stands that predicts each scored completion token, as an index into the R·L
            tokens row after row, (N,) int64.
        targets: The scored tokens themselves, (N,) int64; completion after completion.
        lengths: Number of scored tokens of each completion, S of them, each at least 1; they add up to N.
        num_tokens: Tokens fed that aren't padding.
        spans: What the one row of a packed layout is made of, in order; empty for rows of their own.
        positions: Position of each token of a packed row within its sequence, (1, L) int64: every branch goes on
            from the prompt. None for rows of their own, which count from 0.
    """

    input_ids: Tensor
    places: Tensor
    targets: Tensor
    lengths: tuple[int, ...]
    num_tokens: int
    spans: tuple[Span, ...] = ()
    positions: Tensor | None = None

    def to(self, device: torch.device) -> "Layout":
        """Return the layout on a device."""
        names = ("input_ids", "places", "targets", *(() if self.positions is None else ("positions",)))
        return replace(self, **{name: getattr(self, name).to(device, non_blocking=True) for name in names})


def packed_layout(examples: Sequence[Example]) -> Layout:
    """Put examples into one row, each prompt once.

    Args:
        examples: Prompts with their completions; completion order is example by example.

    Returns:
        A layout with a single row of as many tokens as are needed.
    """
    ids: list[Numbers] = []
    positions: list[Numbers] = []
    places: list[Numbers] = []
    spans = []
    start = 0
    for prompt, completions in examples:
        span = Span(len(prompt), tuple(len(completion) - 1 for completion in completions))
        ids.append(prompt)
        positions.append(np.arange(span.prompt))
        last_of_prompt = start + span.prompt - 1
        start += span.prompt
        for completion, fed in zip(completions, span.branches, strict=True):
            ids.append(token_ids(completion[:-1]))
            positions.append(np.arange(span.prompt, span.prompt + fed))
            states = np.concatenate([[last_of_prompt], np.arange(start, start + fed)])
            places.append(states[completion >= 0])
            start += fed
        spans.append(span)
    targets = [completion[completion >= 0] for _, completions in examples for completion in completions]
    return Layout(
        input_ids=_int64(ids)[None],
        places=_int64(places),
        targets=_int64(targets),
        lengths=tuple(map(len, targets)),
        num_tokens=start,
        spans=tuple(spans),
        positions=_int64(positions)[None],
    )


def padded_layout(examples: Sequence[Example]) -> Layout:
    """Give every completion a row of its own, prompt first, padded on the right.

    Args:
        examples: Prompts with their completions; completion order is example by example.

    Returns:
        A layout with one row per completion.
    """
    fed = [np.concatenate([prompt, token_ids(ids[:-1])]) for prompt, completions in examples for ids in completions]
    prompts = [len(prompt) for prompt, completions in examples for _ in completions]
    scored = [np.flatnonzero(ids >= 0) for _, completions in examples for ids in completions]
    targets = [ids[ids >= 0] for _, completions in examples for ids in completions]
    input_ids = np.zeros((len(fed), max(map(len, fed))), dtype=np.int64)
    for row, ids in zip(input_ids, fed, strict=True):
        row[: len(ids)] = ids
    firsts = np.arange(len(fed)) * input_ids.shape[1] + np.array(prompts) - 1
    return Layout(
        input_ids=torch.from_numpy(input_ids),
        places=_int64([first + tokens for first, tokens in zip(firsts, scored, strict=True)]),
        targets=_int64(targets),
        lengths=tuple(map(len, targets)),
        num_tokens=sum(map(len, fed)),
    )


def packs(examples: Sequence[Example], max_tokens: int) -> Iterator[slice]:
    """Split examples, in order, into packs of at most so many tokens.

    Args:
        examples: What to pack.
        max_tokens: Tokens fed at a time. An example that is longer gets a pack of its own.

    Yields:
        Slices of the examples, one after the other.
    """
    first, tokens = 0, 0
    for number, (prompt, completions) in enumerate(examples):
        size = len(prompt) + sum(len(completion) - 1 for completion in completions)
        if number > first and tokens + size > max_tokens:
            yield slice(first, number)
            first, tokens = number, 0
        tokens += size
    yield slice(first, len(examples))


def _int64(pieces: Sequence[Numbers]) -> Tensor:
    return torch.from_numpy(np.concatenate(pieces).astype(np.int64, copy=False))
