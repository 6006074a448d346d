"""The stream plan: the rows of every optimizer step, as a function of the seed and the step.

A stream is the infinite concatenation of seeded permutations of its rows. Step t takes rows [tB, (t+1)B) of the
main stream and of the buffer; an epoch is ceil(main rows / B) steps; there are no partial batches. Every process
computes the same plan and takes its own share, so no process runs out of rows before the others, and resuming needs
only the number of the step.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

Rows = NDArray[np.int64]
Weights = NDArray[np.float64]

# Rows of a stream whose order is an array: 128 MiB for each pass that is begun.
MAX_SHUFFLED = 2**24
# Of the Feistel network; four make a pseudorandom permutation of functions that are pseudorandom.
_ROUNDS = 6


class WeightedRow(NamedTuple):
    """A row of the table and its weight in the step's loss."""

    row: int
    weight: float


class StepRows(NamedTuple):
    """The rows of one optimizer step over all processes, (B,) each; `buffer` is (0,) without a buffer stream."""

    main: Rows
    buffer: Rows


def mean_weights(rows: StepRows, buffer_weight: float) -> tuple[Weights, Weights]:
    """Return the weights of mean(main) + buffer_weight · mean(buffer), for the main rows and the buffer rows."""
    main, buffer = rows
    return (
        np.full(len(main), 1 / max(len(main), 1)),
        np.full(len(buffer), buffer_weight / max(len(buffer), 1)),
    )


class RowStream:
    """An endless, seeded sequence of rows in which every pass contains each row once.

    Up to `MAX_SHUFFLED` rows a pass is shuffled as a whole. More rows are permuted by a function of their number,
    which takes no memory.

    Args:
        rows: Row indices, (N,).
        seed: Integers that together seed the sequence.
    """

    def __init__(self, rows: Rows | range, seed: tuple[int, ...]) -> None:
        self._rows, self._seed = rows, seed
        self._passes: dict[int, Rows | _Permutation] = {}

    def take(self, start: int, count: int) -> Rows:
        """Return rows [start, start + count) of the sequence."""
        size = len(self._rows)
        if size == 0:
            return np.zeros(0, dtype=np.int64)
        passes, offsets = np.divmod(np.arange(start, start + count), size)
        return np.concatenate([self._rows_of(int(number), offsets[passes == number]) for number in np.unique(passes)])

    def _rows_of(self, number: int, offsets: Rows) -> Rows:
        """Return the rows of a pass at some offsets."""
        if number not in self._passes:
            # Only consecutive passes are needed together.
            self._passes = {known: rows for known, rows in self._passes.items() if abs(known - number) <= 1}
            rng = np.random.default_rng([*self._seed, number])
            if len(self._rows) > MAX_SHUFFLED:
                self._passes[number] = _Permutation(len(self._rows), rng)
            else:
                rows = self._rows
                # `asarray` would make an object of each number.
                array = np.arange(rows.start, rows.stop, rows.step) if isinstance(rows, range) else rows
                self._passes[number] = rng.permutation(array)
        known = self._passes[number]
        if isinstance(known, np.ndarray):
            return known[offsets]
        numbers = known.of(offsets)
        # A range of rows isn't an array: that of many rows would take more memory than anything else.
        return numbers * self._rows.step + self._rows.start if isinstance(self._rows, range) else self._rows[numbers]


