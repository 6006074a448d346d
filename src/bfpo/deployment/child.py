"""Running a server as a child process, until it is stopped."""

import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType

from bfpo.errors import DeploymentError


def run_until_stopped(
    command: Sequence[str], *, environment: Mapping[str, str] | None = None, folder: Path | None = None
) -> None:
    """Run a command until it ends; SIGINT and SIGTERM are passed on to it, and then end it without an error.

    Args:
        command: The command.
        environment: Its environment; None is that of this process.
        folder: Folder that it runs in; None is that of this process.

    Raises:
        DeploymentError: If it ends by itself.
    """
    # In a session of its own: a Ctrl-C in the terminal would reach it twice, which uvicorn takes for "at once".
    process = subprocess.Popen(command, env=environment, cwd=folder, start_new_session=True)
    is_stopped = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal is_stopped
        is_stopped = True
        process.send_signal(number)

    handlers = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        code = process.wait()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        process.kill()
    if not is_stopped:
        raise DeploymentError(f"{command[0]} ended with exit code {code}; its messages are above")
