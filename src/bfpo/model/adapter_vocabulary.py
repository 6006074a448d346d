"""Adapters that were trained with added tokens: their base needs embeddings of the same size."""

from typing import TypeAlias

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils.hub import cached_file

from bfpo.errors import ModelError

Shapes: TypeAlias = dict[str, tuple[int, ...]]


def resize_to_adapter(
    model: PreTrainedModel, adapter: str, revision: str | None, *, num_tokens: int | None = None
) -> None:
    """Resize the embeddings of a base model to those that an adapter contains.

    Args:
        model: Base model, changed in place.
        adapter: Folder or hub id of the adapter.
        revision: Hub revision of the adapter.
        num_tokens: Number of tokens of the adapter's tokenizer if the adapter contains only single rows of the
            embeddings (peft's `trainable_token_indices`).

    Raises:
        ModelError: If the adapter needs more rows, and contains no weights for those of the head.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = {module: name for name, module in model.named_modules()}
    shapes = _stored_shapes(adapter, revision)
    stored_rows = [rows for module in (embedding, head) if module in names for rows in _rows(shapes, names[module])]
    weight = embedding.weight
    assert isinstance(weight, Tensor)
    rows, current = max([*stored_rows, num_tokens or 0], default=0), len(weight)
    if rows == current or not rows or (not stored_rows and rows < current):
        return
    is_tied = head is None or head.weight is weight
    if rows > current and stored_rows and not is_tied and not _rows(shapes, names[head]):
        raise ModelError(
            f"model '{adapter}': it was trained with {rows - current} added tokens, but contains no weights of "
            f"{names[head]} for them; save it again with save_embedding_layers=True"
        )
    # Without mean_resizing: the adapter's weights replace all rows.
    model.resize_token_embeddings(rows, mean_resizing=False)


def _rows(shapes: Shapes, name: str) -> list[int]:
    """Return the sizes of the vocabulary according to the tensors of a module, in an adapter's file."""
    rows = []
    for key, shape in shapes.items():
        parameter = key.removeprefix("base_model.model.").removeprefix(f"{name}.")
        if not key.removeprefix("base_model.model.").startswith(f"{name}."):
            continue
        if parameter in ("weight", "base_layer.weight", "modules_to_save.weight", "lora_B.weight"):
            rows.append(shape[0])
        elif parameter == "lora_embedding_A":
            rows.append(shape[1])
    return rows


def _stored_shapes(adapter: str, revision: str | None) -> Shapes:
    """Return the shapes of an adapter's tensors by name, without reading the tensors."""
    for name in ("adapter_model.safetensors", "adapter_model.bin"):
        file = cached_file(adapter, name, revision=revision, _raise_exceptions_for_missing_entries=False)
        if file is None:
            continue
        if name.endswith(".bin"):
            tensors = torch.load(file, map_location="meta", weights_only=True)
            return {key: tuple(tensor.shape) for key, tensor in tensors.items()}
        with safe_open(file, framework="pt") as tensors:
            return {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}  # noqa: SIM118
    return {}
