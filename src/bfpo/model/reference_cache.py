"""Log-probabilities of the reference, cached on disk under a hash of everything they depend on.

An entry is a folder. While it is computed, finished parts are saved in `parts/`, so that an interrupted pass resumes.
`entry.json` is written last, and only an entry that has one is read. The hash doesn't depend on anything about the
training (learning rate, labels, paths): runs and sweeps over the same weights and token ids share an entry.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
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
from bfpo.model.lora import CausalLM, unwrap_adapter

# Examples per part: the maximum that each process has to score again after an interruption.
PART = 256
# Increase it when entries of older versions must not be read.
SCHEMA = 1


class ReferenceEntry:
    """The log-probabilities of one table's completions under one model, on disk.

    Args:
        folder: Folder of the cache.
        cache_key: Everything the values depend on; see `make_cache_key`.
        shape: Number of rows of the table, and of completions per row.

    Attributes:
        folder: Folder of the entry.
        parts: Rows of each part.
    """

    def __init__(self, folder: Path, cache_key: dict[str, Any], shape: tuple[int, int]) -> None:
        self.folder = folder / content_hash(cache_key)
        self.parts = [slice(start, min(start + PART, shape[0])) for start in range(0, shape[0], PART)]
        self._cache_key, self._shape = cache_key, shape
        self._metadata_file = self.folder / "entry.json"
        self._values_file = self.folder / "values.npy"
        self._parts_folder = self.folder / "parts"

    @property
    def is_finished(self) -> bool:
        """Whether the entry was finished; `read` checks that it is intact."""
        return self._metadata_file.is_file()

    def has_part(self, number: int) -> bool:
        """Return whether a part exists and is intact; a damaged part counts as missing."""
        return self._read_part(number) is not None

    def write_part(self, number: int, values: Floats) -> None:
        """Save the values of a part, (rows, completions)."""
        try:
            _write_array(self._part_file(number), values)
        except FileNotFoundError:
            # Another run that computes the same entry may have finished it meanwhile, and removed the parts.
            if not self.is_finished:
                raise

    def finish(self) -> None:
        """Join the parts, unless another run has finished the entry meanwhile.

        Raises:
            DataError: If a part is missing.
        """
        if not self.is_finished:
            parts = [part for number in range(len(self.parts)) if (part := self._read_part(number)) is not None]
            missing = len(self.parts) - len(parts)
            # Checked again: another run may have finished the entry and removed the parts while they were read.
            if missing and not self.is_finished:
                raise DataError(
                    f"{self._parts_folder}: {missing} of {len(self.parts)} parts that the processes wrote can't be "
                    "read here; every process must see the cache's folder (cache_dir)"
                )
            if not self.is_finished:
                _write_array(self._values_file, np.concatenate(parts))
                metadata = {"schema": SCHEMA, "cache_key": self._cache_key, "shape": list(self._shape)}
                write_json(self._metadata_file, metadata | {"sha256": file_hash(self._values_file)})
        shutil.rmtree(self._parts_folder, ignore_errors=True)

    def read(self) -> Floats:
        """Return the values, (rows, completions), memory-mapped from the file.

        Raises:
            DataError: If the entry is damaged, or its values depend on something other than the cache key.
        """
        metadata = self._read_metadata()
        if metadata.get("schema") != SCHEMA or metadata.get("cache_key") != self._cache_key:
            raise self.error("it is stale: the cache key in entry.json doesn't match the folder's name")
        try:
            if file_hash(self._values_file) != metadata.get("sha256"):
                raise self.error("values.npy is cut or damaged: its hash is not the one in entry.json")
            values: Floats = np.load(self._values_file, mmap_mode="r")
        except DataError:
            raise
        except (OSError, ValueError, EOFError) as error:
            raise self.error(f"values.npy can't be read ({error})") from None
        if values.shape != self._shape:
            raise self.error(f"values.npy has shape {values.shape}, expected {self._shape}")
        return values

    def error(self, fault: str) -> DataError:
        """Return an error that names this entry, its fault, and what to do."""
        return DataError(f"reference cache {self.folder}: {fault}; delete that folder, and it is computed again")

    def _read_metadata(self) -> dict[str, Any]:
        try:
            metadata = json.loads(self._metadata_file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise self.error(f"entry.json can't be read ({error})") from None
        if not isinstance(metadata, dict):
            raise self.error("entry.json can't be read (not an object)")
        return metadata

    def _part_file(self, number: int) -> Path:
        return self._parts_folder / f"{number:06d}.npy"

    def _read_part(self, number: int) -> Floats | None:
        """Return the values of a part; None if it is missing or damaged."""
        rows = self.parts[number]
        try:
            values: Floats = np.load(self._part_file(number))
        except (OSError, ValueError, EOFError):
            return None
        return values if values.shape == (rows.stop - rows.start, self._shape[1]) else None


def make_cache_key(model_hash: str, table: TokenTable, *, arithmetic: str, layout: str) -> dict[str, Any]:
    """Return everything the values of a table depend on.

    Args:
        model_hash: Result of `hash_model`.
        table: Table whose token ids are scored; labels and row ids don't matter.
        arithmetic: Type of the weights, and of autocast if it is on.
        layout: `packed` or `padded`.
    """
    return {
        "model": model_hash,
        "token_ids": table.tokens_hash,
        "aggregation": "sum over tokens, float64",
        "dtype": arithmetic,
        "layout": f"{layout} {LAYOUT_VERSION}",
    }


def hash_model(model: CausalLM) -> str:
    """Return a hash of all weights, bit by bit, and of the configuration without paths and versions."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    configs = [unwrap_adapter(model).config.to_dict()]
    if isinstance(model, PeftModel):
        configs += [config.to_dict() for config in model.peft_config.values()]
    for config in configs:
        digest.update(content_hash(without_provenance(config)).encode())
    return digest.hexdigest()


def without_provenance(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of a configuration that say what a model computes; sets, whose order differs, as lists."""
    return {
        key: sorted(value) if isinstance(value, set) else value
        for key, value in config.items()
        if not _is_provenance(key)
    }


def _is_provenance(key: str) -> bool:
    """Return whether a configuration key says where a model comes from or how it is loaded, not what it computes."""
    return key.startswith("_") or key.endswith(("_version", "path", "revision")) or key in ("use_cache", "dtype")


def prefers_cache(model: nn.Module) -> bool:
    """Return whether a reference without a new adapter is better cached on disk than copied.

    It is if the copy would be as large as the model, or if a trained embedding is also the head.
    """
    if isinstance(model, PeftModel):
        return False
    assert isinstance(model, PreTrainedModel)
    trained = [parameter.requires_grad for parameter in model.parameters() if parameter.is_floating_point()]
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    return all(trained) or (embedding is head and embedding.requires_grad)


def _write_array(file: Path, values: Floats) -> None:
    with open_atomic(file) as opened:
        np.save(opened, values)
