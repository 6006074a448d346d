"""Tables of tokenized prompts and completions, compact in memory."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bfpo.core.files import content_hash
from bfpo.core.pairs import SIDES, PreferencePair
from bfpo.data.pair_columns import PairColumns, RowIds, pair_columns

Ids = NDArray[np.int32]
# Numbers of an array, and rows of a table, that are held at once by what reads all of them.
_CHUNK_NUMBERS = 1 << 22
_CHUNK_ROWS = 1 << 16
Floats = NDArray[np.float64]


class Example(NamedTuple):
    """Token ids of a prompt and of its completions (two for a pair, one for a demonstration).

    A chat whose every answer is imitated is one completion, from its first answer on. The tokens between the answers
    are not scored and are marked: their ids are the complements `~id`, below 0. The last token of a completion is
    always scored.
    """

    prompt_ids: Ids
    completions: tuple[Ids, ...]


def token_ids(marked: Ids) -> Ids:
    """Return the ids of a completion without the marks of unscored tokens."""
    return np.where(marked < 0, ~marked, marked)


@dataclass(frozen=True)
class TokenTable(Sequence[Example]):
    """Examples in one flat array: 4 bytes per token, cheap to slice and to send to a worker.

    Args:
        ids: Concatenated token ids of all examples, (T,).
        bounds: Bounds of prompts and completions in `ids`, (N, completions + 2): the prompt of example i is
            ids[bounds[i, 0] : bounds[i, 1]], its completion k is ids[bounds[i, k + 1] : bounds[i, k + 2]].
        row_ids: Row ids of the N examples, for messages.
    """

    ids: Ids
    bounds: NDArray[np.int64]
    row_ids: Sequence[str]

    def __len__(self) -> int:
        return len(self.row_ids)

    def __getitem__(self, index: int) -> Example:  # type: ignore[override]  # one example, not a slice
        prompt, *completions = (
            self.ids[start:stop] for start, stop in zip(self.bounds[index, :-1], self.bounds[index, 1:], strict=True)
        )
        return Example(prompt, tuple(completions))

    @property
    def tokens_hash(self) -> str:
        """Hash of the token ids and of the bounds."""
        digest = hashlib.sha256()
        for array in (self.ids, self.bounds):
            for chunk in _chunks(array):
                # `tobytes` would copy it.
                digest.update(np.ascontiguousarray(chunk).data)
        return digest.hexdigest()[:16]

    @property
    def fingerprint(self) -> str:
        """Hash of everything that must be unchanged when a run is resumed."""
        return self.tokens_hash

    @property
    def largest_id(self) -> int:
        """Largest token id of all examples."""
        return max((int(token_ids(chunk).max()) for chunk in _chunks(self.ids)), default=0)

    @property
    def longest(self) -> int:
        """Number of tokens of the longest prompt with one of its completions."""
        lengths = self.lengths
        return int((lengths[:, 0] + lengths[:, 1:].max(axis=1)).max())

    @property
    def longest_span(self) -> int:
        """Maximum number of input tokens of an example: its prompt once, completions without their last tokens."""
        return int(self.lengths.sum(axis=1).max()) - self.completions

    @property
    def completions(self) -> int:
        """Number of completions of each example."""
        return int(self.bounds.shape[1]) - 2

    @property
    def scored(self) -> NDArray[np.int64]:
        """Number of scored tokens of each completion, (N, completions)."""
        scored = []
        for start in range(0, len(self), _CHUNK_ROWS):
            bounds = self.bounds[start : start + _CHUNK_ROWS]
            first, last = int(bounds[0, 0]), int(bounds[-1, -1])
            counts = np.concatenate([[0], np.cumsum(self.ids[first:last] >= 0)])
            scored.append(np.diff(counts[bounds[:, 1:] - first], axis=1))
        return np.concatenate(scored)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Number of tokens of the prompt and of each completion, (N, completions + 1)."""
        return np.diff(self.bounds, axis=1)

    @property
    def columns(self) -> dict[str, NDArray[Any]]:
        """Inputs of losses and metrics besides the tokens, name → (N, ...)."""
        return {}


