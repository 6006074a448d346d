"""Demonstrations for supervised fine-tuning: read, cleaned and split by prompt like pairs."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from bfpo.config.recipes import Source
from bfpo.core.pairs import Demonstration, PreferencePair
from bfpo.data.adapters import DEMONSTRATIONS
from bfpo.data.load import BROKEN, SourceReport, Why, is_broken, load_pairs, sample, source_report
from bfpo.data.prepare import is_held_out
from bfpo.data.rows import SourceRow, read_rows
from bfpo.errors import DataError


@dataclass
class DemonstrationPart:
    """The demonstrations of one source, with what happened to them.

    Args:
        report: Counts.
        train: What to imitate.
        eval: What to evaluate on.
    """

    report: SourceReport
    train: list[Demonstration]
    eval: list[Demonstration]


def prepare_demonstrations(
    sources: list[Source], *, holdout: float, limit: int | None = None, evaluated: frozenset[str] = frozenset()
) -> list[DemonstrationPart]:
    """Read, clean and split all data of a supervised recipe.

    Args:
        sources: What to read.
        holdout: Share of the prompts held out, by the same hash as for preference data.
        limit: Take at most so many of each source.
        evaluated: Keys of prompts that must not be trained on.

    Returns:
        One part per source; repeated demonstrations and empty completions are gone, and counted.

    Raises:
        DataError: If rows are malformed or nothing is left.
    """
    seen: set[str] = set()
    parts = []
    for source in sources:
        report, found = load_demonstrations(source, limit=limit)
        part = DemonstrationPart(report, [], [])
        for item in found:
            if item.row_id in seen:
                report.removed[Why("duplicate", None)] += 1
            elif not item.completion.strip():
                report.dropped[Why("empty answer", None)] += 1
            elif item.prompt_key in evaluated and not is_held_out(item.prompt_key, holdout):
                report.removed[Why("prompt of an evaluation set", None)] += 1
            else:
                seen.add(item.row_id)
                (part.eval if is_held_out(item.prompt_key, holdout) else part.train).append(item)
        parts.append(part)
    if not any(part.train for part in parts):
        raise DataError("no completions are left to train on; see holdout, limit and fraction in the recipe")
    return parts


def load_demonstrations(source: Source, *, limit: int | None = None) -> tuple[SourceReport, list[Demonstration]]:
    """Read the completions of a source and take the sample that it asks for.

    With an adapter of `DEMONSTRATIONS` rows are prompts with completions; with any other they are pairs, and
    `source.use` says which of their answers to imitate.

    Raises:
        DataError: If rows are malformed, or `use: safer` meets an unlabeled pair.
    """
    if source.adapter in DEMONSTRATIONS:
        read, license = DEMONSTRATIONS[source.adapter]
        report = source_report(source, source.license or license, "")
        found = list(_read(source, read, report))
        if not found:
            raise DataError(f"{report.name}: no rows in {source.path}")
        taken = sample(found, source, report, limit)
    else:
        report, pairs = load_pairs(source, "main", limit=limit)
        taken = [item for pair in pairs for item in _imitated(pair, source, report)]
        report.taken = len(taken)
    return report, [replace(item, dataset_name=report.name) for item in taken]


def _read(
    source: Source, read: Callable[[SourceRow], Demonstration], report: SourceReport
) -> Iterator[Demonstration]:
    for row in read_rows(source):
        try:
            item = read(row)
        except DataError as error:
            raise DataError(f"{row.where}: {error}") from None
        if is_broken(item.completion, *(message.content for message in item.prompt)):
            report.skip(BROKEN, fault=True)
        else:
            yield item


def _imitated(pair: PreferencePair, source: Source, report: SourceReport) -> list[Demonstration]:
    chosen, rejected = (Demonstration(pair.prompt, text) for text in (pair.chosen, pair.rejected))
    if source.use == "both":
        return [chosen, rejected]
    if source.use == "safer":
        if pair.labels is None:
            raise DataError(f"{report.name}: 'use: safer' needs safety labels, and this set has none")
        if not any(pair.labels):
            report.removed[Why("both answers unsafe", pair.cell)] += 1
            return []
        # Among two safe answers the more helpful one is imitated.
        return [chosen if pair.labels.chosen else rejected]
    return [chosen if source.use == "chosen" else rejected]
