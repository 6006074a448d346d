"""Running a server as a child process, until it is stopped."""

import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType

from bfpo.errors import DeploymentError

_STOPPING = (signal.SIGINT, signal.SIGTERM, *((signal.SIGHUP,) if hasattr(signal, "SIGHUP") else ()))
# A server reads its settings again on SIGHUP, if it doesn't ignore it.
_PASSED_ON: dict[int, int] = {getattr(signal, "SIGHUP", -1): signal.SIGTERM}


def run_until_stopped(
    command: Sequence[str], *, environment: Mapping[str, str] | None = None, folder: Path | None = None
) -> None:
    """Run a command until it ends; signals to stop are passed on to it, and then end it without an error.

    SIGINT, SIGTERM, and SIGHUP, which a closed terminal sends; not those that this process ignores.

    Args:
        command: The command.
        environment: Its environment; None is that of this process.
        folder: Folder that it runs in; None is that of this process.

    Raises:
        DeploymentError: If it ends by itself.
    """
    process: subprocess.Popen[bytes] | None = None
    stopped_by: int | None = None

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal stopped_by
        stopped_by = _PASSED_ON.get(number, number)
        if process is not None:
            process.send_signal(stopped_by)

    # Before the child is there: a signal in between would leave it behind. `nohup` ignores SIGHUP, and so it stays.
    handled = [number for number in _STOPPING if signal.getsignal(number) is not signal.SIG_IGN]
    handlers = {number: signal.signal(number, stop) for number in handled}
    try:
        # In a session of its own: a Ctrl-C in the terminal would reach it twice, which uvicorn takes for "at once".
        process = subprocess.Popen(command, env=environment, cwd=folder, start_new_session=True)
        if stopped_by is not None:
            process.send_signal(stopped_by)
        code = process.wait()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if process is not None:
            process.kill()
    if stopped_by is None:
        raise DeploymentError(f"{command[0]} ended with exit code {code}; its messages are above")
