"""What a table of tokenized pairs needs of the pairs besides their token ids, in arrays that can be saved."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from bfpo.core.pairs import CELLS, SIGNALS, PreferencePair

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class RowIds(Sequence[str]):
    """Row ids as numbers: 8 bytes each instead of 65.

    Args:
        hashes: The ids as numbers, (N,).
    """

    hashes: NDArray[np.uint64]

    def __len__(self) -> int:
        return len(self.hashes)

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> "RowIds": ...

    def __getitem__(self, index: int | slice) -> "str | RowIds":
        """Return an id, 16 hexadecimal digits, or several."""
        return RowIds(self.hashes[index]) if isinstance(index, slice) else f"{int(self.hashes[index]):016x}"

    def __iter__(self) -> Iterator[str]:
        return (f"{number:016x}" for number in self.hashes.tolist())


@dataclass(frozen=True)
class PairColumns:
    """Columns of N labeled pairs. Arrays are (N,).

    Args:
        row_hashes: Row ids as numbers.
        cells: Index in `CELLS`.
        is_buffer: Whether the pair belongs to the buffer stream.
        is_judged: Whether the labels are a judge's.
        datasets: Index in `dataset_names`.
        harms: Index in `harm_sets`.
        signals: Columns of `PairSignals` that any pair has, NaN where one has none.
        dataset_names: Names of data sets.
        harm_sets: Sets of harm categories that pairs have.
    """

    row_hashes: NDArray[np.uint64]
    cells: NDArray[np.int8]
    is_buffer: NDArray[np.bool_]
    is_judged: NDArray[np.bool_]
    datasets: NDArray[np.int32]
    harms: NDArray[np.int32]
    signals: Mapping[str, Floats]
    dataset_names: tuple[str, ...]
    harm_sets: tuple[tuple[str, ...], ...]

    def __len__(self) -> int:
        return len(self.row_hashes)

    def signal(self, name: str) -> Floats:
        """Return a column of `PairSignals`, NaN for pairs without a value."""
        return self.signals[name] if name in self.signals else np.full(len(self), np.nan)

    @property
    def labels(self) -> Floats:
        """Safety of both answers, 0 or 1, (N, 2)."""
        return np.stack([self.cells < 2, self.cells % 2 == 0], axis=1).astype(np.float64)

    @property
    def harm_categories(self) -> tuple[str, ...]:
        """Names of all harm categories, in order."""
        return tuple(sorted({name for names in self.harm_sets for name in names}))

    def has_harm(self, name: str) -> NDArray[np.bool_]:
        """Return which pairs have a harm category."""
        return np.array([name in names for names in self.harm_sets], dtype=bool)[self.harms]

    def take(self, rows: NDArray[Any]) -> "PairColumns":
        """Return the columns of some pairs, by index or by mask."""
        arrays = {name: getattr(self, name)[rows] for name in ARRAYS}
        signals = {name: values[rows] for name, values in self.signals.items()}
        return PairColumns(**arrays, signals=signals, dataset_names=self.dataset_names, harm_sets=self.harm_sets)


ARRAYS = ("row_hashes", "cells", "is_buffer", "is_judged", "datasets", "harms")


def pair_columns(pairs: Sequence[PreferencePair]) -> PairColumns:
    """Return the columns of labeled pairs."""
    datasets: dict[str, int] = {}
    harms: dict[tuple[str, ...], int] = {}
    signals = {}
    for name in SIGNALS:
        values = np.array([getattr(pair.signals, name) for pair in pairs], dtype=np.float64)
        if not np.isnan(values).all():
            signals[name] = values
    return PairColumns(
        row_hashes=np.array([int(pair.row_id, 16) for pair in pairs], dtype=np.uint64),
        cells=np.array([CELLS.index(pair.cell) for pair in pairs if pair.cell], dtype=np.int8),
        is_buffer=np.array([pair.provenance.stream == "buffer" for pair in pairs], dtype=bool),
        is_judged=np.array([pair.provenance.is_judged for pair in pairs], dtype=bool),
        datasets=np.array(
            [datasets.setdefault(pair.provenance.dataset_name, len(datasets)) for pair in pairs], dtype=np.int32
        ),
        harms=np.array([harms.setdefault(pair.harm_categories, len(harms)) for pair in pairs], dtype=np.int32),
        signals=signals,
        dataset_names=tuple(datasets),
        harm_sets=tuple(harms),
    )


def join_columns(parts: Sequence[PairColumns]) -> PairColumns:
    """Return the columns of several parts, one after the other."""
    datasets: dict[str, int] = {}
    harms: dict[tuple[str, ...], int] = {}
    arrays: dict[str, list[NDArray[Any]]] = {name: [] for name in ARRAYS}
    for part in parts:
        by_dataset = [datasets.setdefault(name, len(datasets)) for name in part.dataset_names]
        by_harms = [harms.setdefault(names, len(harms)) for names in part.harm_sets]
        for name in ARRAYS:
            arrays[name].append(getattr(part, name))
        arrays["datasets"][-1] = np.array(by_dataset, dtype=np.int32)[part.datasets]
        arrays["harms"][-1] = np.array(by_harms, dtype=np.int32)[part.harms]
    present = [name for name in SIGNALS if any(name in part.signals for part in parts)]
    return PairColumns(
        **{name: np.concatenate(pieces) for name, pieces in arrays.items()},
        signals={name: np.concatenate([part.signal(name) for part in parts]) for name in present},
        dataset_names=tuple(datasets),
        harm_sets=tuple(harms),
    )
