"""Duplicates, contradictions and faults of pairs, found in arrays of hashes."""

from collections import Counter
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bfpo.core.pairs import CELLS
from bfpo.data.facts import FAULTS, Facts, Hashes
from bfpo.data.load import Reason, SourceReport
from bfpo.errors import DataError

Mask = NDArray[np.bool_]

_CONFLICTS = ("an answer is labeled both safe and unsafe", "the pair occurs in both orders")


def clean(sources: list[tuple[SourceReport, Facts]], conflicts: Literal["drop", "keep", "error"]) -> list[Mask]:
    """Return which pairs can be trained on, and count the others by source, reason and cell.

    Two pairs are the same if their row ids, labels and streams are. Answers are compared by a hash of 64 bits.

    Args:
        sources: Facts about the pairs of each source, with the report that counts them.
        conflicts: What to do with contradictions.

    Returns:
        Masks of the clean pairs of each source.

    Raises:
        DataError: If there are conflicts, and `conflicts` is `error`.
    """
    sizes = [len(facts) for _, facts in sources]
    ends = np.cumsum(sizes)
    if not sources:
        return []
    all_facts = [facts for _, facts in sources]
    cells = np.concatenate([facts.cells for facts in all_facts])
    # A pair in both streams, or with other labels, is another one.
    kinds = np.concatenate([_stream_codes(facts) for facts in all_facts]) * np.int8(8) + cells
    is_duplicate = ~_is_first(np.concatenate([facts.row_hashes for facts in all_facts]), kinds)
    chosen = np.concatenate([facts.chosen_hashes for facts in all_facts])
    rejected = np.concatenate([facts.rejected_hashes for facts in all_facts])
    conflict = np.where(_has_two_labels(chosen, rejected, cells), 1, 0).astype(np.int8)
    conflict[(conflict == 0) & _is_in_both_orders(chosen, rejected)] = 2
    del chosen, rejected, kinds
    kept = []
    for (report, facts), start, end in zip(sources, ends - sizes, ends, strict=True):
        part = slice(int(start), int(end))
        masks = _Masks(is_duplicate[part], facts.faults, conflict[part])
        kept.append(_count(report, facts, masks, conflicts))
    return kept


class _Masks(NamedTuple):
    duplicate: Mask
    fault: NDArray[np.int8]
    conflict: NDArray[np.int8]


def _count(
    report: SourceReport, facts: Facts, masks: _Masks, conflicts: Literal["drop", "keep", "error"]
) -> NDArray[np.bool_]:
    unique = ~masks.duplicate
    faulty = unique & (masks.fault > 0)
    conflicting = unique & ~faulty & (masks.conflict > 0)
    if conflicts == "error" and conflicting.any():
        first = int(np.argmax(conflicting))
        raise DataError(
            f"{report.name}: row {facts.row_id(first)}: {_CONFLICTS[masks.conflict[first] - 1]}; fix the data, or "
            "set conflicts to drop or keep"
        )
    count_reasons(report.removed, ("duplicate",), masks.duplicate.astype(np.int8), facts.cells)
    dropped = np.where(faulty, masks.fault, 0)
    texts: tuple[str, ...] = FAULTS
    if conflicts == "drop":
        dropped = np.where(conflicting, len(FAULTS) + masks.conflict, dropped)
        texts = (*FAULTS, *_CONFLICTS)
    elif conflicts == "keep":
        noted = tuple(f"kept though {text}" for text in _CONFLICTS)
        count_reasons(report.noted, noted, np.where(conflicting, masks.conflict, 0), facts.cells)
    count_reasons(report.dropped, texts, dropped, facts.cells)
    mask: Mask = unique & (dropped == 0)
    return mask


