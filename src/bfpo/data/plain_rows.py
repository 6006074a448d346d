"""Rows of a JSON Lines file of pairs, read in pieces and without the objects that other rows need.

Most rows have texts, labels and an origin, and nothing else. They are read about twenty times as fast as by
`bfpo.data.rows`, with the same result. Any other row is read as always. What can't be read here at all, such as a
broken line, is left to the reader of all formats, whose errors name file and row.
"""

from collections.abc import Collection, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from pydantic_core import from_json

from bfpo.config.recipes import Source
from bfpo.core.conversation import as_answer
from bfpo.core.files import parse_json
from bfpo.core.pairs import PreferencePair, Provenance, StreamName
from bfpo.core.reasoning import FIRST_CHARACTERS
from bfpo.data.facts import PlainPair
from bfpo.data.pair_formats import SkipRow, read_pair_rows
from bfpo.data.rows import MAX_LINE, SourceRow
from bfpo.errors import DataError

_TEXTS = ("prompt", "chosen", "rejected")
_LABELS = ("is_chosen_safe", "is_rejected_safe")
_ORIGIN = ("dataset_name", "safety_label_source", "stream")
_KNOWN = frozenset((*_TEXTS, *_LABELS, *_ORIGIN, "row_id"))
_STREAMS: dict[str | None, StreamName | None] = {None: None, "": None, "main": "main", "buffer": "buffer"}
# Of a row without columns of the origin, by whether it has labels.
_NO_ORIGIN = (Provenance(), Provenance(safety_label_source="dataset"))
# What a text has that is read as messages or begins with a thought, as it is or escaped.
_MARKS = tuple(mark.encode() for mark in {"\\u", "[", *FIRST_CHARACTERS})
# Bytes that are read at a time.
_BLOCK = 1 << 18
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class NotReadable(Exception):
    """A row that has to be read, or refused, by the reader of all formats."""


def can_read(source: Source, file: Path) -> bool:
    """Return whether the rows of a file can be read in pieces: uncompressed JSON Lines of pairs."""
    is_pairs = source.adapter == "pairs" and source.turns != "each"
    return is_pairs and not source.columns and not source.ignore_columns and file.suffix.lower() == ".jsonl"


def pieces(file: Path, size: int) -> list[tuple[int, int]]:
    """Return the ranges of bytes of a file, each of about `size` bytes and of whole lines.

    Raises:
        NotReadable: If a line is longer than any row.
    """
    bounds = [0]
    length = file.stat().st_size
    with file.open("rb") as opened:
        while bounds[-1] < length:
            opened.seek(bounds[-1] + size)
            if len(opened.readline(MAX_LINE + 1)) > MAX_LINE:
                raise NotReadable
            bounds.append(min(opened.tell(), length))
    return list(pairwise(bounds))


def read_piece(
    file: Path, piece: tuple[int, int], source: Source, ignored_keys: Collection[str]
) -> Iterator[PlainPair | PreferencePair | SkipRow]:
    """Yield the pairs of a piece of a file in their order, and a `SkipRow` for each row without one.

    Raises:
        NotReadable: If a row has to be read, or refused, by the reader of all formats.
    """
    provenances = _Provenances()
    # By the columns of a row: None if such a row isn't plain.
    layouts: dict[tuple[str, ...], _Layout | None] = {}
    for is_marked, lines in _blocks(file, piece):
        for line in lines:
            try:
                values = from_json(line, cache_strings="keys")
            except ValueError:
                if line.strip():
                    yield _read_other(line, source, ignored_keys)
                continue
            if type(values) is not dict:
                raise NotReadable
            columns = tuple(values)
            if columns not in layouts:
                layouts[columns] = _layout_of(columns)
            layout = layouts[columns]
            pair = None
            # Without a mark, no text is the JSON of messages or begins with a thought.
            if layout is not None and (not is_marked or _has_texts(values)):
                pair = _read_plain(values, layout, provenances)
            yield _read_other(line, source, ignored_keys) if pair is None else pair