@dataclass(frozen=True)
class PairTable(TokenTable):
    """Tokenized preference pairs with the inputs of losses and metrics. Arrays are (N,).

    Args:
        chosen_safe: Safety of the chosen answer: 0 or 1, or a probability if scores are used.
        rejected_safe: Same for the rejected answer.
        cells: Index of the pair's cell in `CELLS`.
        is_buffer: Whether the pair belongs to the buffer stream.
        signals: Columns of `PairSignals` that every pair has, and `degree_difference` if any pair has it, else NaN;
            `categories` is 1 for each harm category of a pair, else 0, (N, K).
        reference_logps: Log-probabilities of both answers under the reference, nats, (N, 2); None if the reference
            computes them batch by batch.
        category_names: Names of the K harm categories.
    """

    chosen_safe: Floats
    rejected_safe: Floats
    cells: NDArray[np.int8]
    is_buffer: NDArray[np.bool_]
    signals: dict[str, Floats]
    reference_logps: Floats | None = None
    category_names: tuple[str, ...] = ()

    @property
    def fingerprint(self) -> str:
        """Hash of the tokens, the labels, the streams and, where preferences follow from scores, their margins."""
        arrays = [self.chosen_safe, self.rejected_safe, self.is_buffer]
        arrays += [self.signals["score_margin"]] if "score_margin" in self.signals else []
        return content_hash(self.tokens_hash, [hashlib.sha256(array.tobytes()).hexdigest() for array in arrays])

    def hash_signals(self, names: Iterable[str]) -> str | None:
        """Return a hash of the signals of a loss that `fingerprint` doesn't contain; None if there are none."""
        others = sorted({*names} - {"score_margin"})
        if not others:
            return None
        # Losses that read win rates also read the mean safety of the answers to a prompt.
        read = [name for name in (*others, "expected_safety") if name in self.signals]
        return content_hash([(name, hashlib.sha256(self.signals[name].tobytes()).hexdigest()) for name in read])

    @property
    def columns(self) -> dict[str, NDArray[Any]]:
        """Labels, cells, streams, signals and, if they are known, log-probabilities of the reference."""
        columns: dict[str, NDArray[Any]] = {
            "chosen_safe": self.chosen_safe,
            "rejected_safe": self.rejected_safe,
            "cells": self.cells,
            "is_buffer": self.is_buffer,
            **self.signals,
        }
        if self.reference_logps is not None:
            columns["ref_chosen_logps"], columns["ref_rejected_logps"] = self.reference_logps.T
        return columns

    @property
    def main_rows(self) -> NDArray[np.int64] | range:
        """Indices of the pairs of the main stream; a range if they follow each other, as in the data of a recipe."""
        return _rows_where(~self.is_buffer)

    @property
    def buffer_rows(self) -> NDArray[np.int64] | range:
        """Indices of the pairs of the buffer stream."""
        return _rows_where(self.is_buffer)


@dataclass(frozen=True)
class ScoreTable(TokenTable):
    """Pairs whose answers are scored: the score of a completion is read at its last token.

    That token must be fed, so a completion has one more after it, which nothing reads; all others are marked.

    Args:
        signs: 1 for an unsafe answer, -1 for a safe one, 0 for one that trains no cost, (N, 2).
        order: 1 if the chosen answer is less safe, -1 if the rejected one is, 0 if that isn't known, (N,).
        is_buffer: Whether the pair belongs to the buffer stream, (N,).
    """

    signs: Floats
    order: Floats
    is_buffer: NDArray[np.bool_]

    @property
    def fingerprint(self) -> str:
        """Hash of the tokens, the signs, the order and the streams."""
        arrays = (self.signs, self.order, self.is_buffer)
        return content_hash(self.tokens_hash, [hashlib.sha256(array.tobytes()).hexdigest() for array in arrays])

    @property
    def columns(self) -> dict[str, NDArray[Any]]:
        """Signs, order and streams."""
        return {"signs": self.signs, "order": self.order, "is_buffer": self.is_buffer}


