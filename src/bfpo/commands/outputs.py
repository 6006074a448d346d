"""What every command does with its `--out`: it is never one of the command's own inputs."""

from collections.abc import Callable, Iterator, Mapping
from functools import wraps
from pathlib import Path
from typing import Any

from bfpo.errors import RecipeError


def protect_inputs(command: Any) -> None:
    """Let a command of click, and those in it, refuse to write onto a file that it reads."""
    for inner in getattr(command, "commands", {}).values():
        protect_inputs(inner)
    if command.callback is not None and any(parameter.name == "out" for parameter in command.params):
        command.callback = _protected(command.callback)


def _protected(callback: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(callback)
    def run(**parameters: Any) -> Any:
        if parameters["out"] is not None:
            parameters["out"] = _checked(parameters)
        return callback(**parameters)

    return run


def _checked(parameters: Mapping[str, Any]) -> Path:
    """Return the output's path.

    Raises:
        RecipeError: If it is a file that another argument names.
    """
    out = Path(parameters["out"])
    if out.is_file():
        given = (value for name, value in parameters.items() if name != "out")
        if any(path.is_file() and path.samefile(out) for path in _paths(given)):
            raise RecipeError(f"`out` is {out}, which the command reads; name another file")
    # A path such as `.` has no name, beside which a temporary file could be written.
    return out if out.name else out.resolve()


def _paths(given: Any) -> Iterator[Path]:
    for value in given:
        if isinstance(value, Path):
            yield value
        elif isinstance(value, str):
            # A source is `ADAPTER:PATH`, a judge `KIND:PATH`.
            yield from (Path(value), Path(value.rpartition(":")[2]))
        elif isinstance(value, list | tuple):
            yield from _paths(value)
