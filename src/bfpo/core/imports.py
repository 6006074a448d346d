"""Importing what a recipe names as `module:Name`: custom losses, adapters and judges."""

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from bfpo.errors import RecipeError


def import_object(path: str, what: str) -> Any:
    """Return the object that `module:Name` names.

    The current directory is searched last, because custom code usually is beside the recipe.

    Args:
        path: Import path, such as `my_package.losses:MyLoss`.
        what: Recipe key or parameter that holds the path, for error messages.

    Raises:
        RecipeError: If the path has another form, or the module or the name can't be imported.
    """
    module_name, _, name = path.partition(":")
    if not module_name or module_name.startswith(".") or not name.isidentifier():
        raise RecipeError(f"{what} is '{path}'; expected 'module:Name', such as 'my_package.my_module:my_name'")
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        imported: Any = getattr(import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise RecipeError(f"{what} is '{path}'; {error}") from error
    # Not narrower: code of others runs here.
    except Exception as error:
        raise RecipeError(f"{what} is '{path}'; importing it failed: {type(error).__name__}: {error}") from error
    return imported
