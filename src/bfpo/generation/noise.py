"""Seeded noise of sampling: a hash of seed, position and token, the same in any batch and on any device.

Adding Gumbel noise to log-probabilities and taking the largest sum samples from the distribution. The noise of a
token is computed from a counter, not drawn from a generator: no state is kept per row, and it is computed where
the logits are. Integers are hashed in 32 bits, exactly on any device; only the last step, from a uniform number to
Gumbel noise, is in float32 and may differ between devices in the last digit.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# Part of the hash of an engine's settings: samples of another version are different samples.
VERSION = 2
# Noise values computed at once on a CPU: about half of a core's second-level cache.
_CHUNK = 1 << 17
_MASK = (1 << 64) - 1
# The constants of splitmix64 (Steele et al., 2014) and of a 32-bit mixer found by Wellons' search ("lowbias32").
_GOLDEN, _MIX_1, _MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_MULTIPLIERS = (0x7FEB352D, 0x846CA68B)
# From |hash| in [0, 2^31] to (0, 1): the upper end stays below 1, whose logarithm is infinite.
_SCALE, _SHIFT = (1 - 2.0**-24) * 2.0**-31, 2.0**-32


class TokenNoise:
    """Gumbel noise of every token of a vocabulary.

    Args:
        vocab_size: Number of logits.
        device: Device of the logits.
    """

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._tokens = _as_int32(_mix32(np.arange(vocab_size, dtype=np.uint32))).to(device)
        self._rows = max(1, _CHUNK // vocab_size) if device.type == "cpu" else 1 << 30

    def add(self, scores: Tensor, seeds: Sequence[int], positions: Sequence[int]) -> Tensor:
        """Add noise to scores in place, and return them.

        Args:
            scores: Log-probabilities up to a constant, (rows, vocabulary), float32 or float64.
            seeds: Seed of each row.
            positions: Number of the token in the answer of each row, from 0.
        """
        states = (seed + position * _GOLDEN for seed, position in zip(seeds, positions, strict=True))
        keys = np.array([_mix64(state) for state in states], dtype=np.uint64)
        low = _as_int32(keys.astype(np.uint32)).to(scores.device)
        odd = _as_int32((keys >> np.uint64(32)).astype(np.uint32) | np.uint32(1)).to(scores.device)
        for start in range(0, len(keys), self._rows):
            rows = slice(start, start + self._rows)
            scores[rows] -= self._log_exponentials(low[rows, None], odd[rows, None])
        return scores

    def _log_exponentials(self, low: Tensor, odd: Tensor) -> Tensor:
        """Return logarithms of exponentially distributed numbers, the negative of Gumbel noise."""
        # Products wrap around. torch shifts signed integers with their sign, hence the masks.
        hashes = (self._tokens ^ low).mul_(odd)
        hashes ^= (hashes >> 16).bitwise_and_(0xFFFF)
        hashes.mul_(_signed(_MULTIPLIERS[1]))
        hashes ^= (hashes >> 16).bitwise_and_(0xFFFF)
        # -log(1 - u) is small where u is, and float32 resolves u best there: the largest noise needs it.
        return hashes.float().abs_().mul_(-_SCALE).sub_(_SHIFT).log1p_().neg_().log_()


def _mix64(value: int) -> int:
    """Return the output of splitmix64 for a state."""
    value = (value + _GOLDEN) & _MASK
    value = ((value ^ (value >> 30)) * _MIX_1) & _MASK
    value = ((value ^ (value >> 27)) * _MIX_2) & _MASK
    return value ^ (value >> 31)


def _mix32(values: NDArray[np.uint32]) -> NDArray[np.uint32]:
    # In place, so that products stay in 32 bits.
    mixed = values ^ (values >> np.uint32(16))
    mixed *= np.uint32(_MULTIPLIERS[0])
    mixed ^= mixed >> np.uint32(15)
    mixed *= np.uint32(_MULTIPLIERS[1])
    mixed ^= mixed >> np.uint32(16)
    return mixed


def _as_int32(values: NDArray[np.uint32]) -> Tensor:
    return torch.from_numpy(values.view(np.int32).copy())


def _signed(value: int) -> int:
    return value - (1 << 32) if value >= 1 << 31 else value
