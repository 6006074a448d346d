"""Cache of encodings: files that are named by a hash of the texts, the tokenizer and the settings."""

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

# For fewer texts, tokenizing takes about as long as reading the cache.
MIN_CACHED = 1000
# To increase when newer code encodes the same texts with the same tokenizer differently.
VERSION = 2
# Directives of strftime that depend on the time of day.
_TIMES = ("%H", "%I", "%M", "%S", "%p", "%X", "%c", "%f", "%s", "%T", "%R")


class Encoding(NamedTuple):
    """Encoding of a pair or a demonstration.

    Args:
        example: Token ids; None if it can't be encoded.
        fault: Reason why it can't be encoded.
        notes: Remarks, such as a truncation.
    """

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
    """Return the cache file for some texts; None if the tokenizer's content can't be hashed.

    Args:
        folder: Folder of the cache.
        tokenizer: Tokenizer.
        template: Chat template that is used.
        text: Length and truncation.
        texts: Texts to encode, in a form that JSON can represent.
        clock: Time that a template with a clock gets; None for the current time.
    """
    if not tokenizer.is_fast:
        return None
    # A template can write the date into the prompt.
    day = None
    if "strftime_now" in str(template):
        has_time = any(directive in str(template) for directive in _TIMES)
        day = clock if clock is not None and has_time else (clock or datetime.now(UTC)).date()
    content = tokenizer.backend_tokenizer.to_str()
    # Templates write special tokens by name, such as `bos_token`.
    special = [tokenizer.eos_token_id, tokenizer.special_tokens_map]
    cache_key = content_hash(VERSION, content, special, template, day, text.model_dump(), texts)
    return folder / f"{cache_key}.npz"


def read_encodings(file: Path) -> list[Encoding] | None:
    """Return the encodings of a cache file; None if it is missing or can't be read."""
    try:
        with file.open("rb") as opened, np.load(opened) as arrays:
            ids, lengths = arrays["ids"], arrays["lengths"]
            remarks = json.loads(arrays["told"].tobytes())
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    ends = np.cumsum(lengths)
    pieces = np.split(ids, ends[:-1].tolist())
    pieces_per_example = lengths.shape[1]
    encodings = []
    for index in range(len(lengths)):
        fault, notes = remarks.get(str(index), (None, []))
        prompt, *completions = pieces[index * pieces_per_example : (index + 1) * pieces_per_example]
        example = Example(prompt, tuple(completions)) if fault is None else None
        encodings.append(Encoding(example, fault, tuple(notes)))
    return encodings


def write_encodings(file: Path, encodings: Sequence[Encoding]) -> None:
    """Write a cache file atomically; at least one encoding must have an example."""
    num_completions = next(len(encoding.example.completions) for encoding in encodings if encoding.example)
    no_ids = np.zeros(0, dtype=np.int32)
    no_example = Example(no_ids, (no_ids,) * num_completions)
    examples = [encoding.example or no_example for encoding in encodings]
    pieces = [(example.prompt_ids, *example.completions) for example in examples]
    remarks = {
        str(index): (encoding.fault, encoding.notes)
        for index, encoding in enumerate(encodings)
        if encoding.fault is not None or encoding.notes
    }
    with open_atomic(file) as opened:
        np.savez(
            opened,
            ids=np.concatenate([ids for example in pieces for ids in example]),
            lengths=np.array([[len(ids) for ids in example] for example in pieces]),
            # The array has this name in the files of earlier versions.
            told=np.frombuffer(json.dumps(remarks).encode(), dtype=np.uint8),
        )
