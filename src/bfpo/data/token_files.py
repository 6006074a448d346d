"""Token ids of large data on disk: one file that is mapped and not held, and the columns of its pairs.

An entry is a folder in the cache. While it is made, chunks are saved in `parts/`, so that a killed run goes on after
the last one, and several processes share the work. `entry.json` is written last, and only an entry that has one is
read. The folder is named by a hash of the tokenizer, the settings and what the pairs follow from, which is known
without reading rows.
"""

import json
import shutil
import zipfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bfpo.config.recipes import Source
from bfpo.core.files import content_hash, file_hash, open_atomic, write_json
from bfpo.core.pairs import PreferencePair
from bfpo.data.load import Reason, SourceReport
from bfpo.data.pair_columns import ARRAYS, PairColumns, join_columns, pair_columns
from bfpo.data.stored_pairs import StoredPairs, pair_lines
from bfpo.data.table import Ids
from bfpo.data.tokenize import Encoder
from bfpo.errors import DataError

# Pairs that are tokenized and saved together.
CHUNK = 4096
SCHEMA = 1

Pairs = list[PreferencePair] | StoredPairs


class TokenizedPairs(NamedTuple):
    """Tokenized pairs of several sources.

    Args:
        ids: Token ids of all pairs.
        bounds: Bounds of prompts and answers in `ids`, (N, 4), see `TokenTable`.
        columns: Columns of the pairs.
        kept: For each source, which of its pairs could be encoded.
    """

    ids: Ids
    bounds: NDArray[np.int64]
    columns: PairColumns
    kept: list[NDArray[np.bool_]]

    def take(self, rows: Sequence[int]) -> "TokenizedPairs":
        """Return some of the pairs, whose ids are held in memory."""
        bounds = self.bounds[rows]
        pieces = [self.ids[start:end] for start, end in bounds[:, [0, -1]]]
        starts = np.cumsum([0, *map(len, pieces)])[:-1]
        moved = bounds - bounds[:, :1] + starts[:, None]
        return TokenizedPairs(np.concatenate(pieces), moved, self.columns.take(np.array(rows)), [])


def tokenize_stored(
    encoder: Encoder,
    sources: Sequence[tuple[Pairs, SourceReport]],
    *,
    share: tuple[int, int] = (0, 1),
    advance: Callable[[int], None] = lambda count: None,
) -> TokenizedPairs:
    """Tokenize the pairs of several sources in chunks, and count in the reports what is dropped or truncated.

    Args:
        encoder: Encoder with the folder of its cache. Without one the ids are held in memory.
        sources: Pairs of each source, with the report on it.
        share: Index of this process, and number of processes that share the work.
        advance: Function that is called with numbers of pairs that are done.

    Raises:
        DataError: If an entry in the cache is damaged.
    """
    keys = [pairs.key if isinstance(pairs, StoredPairs) else content_hash(*pair_lines(pairs)) for pairs, _ in sources]
    folder = encoder.entry_folder([SCHEMA, CHUNK, keys])
    if folder is not None:
        return _Entry(folder, encoder, sources, share).make(advance)
    with TemporaryDirectory() as temporary:
        tokenized = _Entry(Path(temporary), encoder, sources, (0, 1)).make(advance)
        return tokenized._replace(ids=np.array(tokenized.ids))


class _Part(NamedTuple):
    """Tokenized pairs of a chunk, or of all sources.

    Args:
        lengths: Numbers of tokens of prompts and answers, (N, 3).
        columns: Columns of the pairs that could be encoded.
        kept: Which pairs those are, one array for each source.
        counts: For each source, the pairs that were dropped and noted, by reason.
    """

    lengths: NDArray[np.int32]
    columns: PairColumns
    kept: list[NDArray[np.bool_]]
    counts: list[tuple[Counter[Reason], Counter[Reason]]]


