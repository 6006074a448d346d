"""Saving a model with its tokenizer as a new folder, complete or not at all."""

import os
import shutil
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bfpo.core.files import write_json
from bfpo.errors import ModelError


def check_out(out: Path) -> None:
    """Check that an output folder is empty or doesn't exist.

    Raises:
        ModelError: If it contains files, or is a file.
    """
    if out.is_dir() and any(out.iterdir()):
        raise ModelError(f"out '{out}' is not empty; name a folder that doesn't exist yet")
    if out.exists() and not out.is_dir():
        raise ModelError(f"out '{out}' is a file; name a folder")


def save_checkpoint(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, out: Path, records: dict[str, Any] | None = None
) -> None:
    """Save a model and its tokenizer under a temporary name, and rename the folder.

    Args:
        model: Model to save.
        tokenizer: Tokenizer of the model.
        out: Output folder; empty or missing.
        records: Content of further JSON files, by file name.
    """
    # The folder's own path: nothing can be renamed to `.`, or to a link.
    out = out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        for name, content in (records or {}).items():
            write_json(temporary / name, content)
        temporary.replace(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
