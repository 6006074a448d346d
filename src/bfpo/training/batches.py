"""Collating rows of a table into batches that a trainer can feed."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from bfpo.config.recipes import LayoutSection
from bfpo.data.table import PairTable, TokenTable
from bfpo.model.layout import Layout, packed_layout, packs, padded_layout
from bfpo.training.streams import Rows, WeightedRow


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """n examples that are fed together: a micro-batch, or a pack of one.

    Args:
        layout: The completions of all examples, example by example.
        weights: Each example's weight in the loss, (n,) float64; 0 for one that only fills up a rank's last batch.
        columns: Whatever else the loss needs, name → (n,).
        row_ids: Names of the examples, for messages; none if the batch only keeps a process busy.
    """

    layout: Layout
    weights: Tensor
    columns: dict[str, Tensor]
    row_ids: tuple[str, ...]

    @property
    def is_filler(self) -> bool:
        """Whether the batch is there only because other processes have more of them."""
        return not self.row_ids

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on a device."""
        columns = {name: values.to(device) for name, values in self.columns.items()}
        return replace(self, layout=self.layout.to(device), weights=self.weights.to(device), columns=columns)


class RowNumbers(Dataset[WeightedRow]):
    """A data set whose items are their own keys: the collator has the table.

    Args:
        size: What `len` returns.
    """

    def __init__(self, size: int) -> None:
        self._size = size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, item: WeightedRow) -> WeightedRow:
        return item


@dataclass(frozen=True)
class Collator:
    """Makes batches of weighted rows.

    Args:
        table: Pairs or demonstrations.
        layout: How they are fed.
    """

    table: TokenTable
    layout: LayoutSection

    def __call__(self, items: Sequence[WeightedRow]) -> dict[str, list[Batch]]:
        """Return `{"packs": [Batch, ...]}`: transformers wants a mapping, and one without the key `labels`."""
        examples = [self.table[item.row] for item in items]
        if self.layout.kind == "padded":
            return {"packs": [self._batch(items, padded_layout(examples))]}
        parts = packs(examples, self.layout.max_tokens_per_pack)
        return {"packs": [self._batch(items[part], packed_layout(examples[part])) for part in parts]}

    def _batch(self, items: Sequence[WeightedRow], layout: Layout) -> Batch:
        rows = np.array([item.row for item in items])
        return Batch(
            layout=layout,
            weights=torch.tensor([item.weight for item in items], dtype=torch.float64),
            columns=self._columns(rows),
            row_ids=tuple(self.table.row_ids[int(row)] for row in rows),
        )

    def _columns(self, rows: Rows) -> dict[str, Tensor]:
        if not isinstance(self.table, PairTable):
            return {}
        arrays: dict[str, np.ndarray[Any, Any]] = {
            "chosen_safe": self.table.chosen_safe,
            "rejected_safe": self.table.rejected_safe,
            "cells": self.table.cells,
            "is_buffer": self.table.is_buffer,
            **self.table.signals,
        }
        if self.table.reference_logps is not None:
            arrays["ref_chosen_logps"], arrays["ref_rejected_logps"] = self.table.reference_logps.T
        return {name: torch.from_numpy(array[rows]) for name, array in arrays.items()}
