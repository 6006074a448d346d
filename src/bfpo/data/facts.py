"""What cleaning and splitting know of a pair: hashes and labels in arrays, 42 bytes a pair, without its texts."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from json.encoder import encode_basestring
from typing import Any, NamedTuple, Self
from unicodedata import normalize

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_64_intdigest

from bfpo.core.conversation import (
    Answer,
    Conversation,
    answer_turns,
    in_nfc,
    last_request,
    prompt_key,
)
from bfpo.core.pairs import CELLS, Cell, PreferencePair, Provenance, SafetyLabels, TemplateInputs

Hashes = NDArray[np.uint64]

FAULTS = ("empty prompt", "empty answer", "identical answers")
# Pairs whose Python objects wait to become arrays.
_WAITING = 1 << 14


class PlainPair(NamedTuple):
    """Pair of a row that has texts, labels and an origin, and nothing else.

    Args:
        prompt: Text of the only turn, the user's.
        chosen: More helpful answer.
        rejected: Less helpful answer.
        cell: Index in `CELLS`; -1 for an unlabeled pair.
        provenance: Origin in the row.
    """

    prompt: str
    chosen: str
    rejected: str
    cell: int
    provenance: Provenance


LABELS: tuple[SafetyLabels | None, ...] = tuple(SafetyLabels(*(side == "s" for side in cell)) for cell in CELLS)


@dataclass(frozen=True)
class Facts:
    """Facts about N pairs, in their order. Arrays are (N,).

    Args:
        row_hashes: `row_id` of each pair as a number.
        prompt_keys: `prompt_key` as a number.
        request_keys: Key of the last user turn; those of the prompts if every prompt is a single turn.
        chosen_hashes: Hash of prompt, inputs of the template and chosen answer, in NFC.
        rejected_hashes: Same with the rejected answer.
        cells: Index in `CELLS`; -1 for an unlabeled pair.
        faults: 0, or 1 + index in `FAULTS`.
        origins: Index in `provenances`.
        provenances: Origins of the pairs.
    """

    row_hashes: Hashes
    prompt_keys: Hashes
    request_keys: Hashes
    chosen_hashes: Hashes
    rejected_hashes: Hashes
    cells: NDArray[np.int8]
    faults: NDArray[np.int8]
    origins: NDArray[np.int32]
    provenances: tuple[Provenance, ...]

    def __len__(self) -> int:
        return len(self.row_hashes)

    def take(self, rows: NDArray[Any]) -> Self:
        """Return the facts of some pairs, by index or by mask."""
        arrays = {name: getattr(self, name)[rows] for name in ARRAYS}
        if self.request_keys is self.prompt_keys:
            arrays["request_keys"] = arrays["prompt_keys"]
        return replace(self, **arrays)

    @property
    def is_buffer(self) -> NDArray[np.bool_]:
        """Whether each pair belongs to the buffer stream."""
        in_buffer = [provenance.stream == "buffer" for provenance in self.provenances]
        return np.array(in_buffer, dtype=bool)[self.origins]

    def cell_of(self, index: int) -> Cell | None:
        """Return the cell of a pair; None if it is unlabeled."""
        cell = int(self.cells[index])
        return CELLS[cell] if cell >= 0 else None

    def row_id(self, index: int) -> str:
        """Return the `row_id` of a pair."""
        return f"{int(self.row_hashes[index]):016x}"


ARRAYS = (
    *("row_hashes", "prompt_keys", "request_keys", "chosen_hashes", "rejected_hashes"),
    *("cells", "faults", "origins"),
)


def join_facts(parts: Sequence[Facts]) -> Facts:
    """Return the facts of several parts, one after the other; each origin is numbered once."""
    if len(parts) == 1:
        return parts[0]
    numbers: dict[Provenance, int] = {}
    origins = []
    for part in parts:
        renumbered = [numbers.setdefault(provenance, len(numbers)) for provenance in part.provenances]
        origins.append(np.array(renumbered, dtype=np.int32)[part.origins])
    arrays = {name: np.concatenate([getattr(part, name) for part in parts]) for name in ARRAYS[:2]}
    if all(part.request_keys is part.prompt_keys for part in parts):
        arrays["request_keys"] = arrays["prompt_keys"]
    else:
        arrays["request_keys"] = np.concatenate([part.request_keys for part in parts])
    for name in ARRAYS[3:-1]:
        arrays[name] = np.concatenate([getattr(part, name) for part in parts])
    return Facts(**arrays, origins=np.concatenate(origins), provenances=tuple(numbers))


class FactsBuilder:
    """Facts of pairs that are added one after the other."""

    def __init__(self) -> None:
        self._origins: dict[Provenance, int] = {}
        self._parts: list[Facts] = []
        self._clear()

    def _clear(self) -> None:
        self._ids: list[bytes] = []
        self._keys: list[bytes] = []
        self._requests: dict[int, int] = {}
        self._chosen: list[int] = []
        self._rejected: list[int] = []
        self._cells: list[int] = []
        self._faults: list[int] = []
        self._numbers: list[int] = []

    def __len__(self) -> int:
        return sum(map(len, self._parts)) + len(self._ids)

    def extend(self, pairs: Iterable[PlainPair | PreferencePair]) -> None:
        """Add pairs. The facts of a plain pair are those of its `PreferencePair`, without making one."""
        for pair in pairs:
            if type(pair) is PlainPair:
                self._add_plain(*pair)
            else:
                assert isinstance(pair, PreferencePair)
                self._add(pair)
            if len(self._ids) >= _WAITING:
                self._flush()

    def _add_plain(self, prompt: str, chosen: str, rejected: str, cell: int, provenance: Provenance) -> None:
        if prompt.isascii():
            key = " ".join(prompt.lower().split())
            self._keys.append(sha256(f"[{encode_basestring(key)}]".encode()).digest()[:8])
        else:
            self._keys.append(bytes.fromhex(prompt_key(prompt)))
            prompt = normalize("NFC", prompt)
        chosen = chosen if chosen.isascii() else normalize("NFC", chosen)
        rejected = rejected if rejected.isascii() else normalize("NFC", rejected)
        # The JSON text of `content_hash`, and of `_compared_hash`.
        conversation = f'[[["user", {encode_basestring(prompt)}]], '
        chosen_text, rejected_text = encode_basestring(chosen), encode_basestring(rejected)
        self._ids.append(sha256(f"{conversation}{chosen_text}, {rejected_text}]".encode()).digest()[:8])
        question = f"{conversation}[null, null], "
        self._chosen.append(xxh3_64_intdigest(f"{question}{chosen_text}]".encode()))
        self._rejected.append(xxh3_64_intdigest(f"{question}{rejected_text}]".encode()))
        chosen, rejected = chosen.strip(), rejected.strip()
        fault = 0
        if not chosen or not rejected or chosen == rejected or not prompt.strip():
            fault = 1 if not prompt.strip() else 3 if chosen and rejected else 2
        self._faults.append(fault)
        self._cells.append(cell)
        self._numbers.append(self._origins.setdefault(provenance, len(self._origins)))

    def _add(self, pair: PreferencePair) -> None:
        index = len(self._ids)
        self._ids.append(bytes.fromhex(pair.row_id))
        self._keys.append(bytes.fromhex(pair.prompt_key))
        if len(pair.prompt) > 1 or not pair.prompt[0].is_plain:
            self._requests[index] = int(prompt_key(last_request(pair.prompt)), 16)
        prompt = in_nfc(pair.prompt)
        self._chosen.append(_compared_hash(prompt, pair.inputs, in_nfc(pair.chosen)))
        self._rejected.append(_compared_hash(prompt, pair.inputs, in_nfc(pair.rejected)))
        self._cells.append(-1 if pair.cell is None else CELLS.index(pair.cell))
        fault = fault_of(pair)
        self._faults.append(0 if fault is None else 1 + FAULTS.index(fault))
        self._numbers.append(self._origins.setdefault(pair.provenance, len(self._origins)))

    def _flush(self) -> None:
        keys = _as_hashes(self._keys)
        requests = keys
        if self._requests:
            requests = keys.copy()
            requests[list(self._requests)] = np.array(list(self._requests.values()), dtype=np.uint64)
        self._parts.append(
            Facts(
                _as_hashes(self._ids),
                keys,
                requests,
                np.array(self._chosen, dtype=np.uint64),
                np.array(self._rejected, dtype=np.uint64),
                np.array(self._cells, dtype=np.int8),
                np.array(self._faults, dtype=np.int8),
                np.array(self._numbers, dtype=np.int32),
                tuple(self._origins),
            )
        )
        self._clear()

    def finish(self) -> Facts:
        """Return the facts of all pairs that were added."""
        self._flush()
        return join_facts(self._parts)


def _as_hashes(digests: list[bytes]) -> Hashes:
    return np.frombuffer(b"".join(digests), dtype=">u8").astype(np.uint64)


def _compared_hash(prompt: Answer, inputs: TemplateInputs, answer: Answer) -> int:
    """Return a hash of an answer with what two answers must share to be compared."""
    content = json.dumps((prompt, inputs, answer), ensure_ascii=False, default=lambda value: value.to_hash())
    return xxh3_64_intdigest(content.encode("utf-8", "surrogatepass"))


def fault_of(pair: PreferencePair) -> str | None:
    """Return why a pair can't be trained on; None if it can."""
    if pair.prompt[-1].role == "user" and pair.prompt[-1].is_empty:
        return "empty prompt"
    if any(map(is_empty_answer, pair.answers)):
        return "empty answer"
    chosen, rejected = map(_stripped, pair.answers)
    if chosen == rejected:
        return "identical answers"
    return None


def is_empty_answer(answer: Answer) -> bool:
    """Return whether the last turn of an answer says and calls nothing; reasoning alone is no answer."""
    return answer_turns(answer)[-1].is_empty


def _stripped(answer: Answer) -> Conversation:
    return tuple(replace(turn, content=turn.content.strip()) for turn in answer_turns(in_nfc(answer)))
