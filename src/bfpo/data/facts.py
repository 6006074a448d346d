"""What cleaning and splitting know of a pair: hashes and labels in arrays, 46 bytes a pair, without its texts."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
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
from bfpo.core.pairs import CELLS, PreferencePair, Provenance, SafetyLabels, TemplateInputs

Hashes = NDArray[np.uint64]

FAULTS = ("empty prompt", "empty answer", "identical answers")
# Pairs whose facts are found together.
_BATCH = 1 << 12


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
class PairFacts:
    """What is held of N clean pairs, in their order. Arrays are (N,).

    Args:
        row_hashes: `row_id` of each pair as a number.
        prompt_keys: `prompt_key` as a number.
        cells: Index in `CELLS`; -1 for an unlabeled pair.
        origins: Index in `provenances`.
        provenances: Origins of the pairs.
    """

    row_hashes: Hashes
    prompt_keys: Hashes
    cells: NDArray[np.int8]
    origins: NDArray[np.int32]
    provenances: tuple[Provenance, ...]

    def __len__(self) -> int:
        return len(self.row_hashes)

    def take(self, rows: NDArray[Any]) -> Self:
        """Return the facts of some pairs, by index or by mask."""
        names = (field.name for field in fields(self) if field.name != "provenances")
        return replace(self, **{name: getattr(self, name)[rows] for name in names})

    def row_id(self, index: int) -> str:
        """Return the `row_id` of a pair."""
        return f"{int(self.row_hashes[index]):016x}"


@dataclass(frozen=True)
class Facts(PairFacts):
    """Facts about N pairs, in their order, from which cleaning follows. Arrays are (N,).

    Args:
        request_keys: Key of the last user turn; those of the prompts if every prompt is a single turn.
        chosen_hashes: Hash of prompt, inputs of the template and chosen answer, in NFC.
        rejected_hashes: Same with the rejected answer.
        faults: 0, or 1 + index in `FAULTS`.
    """

    request_keys: Hashes
    chosen_hashes: Hashes
    rejected_hashes: Hashes
    faults: NDArray[np.int8]

    def take(self, rows: NDArray[Any]) -> Self:
        """Return the facts of some pairs, by index or by mask."""
        taken = super().take(rows)
        if self.request_keys is self.prompt_keys:
            return replace(taken, request_keys=taken.prompt_keys)
        return taken

    def held(self) -> PairFacts:
        """Return what is still needed of clean pairs, without copying it."""
        return PairFacts(self.row_hashes, self.prompt_keys, self.cells, self.origins, self.provenances)


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

    def __len__(self) -> int:
        return sum(map(len, self._parts))

    def extend(self, pairs: Iterable[PlainPair | PreferencePair]) -> None:
        """Add pairs. The facts of a plain pair are those of its `PreferencePair`, without making one."""
        whole: list[PreferencePair] = []
        plain: list[PlainPair] = []
        for pair in pairs:
            if isinstance(pair, PreferencePair):
                if plain:
                    self._add_plain(plain)
                    plain = []
                whole.append(pair)
                if len(whole) == _BATCH:
                    self._add(whole)
                    whole = []
            else:
                if whole:
                    self._add(whole)
                    whole = []
                plain.append(pair)
                if len(plain) == _BATCH:
                    self._add_plain(plain)
                    plain = []
        if plain:
            self._add_plain(plain)
        if whole:
            self._add(whole)

    def finish(self) -> Facts:
        """Return the facts of all pairs that were added."""
        if not self._parts:
            self._add([])
        return join_facts(self._parts)

    def _add(self, pairs: Sequence[PreferencePair]) -> None:
        prompt_keys = _as_numbers(pair.prompt_key for pair in pairs)
        are_turns = all(len(pair.prompt) == 1 and pair.prompt[0].is_plain for pair in pairs)
        cells = [-1 if pair.cell is None else CELLS.index(pair.cell) for pair in pairs]
        faults = [fault_of(pair) for pair in pairs]
        prompts = [in_nfc(pair.prompt) for pair in pairs]
        chosen, rejected = (
            np.array(
                [
                    _compared_hash(prompt, pair.inputs, in_nfc(pair.answers[side]))
                    for prompt, pair in zip(prompts, pairs, strict=True)
                ],
                dtype=np.uint64,
            )
            for side in (0, 1)
        )
        self._parts.append(
            Facts(
                row_hashes=_as_numbers(pair.row_id for pair in pairs),
                prompt_keys=prompt_keys,
                request_keys=(
                    prompt_keys if are_turns else _as_numbers(prompt_key(last_request(pair.prompt)) for pair in pairs)
                ),
                chosen_hashes=chosen,
                rejected_hashes=rejected,
                cells=np.array(cells, dtype=np.int8),
                faults=np.array([0 if fault is None else 1 + FAULTS.index(fault) for fault in faults], dtype=np.int8),
                origins=self._number([pair.provenance for pair in pairs]),
                provenances=tuple(self._origins),
            )
        )

    def _add_plain(self, pairs: Sequence[PlainPair]) -> None:
        """Add plain pairs, column by column: a call for each pair would take longer than the work."""
        columns: tuple[tuple[str, ...], ...]
        *columns, cells, origins = zip(*pairs, strict=True)  # type: ignore[assignment]
        keys = [
            sha256(f"[{encode_basestring(' '.join(text.lower().split()))}]".encode()).digest()[:8]
            if text.isascii()
            else bytes.fromhex(prompt_key(text))
            for text in columns[0]
        ]
        texts = [[text if text.isascii() else normalize("NFC", text) for text in column] for column in columns]
        asked, chosen, rejected = (list(map(encode_basestring, column)) for column in texts)
        # The JSON texts of `content_hash`, and of `_compared_hash`.
        conversations = [f'[[["user", {text}]], ' for text in asked]
        ids = [
            sha256(f"{conversation}{text}, {other}]".encode()).digest()[:8]
            for conversation, text, other in zip(conversations, chosen, rejected, strict=True)
        ]
        chosen_hashes, rejected_hashes = (
            np.array(
                [
                    xxh3_64_intdigest(f"{conversation}[null, null], {text}]".encode())
                    for conversation, text in zip(conversations, column, strict=True)
                ],
                dtype=np.uint64,
            )
            for column in (chosen, rejected)
        )
        stripped = zip(*(map(str.strip, column) for column in texts), strict=True)
        prompt_keys = _first_bytes(keys)
        self._parts.append(
            Facts(
                row_hashes=_first_bytes(ids),
                prompt_keys=prompt_keys,
                request_keys=prompt_keys,
                chosen_hashes=chosen_hashes,
                rejected_hashes=rejected_hashes,
                cells=np.array(cells, dtype=np.int8),
                faults=np.array(
                    [
                        0 if prompt and text and other and text != other else _fault_code(prompt, text, other)
                        for prompt, text, other in stripped
                    ],
                    dtype=np.int8,
                ),
                origins=self._number(origins),
                provenances=tuple(self._origins),
            )
        )

    def _number(self, origins: Sequence[Provenance]) -> NDArray[np.int32]:
        # Most pairs share one object, whose hash takes longer than its identity.
        numbers = {id(origin): origin for origin in origins}
        by_id = {key: self._origins.setdefault(origin, len(self._origins)) for key, origin in numbers.items()}
        return np.array([by_id[id(origin)] for origin in origins], dtype=np.int32)


def _fault_code(prompt: str, chosen: str, rejected: str) -> int:
    """Return the fault of texts without white space around them, one of which is empty or equal to another."""
    if not prompt:
        return 1 + FAULTS.index("empty prompt")
    return 1 + FAULTS.index("identical answers" if chosen and rejected else "empty answer")


def _as_numbers(hexadecimal: Iterable[str]) -> Hashes:
    return np.array([int(text, 16) for text in hexadecimal], dtype=np.uint64)


def _first_bytes(digests: list[bytes]) -> Hashes:
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
