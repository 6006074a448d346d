"""Raw rows of files and of hub data sets, with their locations for errors."""

import csv
import gzip
import json
import lzma
import math
import re
import zlib
from collections import Counter
from collections.abc import Collection, Generator, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from glob import glob
from pathlib import Path
from typing import IO, Any, cast

from bfpo.config.recipes import Source
from bfpo.core.conversation import Conversation, conversation_text
from bfpo.core.files import parse_json
from bfpo.core.pairs import parse_label
from bfpo.core.read_messages import as_messages
from bfpo.errors import DataError

_SUFFIXES = ("json", "jsonl", "csv", "tsv", "parquet")
# Characters of a line; more than any row has.
MAX_LINE = 1 << 28
_HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+$")


class MissingColumn(DataError):
    """A row lacks a column.

    Args:
        message: Error message.
        columns: Columns that the row has.
    """

    def __init__(self, message: str, columns: Collection[str]) -> None:
        super().__init__(message)
        self.columns = columns


@dataclass(frozen=True, slots=True)
class SourceRow:
    """Raw row of a data set.

    Args:
        values: Values by column.
        where: Location: the file or hub id, and the number of the row from 1.
        ignored_keys: Keys of messages that are left out.
    """

    values: Mapping[str, Any]
    where: str
    ignored_keys: Collection[str] = ()

    @contextmanager
    def locate_errors(self) -> Iterator[None]:
        """Put the location of the row in front of the message of a DataError."""
        try:
            yield
        except MissingColumn as error:
            raise MissingColumn(f"{self.where}: {error}", error.columns) from None
        except DataError as error:
            raise DataError(f"{self.where}: {error}") from None

    def value(self, column: str) -> Any:
        """Return the value of a column.

        Raises:
            MissingColumn: If the row lacks the column.
        """
        if column not in self.values:
            columns = ", ".join(map(str, self.values))
            raise MissingColumn(f"no column '{column}'; the columns are {columns}", self.values.keys())
        return self.values[column]

    def text(self, column: str) -> str:
        """Return a column that must be a string."""
        value = self.value(column)
        if not isinstance(value, str):
            raise DataError(f"column '{column}' is {value!r} ({type(value).__name__}); expected a string")
        return value

    def messages(self, column: str) -> Conversation:
        """Return a column that must be a string (one user turn) or a list of messages, see `as_messages`."""
        return as_messages(self.value(column), column, ignore=self.ignored_keys)

    def label(self, column: str) -> bool:
        """Return a column that must be a safety label; True means safe, see `parse_label`."""
        value = self.value(column)
        try:
            return parse_label(value)
        except DataError as error:
            raise DataError(f"column '{column}': {error}") from None

    def choice(self, column: str, allowed: tuple[int, ...]) -> int:
        """Return a column that must be one of the allowed whole numbers."""
        value = self.value(column)
        if isinstance(value, str) and value.strip().isdecimal():
            value = int(value)
        if isinstance(value, bool) or value not in allowed:
            raise DataError(f"column '{column}' is {value!r}; expected {' or '.join(map(str, allowed))}")
        return int(value)

    def number(self, column: str) -> float | None:
        """Return a column that may be missing or must be a number; None if it is missing, null or NaN."""
        value = self.values.get(column)
        if value is None or value == "":
            return None
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            raise DataError(f"column '{column}' is {value!r}; expected a number") from None
        return None if math.isnan(number) else number


def read_rows(source: Source, ignored_keys: Collection[str] = ()) -> Iterator[SourceRow]:
    """Yield the raw rows of a source, in their order.

    Args:
        source: Files or hub data set, with the columns that are renamed or left out.
        ignored_keys: Keys of messages that are left out.

    Raises:
        DataError: If a file is missing, empty, truncated or malformed, or the hub can't be reached.
    """
    paths = [source.path] if isinstance(source.path, str) else source.path
    for path in paths:
        files = _local_files(path)
        for row in _hub_rows(path, source) if files is None else _file_rows(files, source.field):
            selected = _select_columns(row, source)
            yield replace(selected, ignored_keys=ignored_keys) if ignored_keys else selected


def read_prompts(path: str) -> Iterator[str]:
    """Yield the prompts of a benchmark: the lines of a text file, or a prompt column of a table.

    Raises:
        DataError: If the file has no prompts, or no prompt column.
    """
    if Path(path).suffix == ".txt":
        prompts = [line.strip() for line in _lines(Path(path)) if line.strip()]
        if not prompts:
            raise DataError(f"{path} has no prompts")
        yield from prompts
        return
    for row in read_rows(Source(path=path)):
        column = next((name for name in ("prompt", "instruction", "question", "goal") if name in row.values), None)
        if column is None:
            raise DataError(f"{row.where}: no column 'prompt', 'instruction', 'question' or 'goal'")
        with row.locate_errors():
            prompt = row.messages(column)
        yield conversation_text(prompt)