class _Entry:
    """Entry of some pairs in the cache; see `tokenize_stored`."""

    def __init__(
        self,
        folder: Path,
        encoder: Encoder,
        sources: Sequence[tuple[Pairs, SourceReport]],
        share: tuple[int, int],
    ) -> None:
        self._folder, self._sources, self._share = folder, sources, share
        self._encoder = replace(encoder, cache=None)
        self._chunks = [
            (source, range(start, min(start + CHUNK, len(pairs))))
            for source, (pairs, _) in enumerate(sources)
            for start in range(0, len(pairs), CHUNK)
        ]

    def make(self, advance: Callable[[int], None]) -> TokenizedPairs:
        """Return the entry, after what is missing was made."""
        if not self._is_finished:
            rank, world = self._share
            own = [number for number in range(len(self._chunks)) if number % world == rank]
            self._fill(own, advance)
            # What other processes have not finished, or have written where this one can't read it.
            self._fill([number for number in range(len(self._chunks)) if number % world != rank], advance)
            self._join()
        return self._read()

    @property
    def _is_finished(self) -> bool:
        return (self._folder / "entry.json").is_file()

    def _ids_file(self, number: int) -> Path:
        return self._folder / "parts" / f"{number:06d}.ids"

    def _part_file(self, number: int) -> Path:
        return self._folder / "parts" / f"{number:06d}.npz"

    def _has_part(self, number: int) -> bool:
        part = _read_part(self._part_file(number))
        try:
            return part is not None and self._ids_file(number).stat().st_size == 4 * int(part.lengths.sum())
        except OSError:
            return False

    def _fill(self, numbers: list[int], advance: Callable[[int], None]) -> None:
        for source, (pairs, _) in enumerate(self._sources):
            of_source = [number for number in numbers if self._chunks[number][0] == source]
            missing = [number for number in of_source if not self._is_finished and not self._has_part(number)]
            advance(sum(len(self._chunks[number][1]) for number in of_source if number not in missing))
            if not missing:
                continue
            rows = np.concatenate([np.array(self._chunks[number][1]) for number in missing])
            reader = iter(pairs.take(rows)) if isinstance(pairs, StoredPairs) else (pairs[row] for row in rows)
            for number in missing:
                chunk = [next(reader) for _ in self._chunks[number][1]]
                # Another process may have made it meanwhile.
                if not self._has_part(number) and not self._is_finished:
                    self._write(number, chunk)
                advance(len(chunk))

    def _write(self, number: int, chunk: list[PreferencePair]) -> None:
        report = SourceReport("", Source(path="-"))
        encoded, examples = self._encoder.encode(chunk, report)
        known = {id(pair) for pair in encoded}
        pieces = [(example.prompt_ids, *example.completions) for example in examples]
        with open_atomic(self._ids_file(number)) as file:
            for piece in pieces:
                file.write(b"".join(ids.tobytes() for ids in piece))
        _write_part(
            self._part_file(number),
            _Part(
                np.array([[len(ids) for ids in piece] for piece in pieces], dtype=np.int32).reshape(-1, 3),
                pair_columns(encoded),
                [np.array([id(pair) in known for pair in chunk], dtype=bool)],
                [(report.dropped, report.noted)],
            ),
        )

    def _join(self) -> None:
        """Join the parts, unless another process has done so."""
        parts = [_read_part(self._part_file(number)) for number in range(len(self._chunks))]
        if not self._is_finished:
            found = [part for part in parts if part is not None]
            if len(found) < len(parts) and not self._is_finished:
                raise DataError(f"{self._folder}: parts are missing; delete that folder, and start again")
            try:
                with open_atomic(self._folder / "ids.bin") as file:
                    for number in range(len(self._chunks)):
                        file.write(self._ids_file(number).read_bytes())
            except FileNotFoundError:
                # Another process has joined and removed them meanwhile.
                if self._is_finished:
                    return
                raise
            kept: list[list[NDArray[np.bool_]]] = [[np.zeros(0, dtype=bool)] for _ in self._sources]
            counts: list[tuple[Counter[Reason], Counter[Reason]]] = [(Counter(), Counter()) for _ in self._sources]
            for (source, _), part in zip(self._chunks, found, strict=True):
                kept[source] += part.kept
                for total, count in zip(counts[source], part.counts[0], strict=True):
                    total.update(count)
            # The dimensions of a data set without pairs, such as a holdout of 0.
            empty = np.zeros((0, 3), dtype=np.int32)
            lengths = np.concatenate([empty, *(part.lengths for part in found)])
            columns = join_columns([pair_columns([]), *(part.columns for part in found)])
            _write_part(
                self._folder / "columns.npz", _Part(lengths, columns, list(map(np.concatenate, kept)), counts)
            )
            hashes = {name: file_hash(self._folder / name) for name in ("ids.bin", "columns.npz")}
            write_json(self._folder / "entry.json", {"schema": SCHEMA, "sha256": hashes})
        shutil.rmtree(self._folder / "parts", ignore_errors=True)

    def _read(self) -> TokenizedPairs:
        part = _read_part(self._folder / "columns.npz")
        try:
            hashes = json.loads((self._folder / "entry.json").read_text(encoding="utf-8"))["sha256"]
            is_intact = all(file_hash(self._folder / name) == digest for name, digest in hashes.items())
        except (OSError, ValueError, KeyError, TypeError):
            is_intact = False
        if part is None or not is_intact:
            raise DataError(
                f"cached token ids {self._folder} are damaged; delete that folder, and they are made again"
            )
        for (_, report), (dropped, noted) in zip(self._sources, part.counts, strict=True):
            report.dropped.update(dropped)
            report.noted.update(noted)
        ends = np.cumsum(part.lengths, dtype=np.int64).reshape(-1, 3)
        starts = np.concatenate([[0], ends[:-1, -1]]) if len(ends) else np.zeros(0, dtype=np.int64)
        bounds = np.concatenate([starts[:, None], ends], axis=1)
        total = int(bounds[-1, -1]) if len(bounds) else 0
        file = self._folder / "ids.bin"
        ids = np.memmap(file, np.int32, "r") if total else np.zeros(0, dtype=np.int32)
        return TokenizedPairs(ids, bounds, part.columns, part.kept)