class _Permutation:
    """A seeded permutation of 0, ..., size - 1, computed number by number.

    A Feistel network permutes the numbers of an even number of bits, and is applied again to a number from `size` on
    until one below is reached (cycle walking; Black and Rogaway, Ciphers with Arbitrary Finite Domains, 2002).

    Args:
        size: Number of rows.
        rng: Generator of the keys.
    """

    def __init__(self, size: int, rng: np.random.Generator) -> None:
        self._size = size
        self._half = np.uint64(max((size - 1).bit_length() + 1, 2) // 2)
        self._keys = rng.integers(2**64, size=_ROUNDS, dtype=np.uint64)

    def of(self, numbers: Rows) -> Rows:
        """Return the numbers at some places of the permutation, (n,)."""
        values = self._encrypt(numbers.astype(np.uint64))
        while (outside := values >= np.uint64(self._size)).any():
            values[outside] = self._encrypt(values[outside])
        return values.astype(np.int64)

    def _encrypt(self, values: NDArray[np.uint64]) -> NDArray[np.uint64]:
        mask = (np.uint64(1) << self._half) - np.uint64(1)
        left, right = values >> self._half, values & mask
        for key in self._keys:
            # The finalizer of SplitMix64.
            mixed = right + key
            mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            left, right = right, left ^ ((mixed ^ (mixed >> np.uint64(31))) & mask)
        return (left << self._half) | right


@dataclass(frozen=True)
class StreamPlan:
    """Two streams, step by step.

    Args:
        main: Rows of the main stream, (N,), N at least 1.
        buffer: Rows of the buffer, (M,); empty for a single stream.
        batch_size: B, number of rows of each stream per optimizer step, over all processes and micro-batches.
        seed: Seed of the permutations.
    """

    main: Rows | range
    buffer: Rows | range
    batch_size: int
    seed: int

    def __post_init__(self) -> None:
        streams = (RowStream(rows, (self.seed, index)) for index, rows in enumerate((self.main, self.buffer)))
        object.__setattr__(self, "_streams", tuple(streams))

    @property
    def steps_per_epoch(self) -> int:
        """Number of optimizer steps until the main stream has been seen once."""
        return -(-len(self.main) // self.batch_size)

    def step(self, number: int) -> StepRows:
        """Return the rows of optimizer step `number`, counted from 0."""
        streams: tuple[RowStream, RowStream] = self._streams  # type: ignore[attr-defined]
        return StepRows(*(stream.take(number * self.batch_size, self.batch_size) for stream in streams))


class MicroBatches(Sampler[list[WeightedRow]]):
    """The micro-batches of one epoch and one process, in the order of the plan.

    Every micro-batch has as many main rows as buffer rows. A row's weight is its part in the step's loss, so the sum
    over micro-batches and processes is the same for every split.

    Args:
        plan: Stream plan of all processes.
        weigh: Function from the rows of a step to the weights of its main and buffer rows.
        per_device: Number of main rows in a micro-batch.
        rank: Index of this process.
        world_size: Number of processes.
        steps_done: Function that returns the number of finished optimizer steps; called at the start of an epoch.
        is_finished: Function that returns whether the run has taken its last step; the epoch is then empty, because
            transformers would take another step when a finished run is resumed.
    """

    def __init__(
        self,
        plan: StreamPlan,
        weigh: Callable[[StepRows], tuple[Weights, Weights]],
        *,
        per_device: int,
        rank: int,
        world_size: int,
        steps_done: Callable[[], int],
        is_finished: Callable[[], bool] = lambda: False,
    ) -> None:
        if plan.batch_size % (per_device * world_size):
            raise ValueError(f"batch of {plan.batch_size} doesn't split into {world_size} x {per_device}")
        self._plan, self._weigh, self._steps_done, self._is_finished = plan, weigh, steps_done, is_finished
        self._per_device, self._rank, self._world_size = per_device, rank, world_size
        self._accumulation = plan.batch_size // (per_device * world_size)

    def __len__(self) -> int:
        return self._plan.steps_per_epoch * self._accumulation

    def __iter__(self) -> Iterator[list[WeightedRow]]:
        if self._is_finished():
            return
        steps = self._plan.steps_per_epoch
        first = self._steps_done() // steps * steps
        for number in range(first, first + steps):
            rows = self._plan.step(number)
            weights = self._weigh(rows)
            for micro in range(self._accumulation):
                start = (micro * self._world_size + self._rank) * self._per_device
                share = slice(start, start + self._per_device)
                yield [
                    WeightedRow(int(row), float(weight))
                    for stream, stream_weights in zip(rows, weights, strict=True)
                    for row, weight in zip(stream[share], stream_weights[share], strict=True)
                ]
