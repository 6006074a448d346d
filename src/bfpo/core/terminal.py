"""Output for people: tables and progress bars on a terminal, plain lines in files and logs.

Only the first process of a distributed run prints. Control characters are escaped, so that the text of a model or of
a file can't control the terminal.
"""

import math
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from pathlib import Path
from typing import Literal

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

# Progress where there is no bar, in a file or the log of a job.
SECONDS_BETWEEN_LINES = 60.0

# Control characters except tab and line feed, marks that change the direction of writing, and lone surrogates.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")

# Work that takes longer is announced, and prints its time.
NOTICEABLE_SECONDS = 2.0
# The first of these lines comes early, so that a run is seen to start.
SECONDS_BEFORE_FIRST_LINE = 5.0

# The function that shows an activity in the progress that is open.
_activity: ContextVar[Callable[[str], None] | None] = ContextVar("activity", default=None)
_log: ContextVar[Console | None] = ContextVar("log", default=None)
_bars: ContextVar[bool] = ContextVar("bars", default=True)


@contextmanager
def log_to_file(path: Path, *, bars: bool = True) -> Iterator[None]:
    """Append lines and tables to a file instead of printing them.

    Args:
        path: Log file.
        bars: Whether progress bars stay on the terminal; parallel workers show none.
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
    """Return the console of this process; it prints nothing unless this is the first process."""
    log = _log.get()
    if log is not None and not (stderr and _bars.get()):
        return log
    return Console(stderr=stderr, quiet=int(os.environ.get("RANK", "0")) != 0, highlight=False, soft_wrap=True)


def escape_controls(text: str) -> str:
    """Return a text with its control characters escaped: an escape sequence could rewrite the screen."""
    return _CONTROLS.sub(lambda match: ascii(match[0])[1:-1], text)


def say(text: str = "") -> None:
    """Print a line without interpreting markup."""
    console().print(escape_controls(text), markup=False, emoji=False)


def warn(message: str) -> None:
    """Print a warning to the standard error."""
    console(stderr=True).print(escape_controls(f"warning: {message}"), markup=False, emoji=False)


def show_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table without interpreting markup in its cells.

    Args:
        title: Title of the table.
        columns: Headings; all columns but the first are aligned to the right.
        rows: Cells of each row, one for each column; they are converted to text.
    """
    output = console()
    title, columns = escape_controls(title), [escape_controls(column) for column in columns]
    cells = [[escape_controls(str(cell)) for cell in row] for row in rows]
    if output.is_terminal:
        table = Table(title=title, title_justify="left", title_style="bold")
        for index, column in enumerate(columns):
            justify: Literal["left", "right"] = "left" if index == 0 else "right"
            table.add_column(column, justify=justify, overflow="fold", no_wrap=index == 0)
        for row in cells:
            table.add_row(*map(Text, row))
        output.print(table)
        return
    widths = [max(map(cell_len, column)) for column in zip(columns, *cells, strict=True)]
    say(f"\n{title}")
    for line in (columns, *cells):
        rest = (text.strip() for text in line[1:])
        aligned = (_padding(text, width) + text for text, width in zip(rest, widths[1:], strict=True))
        say("  ".join((line[0] + _padding(line[0], widths[0]), *aligned)).rstrip())


def _padding(text: str, width: int) -> str:
    """Return the spaces that fill a cell: a Chinese character or an emoji is two cells wide, an accent none."""
    return " " * (width - cell_len(text))


@contextmanager
def timed(what: str) -> Iterator[None]:
    """Print what a `with` block does once it takes noticeably long, and at its end how long it took.

    Args:
        what: What is done, such as "loading the model".
    """
    start = time.monotonic()
    # In this context, so that the line goes where others go.
    timer = threading.Timer(NOTICEABLE_SECONDS, copy_context().run, [say, f"{what} ..."])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
    if (seconds := time.monotonic() - start) > NOTICEABLE_SECONDS:
        say(f"{what} took {seconds:,.0f} s")


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a progress bar on a terminal, and elsewhere a line after five seconds and then every minute.

    Args:
        what: Description of the work.
        total: Number of steps.

    Yields:
        A function to call with the number of steps done since the last call.
    """
    from rich.progress import MofNCompleteColumn, Progress, TextColumn

    output = console(stderr=True)
    if output.is_terminal:
        default = Progress.get_default_columns()
        columns = [*default[:-1], MofNCompleteColumn(), default[-1], TextColumn("{task.fields[activity]}")]
        with Progress(*columns, console=output, transient=True) as bar:
            task = bar.add_task(what, total=total, activity="")
            with _showing(lambda text: bar.update(task, activity=escape_controls(text))):
                yield lambda steps: bar.advance(task, steps)
        return
    start = last_line = time.monotonic()
    done, activity, wait = 0, "", SECONDS_BEFORE_FIRST_LINE

    def advance(steps: int) -> None:
        nonlocal done
        done += steps
        print_line()

    def show(text: str) -> None:
        nonlocal activity
        activity = f" ({escape_controls(text)})"
        print_line()

    def print_line() -> None:
        nonlocal last_line, wait
        now = time.monotonic()
        if now - last_line < wait or done >= total or not (done or activity):
            return
        last_line, wait = now, SECONDS_BETWEEN_LINES
        left = f", about {math.ceil((now - start) / done * (total - done) / 60)} min left" if done else ""
        output.print(f"{what}: {done:,} of {total:,}{left}{activity}", markup=False, emoji=False)

    with _showing(show):
        yield advance


@contextmanager
def _showing(show: Callable[[str], None]) -> Iterator[None]:
    token = _activity.set(show)
    try:
        yield
    finally:
        _activity.reset(token)


def show_activity(text: str) -> None:
    """Show what the work in progress is doing, beside its bar or in its next line; nothing outside of `progress`.

    Args:
        text: A few words, such as the number of tokens generated.
    """
    show = _activity.get()
    if show is not None:
        show(text)
