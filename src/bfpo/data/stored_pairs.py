"""Pairs of a large source, which stay in its files: only facts are held, and the pairs are read when needed."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from itertools import chain, compress, islice
from json.encoder import encode_basestring
from typing import Any, NamedTuple, Self, overload

import numpy as np
from numpy.typing import NDArray

from bfpo.core.conversation import user_says
from bfpo.core.files import content_hash
from bfpo.core.pairs import CELLS, Cell, PreferencePair, StreamName
from bfpo.data.facts import LABELS, PairFacts, PlainPair

# Cells with the answers exchanged, also that of unlabeled pairs, -1.
_EXCHANGED = np.array([0, 2, 1, 3, -1], dtype=np.int8)
_OWN_COLUMNS = ("prompt", "chosen", "rejected", "row_id")


class Kind(NamedTuple):
    """What tables of the data count pairs by."""

    stream: StreamName | None
    cell: Cell | None
    label_source: str | None


class _ReadInOrder(Sequence[PreferencePair]):
    """Pairs that are cheap to iterate over, and not to pick from."""

    @overload
    def __getitem__(self, index: int) -> PreferencePair: ...

    @overload
    def __getitem__(self, index: slice) -> list[PreferencePair]: ...

    def __getitem__(self, index: int | slice) -> PreferencePair | list[PreferencePair]:
        """Return a pair or several; all before them are read, so this is for the first few."""
        if isinstance(index, slice):
            return list(islice(self, *index.indices(len(self))))
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return next(islice(self, index % len(self), None))


@dataclass(frozen=True)
class StoredPairs(_ReadInOrder):
    """Pairs that are read from their source each time they are iterated over, in their order.

    Args:
        read: Function that reads all pairs of the source, in their order.
        content: Hash of everything that the source's pairs follow from: its files, and how they are read.
        facts: Facts about these pairs, with their final labels and provenances.
        rows: Indices of these pairs among all of the source, ascending, (N,).
        exchanged: Which pairs have their answers in the other order, (N,); None for none.
    """

    read: Callable[[], Iterable[PlainPair | PreferencePair]]
    content: str
    facts: PairFacts
    rows: NDArray[np.int64]
    exchanged: NDArray[np.bool_] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[PreferencePair]:
        return (self._finish(index, pair) for index, pair in self._read_own())

    def take(self, rows: NDArray[Any]) -> Self:
        """Return some of the pairs, by ascending indices or by mask."""
        exchanged = None if self.exchanged is None else self.exchanged[rows]
        return replace(self, facts=self.facts.take(rows), rows=self.rows[rows], exchanged=exchanged)

    def exchange(self, chosen: NDArray[np.bool_]) -> Self:
        """Return the pairs with the answers of some, (N,), in the other order."""
        return replace(self, exchanged=chosen if self.exchanged is None else self.exchanged ^ chosen)

    @property
    def cells(self) -> NDArray[np.int8]:
        """Index of each pair's cell in `CELLS`, -1 for an unlabeled pair, (N,)."""
        cells = self.facts.cells
        return cells if self.exchanged is None else np.where(self.exchanged, _EXCHANGED[cells], cells)

    @property
    def key(self) -> str:
        """Hash of everything that the pairs follow from; without reading them."""
        arrays = [self.rows, self.facts.cells, self.facts.origins]
        arrays += [] if self.exchanged is None else [self.exchanged]
        hashes = [sha256(np.ascontiguousarray(array).data).hexdigest() for array in arrays]
        origins = [[getattr(origin, name) for name in origin.__slots__] for origin in self.facts.provenances]
        return content_hash(self.content, hashes, origins)

    def tally(self) -> "Counter[Kind]":
        """Return the number of pairs of each kind, in the order in which each first occurs."""
        width = len(CELLS) + 1
        values, firsts, counts = np.unique(
            self.facts.origins.astype(np.int64) * width + self.cells + 1, return_index=True, return_counts=True
        )
        tally: Counter[Kind] = Counter()
        for index in np.argsort(firsts):
            origin, cell = divmod(int(values[index]), width)
            provenance = self.facts.provenances[origin]
            kind = Kind(provenance.stream, CELLS[cell - 1] if cell else None, provenance.safety_label_source)
            tally[kind] += int(counts[index])
        return tally

    def lines(self) -> Iterator[str]:
        """Yield the pairs as lines of a pair file, with the columns of `PreferencePair.to_row`."""
        # The columns between texts and id of a plain pair, by its origin and cell.
        columns: dict[tuple[int, int], str] = {}
        for index, pair in self._read_own():
            if not isinstance(pair, PlainPair) or self.exchanged is not None:
                yield to_line(self._finish(index, pair))
                continue
            kind = int(self.facts.origins[index]), int(self.facts.cells[index])
            if kind not in columns:
                row = self._finish(index, pair).to_row()
                others = {name: value for name, value in row.items() if name not in _OWN_COLUMNS}
                columns[kind] = json.dumps(others, ensure_ascii=False)[1:-1]
            yield (
                f'{{"prompt": {encode_basestring(pair.prompt)}, "chosen": {encode_basestring(pair.chosen)}, '
                f'"rejected": {encode_basestring(pair.rejected)}, {columns[kind]}, '
                f'"row_id": "{self.facts.row_id(index)}"}}\n'
            )

    def _read_own(self) -> Iterator[tuple[int, PlainPair | PreferencePair]]:
        rows = iter(self.rows.tolist())
        wanted, index = next(rows, None), 0
        for row, pair in enumerate(self.read()):
            if row == wanted:
                yield index, pair
                wanted, index = next(rows, None), index + 1
            if wanted is None:
                return

    def _finish(self, index: int, pair: PlainPair | PreferencePair) -> PreferencePair:
        """Return a pair of the source with its final labels, provenance and order."""
        cell, origin = int(self.facts.cells[index]), int(self.facts.origins[index])
        labels, provenance = None if cell < 0 else LABELS[cell], self.facts.provenances[origin]
        if isinstance(pair, PlainPair):
            pair = PreferencePair(user_says(pair.prompt), pair.chosen, pair.rejected, labels, provenance=provenance)
        else:
            pair = replace(pair, labels=labels, provenance=provenance)
        return pair.swapped() if self.exchanged is not None and self.exchanged[index] else pair