def local_files(source: Source) -> list[Path]:
    """Return the local files of a source; none for a hub id."""
    paths = [source.path] if isinstance(source.path, str) else source.path
    if not paths:
        raise DataError("path is an empty list; name at least one file")
    return [file for path in paths for file in _local_files(path) or []]


def _local_files(path: str) -> list[Path] | None:
    """Return the files that a path matches; None for a hub id."""
    file = Path(path)
    if file.is_file():
        return [file]
    if any(wildcard in path for wildcard in "*?["):
        matches = sorted(glob(path, recursive=True))
        if not matches:
            raise DataError(f"path '{path}' matches no file")
        return [Path(match) for match in matches]
    if file.is_dir():
        raise DataError(f"path '{path}' is a folder; name its files, or a pattern such as '{path}/*.jsonl'")
    if _HUB_ID.match(path) and not _format_of(file):
        return None
    raise DataError(f"path '{path}': no such file, and not a hub id (org/name)")


def _format_of(file: Path) -> str | None:
    name = file.name.removesuffix(".gz").removesuffix(".xz")
    suffix = name.rpartition(".")[2].lower()
    return suffix if suffix in _SUFFIXES else None


def _file_rows(files: list[Path], field: str | None) -> Iterator[SourceRow]:
    readers = {"jsonl": _jsonl_rows, "csv": _csv_rows, "tsv": _csv_rows, "parquet": _parquet_rows}
    for file in files:
        file_format = _format_of(file)
        if file_format is None:
            suffixes = ", .".join(_SUFFIXES)
            raise DataError(f"{file}: unknown file format; expected .{suffixes}, optionally with .gz or .xz")
        is_empty = True
        for number, values in _json_rows(file, field) if file_format == "json" else readers[file_format](file):
            is_empty = False
            if not isinstance(values, Mapping):
                raise DataError(f"{file} row {number}: {type(values).__name__}; expected an object with columns")
            yield SourceRow(values, f"{file} row {number}")
        if is_empty:
            raise DataError(f"{file} has no rows")


def _open(file: Path) -> IO[str]:
    opener: Any = {".gz": gzip.open, ".xz": lzma.open}.get(file.suffix, open)
    # utf-8-sig drops the byte order mark that spreadsheet programs write.
    return cast(IO[str], opener(file, "rt", encoding="utf-8-sig", newline=""))


def _lines(file: Path) -> Generator[str, None, None]:
    try:
        with _open(file) as text:
            # Otherwise a small compressed file could contain a line that fills the memory.
            while line := text.readline(MAX_LINE + 1):
                if len(line) > MAX_LINE:
                    raise DataError(f"{file}: a line of more than {MAX_LINE:,} characters")
                yield line
    except (EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError) as error:
        raise DataError(f"{file}: the compressed file is truncated or damaged ({error}); get it again") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 text ({error})") from None
    except OSError as error:
        raise DataError(f"{file}: {error.strerror or error}") from None


def _jsonl_rows(file: Path) -> Iterator[tuple[int, Any]]:
    with closing(_lines(file)) as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                values = parse_json(line)
            except json.JSONDecodeError as error:
                is_incomplete = not line.endswith("\n")
                hint = "; the last line is incomplete: remove it, or write the file again" if is_incomplete else ""
                raise DataError(
                    f"{file} row {number}: not JSON ({error.msg} at column {error.colno}){hint}"
                ) from None
            except ValueError as error:
                raise DataError(f"{file} row {number}: not JSON ({error})") from None
            yield number, values


def _json_rows(file: Path, field: str | None) -> Iterator[tuple[int, Any]]:
    text = "".join(_lines(file))
    if not text.strip():
        return
    try:
        content = parse_json(text)
    except json.JSONDecodeError as error:
        hint = "; the suffix for one object per line is .jsonl" if error.msg == "Extra data" else ""
        position = f"line {error.lineno}, column {error.colno}"
        raise DataError(f"{file}: not JSON ({error.msg} at {position}){hint}") from None
    except ValueError as error:
        raise DataError(f"{file}: not JSON ({error})") from None
    if isinstance(content, dict) and field is not None:
        if field not in content:
            raise DataError(f"{file}: no key '{field}'; the keys are {', '.join(content)}")
        content = content[field]
    if not isinstance(content, list):
        hint = "; `field:` of the source names the key of its list" if isinstance(content, dict) else ""
        raise DataError(f"{file} is a {type(content).__name__}; expected a list of rows{hint}")
    yield from enumerate(content, start=1)


def refuse_lone_surrogates(row: SourceRow) -> None:
    r"""Refuse a lone surrogate such as \ud800, which JSON can escape and a text file can't contain.

    Raises:
        DataError: If a value has one.
    """
    try:
        json.dumps(row.values, ensure_ascii=False, default=str).encode("utf-8")
    except UnicodeEncodeError as error:
        surrogate = f"\\u{ord(error.object[error.start]):04x}"
        raise DataError(f"lone surrogate {surrogate} in a text; fix the text") from None


