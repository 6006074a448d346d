"""Folders that one process at a time works in."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from bfpo.errors import RecipeError


@contextmanager
def exclusive_folder(folder: Path, message: str) -> Iterator[None]:
    """Keep other processes out of a folder inside a `with` block.

    The lock is a file beside the folder (in it if the parent can't be written to), and ends with its process, however
    that ends.

    Args:
        folder: The folder; a link to one is locked under the folder's own path.
        message: Message of the error.

    Raises:
        RecipeError: If another process holds the lock.
    """
    target = folder.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(f".{target.name}.lock")
    lock = FileLock(beside if os.access(target.parent, os.W_OK) else target / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise RecipeError(message) from None
    try:
        yield
    finally:
        # Removed while it is locked: a process that has opened it already finds it unlinked, and opens a new one.
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()
