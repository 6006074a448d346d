"""JSON files that hold one typed value: a dataclass whose fields are checked when it is read."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

from pydantic import TypeAdapter, ValidationError

from bfpo.core.files import parse_json
from bfpo.errors import DataError

Value = TypeVar("Value")


def read_if_written(path: Path, kind: type[Value], *, remedy: str) -> Value | None:
    """Return the value of a file that a stage writes last; None if it isn't written yet.

    Args:
        path: The file.
        kind: Dataclass of the value.
        remedy: What to do about a malformed file.

    Raises:
        DataError: If the file is malformed.
    """
    try:
        value: Value = _adapter(cast(Any, kind)).validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError as error:
        raise DataError(f"{path}: {_describe(error)}; {remedy}") from None
    return value


def read_versioned(path: Path, kind: type[Value], *, schema: int, remedy: str) -> Value:
    """Return the value of a file that names the version of its schema.

    Args:
        path: The file.
        kind: Dataclass of the value.
        schema: The schema that is read.
        remedy: What to do about a malformed file.

    Raises:
        OSError: If the file can't be read.
        DataError: If it is malformed, or of another schema.
    """
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error}); {remedy}") from None
    got = content.get("schema") if isinstance(content, Mapping) else type(content).__name__
    if got != schema:
        raise DataError(f"{path}: schema is {got!r}; this version reads schema {schema}: {remedy}")
    try:
        value: Value = _adapter(cast(Any, kind)).validate_python(content)
    except ValidationError as error:
        raise DataError(f"{path}: {_describe(error)}; {remedy}") from None
    return value


def _describe(error: ValidationError) -> str:
    fault = error.errors(include_url=False)[0]
    return f"{'.'.join(map(str, fault['loc'])) or 'the file'}: {fault['msg']}"


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)