def count_reasons(
    counter: Counter[Reason], texts: tuple[str, ...], codes: NDArray[Any], cells: NDArray[np.int8]
) -> None:
    """Count pairs by reason and cell, in the order in which each first occurs.

    Args:
        counter: Counts to add to.
        texts: Reasons.
        codes: 0, or 1 + index of the reason, (N,).
        cells: Index in `CELLS`, or -1, (N,).
    """
    rows = np.flatnonzero(codes)
    width = len(CELLS) + 1
    combined = (codes[rows].astype(np.int64) - 1) * width + cells[rows] + 1
    values, firsts, counts = np.unique(combined, return_index=True, return_counts=True)
    for index in np.argsort(firsts):
        code, cell = divmod(int(values[index]), width)
        counter[Reason(texts[code], CELLS[cell - 1] if cell else None)] += int(counts[index])


def _stream_codes(facts: Facts) -> NDArray[np.int8]:
    codes = {None: 0, "main": 1, "buffer": 2}
    by_origin = np.array([codes[provenance.stream] for provenance in facts.provenances], dtype=np.int8)
    return by_origin[facts.origins]


def _is_first(hashes: Hashes, kinds: NDArray[np.int8]) -> Mask:
    """Return whether each value of a hash and a kind occurs here first."""
    rows = _repeated(hashes)
    rows = rows[np.lexsort((rows, kinds[rows], hashes[rows]))]
    again = (hashes[rows][1:] == hashes[rows][:-1]) & (kinds[rows][1:] == kinds[rows][:-1])
    first = np.ones(len(hashes), dtype=bool)
    first[rows[1:][again]] = False
    return first


def _has_two_labels(chosen: Hashes, rejected: Hashes, cells: NDArray[np.int8]) -> Mask:
    """Return whether one of a pair's answers is labeled both safe and unsafe, in any pair."""
    labeled = cells >= 0
    # Cells in the order ss, su, us, uu.
    chosen_safe, rejected_safe = cells < 2, cells % 2 == 0
    safe, unsafe = (
        distinct(
            np.concatenate(
                [chosen[labeled & (chosen_safe == is_safe)], rejected[labeled & (rejected_safe == is_safe)]]
            )
        )
        for is_safe in (True, False)
    )
    both = np.intersect1d(safe, unsafe, assume_unique=True)
    return is_among(chosen, both) | is_among(rejected, both)


def _is_in_both_orders(chosen: Hashes, rejected: Hashes) -> Mask:
    """Return whether the pair with the two answers exchanged exists, too."""
    low, high = np.minimum(chosen, rejected), np.maximum(chosen, rejected)
    rows = _repeated(low)
    rows = rows[np.lexsort((high[rows], low[rows]))]
    found = np.zeros(len(chosen), dtype=bool)
    if len(rows) == 0:
        return found
    new = (low[rows][1:] != low[rows][:-1]) | (high[rows][1:] != high[rows][:-1])
    starts = np.flatnonzero(np.concatenate([[True], new]))
    sizes = np.diff(np.append(starts, len(rows)))
    in_order = np.add.reduceat((chosen[rows] == low[rows]).astype(np.int64), starts)
    found[rows] = np.repeat((in_order > 0) & (in_order < sizes), sizes)
    return found


def _repeated(hashes: Hashes) -> NDArray[np.int64]:
    """Return the indices of the values that occur several times."""
    order = np.argsort(hashes)
    ordered = hashes[order]
    same = ordered[1:] == ordered[:-1]
    repeated = np.zeros(len(hashes), dtype=bool)
    repeated[1:] |= same
    repeated[:-1] |= same
    rows: NDArray[np.int64] = order[repeated]
    return rows


def distinct(hashes: Hashes) -> Hashes:
    """Return the values in ascending order, each once; numpy's `unique` finds random numbers twenty times slower."""
    ordered = np.sort(hashes)
    values: Hashes = ordered[np.append(True, ordered[1:] != ordered[:-1])] if len(ordered) else ordered
    return values


def is_among(hashes: Hashes, ordered: Hashes) -> Mask:
    """Return which hashes are among others, which are in ascending order."""
    if len(ordered) == 0:
        return np.zeros(len(hashes), dtype=bool)
    nearest = np.searchsorted(ordered, hashes).clip(max=len(ordered) - 1)
    mask: Mask = ordered[nearest] == hashes
    return mask