def _write_part(file: Path, part: _Part) -> None:
    arrays: dict[str, NDArray[Any]] = {name: getattr(part.columns, name) for name in ARRAYS}
    arrays |= {f"signal {name}": values for name, values in part.columns.signals.items()}
    arrays |= {f"kept {source}": kept for source, kept in enumerate(part.kept)}
    others = {
        "dataset_names": part.columns.dataset_names,
        "harm_sets": part.columns.harm_sets,
        "counts": [[[(*reason, number) for reason, number in count.items()] for count in of] for of in part.counts],
    }
    with open_atomic(file) as opened:
        text = np.frombuffer(json.dumps(others).encode(), dtype=np.uint8)
        np.savez(opened, allow_pickle=False, lengths=part.lengths, others=text, **arrays)


def _read_part(file: Path) -> _Part | None:
    """Return the content of a file; None if it is missing or damaged."""
    try:
        with file.open("rb") as opened, np.load(opened) as arrays:
            others = json.loads(arrays["others"].tobytes())
            values = {name: arrays[name] for name in arrays}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    columns = PairColumns(
        **{name: values[name] for name in ARRAYS},
        signals={name.removeprefix("signal "): values[name] for name in values if name.startswith("signal ")},
        dataset_names=tuple(others["dataset_names"]),
        harm_sets=tuple(map(tuple, others["harm_sets"])),
    )
    counts = [(_as_counter(dropped), _as_counter(noted)) for dropped, noted in others["counts"]]
    kept = [values[f"kept {source}"] for source in range(len(counts))]
    return _Part(values["lengths"], columns, kept, counts)


def _as_counter(counts: list[list[Any]]) -> Counter[Reason]:
    return Counter({Reason(text, cell): number for text, cell, number in counts})
