"""Log-probabilities of the reference, kept on disk under a name made of what they depend on.

An entry is a folder. While it is made, finished parts stand in `parts/`, so that a killed pass goes on where it was.
`entry.json` is written last, and only an entry that has one is read. Nothing about the training (learning rate,
labels, paths) is in the name: runs and sweeps over the same weights and token ids share an entry.
"""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from bfpo.core.files import content_hash, file_hash, open_atomic, write_json
from bfpo.data.table import Floats, TokenTable
from bfpo.errors import DataError
from bfpo.model.layout import VERSION as LAYOUT_VERSION
from bfpo.model.lora import CausalLM, under_adapter

# Examples that are lost at most, on each process, when a pass is killed.
PART = 256
# Raised when entries of older code must not be read.
SCHEMA = 1


class ReferenceEntry:
    """The log-probabilities of one table's completions under one model, on disk.

    Args:
        folder: Of the cache.
        cache_key: What the values depend on; see `cache_key`.
        shape: Rows of the table and completions of each.

    Attributes:
        parts: The rows of each part.
    """

    def __init__(self, folder: Path, cache_key: dict[str, Any], shape: tuple[int, int]) -> None:
        self.folder = folder / content_hash(cache_key)
        self._made_of, self._shape = cache_key, shape
        self.parts = [slice(first, min(first + PART, shape[0])) for first in range(0, shape[0], PART)]

    @property
    def finished(self) -> bool:
        """Whether the entry is there; `read` tells whether it is whole."""
        return self._note.is_file()

    def has_part(self, number: int) -> bool:
        """Return whether a part is there and whole; a damaged one counts as missing."""
        return self._part(number) is not None

    def write_part(self, number: int, values: Floats) -> None:
        """Keep the values of a part's rows, (rows, completions)."""
        try:
            _write_array(self._part_file(number), values)
        except FileNotFoundError:
            # Another run that made the same entry may have finished it, and removed the parts, meanwhile.
            if not self.finished:
                raise

    def finish(self) -> None:
        """Join the parts. Another run may have done so meanwhile: then nothing is left to do.

        Raises:
            DataError: If a part isn't there.
        """
        if self.finished:
            shutil.rmtree(self._parts, ignore_errors=True)
            return
        parts = [self._part(number) for number in range(len(self.parts))]
        whole = [part for part in parts if part is not None]
        if len(whole) < len(parts) and not self.finished:
            raise DataError(
                f"{self._parts}: {len(parts) - len(whole)} of {len(parts)} parts that the processes wrote can't be "
                "read here; every process must see the cache's folder (cache_dir)"
            )
        if not self.finished:
            _write_array(self._values, np.concatenate(whole))
            content = {"schema": SCHEMA, "cache_key": self._made_of, "shape": list(self._shape)}
            write_json(self._note, content | {"sha256": file_hash(self._values)})
        shutil.rmtree(self._parts, ignore_errors=True)

    def read(self) -> Floats:
        """Return the values, (rows, completions), mapped from the file rather than held in memory.

        Raises:
            DataError: If the entry isn't what was written, or was made of something else.
        """
        try:
            content = json.loads(self._note.read_text(encoding="utf-8"))
            if not isinstance(content, dict):
                raise ValueError("not an object")
        except (OSError, ValueError) as error:
            raise self.refused(f"entry.json can't be read ({error})") from None
        if content.get("schema") != SCHEMA or content.get("cache_key") != self._made_of:
            raise self.refused("it is stale: entry.json says that it was made of something else than its name")
        try:
            if file_hash(self._values) != content.get("sha256"):
                raise self.refused("values.npy is cut or damaged: its hash is not the one that was written")
            values: Floats = np.load(self._values, mmap_mode="r")
        except (OSError, ValueError, EOFError) as error:
            if isinstance(error, DataError):
                raise
            raise self.refused(f"values.npy can't be read ({error})") from None
        if values.shape != self._shape:
            raise self.refused(f"values.npy holds {values.shape}, expected {self._shape}")
        return values

    def refused(self, fault: str) -> DataError:
        """Return the error that names this entry and says what to do."""
        return DataError(f"reference cache {self.folder}: {fault}; delete that folder, and it is made anew")

    @property
    def _note(self) -> Path:
        return self.folder / "entry.json"

    @property
    def _values(self) -> Path:
        return self.folder / "values.npy"

    @property
    def _parts(self) -> Path:
        return self.folder / "parts"

    def _part_file(self, number: int) -> Path:
        return self._parts / f"{number:06d}.npy"

    def _part(self, number: int) -> Floats | None:
        rows = self.parts[number]
        try:
            values: Floats = np.load(self._part_file(number))
        except (OSError, ValueError, EOFError):
            return None
        return values if values.shape == (rows.stop - rows.start, self._shape[1]) else None


def cache_key(model_hash: str, table: TokenTable, *, arithmetic: str, layout: str) -> dict[str, Any]:
    """Return what the values of a table depend on, and nothing else.

    Args:
        model_hash: See `model_content`.
        table: Whose token ids are fed; labels and names don't matter.
        arithmetic: Type of the weights, and of autocast if there is one.
        layout: `packed` or `padded`.
    """
    return {
        "model": model_hash,
        "token_ids": table.tokens_hash,
        "aggregation": "sum over tokens, float64",
        "dtype": arithmetic,
        "layout": f"{layout} {LAYOUT_VERSION}",
    }


def model_content(model: CausalLM) -> str:
    """Return a hash of all weights, bit by bit, and of the configuration, without paths and versions."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    configs = [under_adapter(model).config.to_dict()]
    if isinstance(model, PeftModel):
        configs += [config.to_dict() for config in model.peft_config.values()]
    for config in configs:
        # A set has another order in every process.
        known = {
            key: sorted(value) if isinstance(value, set) else value
            for key, value in config.items()
            if not _about_a_place(key)
        }
        digest.update(content_hash(known).encode())
    return digest.hexdigest()


def _about_a_place(key: str) -> bool:
    return key.startswith("_") or key.endswith(("_version", "path", "revision")) or key in ("use_cache", "dtype")


def wants_cache(model: nn.Module) -> bool:
    """Return whether the reference of a model that is trained without a new adapter is better kept on disk.

    It is when a copy would be as large as the model, or a trained embedding is also the head.
    """
    trained = [parameter.requires_grad for parameter in model.parameters() if parameter.is_floating_point()]
    if isinstance(model, PeftModel):
        return False
    assert isinstance(model, PreTrainedModel)
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    return all(trained) or (embedding is head and embedding.requires_grad)


def _write_array(file: Path, values: Floats) -> None:
    with open_atomic(file) as opened:
        np.save(opened, values)
