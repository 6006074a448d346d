"""Tables of tokenized prompts and completions, compact in memory."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bfpo.core.files import content_hash
from bfpo.core.pairs import CELLS, PreferencePair

Ids = NDArray[np.int32]
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
        """Hash of the token ids and of the bounds."""
        digest = hashlib.sha256()
        for array in (self.ids, self.bounds):
            # `tobytes` would copy the array.
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()[:16]

    @property
    def fingerprint(self) -> str:
        """Hash of everything that must be unchanged when a run is resumed."""
        return self.tokens_hash

    @property
    def largest_id(self) -> int:
        """Largest token id of all examples."""
        return int(token_ids(self.ids).max(initial=0))

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
        counts = np.concatenate([[0], np.cumsum(self.ids >= 0)])
        return np.diff(counts[self.bounds[:, 1:]], axis=1)

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
    def main_rows(self) -> NDArray[np.int64]:
        """Indices of the pairs of the main stream."""
        return np.flatnonzero(~self.is_buffer)

    @property
    def buffer_rows(self) -> NDArray[np.int64]:
        """Indices of the pairs of the buffer stream."""
        return np.flatnonzero(self.is_buffer)


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
    labels = np.array([(pair.labels.chosen, pair.labels.rejected) for pair in pairs if pair.labels], dtype=np.float64)
    scores = np.array(
        [(pair.signals.chosen_safety_score, pair.signals.rejected_safety_score) for pair in pairs], dtype=np.float64
    )
    safe = scores if use_scores else labels
    # The best estimate of safety: the score if there is one, else the label.
    probability = np.where(np.isnan(scores), labels, scores)
    signals = {
        name: np.array([getattr(pair.signals, name) for pair in pairs], dtype=np.float64)
        for name in ("chosen_win_rate", "rejected_win_rate", "reward_margin", "expected_safety")
    }
    signals["judged"] = np.array([pair.provenance.is_judged for pair in pairs], dtype=np.float64)
    # NaN for pairs that aren't graded, which may be in one table with graded ones.
    degrees = np.array([pair.signals.degree_difference for pair in pairs], dtype=np.float64)
    if score_margins is not None:
        signals["score_margin"] = score_margins
    if categories:
        signals["categories"] = np.array(
            [[name in pair.harm_categories for name in categories] for pair in pairs], dtype=np.float64
        )
    signals["expected_safety"] = _fill_by_dataset(signals["expected_safety"], probability.mean(axis=1), pairs)
    return PairTable(
        *_concatenate(examples),
        tuple(pair.row_id for pair in pairs),
        chosen_safe=safe[:, 0],
        rejected_safe=safe[:, 1],
        cells=np.array([CELLS.index(pair.cell) for pair in pairs if pair.cell], dtype=np.int8),
        is_buffer=np.array([pair.provenance.stream == "buffer" for pair in pairs]),
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


def _fill_by_dataset(values: Floats, means: Floats, pairs: Sequence[PreferencePair]) -> Floats:
    """Replace missing values by the mean of the pair's data set."""
    names, group = np.unique([pair.provenance.dataset_name for pair in pairs], return_inverse=True)
    by_group = np.bincount(group, weights=means, minlength=len(names)) / np.bincount(group, minlength=len(names))
    return np.where(np.isnan(values), by_group[group], values)


def _concatenate(examples: Sequence[Example]) -> tuple[Ids, NDArray[np.int64]]:
    """Return the concatenated token ids of examples, and their bounds."""
    pieces = [piece for example in examples for piece in (example.prompt_ids, *example.completions)]
    ends = np.cumsum([0, *(len(piece) for piece in pieces)], dtype=np.int64)
    per_example = len(pieces) // len(examples)
    starts = np.arange(len(examples))[:, None] * per_example + np.arange(per_example + 1)[None, :]
    return np.concatenate(pieces).astype(np.int32), ends[starts]
