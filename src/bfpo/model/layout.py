"""Layouts: where the tokens of a batch stand, and where to read the predictions of its completions.

The way from token ids to log-probabilities is `layout → attention → logps`: a layout says what is fed and where to
read, `attention.attention_inputs` turns it into what the backbone needs to attend rightly, and
`logps.completion_logps` gathers hidden states and scores the completions. A new layout changes the first two only.

The last token of a completion is never fed: nothing is predicted from it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from bfpo.data.table import Example


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """A batch of S completions, ready to be fed.

    Args:
        input_ids: Tokens, (R, L) int64.
        rows: Row of the hidden state that predicts each completion token, (N,) int64.
        columns: Column of that hidden state, (N,) int64.
        targets: The completion tokens themselves, (N,) int64; completion after completion.
        lengths: Number of tokens of each completion, S of them, each at least 1; they add up to N.
        useful_tokens: Tokens fed that aren't padding.
    """

    input_ids: Tensor
    rows: Tensor
    columns: Tensor
    targets: Tensor
    lengths: tuple[int, ...]
    useful_tokens: int

    def to(self, device: torch.device) -> "Layout":
        """Return the layout on a device."""
        return replace(
            self,
            **{
                name: getattr(self, name).to(device, non_blocking=True)
                for name in ("input_ids", "rows", "columns", "targets")
            },
        )


def padded_layout(examples: Sequence[Example]) -> Layout:
    """Give every completion a row of its own, prompt first, padded on the right.

    Args:
        examples: Prompts with their completions; completion order is example by example.

    Returns:
        A layout with one row per completion.
    """
    fed = [np.concatenate([prompt, ids[:-1]]) for prompt, completions in examples for ids in completions]
    prompts = [len(prompt) for prompt, completions in examples for _ in completions]
    targets = [ids for _, completions in examples for ids in completions]
    input_ids = np.zeros((len(fed), max(map(len, fed))), dtype=np.int64)
    for row, ids in zip(input_ids, fed, strict=True):
        row[: len(ids)] = ids
    lengths = [len(ids) for ids in targets]
    return Layout(
        input_ids=torch.from_numpy(input_ids),
        rows=torch.from_numpy(np.repeat(np.arange(len(fed)), lengths)),
        columns=torch.from_numpy(
            np.concatenate([np.arange(n) + p - 1 for p, n in zip(prompts, lengths, strict=True)])
        ),
        targets=torch.from_numpy(np.concatenate(targets).astype(np.int64)),
        lengths=tuple(lengths),
        useful_tokens=sum(map(len, fed)),
    )
