"""Choice of the next token: temperature, nucleus, a guard's factor, and seeded noise."""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from bfpo.core.samples import Sampling
from bfpo.generation.noise import TokenNoise

# Tokens among which the nucleus is looked for before the whole vocabulary is sorted.
_FIRST_TOKENS = 512


Peek = Callable[[Tensor, Sequence[int]], Tensor]
"""Function from candidates for the next token of each row, (rows, candidates), and the numbers of layers to
the hidden states that the model has after reading each of them, (rows, candidates, layers · width)."""


class ScoreGuard(Protocol):
    """Guard that changes the probabilities of the next token."""

    def adjust(self, scores: Tensor, peek: Peek) -> Tensor:
        """Return a new tensor of scores; see `bfpo.generation.guards.factor`."""


class Sampler:
    """Chooses the next token of each row, independently of the other rows.

    Args:
        sampling: Temperature and top-p.
        guard: Guard that changes the probabilities that these leave.
    """

    def __init__(self, sampling: Sampling, guard: ScoreGuard | None = None) -> None:
        self._sampling, self._guard = sampling, guard
        self._noise: TokenNoise | None = None

    def choose(
        self, logits: Tensor, seeds: Sequence[int], positions: Sequence[int], peek: Peek | None = None
    ) -> list[int]:
        """Return the next token of each row; see `perturb`."""
        tokens: list[int] = self.perturb(logits, seeds, positions, peek).argmax(-1).tolist()
        return tokens

    def perturb(
        self, logits: Tensor, seeds: Sequence[int], positions: Sequence[int], peek: Peek | None = None
    ) -> Tensor:
        """Return scores whose largest one is the next token: a sample, or at temperature 0 the likeliest token.

        Args:
            logits: Logits of the model, (rows, vocabulary), or (1, vocabulary) if they are the same for all rows.
            seeds: Seed of each row.
            positions: Number of the token in the answer of each row, from 0.
            peek: Function that a guard gets hidden states from.
        """
        is_greedy = self._sampling.temperature == 0
        scores = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if not is_greedy:
            scores = scores / self._sampling.temperature
            if self._sampling.top_p < 1:
                scores = keep_nucleus(scores, self._sampling.top_p)
        if self._guard is not None:
            assert peek is not None
            # Before the noise, which stays the same.
            scores = self._guard.adjust(scores, peek)
        scores = scores.expand(len(seeds), -1)
        if is_greedy:
            return scores
        # The noise is added in place.
        scores = scores.clone()
        if self._noise is None:
            self._noise = TokenNoise(logits.shape[-1], logits.device)
        return self._noise.add(scores, seeds, positions)


def keep_nucleus(scores: Tensor, top_p: float) -> Tensor:
    """Return scores with -inf for all but the likeliest tokens whose probabilities add up to at least `top_p`.

    Args:
        scores: Log-probabilities up to a constant, (rows, vocabulary).
        top_p: Probability mass to keep, in (0, 1].
    """
    probabilities = scores.softmax(-1)
    size = scores.shape[-1]
    for count in (min(_FIRST_TOKENS, size), size):
        largest, tokens = probabilities.topk(count, dim=-1)
        sums = largest.cumsum(-1)
        if count == size or bool((sums[:, -1] >= top_p).all()):
            break
    # The token that reaches the mass is kept, and so is the likeliest one.
    kept = sums - largest < top_p
    nucleus = torch.full_like(scores, -torch.inf)
    return nucleus.scatter_(-1, tokens, scores.gather(-1, tokens).masked_fill(~kept, -torch.inf))
