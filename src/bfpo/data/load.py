"""The sampled pairs of one source, with a report on what happened to its rows."""

import random
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import ArrayLike

from bfpo.config.recipes import Source
from bfpo.core.files import file_hash
from bfpo.core.pairs import Cell, PreferencePair, Provenance, SafetyLabels, StreamName
from bfpo.data.adapters import find_adapter, read_pairs
from bfpo.data.pair_formats import SkipRow
from bfpo.data.rows import local_files, read_rows
from bfpo.errors import DataError

Sampled = TypeVar("Sampled")
Read = TypeVar("Read")

LONE_SURROGATE = "lone surrogate in a text"
NOT_A_PREFIX = "prompt is not a prefix of the conversation"
# Share of such prompts that is always accepted: tokens can merge across the end of a prompt.
_MAX_NOT_A_PREFIX = 0.1


class Reason(NamedTuple):
    """Reason why pairs of a cell were dropped, removed or noted.

    Args:
        text: Short description.
        cell: Cell of the pairs; None for unlabeled pairs and for completions.
    """

    text: str
    cell: Cell | None


@dataclass
class SourceReport:
    """What happened to the rows of a source; all counts are of pairs or completions, except where they are of rows.

    Args:
        name: Name of the data set, unique within a run.
        source: Source in the recipe.
        license: License of the data; "" if unknown.
        note: Caution of the adapter.
        files: SHA-256 of each local file.
        skipped: Number of rows without a pair, by reason.
        faulty: Skipped rows that are faults and count against the cap.
        read: Number of pairs that were read.
        taken: Number of pairs after `fraction` and `limit`.
        dropped: Pairs with a fault, which count against the cap.
        removed: Pairs that are left out for another reason (duplicates, leaks, cells that the loss doesn't train on).
        noted: Pairs that are kept with a remark (truncated, contradictory).
    """

    name: str
    source: Source
    license: str = ""
    note: str = ""
    files: dict[str, str] = field(default_factory=dict)
    skipped: Counter[str] = field(default_factory=Counter)
    faulty: Counter[str] = field(default_factory=Counter)
    read: int = 0
    taken: int = 0
    dropped: Counter[Reason] = field(default_factory=Counter)
    removed: Counter[Reason] = field(default_factory=Counter)
    noted: Counter[Reason] = field(default_factory=Counter)

    def skip(self, reason: str, *, fault: bool) -> None:
        """Count a row without a pair; a fault counts against the cap."""
        self.skipped[reason] += 1
        if fault:
            self.faulty[reason] += 1

    def check_cap(self, max_dropped: float) -> None:
        """Check that no more than a share of this source is dropped.

        Args:
            max_dropped: Maximum share, in [0, 1).

        Raises:
            DataError: If more is dropped, or more prompts aren't a prefix of their conversation; the message has the
                count of each reason.
        """
        # Faulty rows are a share of all rows, dropped pairs are a share of the sample.
        faulty, dropped = self.faulty.total(), self.dropped.total()
        shares = ((faulty, self.read + faulty), (dropped, self.taken))
        count, total = max(shares, key=lambda share: share[0] / max(share[1], 1))
        if count > max_dropped * total:
            reasons = Counter(self.faulty)
            for reason, pairs in self.dropped.items():
                reasons[reason.text] += pairs
            counts = ", ".join(f"{reason}: {pairs}" for reason, pairs in reasons.most_common())
            raise DataError(
                f"{self.name}: {count} of {total} pairs would be dropped ({counts}), more than max_dropped = "
                f"{max_dropped:g}; fix the data, or raise max_dropped in the recipe if this is intended"
            )
        mismatched = sum(pairs for reason, pairs in self.noted.items() if reason.text == NOT_A_PREFIX)
        if mismatched > max(max_dropped, _MAX_NOT_A_PREFIX) * self.taken:
            raise DataError(
                f"{self.name}: in {mismatched} of {self.taken} pairs the chat template renders the prompt for "
                "generation differently from the conversation, so the model would be trained on prompts that it is "
                "never asked; set `text.chat_template`, or raise max_dropped in the recipe if this "
                "is intended"
            )

    def to_json(self) -> dict[str, Any]:
        """Return the report for a manifest."""
        return {
            "name": self.name,
            "source": self.source.model_dump(exclude_defaults=True),
            "license": self.license,
            "note": self.note,
            "files": self.files,
            "rows_skipped": dict(self.skipped),
            "pairs_read": self.read,
            "pairs_taken": self.taken,
            "dropped": by_reason(self.dropped),
            "removed": by_reason(self.removed),
            "noted": by_reason(self.noted),
        }


def by_reason(counts: Counter[Reason]) -> dict[str, dict[str, int]]:
    """Return counts by reason and cell."""
    table: dict[str, dict[str, int]] = {}
    for reason, count in sorted(counts.items(), key=str):
        table.setdefault(reason.text, {})[reason.cell or "unlabeled"] = count
    return table


