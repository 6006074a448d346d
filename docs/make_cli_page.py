"""Write docs/cli.md from the command line itself, so that the page and the program agree.

    python docs/make_cli_page.py

The page has every command with its arguments, options and defaults. A test compares the committed page with what this
script writes.
"""

from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

import typer

from bfpo import errors
from bfpo.commands.app import app

PAGE = Path(__file__).resolve().parent / "cli.md"
TYPES = {str: "text", int: "whole number", float: "number", Path: "path"}


def page() -> str:
    """Return the page."""
    root = typer.main.get_command(app)
    parts = [INTRODUCTION.strip(), options_table(root), EXIT_CODES.strip(), exit_codes()]
    for name, command in commands(root, "bfpo"):
        parts.append(section(name, command))
    return "\n\n".join(part for part in parts if part) + "\n"


def commands(group: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Yield every visible command below a group with its full name, groups before their commands."""
    for word, command in group.commands.items():
        if command.hidden:
            continue
        yield f"{name} {word}", command
        if hasattr(command, "commands"):
            yield from commands(command, f"{name} {word}")


def section(name: str, command: Any) -> str:
    """Return the section of a command or a group."""
    lines = [f"## `{name}`", "", in_line(command.help)]
    if hasattr(command, "commands"):
        return "\n".join(lines)
    arguments = [parameter for parameter in command.params if parameter.param_type_name == "argument"]
    lines += ["", "```text", " ".join([name, *map(in_usage, arguments), "[OPTIONS]"]), "```"]
    if arguments:
        lines += ["", "| argument | |", "|---|---|"]
        lines += [f"| `{in_usage(argument)}` | {in_line(argument.help)} |" for argument in arguments]
    return "\n\n".join(part for part in ("\n".join(lines), options_table(command)) if part)


def in_usage(argument: Any) -> str:
    """Return an argument as a usage line has it."""
    name = argument.metavar or argument.name.upper()
    name += "..." if argument.nargs == -1 and not name.endswith("...") else ""
    return name if argument.required else f"[{name}]"


def options_table(command: Any) -> str:
    """Return the options of a command as a table; "" without options of its own."""
    rows = [row(parameter) for parameter in command.params if parameter.param_type_name == "option"]
    rows = [line for line in rows if "`--help`" not in line]
    return "\n".join(["| option | value | default | |", "|---|---|---|---|", *rows]) if rows else ""


def row(option: Any) -> str:
    """Return an option as a row of a table."""
    flags = ", ".join(f"`{flag}`" for flag in (*option.opts, *option.secondary_opts))
    return f"| {flags} | {value_of(option)} | {default_of(option)} | {in_line(option.help)} |"


def value_of(option: Any) -> str:
    """Return what an option takes."""
    if option.is_flag:
        return ""
    bounds = (("≥", option.min), ("≤", option.max))
    text = type_name(option.type_descriptor.annotation)
    text += "".join(f" {sign} {bound:g}" for sign, bound in bounds if bound is not None)
    return f"{text}, repeatable" if option.multiple else text


def type_name(annotation: Any) -> str:
    """Return the type of an option's value in words."""
    if annotation in TYPES:
        return TYPES[annotation]
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(annotation))
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return ", ".join(f"`{member.value}`" for member in annotation)
    (kind,) = [part for part in get_args(annotation) if part is not NoneType]
    return type_name(kind)


def default_of(option: Any) -> str:
    """Return the default of an option, in words where the help has words."""
    if option.required:
        return "required"
    if isinstance(option.show_default, str):
        return option.show_default
    if option.is_flag or option.default is None:
        return ""
    return f"`{option.default}`"


def in_line(text: str | None) -> str:
    """Return a help text as one line of a table."""
    return " ".join((text or "").split()).replace("|", "/")


def exit_codes() -> str:
    """Return the exit codes with the errors that have them."""
    found = {0: ["Success."]}
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.BfpoError)]
    for kind in kinds:
        if kind is not errors.BfpoError:
            found.setdefault(kind.exit_code, []).append(in_line((kind.__doc__ or "").partition("\n\n")[0]))
    lines = ["| exit code | |", "|---|---|"]
    return "\n".join([*lines, *(f"| {code} | {' '.join(found[code])} |" for code in sorted(found))])


INTRODUCTION = """
<!-- Made by docs/make_cli_page.py from the code; don't edit this page by hand. -->
# Command line

`bfpo --help` and `bfpo COMMAND --help` show the same. `key.sub=value` after a recipe overrides a key of it
([recipes](recipes.md#on-the-command-line)). Options of `bfpo` itself:
"""
EXIT_CODES = """
An error is one message without a traceback, on the standard error stream, and an exit code:
"""

if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
