"""What is served: a checkpoint as files on this machine."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from bfpo.config.recipes import ModelSection, is_gguf
from bfpo.errors import ModelError
from bfpo.model.load import load_config
from bfpo.model.lora import is_adapter

# What a model is loaded from; a repository may hold the same weights in other formats.
_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A checkpoint on this machine.

    Args:
        folder: Folder of the model or the adapter.
        base: Folder of the adapter's base model; None for a whole model.
        config: Configuration of the model, of an adapter that of its base, as JSON.
        adapter: Configuration of the adapter; None for a whole model.
    """

    folder: Path
    base: Path | None
    config: dict[str, Any]
    adapter: dict[str, Any] | None


def find_model(checkpoint: str) -> ServedModel:
    """Find the files of a checkpoint, and download them if it is on the hub.

    Args:
        checkpoint: Folder or hub id of a model or an adapter.

    Raises:
        ModelError: If it is neither, or an adapter that can't be used alone.
    """
    if is_gguf(checkpoint):
        raise ModelError(
            f"'{checkpoint}' is a GGUF file, which llama.cpp serves (`llama-server -m {checkpoint}`); with a guard, "
            "it is served from here"
        )
    config = load_config(ModelSection(path=checkpoint)).to_dict()
    folder = _on_disk(checkpoint, None)
    if not is_adapter(checkpoint):
        return ServedModel(folder, None, config, None)
    adapter = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    base = _on_disk(str(adapter["base_model_name_or_path"]), adapter.get("revision"))
    return ServedModel(folder, base, config, adapter)


def _on_disk(path: str, revision: str | None) -> Path:
    if Path(path).is_dir():
        return Path(path).resolve()
    try:
        return Path(snapshot_download(path, revision=revision, allow_patterns=_FILES))
    except (OSError, ValueError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ModelError(f"model '{path}' can't be downloaded: {reason}") from None