def load_pairs(
    source: Source, stream: StreamName, *, limit: int | None = None, ignored_keys: Collection[str] = ()
) -> tuple[SourceReport, list[PreferencePair]]:
    """Read the pairs of a source, and take the sample that it specifies.

    Args:
        source: Source of the pairs.
        stream: Stream of pairs without one.
        limit: Maximum number of pairs, besides the source's own limit.
        ignored_keys: Keys of messages that are left out.

    Returns:
        The report, and the pairs with data set name and stream.

    Raises:
        DataError: If a row is malformed, only some pairs are labeled, or a source of the buffer has a pair of the
            main stream.
        RecipeError: If the adapter is unknown or can't be imported.
    """
    adapter = find_adapter(source.adapter)
    report = make_source_report(source, source.license or adapter.license, adapter.note)
    pairs = list(read_usable(read_pairs(adapter, read_rows(source, ignored_keys), source), report))
    if not pairs:
        raise DataError(f"{report.name}: no pairs in {source.path} (rows skipped: {dict(report.skipped)})")
    check_all_or_none_labeled(f"{report.name} ({source.path})", [pair.labels is not None for pair in pairs])
    return report, [_with_provenance(pair, report, stream) for pair in sample(pairs, source, report, limit)]


def read_usable(items: Iterable[Read | SkipRow], report: SourceReport) -> Iterator[Read]:
    """Yield the pairs among items, and count rows without one, or with a text that can't be written."""
    for item in items:
        if isinstance(item, SkipRow):
            report.skip(item.reason, fault=item.fault)
        # The reader of plain rows lets no lone surrogate through.
        elif isinstance(item, PreferencePair) and has_lone_surrogate(*item.texts(), *item.inputs.texts()):
            report.skip(LONE_SURROGATE, fault=True)
        else:
            yield item


def make_source_report(source: Source, license: str, note: str) -> SourceReport:
    """Return an empty report of a source, with its name, its license and the hashes of its files."""
    files = local_files(source)
    if files:
        # A file of a published set is named after the set: a name such as 'test' would say nothing.
        is_generic = source.adapter in ("pairs", "demonstrations") or ":" in source.adapter
        name = _stem(files[0]) if is_generic else source.adapter
    else:
        name = source.path if isinstance(source.path, str) else source.path[0]
    hashes = {str(file): file_hash(file) for file in files}
    return SourceReport(name, source, license, note, hashes)


def has_lone_surrogate(*texts: str) -> bool:
    """Return whether a text has a lone surrogate, as in truncated JSON: it can't be written or tokenized."""
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        return True
    return False


def _stem(file: Path) -> str:
    return file.name.partition(".")[0] or file.name


def _with_provenance(pair: PreferencePair, report: SourceReport, stream: StreamName) -> PreferencePair:
    is_labeled = pair.labels is not None
    provenance = final_provenance(pair.provenance, report, stream, is_labeled=is_labeled)
    labels = SafetyLabels(True, True) if not is_labeled and report.source.assume_safe else pair.labels
    return replace(pair, labels=labels, provenance=provenance)


def final_provenance(
    provenance: Provenance, report: SourceReport, stream: StreamName, *, is_labeled: bool
) -> Provenance:
    """Return the provenance of a pair with its data set, its stream and the source of its labels.

    Args:
        provenance: Provenance in the row.
        report: Report on the source.
        stream: Stream of pairs without one.
        is_labeled: Whether the row has labels.

    Raises:
        DataError: If a source of the buffer has a pair of the main stream.
    """
    if stream == "buffer" and provenance.stream == "main":
        raise DataError(f"{report.name}: a source of the buffer has pairs of stream 'main'; list the file in data:")
    label_source = provenance.safety_label_source
    if not is_labeled and report.source.assume_safe:
        label_source = "assumed"
    elif is_labeled and label_source is None:
        # A custom adapter need not set it.
        label_source = "dataset"
    return replace(
        provenance,
        dataset_name=provenance.dataset_name or report.name,
        safety_label_source=label_source,
        stream=provenance.stream or stream,
    )


def check_all_or_none_labeled(name: str, is_labeled: ArrayLike) -> None:
    """Check that all pairs of a source are labeled, or none.

    Args:
        name: Name of the source, for the message.
        is_labeled: Whether each pair is, (N,).

    Raises:
        DataError: If only some are; the message has their number, and the first.
    """
    labeled = np.asarray(is_labeled, dtype=bool)
    unlabeled = len(labeled) - int(labeled.sum())
    if 0 < unlabeled < len(labeled):
        raise DataError(
            f"{name}: {unlabeled} of {len(labeled)} pairs have no safety labels (the first is pair "
            f"{int(np.argmin(labeled)) + 1}); label all of them or none"
        )


def sample(pairs: list[Sampled], source: Source, report: SourceReport, limit: int | None) -> list[Sampled]:
    """Return the sample of pairs or demonstrations that `sampled_rows` chooses, in their order."""
    return [pairs[row] for row in sampled_rows(len(pairs), source, report, limit)]


def sampled_rows(number: int, source: Source, report: SourceReport, limit: int | None) -> Sequence[int]:
    """Return the rows of the sample that `fraction` and the limits specify, in ascending order.

    Args:
        number: Number of all pairs or demonstrations of the source.
        source: Source with `fraction` and `limit`.
        report: Report that counts what was read and taken.
        limit: Maximum size of the sample, besides the source's own limit.

    Raises:
        DataError: If the sample would be empty.
    """
    report.read = number
    count = number if source.fraction is None else int(source.fraction * number)
    count = min(count, *(most for most in (source.limit, limit) if most is not None), count)
    report.taken = count
    if count == 0:
        raise DataError(f"{report.name}: fraction {source.fraction} of {number} pairs leaves none")
    if source.sample == "head" or count == number:
        return range(count)
    return sorted(random.Random(source.seed).sample(range(number), count))
