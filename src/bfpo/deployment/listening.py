"""What a server needs before its model is loaded: its packages, and an address."""

import socket
from importlib.util import find_spec

from bfpo.errors import MissingExtra, RecipeError


def check_packages(*packages: str) -> None:
    """Check that packages of the extra `serve` are installed.

    Raises:
        MissingExtra: If one isn't.
    """
    for package in packages:
        if find_spec(package) is None:
            raise MissingExtra("bfpo serve", package, "serve")


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens on an address.

    Args:
        host: Address of this machine.
        port: Port; 0 is a free one.

    Raises:
        RecipeError: If the address is taken, or isn't one of this machine.
    """
    try:
        return socket.create_server((host, port), backlog=128)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RecipeError(f"can't listen on {host}, port {port}: {reason}; choose another `host` or `port`") from None
