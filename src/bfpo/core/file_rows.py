"""Lines of JSON Lines files as dataclasses, whose columns are checked when they are read back."""

from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from functools import cache
from types import NoneType
from typing import Annotated, Any, ClassVar, Self, get_args, get_type_hints

from pydantic import BeforeValidator, Field, PlainValidator, StrictFloat, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from bfpo.core.conversation import Conversation, Message
from bfpo.core.guarding import GuardCounts
from bfpo.core.read_messages import as_messages
from bfpo.core.tools import FrozenJson, ToolCall, as_template_kwargs, as_tool_calls, as_tools
from bfpo.errors import DataError

# Columns that most rows have no value in.
_SPARSE = (
    "tools",
    "chat_template_kwargs",
    "language",
    "reasoning",
    "tool_calls",
    "group",
    "target_functions",
    "prefill",
    "guard",
    "cut",
)
# Columns of files that earlier versions wrote.
RENAMED_COLUMNS = {"licence": "license"}
_EXPECTED = {
    "string_type": "a string",
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
}

# JSON has no infinity and no NaN, but Python's reader of JSON does.
FiniteFloat = Annotated[StrictFloat, Field(allow_inf_nan=False)]
Messages = Annotated[Conversation, PlainValidator(as_messages)]
Tools = Annotated[FrozenJson | None, PlainValidator(as_tools)]
TemplateKwargs = Annotated[FrozenJson | None, PlainValidator(as_template_kwargs)]
ToolCalls = Annotated[tuple[ToolCall, ...], PlainValidator(as_tool_calls)]
# A table that isn't ours may have the column and no value in it.
OptionalText = Annotated[str, BeforeValidator(lambda value: "" if value is None else value)]


@dataclass(frozen=True, slots=True)
class FileRow:
    """One line of a file: the fields are the columns, None is null.

    Annotate numbers and flags with pydantic's strict types: `from_row` checks every column against its annotation.
    """

    file_name: ClassVar[str]

    def to_row(self) -> dict[str, Any]:
        """Return the columns as an object of JSON; those of `_SPARSE` only if they have a value."""
        row = {field.name: getattr(self, field.name) for field in fields(self)}
        # An empty thought is a value: an answer that was cut in it has none.
        return {
            name: _to_json(value) for name, value in row.items() if name not in _SPARSE or value not in (None, ())
        }

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Self:
        """Return the value that an object of JSON describes; unknown columns are ignored.

        Raises:
            DataError: If a column is missing or has a value of another type.
        """
        kind: Any = cls  # mypy doesn't take the class of a dataclass for hashable
        current = {RENAMED_COLUMNS.get(name, name): value for name, value in row.items()}
        try:
            value: Self = _columns_of(kind).validate_python(current)
        except ValidationError as error:
            raise DataError(_describe(error.errors()[0], cls)) from None
        return value


def _to_json(value: Any) -> Any:
    if isinstance(value, FrozenJson):
        return value.value
    if isinstance(value, GuardCounts):
        return asdict(value)
    if isinstance(value, Message):
        return value.content if value.is_plain else [value.to_row()]
    if isinstance(value, tuple) and value and isinstance(value[0], Message | ToolCall):
        return [part.to_row() for part in value]
    return value


@cache
def _columns_of(kind: type[FileRow]) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _describe(fault: ErrorDetails, kind: type[FileRow]) -> str:
    if fault["type"] == "missing":
        return f"no column '{fault['loc'][0]}'; {kind.file_name} needs {', '.join(_required_columns(kind))}"
    if fault["type"] == "value_error":
        return fault["msg"].removeprefix("Value error, ")
    if not fault["loc"]:
        return f"{fault['msg']} (got {fault['input']!r})"
    column = str(fault["loc"][0])
    expected = _EXPECTED.get(fault["type"]) or fault.get("ctx", {}).get("expected", fault["msg"])
    nullable = ", or null" if NoneType in get_args(get_type_hints(kind)[column]) else ""
    return f"column '{column}' is {fault['input']!r}; expected {expected}{nullable}"


def _required_columns(kind: type[FileRow]) -> list[str]:
    return [field.name for field in fields(kind) if field.default is MISSING]
