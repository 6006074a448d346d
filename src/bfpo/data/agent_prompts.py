"""What prompts for agents have besides a text: tools, the tools that they are about, and variants."""

from typing import Any

from bfpo.core.files import parse_json
from bfpo.core.tools import FrozenJson, as_tools
from bfpo.data.prompt_sets import PromptSet
from bfpo.data.rows import SourceRow
from bfpo.errors import DataError


def read_agent_columns(row: SourceRow, prompt_set: PromptSet, name: str) -> dict[str, Any]:
    """Return the fields of `Prompt` that a row of a set for agents has; those without a value are left out.

    Args:
        row: Row of the set.
        prompt_set: The set.
        name: Name of the set, which is part of groups.

    Raises:
        DataError: If a column is malformed.
    """
    targets = _read_targets(row, prompt_set.targets_column)
    tools = as_tools(row.values.get("tools"))
    if tools is None and targets and prompt_set.has_stub_tools:
        tools = make_stub_tools(targets)
    group = row.values.get(prompt_set.group_column) if prompt_set.group_column else None
    columns = {
        "tools": tools,
        "target_functions": targets,
        "group": None if group in (None, "") else f"{name}-{group}",
    }
    return {column: value for column, value in columns.items() if value}


def make_stub_tools(names: tuple[str, ...]) -> FrozenJson | None:
    """Return stubs of tools: schemas with a name and without parameters."""
    parameters = {"type": "object", "properties": {}}
    return as_tools(
        [{"type": "function", "function": {"name": name, "parameters": parameters}} for name in dict.fromkeys(names)]
    )


def _read_targets(row: SourceRow, column: str | None) -> tuple[str, ...]:
    value = row.values.get(column) if column else None
    if value in (None, ""):
        return ()
    # In a CSV file the list is JSON text.
    names = value
    if isinstance(value, str):
        try:
            names = parse_json(value)
        except ValueError:
            names = None
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise DataError(f"column '{column}' is {value!r}; expected a list of names of tools")
    return tuple(names)
