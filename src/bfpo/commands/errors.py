"""How expected errors end a command: one message, named by the command line's options, and an exit code."""

import errno
import os
import re
import sys
from collections.abc import Mapping, Sequence

import typer

from bfpo.commands.outputs import protect_inputs
from bfpo.core.terminal import escape_controls
from bfpo.errors import BfpoError, RecipeError

_DISK_FULL = re.compile(r"No space left on device|os error 28|PytorchStreamWriter failed writing")
_LESS_MEMORY = (
    "less is needed with a smaller per_device_train_batch_size (auto finds one), layout.max_tokens_per_pack, "
    "trainer.activation_checkpointing or lora; bfpo train --plan estimates it"
)
# What a path is that the user has named, where something else is expected.
_WRONG_KINDS: dict[type[OSError], str] = {
    FileExistsError: "is a file, expected a folder",
    NotADirectoryError: "leads through a file, expected a folder",
    IsADirectoryError: "is a folder, expected a file",
}


def run_app(app: typer.Typer, arguments: Sequence[str]) -> None:
    """Run the command line; `--debug`, wherever it stands, shows tracebacks.

    Args:
        app: The application.
        arguments: Everything behind `bfpo`.
    """
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        if any("\0" in argument for argument in arguments):
            raise RecipeError("an argument contains a NUL character; remove it")
        command = typer.main.get_command(app)
        protect_inputs(command)
        command(args=arguments)
    # Not narrower: of anything else than the package's own errors a line is shown, with how to report it.
    except Exception as error:
        if debug:
            raise
        message, exit_code = _describe(error)
        _end(with_flags(message, options_of(app, arguments)), exit_code)


def _describe(error: Exception) -> tuple[str, int]:
    """Return the message and the exit code of an error."""
    if isinstance(error, BfpoError):
        return str(error), error.exit_code
    for kind, fault in _WRONG_KINDS.items():
        if isinstance(error, kind) and error.filename is not None:
            return f"{error.filename} {fault}; name another path", 2
    if _is_out_of_memory(error):
        return f"{_first_line(error) or 'out of memory'}; {_LESS_MEMORY}", 1
    if (refused := _fault_of_option(error)) is not None:
        return refused, 2
    # Weights are written by libraries that raise errors of their own for a full disk.
    if isinstance(error, OSError) or _DISK_FULL.search(str(error)):
        return _describe_os_error(error), 1
    # torch has no class for a lost connection: these are gloo's message and NCCL's class.
    if isinstance(error, RuntimeError) and ("gloo" in str(error) or type(error).__name__ == "DistBackendError"):
        return "the connection to another process was lost: that process has ended, its reason is above", 1
    cause = f"unexpected {type(error).__name__}: {_first_line(error)[:300]}"
    return f"{cause}; this is a bug in bfpo, please report it with the traceback that --debug shows", 1


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"


def _fault_of_option(error: Exception) -> str | None:
    """Return what a section that is made of options refuses; None for another error."""
    pydantic = sys.modules.get("pydantic")
    if pydantic is None or not isinstance(error, pydantic.ValidationError):
        return None
    fault = error.errors()[0]
    name = ".".join(map(str, fault["loc"]))
    return f"`{name}` is {fault['input']!r}: {fault['msg'][:1].lower()}{fault['msg'][1:]}"


def _describe_os_error(error: Exception) -> str:
    message = _first_line(error)
    is_full = bool(_DISK_FULL.search(message))
    if isinstance(error, OSError) and error.strerror:
        message = error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
        is_full = error.errno == errno.ENOSPC
    if not is_full:
        return message
    return f"{message}; what was finished is kept: free some space and run the same command again"


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def options_of(app: typer.Typer, arguments: Sequence[str]) -> dict[str, str]:
    """Return the options of the command that the arguments name: parameter → flag."""
    command = typer.main.get_command(app)
    for argument in arguments:
        commands = getattr(command, "commands", {})
        if argument not in commands:
            break
        command = commands[argument]
    options = [parameter for parameter in command.params if parameter.param_type_name == "option"]
    return {parameter.name: max(parameter.opts, key=len) for parameter in options if parameter.name}


def with_flags(message: str, flags: Mapping[str, str]) -> str:
    """Return a message in which parameters, in backticks, are named as the flags of the command.

    Args:
        message: Error of the library, such as "choose another `out`".
        flags: Parameter → flag. Other names, such as keys of a recipe, lose their backticks only.
    """
    return re.sub(r"`(\w+)`", lambda match: flags.get(match[1], match[1]), message)


def _end(message: str, exit_code: int) -> None:
    if _is_first_to_fail():
        typer.echo(f"error: {escape_controls(message)}", err=True)
    sys.exit(exit_code)


def _is_first_to_fail() -> bool:
    """Whether this process of a distributed run is the one that prints the error."""
    if int(os.environ.get("WORLD_SIZE", "1")) <= 1:
        return True
    torch = sys.modules.get("torch")
    if torch is None or not torch.distributed.is_initialized():
        # Too early to ask the other processes: they read the same recipe and data.
        return os.environ.get("LOCAL_RANK", "0") == "0"
    try:
        return bool(torch.distributed.distributed_c10d._get_default_store().add("bfpo: failed", 1) == 1)
    except RuntimeError:
        # The process that held the store has ended, and has printed its error.
        return False
