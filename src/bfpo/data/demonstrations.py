"""Demonstrations for supervised fine-tuning, which are cleaned and split by prompt like pairs."""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace

from bfpo.config.recipes import Source
from bfpo.core.pairs import Demonstration, PreferencePair
from bfpo.data.adapters import DEMONSTRATIONS
from bfpo.data.facts import is_empty_answer
from bfpo.data.load import (
    LONE_SURROGATE,
    Reason,
    SourceReport,
    has_lone_surrogate,
    load_pairs,
    make_source_report,
    sample,
)
from bfpo.data.pair_formats import SkipRow
from bfpo.data.prepare import is_held_out
from bfpo.data.rows import SourceRow, read_rows
from bfpo.errors import DataError


@dataclass
class DemonstrationPart:
    """Demonstrations of one source.

    Args:
        report: Report on the source.
        train: Demonstrations to train on.
        eval: Demonstrations to evaluate on.
    """

    report: SourceReport
    train: list[Demonstration]
    eval: list[Demonstration]


def prepare_demonstrations(
    sources: list[Source],
    *,
    holdout: float,
    limit: int | None = None,
    evaluated: frozenset[str] = frozenset(),
    ignored_keys: Collection[str] = (),
) -> list[DemonstrationPart]:
    """Read, clean and split the data of a recipe for supervised fine-tuning.

    Args:
        sources: Sources of the demonstrations.
        holdout: Share of the prompts that are held out, by the same hash as for preference data.
        limit: Maximum number of demonstrations from each source.
        evaluated: Keys of prompts that must not be trained on.
        ignored_keys: Keys of messages that are left out.

    Returns:
        One part per source, without duplicates and empty completions, which are counted.

    Raises:
        DataError: If a row is malformed or nothing is left to train on.
    """
    seen: set[str] = set()
    parts = []
    for source in sources:
        report, demonstrations = load_demonstrations(source, limit=limit, ignored_keys=ignored_keys)
        part = DemonstrationPart(report, [], [])
        for demonstration in demonstrations:
            held_out = is_held_out(demonstration.prompt_key, holdout)
            if demonstration.row_id in seen:
                report.removed[Reason("duplicate", None)] += 1
            elif is_empty_answer(demonstration.completion):
                report.dropped[Reason("empty answer", None)] += 1
            elif demonstration.prompt_key in evaluated and not held_out:
                report.removed[Reason("prompt of an evaluation set", None)] += 1
            else:
                seen.add(demonstration.row_id)
                (part.eval if held_out else part.train).append(demonstration)
        parts.append(part)
    if not any(part.train for part in parts):
        raise DataError("no completions are left to train on; see holdout, limit and fraction in the recipe")
    return parts


def load_demonstrations(
    source: Source, *, limit: int | None = None, ignored_keys: Collection[str] = ()
) -> tuple[SourceReport, list[Demonstration]]:
    """Read the demonstrations of a source, and take the sample that it specifies.

    The adapters of `DEMONSTRATIONS` read prompts with completions. All others read pairs, and `source.use` says which
    answers are imitated.

    Args:
        source: Source of the demonstrations.
        limit: Maximum number of demonstrations, besides the source's own limit.
        ignored_keys: Keys of messages that are left out.

    Raises:
        DataError: If a row is malformed, or a pair is unlabeled with `use: safer`.
        RecipeError: If the adapter is unknown or can't be imported.
    """
    if source.adapter in DEMONSTRATIONS:
        convert, license = DEMONSTRATIONS[source.adapter]
        report = make_source_report(source, source.license or license, "")
        demonstrations = list(_read_demonstrations(source, convert, report, ignored_keys))
        if not demonstrations:
            raise DataError(f"{report.name}: no rows in {source.path}")
        demonstrations = sample(demonstrations, source, report, limit)
    else:
        report, pairs = load_pairs(source, "main", limit=limit, ignored_keys=ignored_keys)
        demonstrations = [answer for pair in pairs for answer in _imitated_answers(pair, source, report)]
        report.taken = len(demonstrations)
    return report, [replace(demonstration, dataset_name=report.name) for demonstration in demonstrations]


def _read_demonstrations(
    source: Source, convert: Callable[[SourceRow], Demonstration], report: SourceReport, ignored_keys: Collection[str]
) -> Iterator[Demonstration]:
    for row in read_rows(source, ignored_keys):
        with row.locate_errors():
            try:
                demonstration = convert(row)
            except SkipRow as skip:
                report.skip(skip.reason, fault=skip.fault)
                continue
        if has_lone_surrogate(*demonstration.texts(), *demonstration.inputs.texts()):
            report.skip(LONE_SURROGATE, fault=True)
        else:
            yield demonstration


def _imitated_answers(pair: PreferencePair, source: Source, report: SourceReport) -> list[Demonstration]:
    use = source.use or ("chosen" if pair.labels is None else "safer")
    sides = {"both": (0, 1), "chosen": (0,), "rejected": (1,)}.get(use)
    if sides is None:
        if pair.labels is None:
            raise DataError(f"{report.name}: 'use: safer' needs safety labels, and this set has none")
        if not any(pair.labels):
            report.removed[Reason("both answers unsafe", pair.cell)] += 1
            return []
        # The more helpful of two safe answers is imitated.
        sides = (0,) if pair.labels.chosen else (1,)
    answers = []
    for side in sides:
        # Imitated, it would teach the model to end where the limit of its tokens was.
        if pair.cut[side]:
            report.removed[Reason("answer cut", pair.cell)] += 1
        else:
            answers.append(Demonstration(pair.prompt, pair.answers[side], inputs=pair.inputs))
    return answers
