"""Collating rows of a table into batches that a trainer can feed to the model."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from bfpo.config.recipes import LayoutSection
from bfpo.data.table import TokenTable
from bfpo.model.layout import Layout, packed_layout, packs, padded_layout
from bfpo.training.streams import WeightedRow


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """n examples that are fed together: a micro-batch, or one pack of it.

    Args:
        layout: Layout of the completions of all examples, example by example.
        weights: Weight of each example in the loss, (n,) float64; 0 for a row that only completes a process's last
            batch.
        columns: Other columns that the loss needs, name → (n, ...).
        row_ids: Row ids of the examples, for messages; empty for a filler.
    """

    layout: Layout
    weights: Tensor
    columns: dict[str, Tensor]
    row_ids: tuple[str, ...]

    @property
    def is_filler(self) -> bool:
        """Whether the batch only exists because other processes have more batches."""
        return not self.row_ids

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on a device."""
        columns = {name: values.to(device) for name, values in self.columns.items()}
        return replace(self, layout=self.layout.to(device), weights=self.weights.to(device), columns=columns)


class KeyDataset(Dataset[WeightedRow]):
    """Data set that returns the sampler's keys unchanged: the collator looks the rows up in its table.

    Args:
        size: Number of rows.
    """

    def __init__(self, size: int) -> None:
        self._size = size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, key: WeightedRow) -> WeightedRow:
        return key


@dataclass(frozen=True)
class Collator:
    """Makes batches from weighted rows.

    Args:
        table: Tokenized pairs or demonstrations.
        layout_section: How tokens are fed.
    """

    table: TokenTable
    layout_section: LayoutSection

    def __call__(self, rows: Sequence[WeightedRow]) -> dict[str, list[Batch]]:
        """Return `{"packs": [Batch, ...]}`; transformers requires a mapping, here one without the key `labels`."""
        examples = [self.table[row.row] for row in rows]
        if self.layout_section.kind == "padded":
            return {"packs": [self._batch(rows, padded_layout(examples))]}
        parts = packs(examples, self.layout_section.max_tokens_per_pack)
        return {"packs": [self._batch(rows[part], packed_layout(examples[part])) for part in parts]}

    def _batch(self, rows: Sequence[WeightedRow], layout: Layout) -> Batch:
        indices = np.array([row.row for row in rows])
        return Batch(
            layout=layout,
            weights=torch.tensor([row.weight for row in rows], dtype=torch.float64),
            columns={name: torch.from_numpy(array[indices]) for name, array in self.table.columns.items()},
            row_ids=tuple(self.table.row_ids[index] for index in indices.tolist()),
        )