@dataclass(frozen=True)
class PairChain(_ReadInOrder):
    """The pairs of several sources, one after the other.

    Args:
        parts: Pairs of each source.
    """

    parts: tuple[Sequence[PreferencePair], ...]

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def __iter__(self) -> Iterator[PreferencePair]:
        return chain.from_iterable(self.parts)


def chain_pairs(parts: Iterable[Sequence[PreferencePair]]) -> Sequence[PreferencePair]:
    """Return the pairs of several sources as one sequence: a list, unless pairs are stored."""
    # Chains in a chain are sequences of parts, too.
    parts = tuple(part for given in parts for part in (given.parts if isinstance(given, PairChain) else (given,)))
    if all(isinstance(part, list) for part in parts):
        return [pair for part in parts for pair in part]
    return PairChain(parts)


def tally(pairs: Iterable[PreferencePair]) -> "Counter[Kind]":
    """Return the number of pairs of each kind, in the order in which each first occurs."""
    if isinstance(pairs, StoredPairs):
        return pairs.tally()
    if isinstance(pairs, PairChain):
        counts: Counter[Kind] = Counter()
        for part in pairs.parts:
            counts.update(tally(part))
        return counts
    return Counter(Kind(pair.provenance.stream, pair.cell, pair.provenance.safety_label_source) for pair in pairs)


def with_first_prompts(pairs: Sequence[PreferencePair], count: int) -> list[PreferencePair]:
    """Return the pairs of the prompts with the smallest keys: of at least so many prompts of each kind, if there are.

    A prompt is of one kind if all answers to it are safe, and else of the other. Pairs in memory are all returned.
    """
    if isinstance(pairs, list):
        return pairs
    parts = pairs.parts if isinstance(pairs, PairChain) else (pairs,)
    keys, are_safe = (np.concatenate(columns) for columns in zip(*map(_keys_and_safety, parts), strict=True))
    distinct, groups = np.unique(keys, return_inverse=True)
    all_safe = np.ones(len(distinct), dtype=bool)
    np.logical_and.at(all_safe, groups, are_safe)
    of_kind = [np.flatnonzero(all_safe == kind)[:count] for kind in (True, False)]
    if all(len(found) == count for found in of_kind):
        wanted = np.arange(len(distinct)) <= max(found[-1] for found in of_kind)
    else:
        wanted = np.isin(np.arange(len(distinct)), np.concatenate(of_kind))
    masks = np.split(wanted[groups], np.cumsum([len(part) for part in parts])[:-1])
    return [
        pair
        for part, mask in zip(parts, masks, strict=True)
        for pair in (part.take(mask) if isinstance(part, StoredPairs) else compress(part, mask))
    ]


def _keys_and_safety(pairs: Sequence[PreferencePair]) -> tuple[NDArray[np.uint64], NDArray[np.bool_]]:
    if isinstance(pairs, StoredPairs):
        return pairs.facts.prompt_keys, pairs.cells == CELLS.index("ss")
    keys = np.array([int(pair.prompt_key, 16) for pair in pairs], dtype=np.uint64)
    return keys, np.array([pair.cell == "ss" for pair in pairs], dtype=bool)


def to_line(pair: PreferencePair) -> str:
    """Return a pair as a line of a pair file."""
    return json.dumps(pair.to_row(), ensure_ascii=False, allow_nan=False) + "\n"


def pair_lines(pairs: Iterable[PreferencePair]) -> Iterator[str]:
    """Yield pairs as lines of a pair file."""
    if isinstance(pairs, StoredPairs):
        yield from pairs.lines()
    elif isinstance(pairs, PairChain):
        for part in pairs.parts:
            yield from pair_lines(part)
    else:
        yield from map(to_line, pairs)
