"""One source: its pairs, sampled, and a report of everything that happened to its rows."""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from bfpo.config.recipes import Source
from bfpo.core.files import file_hash
from bfpo.core.pairs import Cell, PreferencePair, SafetyLabels, StreamName
from bfpo.data.adapters import ADAPTERS, SkipRow
from bfpo.data.rows import local_files, read_rows
from bfpo.errors import DataError, RecipeError, did_you_mean

Item = TypeVar("Item")


class Why(NamedTuple):
    """Why pairs of one cell were dropped, removed or noted."""

    reason: str
    cell: Cell | None


@dataclass
class SourceReport:
    """What happened to the rows of one source; every count is of pairs (or completions) unless it says rows.

    Args:
        name: Data set name, unique within a run.
        source: The recipe's source.
        license: License of the data; "" when unknown.
        note: What the adapter warns of.
        files: Local file → SHA-256.
        skipped: Rows without a pair, by reason.
        faulty: Those of `skipped` that are faults and count against the cap.
        read: Pairs that the adapter gave.
        taken: Pairs left after `fraction` and `limit`.
        dropped: Pairs lost to a fault, by reason and cell; these count against the cap.
        removed: Pairs left out on purpose (duplicates, leaks, what the loss doesn't train on).
        noted: Pairs kept that are worth knowing about (truncated, contradictory).
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
    dropped: Counter[Why] = field(default_factory=Counter)
    removed: Counter[Why] = field(default_factory=Counter)
    noted: Counter[Why] = field(default_factory=Counter)

    def skip(self, reason: str, *, fault: bool) -> None:
        """Count a row that holds no pair; a fault counts against the cap."""
        self.skipped[reason] += 1
        if fault:
            self.faulty[reason] += 1

    def check_cap(self, max_dropped: float) -> None:
        """Stop a run that would lose more than a share of this source.

        Raises:
            DataError: If it would; with the count of each reason.
        """
        # Faulty rows were met before the sample was taken: each loss is a share of what it was taken from.
        faulty, dropped = self.faulty.total(), self.dropped.total()
        losses = ((faulty, self.read + faulty), (dropped, self.taken))
        lost, total = max(losses, key=lambda loss: loss[0] / max(loss[1], 1))
        if lost > max_dropped * total:
            reasons = Counter(self.faulty)
            for (reason, _), count in self.dropped.items():
                reasons[reason] += count
            counts = ", ".join(f"{reason}: {count}" for reason, count in reasons.most_common())
            raise DataError(
                f"{self.name}: {lost} of {total} pairs would be dropped ({counts}), more than max_dropped = "
                f"{max_dropped:g}; mend the data, or raise max_dropped in the recipe if this is meant"
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


def by_reason(counts: Counter[Why]) -> dict[str, dict[str, int]]:
    """Return the counts as reason → cell → number."""
    table: dict[str, dict[str, int]] = {}
    for (reason, cell), count in sorted(counts.items(), key=str):
        table.setdefault(reason, {})[cell or "unlabeled"] = count
    return table


def load_pairs(
    source: Source, stream: StreamName, *, limit: int | None = None
) -> tuple[SourceReport, list[PreferencePair]]:
    """Read the pairs of a source and take the sample that it asks for.

    Args:
        source: Where and how to read.
        stream: The stream of pairs that don't name one themselves.
        limit: A further limit, as from `--limit`.

    Returns:
        The report, and pairs that all have a data set name and a stream.

    Raises:
        DataError: If rows are malformed, some pairs are labeled and others are not, or the file puts a pair of
            the main stream into a source of the buffer.
        RecipeError: If the adapter is unknown.
    """
    adapter = ADAPTERS.get(source.adapter)
    if adapter is None:
        raise RecipeError(f"adapter is '{source.adapter}'; {did_you_mean(source.adapter, list(ADAPTERS))}")
    report = source_report(source, source.license or adapter.license, adapter.note)
    found: list[PreferencePair] = []
    for item in adapter.read(read_rows(source), source):
        if isinstance(item, SkipRow):
            report.skip(item.reason, fault=item.fault)
        elif is_broken(item.chosen, item.rejected, *(message.content for message in item.prompt)):
            report.skip(BROKEN, fault=True)
        else:
            found.append(item)
    if not found:
        raise DataError(f"{report.name}: no pairs in {source.path} (rows skipped: {dict(report.skipped)})")
    _check_half_labeled(f"{report.name} ({source.path})", found)
    return report, [_completed(pair, report, stream) for pair in sample(found, source, report, limit)]


def source_report(source: Source, license: str, note: str) -> SourceReport:
    """Begin the report of a source: its name, license and the hashes of its files."""
    files = local_files(source)
    if files:
        # A file of a known data set is named by it: 'test' would say nothing.
        name = _stem(files[0]) if source.adapter in ("pairs", "demonstrations") else source.adapter
    else:
        name = source.path if isinstance(source.path, str) else source.path[0]
    hashes = {str(file): file_hash(file) for file in files}
    return SourceReport(name, source, license, note, hashes)


BROKEN = "half a character in a text (a surrogate without its pair)"


def is_broken(*texts: str) -> bool:
    """Return whether a text can't be written or tokenized: JSON that was cut by length holds half characters."""
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        return True
    return False


def _stem(file: Path) -> str:
    return file.name.partition(".")[0] or file.name


def _completed(pair: PreferencePair, report: SourceReport, stream: StreamName) -> PreferencePair:
    origin = pair.provenance
    if stream == "buffer" and origin.stream == "main":
        raise DataError(f"{report.name}: a source of the buffer holds pairs of stream 'main'; list the file in data:")
    labels, label_source = pair.labels, origin.safety_label_source
    if labels is None and report.source.assume_safe:
        labels, label_source = SafetyLabels(True, True), "assumed"
    origin = replace(
        origin,
        dataset_name=origin.dataset_name or report.name,
        safety_label_source=label_source,
        stream=origin.stream or stream,
    )
    return replace(pair, labels=labels, provenance=origin)


def _check_half_labeled(name: str, pairs: Sequence[PreferencePair]) -> None:
    unlabeled = sum(pair.labels is None for pair in pairs)
    if 0 < unlabeled < len(pairs):
        number = next(index for index, pair in enumerate(pairs, start=1) if pair.labels is None)
        raise DataError(
            f"{name}: {unlabeled} of {len(pairs)} pairs have no safety labels (the first is pair {number}); "
            "label all of them or none"
        )


def sample(items: list[Item], source: Source, report: SourceReport, limit: int | None) -> list[Item]:
    """Take the share of the items that `fraction`, `limit` and `--limit` ask for, in their order.

    Raises:
        DataError: If nothing would be left.
    """
    report.read = len(items)
    count = len(items) if source.fraction is None else int(source.fraction * len(items))
    count = min(count, *(number for number in (source.limit, limit) if number is not None), count)
    report.taken = count
    if count == 0:
        raise DataError(f"{report.name}: fraction {source.fraction} of {len(items)} pairs leaves none")
    if source.sample == "head" or count == len(items):
        return items[:count]
    chosen = sorted(random.Random(source.seed).sample(range(len(items)), count))
    return [items[index] for index in chosen]