def _rows_where(mask: NDArray[np.bool_]) -> NDArray[np.int64] | range:
    first, count = int(mask.argmax()) if len(mask) else 0, int(np.count_nonzero(mask))
    return range(first, first + count) if mask[first : first + count].all() else np.flatnonzero(mask)


def _chunks(array: NDArray[Any]) -> Iterator[NDArray[Any]]:
    """Yield an array in chunks along its first axis; a mapped file is read, so that it doesn't stay in memory."""
    step = max(_CHUNK_NUMBERS // max(int(np.prod(array.shape[1:])), 1), 1)
    for start in range(0, len(array), step):
        if isinstance(array, np.memmap) and array.ndim == 1 and array.base is array._mmap:  # type: ignore[attr-defined]
            offset = array.offset + start * array.itemsize
            yield np.fromfile(str(array.filename), array.dtype, min(step, len(array) - start), offset=offset)
        else:
            yield array[start : start + step]


def sampled_rows(rows: Sequence[int], limit: int | None) -> list[int]:
    """Return a sample of at most `limit` rows, in order; always the same one, so that evaluations are comparable."""
    if limit is None or len(rows) <= limit:
        return list(rows)
    indices = np.random.default_rng(42).choice(len(rows), size=limit, replace=False)
    return [rows[index] for index in np.sort(indices)]


def token_table(examples: Sequence[Example], row_ids: Sequence[str]) -> TokenTable:
    """Return a table of examples that all have the same number of completions."""
    return TokenTable(*_concatenate(examples), tuple(row_ids))


def pair_table(
    examples: Sequence[Example],
    pairs: Sequence[PreferencePair],
    *,
    use_scores: bool = False,
    score_margins: Floats | None = None,
    categories: Sequence[str] = (),
) -> PairTable:
    """Return a table of tokenized pairs with their labels and signals.

    Args:
        examples: Token ids, with two completions each.
        pairs: Labeled pairs of the examples, in the same order.
        use_scores: Whether safety is read from `*_safety_score`, which every pair must then have.
        score_margins: Reward less multiplied cost, chosen minus rejected, (N,); None if no loss needs it.
        categories: Names of the harm categories that the loss distinguishes.

    Returns:
        The table. Missing values of `expected_safety` are the mean safety of all answers of the pair's data set.
    """
    return table_of_columns(
        *_concatenate(examples),
        pair_columns(pairs),
        row_ids=tuple(pair.row_id for pair in pairs),
        use_scores=use_scores,
        score_margins=score_margins,
        categories=categories,
    )


def table_of_columns(
    ids: Ids,
    bounds: NDArray[np.int64],
    columns: PairColumns,
    *,
    row_ids: Sequence[str] | None = None,
    use_scores: bool = False,
    score_margins: Floats | None = None,
    categories: Sequence[str] = (),
) -> PairTable:
    """Return a table of tokenized pairs; see `pair_table`.

    Args:
        ids: Token ids, see `TokenTable`.
        bounds: Bounds of prompts and completions in `ids`.
        columns: Columns of the pairs.
        row_ids: Row ids; None for those of the columns.
        use_scores: Whether safety is read from `*_safety_score`.
        score_margins: Reward less multiplied cost, chosen minus rejected, (N,).
        categories: Names of the harm categories that the loss distinguishes.
    """
    labels = columns.labels
    scores = np.stack([columns.signal(f"{side}_safety_score") for side in SIDES], axis=1)
    safe = scores if use_scores else labels
    # The best estimate of safety: the score if there is one, else the label.
    probability = np.where(np.isnan(scores), labels, scores)
    signals = {
        name: columns.signal(name)
        for name in ("chosen_win_rate", "rejected_win_rate", "reward_margin", "expected_safety")
    }
    signals["judged"] = columns.is_judged.astype(np.float64)
    # NaN for pairs that aren't graded, which may be in one table with graded ones.
    degrees = columns.signal("degree_difference")
    if score_margins is not None:
        signals["score_margin"] = score_margins
    if categories:
        has_harms = np.stack([columns.has_harm(name) for name in categories], axis=1)
        signals["categories"] = has_harms.astype(np.float64)
    expected = signals["expected_safety"]
    signals["expected_safety"] = _fill_by_group(expected, probability.mean(axis=1), columns.datasets)
    return PairTable(
        ids,
        bounds,
        RowIds(columns.row_hashes) if row_ids is None else row_ids,
        chosen_safe=safe[:, 0],
        rejected_safe=safe[:, 1],
        cells=columns.cells,
        is_buffer=columns.is_buffer,
        signals={
            **{name: values for name, values in signals.items() if not np.isnan(values).any()},
            **({} if np.isnan(degrees).all() else {"degree_difference": degrees}),
        },
        category_names=tuple(categories),
    )


def harm_categories(pairs: Iterable[PreferencePair]) -> tuple[str, ...]:
    """Return the names of all harm categories of pairs, in order."""
    return tuple(sorted({name for pair in pairs for name in pair.harm_categories}))


def score_table(examples: Sequence[Example], pairs: Sequence[PreferencePair]) -> ScoreTable:
    """Return a table of tokenized pairs whose answers are scored at their last token.

    Args:
        examples: Token ids of whole texts, with two completions each.
        pairs: Pairs of the examples, in the same order; those of the buffer and unlabeled ones have no signs. Which
            of two safe or two unsafe answers is safer is known from costs.
    """
    scored = [
        Example(prompt, tuple(np.append(~completion, np.int32(0)) for completion in completions))
        for prompt, completions in examples
    ]
    signs = [
        (0.0, 0.0)
        if pair.labels is None or pair.provenance.stream == "buffer"
        else tuple(-1.0 if safe else 1.0 for safe in pair.labels)
        for pair in pairs
    ]
    signs_of = np.array(signs, dtype=np.float64)
    costs = np.array([(pair.signals.chosen_cost, pair.signals.rejected_cost) for pair in pairs], dtype=np.float64)
    by_costs = np.where((signs_of == 0).any(axis=1), 0.0, np.sign(np.nan_to_num(costs[:, 0] - costs[:, 1])))
    by_labels = np.sign(signs_of[:, 0] - signs_of[:, 1])
    return ScoreTable(
        *_concatenate(scored),
        tuple(pair.row_id for pair in pairs),
        signs=signs_of,
        order=np.where(by_labels == 0, by_costs, by_labels),
        is_buffer=np.array([pair.provenance.stream == "buffer" for pair in pairs]),
    )


def _fill_by_group(values: Floats, means: Floats, groups: NDArray[np.int32]) -> Floats:
    """Replace missing values by the mean of the pair's group."""
    by_group = np.bincount(groups, weights=means) / np.maximum(np.bincount(groups), 1)
    return np.where(np.isnan(values), by_group[groups], values)


def _concatenate(examples: Sequence[Example]) -> tuple[Ids, NDArray[np.int64]]:
    """Return the concatenated token ids of examples, and their bounds."""
    pieces = [piece for example in examples for piece in (example.prompt_ids, *example.completions)]
    ends = np.cumsum([0, *(len(piece) for piece in pieces)], dtype=np.int64)
    per_example = len(pieces) // len(examples)
    starts = np.arange(len(examples))[:, None] * per_example + np.arange(per_example + 1)[None, :]
    return np.concatenate(pieces).astype(np.int32), ends[starts]
