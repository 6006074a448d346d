"""Importing a user's own loss, adapter or judge by its path."""

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from bfpo.errors import RecipeError


def import_object(path: str, what: str) -> Any:
    """Import the object that `module:name` names; a module in the current directory is found, too.

    Args:
        path: Import path such as `my_losses:Hinge`.
        what: Key or option that holds the path, for the error message.

    Raises:
        RecipeError: If the module can't be imported or has no such name.
    """
    module, _, name = path.partition(":")
    if str(Path.cwd()) not in sys.path:
        # A user's own module usually stands beside the recipe.
        sys.path.append(str(Path.cwd()))
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise RecipeError(f"{what} is '{path}'; {error}") from error
