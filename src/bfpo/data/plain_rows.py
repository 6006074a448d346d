"""Rows of a JSON Lines file of pairs, read in pieces and without the objects that other rows need.

Most rows have texts, labels and an origin, and nothing else. They are read about twenty times as fast as by
`bfpo.data.rows`, with the same result. Any other row is read as always. What can't be read here at all, such as a
broken line, is left to the reader of all formats, whose errors name file and row.
"""

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from pydantic_core import from_json

from bfpo.config.recipes import Source
from bfpo.core.conversation import as_answer
from bfpo.core.files import parse_json
from bfpo.core.pairs import PreferencePair, Provenance, StreamName
from bfpo.data.facts import PlainPair
from bfpo.data.pair_formats import SkipRow, read_pair_rows
from bfpo.data.rows import MAX_LINE, SourceRow
from bfpo.errors import DataError

_TEXTS = ("prompt", "chosen", "rejected")
_LABELS = ("is_chosen_safe", "is_rejected_safe")
_ORIGIN = ("dataset_name", "safety_label_source", "stream")
_KNOWN = frozenset((*_TEXTS, *_LABELS, *_ORIGIN, "row_id"))
# Characters that begin the marks of a thought.
_MARKS = ("<", "[", "◁")
# Bytes that are read at a time.
_BLOCK = 1 << 20
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
    ends = []
    length = file.stat().st_size
    with file.open("rb") as opened:
        end = 0
        while end < length:
            opened.seek(end + size)
            line = opened.readline(MAX_LINE + 1)
            if len(line) > MAX_LINE:
                raise NotReadable
            end = min(opened.tell(), length)
            ends.append(end)
    return list(zip([0, *ends[:-1]], ends, strict=True))


def read_piece(
    file: Path, piece: tuple[int, int], source: Source, ignored_keys: Collection[str]
) -> Iterator[PlainPair | PreferencePair | SkipRow]:
    """Yield the pairs of a piece of a file in their order, and a `SkipRow` for each row without one.

    Raises:
        NotReadable: If a row has to be read, or refused, by the reader of all formats.
    """
    origins: dict[tuple[Any, ...], Provenance | None] = {}
    layouts: dict[tuple[str, ...], bool] = {}
    for line in _lines(file, piece):
        try:
            values = from_json(line, cache_strings="keys")
        except ValueError:
            if line.strip():
                yield _read_other(line, source, ignored_keys)
            continue
        if type(values) is not dict:
            raise NotReadable
        layout = tuple(values)
        is_plain = layouts.get(layout)
        if is_plain is None:
            is_plain = layouts[layout] = _is_plain(layout)
        if is_plain:
            prompt, chosen, rejected = values["prompt"], values["chosen"], values["rejected"]
            is_safe, is_other_safe = values.get("is_chosen_safe"), values.get("is_rejected_safe")
            if (
                type(prompt) is type(chosen) is type(rejected) is str
                and (type(is_safe) is type(is_other_safe) is bool or "is_chosen_safe" not in values)
                and _is_text(prompt)
                and _is_answer(chosen)
                and _is_answer(rejected)
            ):
                cell = -1 if is_safe is None else 2 * (not is_safe) + (not is_other_safe)
                origin = (
                    values.get("dataset_name"), values.get("safety_label_source"), values.get("stream"), cell >= 0
                )  # fmt: skip
                try:
                    provenance = origins[origin]
                except KeyError:
                    provenance = origins[origin] = _provenance(*origin)
                except TypeError:
                    provenance = None
                if provenance is not None:
                    yield PlainPair(prompt, chosen, rejected, cell, provenance)
                    continue
        yield _read_other(line, source, ignored_keys)


def _lines(file: Path, piece: tuple[int, int]) -> Iterator[bytes]:
    start, end = piece
    is_first = start == 0
    try:
        with file.open("rb") as opened:
            opened.seek(start)
            while (left := end - opened.tell()) > 0:
                block = opened.read(min(_BLOCK, left))
                if opened.tell() < end:
                    block += opened.readline(MAX_LINE + 1)
                if not block or len(block) > _BLOCK + MAX_LINE:
                    raise NotReadable
                if is_first:
                    block, is_first = block.removeprefix(_BYTE_ORDER_MARK), False
                yield from block.splitlines()
    except OSError:
        raise NotReadable from None


def _is_plain(layout: tuple[str, ...]) -> bool:
    columns = set(layout)
    has_labels = [name in columns for name in _LABELS]
    return columns <= _KNOWN and columns.issuperset(_TEXTS) and has_labels[0] == has_labels[1]


def _is_text(text: str) -> bool:
    """Return whether a text is read as one turn: it may be the JSON of a list of messages."""
    first = text[:1]
    return first != "[" and not first.isspace()


def _is_answer(text: str) -> bool:
    """Return whether an answer is read as a text: it may begin with a thought."""
    if not _is_text(text):
        return False
    return not any(mark in text for mark in _MARKS) or as_answer(text) == text


def _provenance(name: object, label_source: object, stream: object, is_labeled: bool) -> Provenance | None:
    """Return the origin that the columns of a row describe; None if they have to be read as always."""
    texts = (name, label_source, stream)
    if any(value is not None and type(value) is not str for value in texts):
        return None
    streams: dict[object, StreamName | None] = {None: None, "": None, "main": "main", "buffer": "buffer"}
    if stream not in streams:
        return None
    return Provenance(
        str(name or ""), str(label_source or "") or ("dataset" if is_labeled else None), streams[stream]
    )


def _read_other(line: bytes, source: Source, ignored_keys: Collection[str]) -> PreferencePair | SkipRow:
    try:
        values = parse_json(line.decode("utf-8"))
        if not isinstance(values, dict):
            raise NotReadable
        (pair,) = read_pair_rows([SourceRow(values, "", ignored_keys)], source)
    except (DataError, ValueError):
        raise NotReadable from None
    return pair
