"""AlpacaEval's files of annotations."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from bfpo.config.recipes import Source
from bfpo.data.rows import read_rows
from bfpo.errors import DataError
from bfpo.stats.intervals import Values

# AlpacaEval's columns for the instruction, the model's output and the reference's.
_TEXTS = ("instruction", "output_2", "output_1")


class Annotations(NamedTuple):
    """Pairwise annotations in AlpacaEval's form.

    Args:
        preferences: For the model on each of N prompts, in [0, 1]; 0.5 is a tie.
        prompts: The instructions, N.
        outputs: The model's, N.
        reference_outputs: What they were compared with, N.
    """

    preferences: Values
    prompts: list[str]
    outputs: list[str]
    reference_outputs: list[str]


def read_alpaca_annotations(path: Path) -> Annotations:
    """Read AlpacaEval annotations: `.json` or `.jsonl`, gzipped or not; the model is output 2.

    Raises:
        DataError: If the file can't be read, or a row lacks a field or a preference in [1, 2].
    """
    if not path.is_file():
        raise DataError(f"{path}: there is no such file of AlpacaEval annotations")
    rows = list(read_rows(Source(path=str(path))))
    for row in rows:
        if missing := next((name for name in ("preference", *_TEXTS) if name not in row.values), None):
            raise DataError(f"{row.where}: no column '{missing}'; expected AlpacaEval's annotations")
        preference = row.values["preference"]
        if not isinstance(preference, int | float) or not 1 <= preference <= 2:
            raise DataError(f"{row.where}: preference is {preference!r}; expected a number from 1 to 2")
    return Annotations(
        np.array([row.values["preference"] - 1 for row in rows], dtype=np.float64),
        *([row.values[name] for row in rows] for name in _TEXTS),
    )
