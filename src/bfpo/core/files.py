"""Atomic writes, JSON Lines files that survive a killed program, and content hashes."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from bfpo.errors import DataError

# Levels of a JSON value; more than any file has, and far from the depth at which Python stops to recurse.
MAX_DEPTH = 200


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Name the path in an error of the operating system that has none, such as that of a full disk."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


@contextmanager
def open_atomic(path: Path) -> Iterator[BinaryIO]:
    """Open a binary file that replaces `path` when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with _naming(path), temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with open_atomic(path) as file:
        file.write(text.encode("utf-8"))


def write_json(path: Path, content: object) -> None:
    """Write a JSON file atomically, indented. NaN and infinity are refused: JSON has none."""
    write_text(path, json.dumps(content, ensure_ascii=False, indent=2, allow_nan=False) + "\n")


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object per line, atomically."""
    write_lines(path, (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows))


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Write a text file of many lines atomically, without holding them in memory."""
    with open_atomic(path) as file:
        for line in lines:
            file.write(line.encode("utf-8"))


def is_among(path: Path, files: Iterable[str | Path]) -> bool:
    """Return whether a path is that of one of some files, by whatever name they are called."""
    return path.resolve() in {Path(file).resolve() for file in files}


def check_own_files(folder: Path, names: Iterable[str], command: str, *, is_own: bool) -> None:
    """Check that files in a folder are of an earlier run of a command, which may replace them.

    Args:
        folder: Output folder.
        names: Names of the files that the command writes.
        command: The command, for the error.
        is_own: Whether something in the folder shows that the command wrote them.

    Raises:
        DataError: If the folder has one of the files, and they aren't the command's own.
    """
    existing = [] if is_own else [folder / name for name in names if (folder / name).exists()]
    if existing:
        raise DataError(f"{existing[0]} was not written by {command}; choose another folder or move the file")


def append_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Append JSON objects to a file; if the program is killed meanwhile, `read_repaired_jsonl` still reads it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _naming(path), path.open("a", encoding="utf-8", newline="\n") as file:
        file.write("".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows))


def parse_json(text: str | bytes) -> Any:
    """Return the value of a JSON text.

    Raises:
        ValueError: If it isn't JSON, is nested too deeply, or has a number of thousands of digits.
    """
    try:
        content = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    brackets: tuple[Any, Any] = (b"[", b"{") if isinstance(text, bytes) else ("[", "{")
    # Few texts have so many brackets that their depth must be measured.
    if sum(map(text.count, brackets)) > MAX_DEPTH and _depth(content) > MAX_DEPTH:
        raise ValueError(f"nested more than {MAX_DEPTH} levels deep")
    return content


def _depth(content: Any) -> int:
    """Return the number of levels of lists and objects in a JSON value, without recursion."""
    depth, level = 0, [content]
    while level := [value for value in level if isinstance(value, list | dict)]:
        depth += 1
        level = [child for value in level for child in (value.values() if isinstance(value, dict) else value)]
    return depth


def read_repaired_jsonl(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a file that `append_jsonl` wrote, after cutting off an incomplete last line.

    A complete last line without its line break, as some editors leave it, is kept. A file of another kind, which
    the user named by mistake, isn't changed.

    Args:
        path: File of the program's own; a missing file has no rows.

    Raises:
        DataError: If a line before the last isn't a JSON object, or the only one isn't the beginning of one: an
            interrupted write doesn't explain that.
    """
    if not path.exists():
        return []
    content = path.read_bytes()
    complete, _, last_line = content.rpartition(b"\n")
    rows = []
    for number, line in enumerate(complete.splitlines(), start=1):
        try:
            row = parse_json(line)
            if not isinstance(row, dict):
                raise ValueError(f"{type(row).__name__}, not an object")
        except ValueError as error:
            raise DataError(
                f"{path} row {number}: not JSON ({error}); name another file, or remove this one if it is damaged"
            ) from None
        rows.append(row)
    if last_line:
        # An object ends with its brace, so a line that was cut off earlier doesn't parse.
        if _is_object(last_line):
            rows.append(parse_json(last_line))
            complete = content
        elif not (rows or last_line.startswith(b"{")):
            raise DataError(f"{path} is no file of JSON objects; name another file, or remove this one")
        write_text(path, (complete + b"\n" if complete else b"").decode("utf-8"))
    return rows


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(parse_json(line), dict)
    except ValueError:
        return False


def replace_lone_surrogates(text: str) -> str:
    """Return a text with question marks for lone surrogates, which JSON can escape and UTF-8 can't encode."""
    return text.encode("utf-8", "replace").decode("utf-8")


def file_name(label: str) -> str:
    """Return a label as part of a file name: characters other than letters, digits and `-_.+` become dashes."""
    return "".join(letter if letter.isalnum() or letter in "-_.+" else "-" for letter in label)


def content_hash(*parts: object) -> str:
    """Return 16 hexadecimal digits of the SHA-256 of the parts as canonical JSON.

    A value that JSON can't represent is hashed by its method `to_hash`, or else by its text.
    """
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, default=_to_hash)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _to_hash(value: Any) -> object:
    return value.to_hash() if hasattr(value, "to_hash") else str(value)


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_hashes(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Return the SHA-256 of files by name, computed in a few threads.

    Args:
        folder: Folder of the files.
        names: Paths of the files in the folder.
    """
    names = list(names)
    with ThreadPoolExecutor(max_workers=4) as threads:
        return dict(zip(names, threads.map(file_hash, [folder / name for name in names]), strict=True))