class _Layout(NamedTuple):
    """Columns of plain rows.

    Args:
        has_labels: Whether they have labels.
        has_origin: Whether they have a column of the origin.
    """

    has_labels: bool
    has_origin: bool


def _layout_of(columns: tuple[str, ...]) -> _Layout | None:
    """Return what rows with these columns have; None if they aren't plain."""
    names = set(columns)
    has_labels = [name in names for name in _LABELS]
    if not (names <= _KNOWN and names.issuperset(_TEXTS) and has_labels[0] == has_labels[1]):
        return None
    return _Layout(has_labels[0], any(name in names for name in _ORIGIN))


def _read_plain(values: dict[str, Any], layout: _Layout, provenances: "_Provenances") -> PlainPair | None:
    """Return a plain pair; None if a column has to be read as always."""
    prompt, chosen, rejected = values["prompt"], values["chosen"], values["rejected"]
    if not type(prompt) is type(chosen) is type(rejected) is str:
        return None
    cell = -1
    if layout.has_labels:
        is_safe, is_other_safe = values["is_chosen_safe"], values["is_rejected_safe"]
        if not type(is_safe) is type(is_other_safe) is bool:
            return None
        cell = 2 * (not is_safe) + (not is_other_safe)
    provenance = provenances.of(values, is_labeled=cell >= 0) if layout.has_origin else _NO_ORIGIN[cell >= 0]
    return None if provenance is None else PlainPair(prompt, chosen, rejected, cell, provenance)


class _Provenances:
    """One object for all rows of the same origin."""

    def __init__(self) -> None:
        self._known: dict[tuple[Any, ...], Provenance | None] = {}

    def of(self, values: dict[str, Any], *, is_labeled: bool) -> Provenance | None:
        """Return the origin that the columns of a row describe; None if they have to be read as always."""
        name, label_source, stream = origin = tuple(map(values.get, _ORIGIN))
        if any(value is not None and type(value) is not str for value in origin):
            return None
        key = (*origin, is_labeled)
        if key not in self._known:
            label_source = label_source or ("dataset" if is_labeled else None)
            is_stream = stream in _STREAMS
            self._known[key] = Provenance(name or "", label_source, _STREAMS[stream]) if is_stream else None
        return self._known[key]


def _has_texts(values: dict[str, Any]) -> bool:
    """Return whether prompt and answers are read as texts."""
    return _is_text(values["prompt"]) and all(
        _is_text(values[side]) and as_answer(values[side]) == values[side] for side in ("chosen", "rejected")
    )


def _is_text(value: object) -> bool:
    """Return whether a value is read as one turn: a text may be the JSON of a list of messages."""
    return isinstance(value, str) and value[:1] != "[" and not value[:1].isspace()


def _read_other(line: bytes, source: Source, ignored_keys: Collection[str]) -> PreferencePair | SkipRow:
    try:
        values = parse_json(line.decode("utf-8"))
        if not isinstance(values, dict):
            raise NotReadable
        (pair,) = read_pair_rows([SourceRow(values, "", ignored_keys)], source)
    except (DataError, ValueError):
        raise NotReadable from None
    return pair


def _blocks(file: Path, piece: tuple[int, int]) -> Iterator[tuple[bool, list[bytes]]]:
    """Yield the lines of a piece in blocks, and whether a mark is in one of them."""
    start, end = piece
    try:
        with file.open("rb") as opened:
            opened.seek(start)
            while (left := end - opened.tell()) > 0:
                is_first = opened.tell() == 0
                block = opened.read(min(_BLOCK, left))
                if opened.tell() < end:
                    block += opened.readline(MAX_LINE + 1)
                if not block or len(block) > _BLOCK + MAX_LINE:
                    raise NotReadable
                if is_first:
                    block = block.removeprefix(_BYTE_ORDER_MARK)
                # A single byte is found ten times as fast as several.
                yield any(mark[:1] in block and mark in block for mark in _MARKS), block.splitlines()
    except OSError:
        raise NotReadable from None
