"""Writing files so that nobody ever sees half of one, and the hashes that name content."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from bfpo.errors import DataError


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a file for bytes that takes the place of `path` once all is written: nobody ever sees a part of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with aside.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a file atomically: a reader sees the old content or the new, never a part."""
    with replacing(path) as file:
        file.write(text.encode("utf-8"))


def write_json(path: Path, content: object) -> None:
    """Write one JSON object, indented, atomically. Not-a-number is refused: JSON has none."""
    write_text(path, json.dumps(content, ensure_ascii=False, indent=2, allow_nan=False) + "\n")


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object per line, atomically."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows))


def append_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Append objects to a file that a killed program may leave with half a last line; see `repaired_jsonl`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8", newline="\n") as file:
        file.write("".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows))


def repaired_jsonl(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a file that `append_jsonl` wrote, after cutting off a half-written last line.

    A whole last line that lacks only its end, as some editors leave it, is kept.

    Args:
        path: The program's own file; if there is none, it holds nothing.

    Raises:
        DataError: If a line before the last isn't a JSON object: that is damage, not an interruption.
    """
    if not path.exists():
        return []
    content = path.read_bytes()
    whole, _, half = content.rpartition(b"\n")
    if half:
        # The last character of an object is its brace: what was cut off anywhere before it isn't one.
        whole = content if _is_object(half) else whole
        write_text(path, (whole + b"\n" if whole else b"").decode("utf-8"))
    rows = []
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError(f"{type(row).__name__}, not an object")
        except ValueError as error:
            raise DataError(f"{path} row {number}: not JSON ({error}); the file is damaged, remove it") from None
        rows.append(row)
    return rows


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def without_half_characters(text: str) -> str:
    """Return a text whose lone surrogates are question marks: a file in UTF-8 can't hold them, JSON's escapes can."""
    return text.encode("utf-8", "replace").decode("utf-8")


def file_name(label: str) -> str:
    """Return a label as part of a file's name: letters, digits and `-_.+` stay, all else is a dash."""
    return "".join(letter if letter.isalnum() or letter in "-_.+" else "-" for letter in label)


def content_hash(*parts: object) -> str:
    """Return 16 hexadecimal digits of the SHA-256 of the parts as canonical JSON."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
