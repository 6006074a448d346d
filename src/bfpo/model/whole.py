"""Checks that no weight of a checkpoint or an adapter is missing, which the libraries would leave as it was made."""

import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from bfpo.errors import ModelError


def check_whole_model(model: object, info: dict[str, Any], name: str) -> None:
    """Check what `from_pretrained` of transformers returned with `output_loading_info`.

    Raises:
        ModelError: If weights are missing; transformers leaves them at random values.
    """
    if missing := sorted(info["missing_keys"]):
        raise ModelError(
            f"{name}: {len(missing)} weights of {type(model).__name__} are missing or have another name: "
            f"{', '.join(missing[:3])}"
        )


@contextmanager
def whole_adapter(path: str) -> Iterator[None]:
    """Turn the warning of peft's `from_pretrained` that weights are missing into a `ModelError`."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "(?s).*Found missing adapter keys", UserWarning)
        try:
            yield
        except UserWarning as warning:
            check_whole_adapter(path, re.findall(r"'(base_model\.[^']*)'", str(warning)) or [str(warning)])


def check_whole_adapter(path: str, missing: Sequence[str]) -> None:
    """Check the names that peft's `load_adapter` returns.

    Raises:
        ModelError: If weights are missing; peft leaves them as they were made, without an effect.
    """
    if missing:
        raise ModelError(
            f"adapter '{path}': {len(missing)} of its weights are missing, or it is for another base model: "
            f"{', '.join(missing[:3])}"
        )
