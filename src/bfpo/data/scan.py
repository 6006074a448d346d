"""The first pass over a source: facts about its pairs, and the pairs themselves if they are few.

A file of JSON Lines is read in pieces. Those of a large file are read by several processes, and what was learned of
each piece is kept in the cache: a killed run goes on after the last piece, and a later run reads no rows again.
"""

import gc
import multiprocessing
import os
import sys
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bfpo.config.recipes import Source
from bfpo.core.files import content_hash
from bfpo.core.pairs import PreferencePair, Provenance, StreamName
from bfpo.core.terminal import progress
from bfpo.data.adapters import find_adapter, read_pairs
from bfpo.data.fact_files import Piece, read_written_piece, write_piece
from bfpo.data.facts import Facts, FactsBuilder, PlainPair, join_facts
from bfpo.data.load import (
    SourceReport,
    check_all_or_none_labeled,
    final_provenance,
    make_source_report,
    read_usable,
    sampled_rows,
)
from bfpo.data.pair_formats import SkipRow
from bfpo.data.plain_rows import NotReadable, can_read, pieces, read_piece
from bfpo.data.rows import local_files, read_rows
from bfpo.data.stored_pairs import StoredPairs, to_line
from bfpo.errors import DataError

# Pairs of a source that are held in memory, at about 2.5 kB each.
MAX_HELD = 100_000
# Bytes of a file that are read by one process, and redone if it is killed.
PIECE = 64 << 20
# To increase when newer code reads the same rows differently.
VERSION = 1


@dataclass(frozen=True)
class Scan:
    """The sampled pairs of a source, with their final labels and provenances.

    Args:
        report: Report on the source.
        facts: Facts about the pairs.
        pairs: The pairs, in the same order.
    """

    report: SourceReport
    facts: Facts
    pairs: list[PreferencePair] | StoredPairs

    def take(self, kept: NDArray[np.bool_]) -> list[PreferencePair] | StoredPairs:
        """Return the pairs that a mask selects."""
        if isinstance(self.pairs, StoredPairs):
            return self.pairs.take(kept)
        return [self.pairs[index] for index in np.flatnonzero(kept)]

    def renamed(self, name: str) -> "Scan":
        """Return the scan with another name for its data set."""
        old = self.report.name

        def rename(provenance: Provenance) -> Provenance:
            return replace(provenance, dataset_name=name) if provenance.dataset_name == old else provenance

        facts = replace(self.facts, provenances=tuple(map(rename, self.facts.provenances)))
        self.report.name = name
        if isinstance(self.pairs, StoredPairs):
            return Scan(self.report, facts, replace(self.pairs, facts=facts.held()))
        pairs = [replace(pair, provenance=rename(pair.provenance)) for pair in self.pairs]
        return Scan(self.report, facts, pairs)


class _FirstPass(NamedTuple):
    """What the first pass found.

    Args:
        facts: Facts about all pairs.
        pairs: The pairs as they are in the source; None if they are many, or cheap to read again.
        digest: Hash of everything that the pairs follow from.
        in_pieces: Whether the files can be read in pieces.
    """

    facts: Facts
    pairs: list[PreferencePair] | None
    digest: str
    in_pieces: bool


def scan_source(
    source: Source,
    stream: StreamName,
    *,
    limit: int | None = None,
    ignored_keys: Collection[str] = (),
    cache: Path | None = None,
    max_held: int | None = MAX_HELD,
) -> Scan:
    """Read a source once, and take the sample that it specifies.

    Args:
        source: Source of the pairs.
        stream: Stream of pairs without one.
        limit: Maximum number of pairs, besides the source's own limit.
        ignored_keys: Keys of messages that are left out.
        cache: Folder for what is known of large files; None for none.
        max_held: Maximum number of pairs that are held in memory; None to hold all.

    Raises:
        DataError: As for `load_pairs`.
        RecipeError: If the adapter is unknown or can't be imported.
    """
    adapter = find_adapter(source.adapter)
    # Before the files are hashed: a change of a file after this is noticed when it is read again.
    states = _states(source)
    report = make_source_report(source, source.license or adapter.license, adapter.note)
    try:
        content = _scan_pieces(source, report, ignored_keys, cache)
    except NotReadable:
        content = _scan_rows(source, report, ignored_keys, max_held)
    facts = content.facts
    if len(facts) == 0:
        raise DataError(f"{report.name}: no pairs in {source.path} (rows skipped: {dict(report.skipped)})")
    check_all_or_none_labeled(f"{report.name} ({source.path})", facts.cells >= 0)
    sampled = sampled_rows(len(facts), source, report, limit)
    rows = np.arange(len(facts)) if isinstance(sampled, range) and len(sampled) == len(facts) else np.array(sampled)
    all_facts, facts = facts, facts if len(rows) == len(facts) else facts.take(rows)
    is_labeled = bool(all_facts.cells[0] >= 0)
    used = np.unique(facts.origins)
    final = list(facts.provenances)
    for index in used:
        final[index] = final_provenance(final[index], report, stream, is_labeled=is_labeled)
    cells = facts.cells if is_labeled or not source.assume_safe else np.zeros_like(facts.cells)
    facts = replace(facts, cells=cells, provenances=tuple(final))
    read = partial(_read_again, source, ignored_keys, states, in_pieces=content.in_pieces)
    stored = StoredPairs(read, content.digest, facts.held(), rows)
    if content.pairs is not None:
        stored = replace(stored, read=partial(iter, content.pairs))
    is_held = content.pairs is not None or max_held is None or len(all_facts) <= max_held
    return Scan(report, facts, list(stored) if is_held else stored)


