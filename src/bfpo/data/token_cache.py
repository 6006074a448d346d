"""Encodings of earlier runs, kept in files that are named by what they were made of."""

import json
import zipfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from bfpo.config.recipes import TextSection
from bfpo.core.files import content_hash, open_atomic
from bfpo.data.table import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Below this, tokenizing takes about as long as looking it up.
FEWEST = 1000
# Raised when the same texts and tokenizer would be encoded differently by newer code.
VERSION = 1
# Directives of strftime that depend on the time of day.
_TIMES = ("%H", "%I", "%M", "%S", "%p", "%X", "%c", "%f", "%s", "%T", "%R")


class Encoding(NamedTuple):
    """Outcome for one item: the example, or why there is none; and what is worth noting."""

    example: Example | None
    fault: str | None = None
    notes: tuple[str, ...] = ()


def cache_file(
    folder: Path,
    tokenizer: "PreTrainedTokenizerBase",
    template: str | None,
    text: TextSection,
    texts: object,
    *,
    clock: datetime | None = None,
) -> Path | None:
    """Return where the encodings of some texts are kept; None for a tokenizer whose content can't be read.

    Args:
        folder: Of the cache.
        tokenizer: What encodes.
        template: Chat template in force.
        text: Length and truncation.
        texts: What is encoded, as JSON can hold it.
        clock: Time that a template with a clock sees; None for the current time.
    """
    if not tokenizer.is_fast:
        return None
    # Some templates write the date into the prompt.
    day = None
    if "strftime_now" in str(template):
        has_time = any(directive in str(template) for directive in _TIMES)
        day = clock if clock is not None and has_time else (clock or datetime.now(UTC)).date()
    content = tokenizer.backend_tokenizer.to_str()
    cache_key = content_hash(VERSION, content, tokenizer.eos_token_id, template, day, text.model_dump(), texts)
    return folder / f"{cache_key}.npz"


def read_encodings(file: Path) -> list[Encoding] | None:
    """Return the encodings of a file; None if it isn't there or can't be read."""
    try:
        with file.open("rb") as opened, np.load(opened) as arrays:
            ids, lengths = arrays["ids"], arrays["lengths"]
            told = json.loads(arrays["told"].tobytes())
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    ends = np.cumsum(lengths)
    pieces = np.split(ids, ends[:-1].tolist())
    per_item = lengths.shape[1]
    encodings = []
    for number in range(len(lengths)):
        fault, notes = told.get(str(number), (None, []))
        prompt, *completions = pieces[number * per_item : (number + 1) * per_item]
        example = Example(prompt, tuple(completions)) if fault is None else None
        encodings.append(Encoding(example, fault, tuple(notes)))
    return encodings


def write_encodings(file: Path, encodings: Sequence[Encoding]) -> None:
    """Write encodings, of which at least one has an example, so that nobody ever sees half a file."""
    pieces = [(e.example.prompt_ids, *e.example.completions) if e.example else None for e in encodings]
    per_item = next(len(of_item) for of_item in pieces if of_item)
    empty = (np.zeros(0, dtype=np.int32),) * per_item
    filled = [of_item or empty for of_item in pieces]
    told = {str(n): (e.fault, e.notes) for n, e in enumerate(encodings) if e.fault is not None or e.notes}
    with open_atomic(file) as opened:
        np.savez(
            opened,
            ids=np.concatenate([piece for of_item in filled for piece in of_item]),
            lengths=np.array([[len(piece) for piece in of_item] for of_item in filled]),
            told=np.frombuffer(json.dumps(told).encode(), dtype=np.uint8),
        )