def _csv_rows(file: Path) -> Iterator[tuple[int, Any]]:
    csv.field_size_limit(2**30)
    with closing(_lines(file)) as lines:
        reader = csv.DictReader(lines, strict=True, delimiter="\t" if _format_of(file) == "tsv" else ",")
        try:
            names = reader.fieldnames or ()
            if duplicates := [name for name, count in Counter(names).items() if count > 1]:
                raise DataError(f"{file}: duplicate column '{duplicates[0]}' in the header; rename one")
            for number, values in enumerate(reader, start=1):
                if None in values or None in values.values():
                    raise DataError(
                        f"{file} row {number}: expected as many fields as the header has ({', '.join(names)})"
                    )
                yield number, values
        except csv.Error as error:
            # The reader counts the lines of complete rows: the broken row starts on the next one.
            raise DataError(f"{file} line {reader.line_num + 1}: not CSV ({error})") from None


def _parquet_rows(file: Path) -> Iterator[tuple[int, Any]]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(file) as table:
            rows = (row for batch in table.iter_batches() for row in batch.to_pylist())
            features = _parquet_features((table.schema_arrow.metadata or {}).get(b"huggingface"))
            for number, values in enumerate(rows, start=1):
                yield number, _with_class_names(values, features, f"{file} row {number}")
    except DataError:
        raise
    # ValueError for values that Python has no object for, such as texts that aren't UTF-8.
    except (ArrowException, OSError, ValueError, OverflowError) as error:
        raise DataError(f"{file}: not a parquet file, or damaged ({error})") from None


def _parquet_features(metadata: bytes | None) -> dict[str, Any]:
    """Return the features of each column, from what `datasets` writes into a parquet file."""
    try:
        features = parse_json(metadata or b"{}").get("info", {}).get("features", {})
        return {str(column): feature for column, feature in features.items()}
    except (ValueError, AttributeError, TypeError) as error:
        raise DataError(f"the metadata of `datasets` in a parquet file can't be read ({error})") from None


def _with_class_names(values: Mapping[str, Any], features: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """Return a row of a table with the names of classes instead of their numbers, and without padded objects."""
    named = {}
    for column, value in values.items():
        try:
            named[column] = _name_classes(without_padding(value), features.get(column))
        except DataError as error:
            raise DataError(f"{where}: column '{column}' {error}") from None
    return named


def _name_classes(value: Any, feature: Any) -> Any:
    """Return a value with the names of classes, also in lists and objects, by its feature as JSON."""
    if isinstance(feature, Mapping) and feature.get("_type") == "ClassLabel" and "names" in feature:
        names = list(map(str, feature["names"]))
        if not isinstance(value, int):
            return value
        # `datasets` writes -1 for a missing label.
        if not -1 <= value < len(names):
            raise DataError(f"is {value}; its classes are {', '.join(names)}")
        return None if value == -1 else names[value]
    if isinstance(value, list):
        inner = feature.get("feature") if isinstance(feature, Mapping) else feature[0] if feature else None
        return [_name_classes(element, inner) for element in value] if inner else value
    if isinstance(value, Mapping) and isinstance(feature, Mapping):
        return {key: _name_classes(content, feature.get(key)) for key, content in value.items()}
    return value


def _hub_rows(path: str, source: Source) -> Iterator[SourceRow]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    split = source.split or "train"
    try:
        dataset = load_dataset(path, source.name, split=split, revision=source.revision)
    except (OSError, ValueError, DatasetsError) as error:  # not found, offline, no such split, damaged
        first_line = str(error).partition("\n")[0]
        raise DataError(f"hub data set '{path}' (split {split}): {first_line}") from None
    features = getattr(dataset, "features", None)
    features = features.to_dict() if features else {}
    for number, values in enumerate(dataset, start=1):
        where = f"{path}[{split}] row {number}"
        yield SourceRow(_with_class_names(values, features, where), where)


def without_padding(value: Any) -> Any:
    """Return a value of a table without the nulls of objects: a table gives every object the keys of all of them."""
    if isinstance(value, Mapping):
        return {key: without_padding(content) for key, content in value.items() if content is not None}
    return [without_padding(content) for content in value] if isinstance(value, list) else value


def _select_columns(row: SourceRow, source: Source) -> SourceRow:
    """Rename the columns of a row, and leave out those that are ignored."""
    if source.ignore_columns:
        values = {name: value for name, value in row.values.items() if name not in source.ignore_columns}
        row = replace(row, values=values)
    columns = source.columns
    if not columns:
        return row
    for theirs in columns.values():
        if theirs not in row.values:
            raise DataError(
                f"{row.where}: columns: no column '{theirs}'; the columns are {', '.join(map(str, row.values))}"
            )
    # All at once, so that two columns can be swapped.
    others = {name: value for name, value in row.values.items() if name not in columns.values()}
    return replace(row, values=others | {ours: row.values[theirs] for ours, theirs in columns.items()})
