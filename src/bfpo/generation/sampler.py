"""Choice of the next token: temperature, nucleus, and seeded noise."""

from collections.abc import Sequence

import torch
from torch import Tensor

from bfpo.core.samples import Sampling
from bfpo.generation.noise import TokenNoise

# Tokens among which the nucleus is looked for before the whole vocabulary is sorted.
_FIRST_TOKENS = 512


class Sampler:
    """Chooses the next token of each row, independently of the other rows.

    Args:
        sampling: Temperature and top-p.
    """

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        self._noise: TokenNoise | None = None

    def choose(self, logits: Tensor, seeds: Sequence[int], positions: Sequence[int]) -> list[int]:
        """Return the next token of each row; see `perturb`."""
        tokens: list[int] = self.perturb(logits, seeds, positions).argmax(-1).tolist()
        return tokens

    def perturb(self, logits: Tensor, seeds: Sequence[int], positions: Sequence[int]) -> Tensor:
        """Return scores whose largest one is the next token: a sample, or at temperature 0 the likeliest token.

        Args:
            logits: Logits of the model, (rows, vocabulary).
            seeds: Seed of each row.
            positions: Number of the token in the answer of each row, from 0.
        """
        if self._sampling.temperature == 0:
            return logits
        # A new tensor, which the noise is added to in place.
        scores = logits.to(torch.promote_types(logits.dtype, torch.float32)) / self._sampling.temperature
        if self._sampling.top_p < 1:
            scores = keep_nucleus(scores, self._sampling.top_p)
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
