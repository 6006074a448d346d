"""Files with the facts about the pairs of a piece of a source, which is not read again while it is unchanged."""

import json
import zipfile
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from bfpo.core.files import open_atomic
from bfpo.core.pairs import Provenance
from bfpo.data.facts import ARRAYS, Facts


@dataclass(frozen=True)
class Piece:
    """What was read from a piece of a source.

    Args:
        facts: Facts about its pairs.
        skipped: Number of rows without a pair, by reason.
        faulty: Skipped rows that are faults.
    """

    facts: Facts
    skipped: Counter[str] = field(default_factory=Counter)
    faulty: Counter[str] = field(default_factory=Counter)


def write_piece(file: Path, piece: Piece) -> None:
    """Write a file atomically."""
    facts = piece.facts
    arrays = {name: getattr(facts, name) for name in ARRAYS}
    if facts.request_keys is facts.prompt_keys:
        del arrays["request_keys"]
    others = {
        "provenances": [asdict(provenance) for provenance in facts.provenances],
        "skipped": piece.skipped,
        "faulty": piece.faulty,
    }
    with open_atomic(file) as opened:
        np.savez(opened, others=np.frombuffer(json.dumps(others).encode(), dtype=np.uint8), **arrays)


def read_written_piece(file: Path) -> Piece | None:
    """Return the content of a file; None if it is missing or damaged, so that the piece is read again."""
    try:
        # Every array has a checksum in the file.
        with file.open("rb") as opened, np.load(opened) as arrays:
            others = json.loads(arrays["others"].tobytes())
            values = {name: arrays[name] for name in ARRAYS if name in arrays}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    values.setdefault("request_keys", values["prompt_keys"])
    provenances = tuple(Provenance(**provenance) for provenance in others["provenances"])
    return Piece(Facts(**values, provenances=provenances), Counter(others["skipped"]), Counter(others["faulty"]))
