"""Tokenized prompts with their completions, compact in memory."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bfpo.core.files import content_hash
from bfpo.core.pairs import CELLS, PreferencePair

Ids = NDArray[np.int32]
Floats = NDArray[np.float64]


class Example(NamedTuple):
    """Token ids of one prompt and of its completions (two for a pair, one for a demonstration).

    A chat of which every answer is imitated is one completion, from its first answer on. What stands between the
    answers is read and not scored, and marked: its ids are the complements `~id`, below 0. The last token of a
    completion is always scored.
    """

    prompt_ids: Ids
    completions: tuple[Ids, ...]


def token_ids(marked: Ids) -> Ids:
    """Return a completion's ids without the marks of tokens that are not scored."""
    return np.where(marked < 0, ~marked, marked)


@dataclass(frozen=True)
class TokenTable(Sequence[Example]):
    """Examples in one flat array: 4 bytes a token, cheap to slice and to send to a worker.

    Args:
        ids: All token ids, one after the other, (T,).
        bounds: Where each piece begins and ends in `ids`: for example i the prompt spans bounds[i, 0] to
            bounds[i, 1], completion k spans bounds[i, k + 1] to bounds[i, k + 2]; (N, completions + 2).
        row_ids: Name of each example, for messages; N of them.
    """

    ids: Ids
    bounds: NDArray[np.int64]
    row_ids: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.row_ids)

    def __getitem__(self, index: int) -> Example:  # type: ignore[override]  # one example, not a slice
        prompt, *completions = (
            self.ids[start:stop] for start, stop in zip(self.bounds[index, :-1], self.bounds[index, 1:], strict=True)
        )
        return Example(prompt, tuple(completions))

    @property
    def tokens_hash(self) -> str:
        """Hash of the token ids and of where examples begin and end."""
        digest = hashlib.sha256()
        for array in (self.ids, self.bounds):
            # Not `tobytes`, which would copy them all.
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()[:16]

    @property
    def fingerprint(self) -> str:
        """Hash of all that a resumed run must find unchanged."""
        return self.tokens_hash

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt with one of its completions."""
        lengths = self.lengths
        return int((lengths[:, 0] + lengths[:, 1:].max(axis=1)).max())

    @property
    def longest_span(self) -> int:
        """Tokens fed of the example that has most: its prompt once, and its completions without their last tokens."""
        return int(self.lengths.sum(axis=1).max()) - self.completions

    @property
    def completions(self) -> int:
        """Completions of each example."""
        return int(self.bounds.shape[1]) - 2

    @property
    def scored(self) -> NDArray[np.int64]:
        """Tokens of each completion that are scored, (N, completions)."""
        counts = np.concatenate([[0], np.cumsum(self.ids >= 0)])
        return np.diff(counts[self.bounds[:, 1:]], axis=1)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of the prompt and of each completion, (N, completions + 1)."""
        return np.diff(self.bounds, axis=1)


@dataclass(frozen=True)
class PairTable(TokenTable):
    """Tokenized preference pairs with what the loss and the metrics need to know of each. Arrays are (N,).

    Args:
        chosen_safe: Safety of the chosen answer: 0 or 1, or a probability when the recipe asks for scores.
        rejected_safe: The same for the rejected answer.
        cells: Index into `CELLS` by the labels.
        is_buffer: Whether the pair belongs to the buffer stream.
        signals: Optional columns of `PairSignals` that every pair has.
        reference_logps: Log-probabilities of both answers under the reference, nats, (N, 2); None where the
            reference computes them batch by batch.
    """

    chosen_safe: Floats
    rejected_safe: Floats
    cells: NDArray[np.int8]
    is_buffer: NDArray[np.bool_]
    signals: dict[str, Floats]
    reference_logps: Floats | None = None

    @property
    def fingerprint(self) -> str:
        """Hash of the tokens, the labels and the streams."""
        arrays = (self.chosen_safe, self.rejected_safe, self.is_buffer)
        return content_hash(self.tokens_hash, [hashlib.sha256(array.tobytes()).hexdigest() for array in arrays])

    @property
    def main_rows(self) -> NDArray[np.int64]:
        """Indices of the main stream's pairs."""
        return np.flatnonzero(~self.is_buffer)

    @property
    def buffer_rows(self) -> NDArray[np.int64]:
        """Indices of the buffer stream's pairs."""
        return np.flatnonzero(self.is_buffer)


def sampled_rows(rows: Sequence[int], limit: int | None) -> list[int]:
    """Return at most so many rows, in order: the same sample each time, so that runs are evaluated on the same."""
    if limit is None or len(rows) <= limit:
        return list(rows)
    chosen = np.random.default_rng(42).choice(len(rows), size=limit, replace=False)
    return [rows[index] for index in np.sort(chosen)]


def token_table(examples: Sequence[Example], row_ids: Sequence[str]) -> TokenTable:
    """Pack examples that all have the same number of completions."""
    return TokenTable(*_packed(examples), tuple(row_ids))


def pair_table(
    examples: Sequence[Example], pairs: Sequence[PreferencePair], *, use_scores: bool = False
) -> PairTable:
    """Pack tokenized pairs with their labels and signals.

    Args:
        examples: Token ids, two completions each.
        pairs: The labeled pairs they come from, in the same order.
        use_scores: Read safety from `*_safety_score` instead of the labels; every pair must have them.

    Returns:
        The table. `expected_safety` is filled in, where the data lack it, by the mean safety of all answers of
        the pair's data set.
    """
    labels = np.array([(pair.labels.chosen, pair.labels.rejected) for pair in pairs if pair.labels], dtype=np.float64)
    scores = np.array(
        [(pair.signals.chosen_safety_score, pair.signals.rejected_safety_score) for pair in pairs], dtype=np.float64
    )
    safe = scores if use_scores else labels
    # What is best known about safety: the score where there is one, else the label.
    probability = np.where(np.isnan(scores), labels, scores)
    signals = {
        name: np.array([getattr(pair.signals, name) for pair in pairs], dtype=np.float64)
        for name in ("chosen_win_rate", "rejected_win_rate", "reward_margin", "expected_safety")
    }
    signals["expected_safety"] = _filled_by_data_set(signals["expected_safety"], probability.mean(axis=1), pairs)
    return PairTable(
        *_packed(examples),
        tuple(pair.row_id for pair in pairs),
        chosen_safe=safe[:, 0],
        rejected_safe=safe[:, 1],
        cells=np.array([CELLS.index(pair.cell) for pair in pairs if pair.cell], dtype=np.int8),
        is_buffer=np.array([pair.provenance.stream == "buffer" for pair in pairs]),
        signals={name: values for name, values in signals.items() if not np.isnan(values).any()},
    )


def _filled_by_data_set(values: Floats, means: Floats, pairs: Sequence[PreferencePair]) -> Floats:
    names, group = np.unique([pair.provenance.dataset_name for pair in pairs], return_inverse=True)
    by_group = np.bincount(group, weights=means, minlength=len(names)) / np.bincount(group, minlength=len(names))
    return np.where(np.isnan(values), by_group[group], values)


def _packed(examples: Sequence[Example]) -> tuple[Ids, NDArray[np.int64]]:
    pieces = [piece for example in examples for piece in (example.prompt_ids, *example.completions)]
    ends = np.cumsum([0, *(len(piece) for piece in pieces)], dtype=np.int64)
    per_example = len(pieces) // len(examples)
    starts = np.arange(len(examples))[:, None] * per_example + np.arange(per_example + 1)[None, :]
    return np.concatenate(pieces).astype(np.int32), ends[starts]
