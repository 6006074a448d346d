"""What a person sees: rich tables and progress on a terminal, plain lines elsewhere.

Only the first process of a distributed run says anything. What a model or a file wrote can't command the terminal:
control characters are shown, not sent.
"""

import math
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

# Where nobody watches a bar, in a file or a job's log.
SECONDS_BETWEEN_LINES = 60.0

# Control characters but tab and new line, marks that turn the direction of writing, and halves of characters.
_COMMANDS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")

_log: ContextVar[Console | None] = ContextVar("log", default=None)
_bars: ContextVar[bool] = ContextVar("bars", default=True)


@contextmanager
def lines_into(path: Path, *, bars: bool = True) -> Iterator[None]:
    """Send lines and tables to the end of a file instead of the terminal.

    Args:
        path: The file.
        bars: Whether progress bars stay on the terminal; one of several workers shows none.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        tokens = _log.set(Console(file=file, highlight=False, soft_wrap=True)), _bars.set(bars)
        try:
            yield
        finally:
            _log.reset(tokens[0])
            _bars.reset(tokens[1])


def console(*, stderr: bool = False) -> Console:
    """Return the console of this process; it is silent on all but the first process."""
    log = _log.get()
    if log is not None and not (stderr and _bars.get()):
        return log
    return Console(stderr=stderr, quiet=int(os.environ.get("RANK", "0")) != 0, highlight=False, soft_wrap=True)


def visible(text: str) -> str:
    """Return a text whose control characters are written out: an escape sequence would rewrite the screen."""
    return _COMMANDS.sub(lambda found: ascii(found[0])[1:-1], text)


def say(text: str = "") -> None:
    """Print a line as it is, without reading markup in it."""
    console().print(visible(text), markup=False, emoji=False)


def warn(message: str) -> None:
    """Print a warning to the standard error."""
    console(stderr=True).print(visible(f"warning: {message}"), markup=False, emoji=False)


def show_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table; cells may be anything, and what a model or a file wrote in them is not read as markup.

    Args:
        title: What the rows are.
        columns: Headings; all but the first are aligned to the right when plain.
        rows: As many cells as there are columns.
    """
    out = console()
    title, columns = visible(title), [visible(column) for column in columns]
    cells = [[visible(str(cell)) for cell in row] for row in rows]
    if out.is_terminal:
        table = Table(title=title, title_justify="left", title_style="bold")
        for index, column in enumerate(columns):
            justify: Literal["left", "right"] = "left" if index == 0 else "right"
            table.add_column(column, justify=justify, overflow="fold", no_wrap=index == 0)
        for row in cells:
            table.add_row(*map(Text, row))
        out.print(table)
        return
    widths = [max(len(text) for text in column) for column in zip(columns, *cells, strict=True)]
    say(f"\n{title}")
    for line in (columns, *cells):
        first, *rest = (f"{text:<{width}}" for text, width in zip(line, widths, strict=True))
        say("  ".join((first, *(text.strip().rjust(len(text)) for text in rest))).rstrip())


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a progress bar on a terminal while something is counted up, elsewhere a line now and then.

    Args:
        what: What is being done.
        total: What the count will reach.

    Yields:
        A function to call with how much was done since the last call.
    """
    from rich.progress import MofNCompleteColumn, Progress

    out = console(stderr=True)
    if out.is_terminal:
        columns = [*Progress.get_default_columns()[:-1], MofNCompleteColumn(), Progress.get_default_columns()[-1]]
        with Progress(*columns, console=out, transient=True) as progress:
            task = progress.add_task(what, total=total)
            yield lambda done: progress.advance(task, done)
        return
    began = told = time.monotonic()
    counted = 0

    def tell(done: int) -> None:
        nonlocal counted, told
        counted, now = counted + done, time.monotonic()
        if now - told >= SECONDS_BETWEEN_LINES and 0 < counted < total:
            told = now
            left = math.ceil((now - began) / counted * (total - counted) / 60)
            out.print(f"{what}: {counted:,} of {total:,}, about {left} min left", markup=False, emoji=False)

    yield tell