def _scan_pieces(
    source: Source, report: SourceReport, ignored_keys: Collection[str], cache: Path | None
) -> _FirstPass:
    files = local_files(source)
    if not files or not all(can_read(source, file) for file in files):
        raise NotReadable
    digest = content_hash(VERSION, list(report.files.values()), source.turns, PIECE, sorted(ignored_keys))
    jobs = []
    for number, file in enumerate(files):
        ranges = pieces(file, PIECE)
        # A smaller file is read again in a second.
        is_kept = cache is not None and file.stat().st_size > PIECE // 8
        folder = cache / "rows" / digest if cache is not None and is_kept else None
        for index, bounds in enumerate(ranges):
            target = folder and folder / f"{number:03d}-{index:05d}.npz"
            jobs.append(_Job(file, bounds, source, tuple(ignored_keys), target))
    done = []
    rows: Counter[Path] = Counter()
    with progress(f"reading {report.name}", sum(job.size for job in jobs)) as advance:
        for job, piece in zip(jobs, _run(jobs), strict=True):
            done.append(piece)
            rows[job.file] += len(piece.facts) + piece.skipped.total()
            advance(job.size)
    if not all(rows[file] for file in files):
        raise NotReadable
    for piece in done:
        report.skipped.update(piece.skipped)
        report.faulty.update(piece.faulty)
    return _FirstPass(join_facts([piece.facts for piece in done]), None, digest, in_pieces=True)


class _FileState(NamedTuple):
    file: Path
    size: int
    changed: int


class _Job(NamedTuple):
    file: Path
    piece: tuple[int, int]
    source: Source
    ignored_keys: tuple[str, ...]
    target: Path | None

    @property
    def size(self) -> int:
        return self.piece[1] - self.piece[0]


def _run(jobs: list[_Job]) -> Iterator[Piece]:
    # What is known of a piece is read here: from another process it would come through a pipe.
    is_known = [job.target is not None and job.target.exists() for job in jobs]
    unread = [job for job, known in zip(jobs, is_known, strict=True) if not known]
    workers = min(len(unread), _cores())
    if workers <= 1 or sum(job.size for job in unread) <= PIECE:
        yield from map(_scan_piece, jobs)
        return
    # Forked: a new interpreter would import the caller's script again.
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("fork")) as pool:
        scanned = pool.map(_scan_piece, unread)
        for job, known in zip(jobs, is_known, strict=True):
            yield _scan_piece(job) if known else next(scanned)


def _cores() -> int:
    """Return the number of processes that may read; other processes of a run on this machine read, too."""
    if sys.platform != "linux":
        return 1
    return max(len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1)


def _scan_piece(job: _Job) -> Piece:
    if job.target is not None and (piece := read_written_piece(job.target)) is not None:
        return piece
    builder, counts = FactsBuilder(), SourceReport("", job.source)
    with _without_collection():
        builder.extend(read_usable(read_piece(job.file, job.piece, job.source, job.ignored_keys), counts))
    piece = Piece(builder.finish(), counts.skipped, counts.faulty)
    if job.target is not None:
        write_piece(job.target, piece)
    return piece


@contextmanager
def _without_collection() -> Iterator[None]:
    """Leave the garbage collector out: rows have no cycles, and it takes a tenth of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _scan_rows(
    source: Source, report: SourceReport, ignored_keys: Collection[str], max_held: int | None
) -> _FirstPass:
    """Read the rows of any source, one after the other."""
    builder, digest = FactsBuilder(), sha256()
    held: list[PreferencePair] | None = []
    for pair in read_usable(_rows_of(source, ignored_keys), report):
        assert isinstance(pair, PreferencePair)
        builder.extend([pair])
        # What a custom adapter or the hub gives can change without a change of a file.
        digest.update(to_line(pair).encode())
        if held is not None:
            held.append(pair)
            if max_held is not None and len(held) > max_held:
                held = None
    return _FirstPass(builder.finish(), held, digest.hexdigest()[:16], in_pieces=False)


def _rows_of(source: Source, ignored_keys: Collection[str]) -> Iterator[PreferencePair | SkipRow]:
    return read_pairs(find_adapter(source.adapter), read_rows(source, ignored_keys), source)


def _read_again(
    source: Source, ignored_keys: Collection[str], states: list[_FileState], *, in_pieces: bool
) -> Iterator[PlainPair | PreferencePair]:
    """Yield the usable pairs of a source, which must be as it was at the first pass."""
    _check_unchanged(states)
    items: Iterable[PlainPair | PreferencePair | SkipRow]
    if in_pieces:
        files = (state.file for state in states)
        ranges = ((file, (0, file.stat().st_size)) for file in files)
        items = (item for file, piece in ranges for item in read_piece(file, piece, source, ignored_keys))
    else:
        items = _rows_of(source, ignored_keys)
    usable: Iterator[PlainPair | PreferencePair] = read_usable(items, SourceReport("", source))
    yield from usable
    _check_unchanged(states)


def _states(source: Source) -> list[_FileState]:
    return [_FileState(file, file.stat().st_size, file.stat().st_mtime_ns) for file in local_files(source)]


def _check_unchanged(states: list[_FileState]) -> None:
    for state in states:
        status = state.file.stat()
        if (status.st_size, status.st_mtime_ns) != state[1:]:
            raise DataError(f"{state.file} was changed while it was in use; start again")
