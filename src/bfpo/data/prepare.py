"""The data of a recipe: read, cleaned, split by prompt and checked for leaks, with counts of what happened."""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bfpo.config.recipes import DataRecipe, Source
from bfpo.core.conversation import prompt_key
from bfpo.core.files import write_json, write_lines
from bfpo.core.pairs import CELLS, PreferencePair, StreamName
from bfpo.data.clean import Mask, clean, count_reasons, distinct, is_among
from bfpo.data.facts import Facts, Hashes
from bfpo.data.load import SourceReport
from bfpo.data.rows import read_prompts
from bfpo.data.scan import Scan, scan_source
from bfpo.data.stored_pairs import StoredPairs, chain_pairs, pair_lines, tally
from bfpo.errors import DataError

_LARGEST = 2**64 - 1

Pairs = list[PreferencePair] | StoredPairs
"""Pairs in memory, or pairs of a large source."""


@dataclass
class Part:
    """Pairs of one source.

    Args:
        report: Report on the source.
        train: Pairs to train on.
        eval: Pairs to evaluate on.
    """

    report: SourceReport
    train: Pairs = field(default_factory=list)
    eval: Pairs = field(default_factory=list)


@dataclass
class PreparedData:
    """Pairs that a run trains and evaluates on.

    Args:
        parts: Pairs by source.
    """

    parts: list[Part]

    @property
    def train(self) -> Sequence[PreferencePair]:
        """Pairs to train on, of both streams."""
        return chain_pairs(part.train for part in self.parts)

    @property
    def eval(self) -> Sequence[PreferencePair]:
        """Pairs to evaluate on, of both streams."""
        return chain_pairs(part.eval for part in self.parts)

    def manifest(self) -> dict[str, Any]:
        """Return the content of `data_manifest.json`: sources, label sources, and counts by stream and cell."""
        label_sources: Counter[str] = Counter()
        for kind, count in tally(self.train).items():
            label_sources[kind.label_source or ""] += count
        return {
            "schema": 1,
            "sources": [part.report.to_json() for part in self.parts],
            # A judge that labeled the training pairs is not an independent judge of the model.
            "label_sources": dict(label_sources),
            "train": cell_counts(self.train),
            "eval": cell_counts(self.eval),
        }


def cell_counts(pairs: Iterable[PreferencePair]) -> dict[str, dict[str, int]]:
    """Return the number of pairs by stream and cell, including 0 for cells without pairs."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for kind, count in tally(pairs).items():
        counts[kind.stream or "main"][kind.cell or "unlabeled"] += count
    return {
        stream: {cell: by_cell[cell] for cell in (*CELLS, "unlabeled") if cell != "unlabeled" or by_cell[cell]}
        for stream, by_cell in sorted(counts.items(), reverse=True)
    }


def prepare(
    recipe: DataRecipe,
    *,
    limit: int | None = None,
    log: Callable[[str], None] = lambda message: None,
    cache: Path | None = None,
    max_held: int | None = None,
) -> PreparedData:
    """Read, clean and split all data of a recipe.

    Args:
        recipe: Recipe with the sources.
        limit: Maximum number of pairs from each source.
        log: Function that is called with a progress message for each source.
        cache: Folder for what is known of the rows of large files; None for none.
        max_held: Maximum number of pairs of a source that are held in memory; None to hold all. Others are read again
            each time they are needed.

    Raises:
        DataError: If a row is malformed, there are conflicts or leaks that the recipe makes errors, too many pairs
            would be dropped, or nothing is left to train on.
        RecipeError: If an adapter is unknown or can't be imported.
    """

    def read(source: Source, stream: StreamName) -> Scan:
        log(f"reading {source.path}")
        return scan_source(
            source,
            stream,
            limit=limit,
            ignored_keys=recipe.text.ignore_message_keys,
            cache=cache,
            max_held=max_held,
        )

    scans = [read(source, "main") for source in recipe.data]
    scans += [read(source, "buffer") for source in recipe.buffer]
    scans = _with_unique_names(scans + [read(source, "main") for source in recipe.eval])
    num_trained = len(recipe.data) + len(recipe.buffer)
    parts, evals = (
        _clean_parts(some, recipe, holdout)
        for some, holdout in ((scans[:num_trained], recipe.holdout), (scans[num_trained:], 1.0))
    )
    _handle_leaks(parts, evals, recipe)
    prepared = PreparedData([cleaned.part for cleaned in parts + evals])
    for part in prepared.parts:
        part.report.check_cap(recipe.max_dropped)
    if not any(part.train for part in prepared.parts):
        raise DataError("no pairs are left to train on; see holdout, limit and fraction in the recipe")
    return prepared


class _Cleaned(NamedTuple):
    """Part of clean pairs with the keys of their prompts, by which leaks are found.

    Args:
        part: The part.
        scan: What was read, with the pairs that aren't clean.
        train: Which of the scan's pairs are trained on.
        eval: Which are evaluated on.
    """

    part: Part
    scan: Scan
    train: Mask
    eval: Mask


def _clean_parts(scans: list[Scan], recipe: DataRecipe, holdout: float) -> list[_Cleaned]:
    cleaned = []
    masks = clean([(scan.report, scan.facts) for scan in scans], recipe.conflicts)
    for scan, kept in zip(scans, masks, strict=True):
        held_out = kept & _are_held_out(scan.facts.prompt_keys, holdout)
        part = Part(scan.report, scan.take(kept & ~held_out), scan.take(held_out))
        cleaned.append(_Cleaned(part, scan, kept & ~held_out, held_out))
    return cleaned


def is_held_out(key: str, share: float) -> bool:
    """Return whether the prompt with this key belongs to the held-out share.

    This depends only on the prompt: a prompt is on the same side in every source, run and machine, and a smaller
    share is a subset of a larger one.

    Args:
        key: Key of the prompt.
        share: Share of the prompts that are held out, in [0, 1].
    """
    return int(key, 16) < share * 2.0 ** (4 * len(key))


def _are_held_out(keys: Hashes, share: float) -> Mask:
    """Return which prompts belong to the held-out share, as `is_held_out` says of one."""
    # Compared as integers: a key has more digits than a float.
    bound = math.ceil(share * 2.0**64)
    return np.ones(len(keys), dtype=bool) if bound > _LARGEST else keys < np.uint64(bound)


def write_prepared(prepared: PreparedData, out: Path) -> list[Path]:
    """Write `pairs.jsonl`, `eval.jsonl` if there are evaluation pairs, and `data_manifest.json`.

    Args:
        prepared: Prepared data.
        out: Output folder.

    Returns:
        The files that were written.
    """
    write_lines(out / "pairs.jsonl", pair_lines(prepared.train))
    written = [out / "pairs.jsonl"]
    if prepared.eval:
        write_lines(out / "eval.jsonl", pair_lines(prepared.eval))
        written.append(out / "eval.jsonl")
    else:
        # The file of an earlier preparation doesn't belong to this one.
        (out / "eval.jsonl").unlink(missing_ok=True)
    write_json(out / "data_manifest.json", prepared.manifest())
    return [*written, out / "data_manifest.json"]


def require_labels(pairs: Sequence[PreferencePair]) -> None:
    """Check that all pairs are labeled.

    Raises:
        DataError: If a pair is unlabeled; the message has its data set and row.
    """
    if not any(kind.cell is None for kind in tally(pairs)):
        return
    for pair in pairs:
        if pair.labels is None:
            raise DataError(
                f"{pair.provenance.dataset_name}: pairs without safety labels (row {pair.row_id}); add the columns "
                "is_chosen_safe and is_rejected_safe, or set 'assume_safe: true' for this source"
            )


def _handle_leaks(parts: list[_Cleaned], evals: list[_Cleaned], recipe: DataRecipe) -> None:
    """Remove or refuse training pairs whose prompt, or its last turn, is a prompt of an evaluation set.

    The last turn is only compared with whole prompts: two conversations that end with the same "why?" are no leak.
    """
    evaluated = [(part.report.name, scan.facts.prompt_keys[rows]) for part, scan, _, rows in evals]
    for path in recipe.benchmarks:
        keys = np.array([int(prompt_key(prompt), 16) for prompt in read_prompts(path)], dtype=np.uint64)
        evaluated.append((path, keys))
    if not evaluated:
        return
    all_keys = distinct(np.concatenate([keys for _, keys in evaluated]))
    for part, scan, rows, _ in parts:
        facts = scan.facts
        leaked = rows & (is_among(facts.prompt_keys, all_keys) | is_among(facts.request_keys, all_keys))
        if recipe.leaks == "error" and leaked.any():
            leaks = np.flatnonzero(leaked)
            name = _evaluation_set(facts, int(leaks[0]), evaluated)
            raise DataError(
                f"{part.report.name}: {len(leaks)} training pairs have a prompt of the evaluation set {name} "
                f"(rows {', '.join(facts.row_id(int(row)) for row in leaks[:3])}); set 'leaks: drop' to train "
                "without them"
            )
        if leaked.any():
            part.train = scan.take(rows & ~leaked)
            count_reasons(part.report.removed, ("prompt of an evaluation set",), leaked.astype(np.int8), facts.cells)


def _evaluation_set(facts: Facts, row: int, evaluated: list[tuple[str, Hashes]]) -> str:
    """Return the name of the last evaluation set with the prompt of a pair, or with its last turn."""
    return next(
        name
        for key in (facts.prompt_keys[row], facts.request_keys[row])
        for name, keys in reversed(evaluated)
        if (keys == key).any()
    )


def _with_unique_names(scans: list[Scan]) -> list[Scan]:
    """Rename sources so that two files of the same name are counted separately."""
    uses: Counter[str] = Counter()
    renamed = []
    for scan in scans:
        name = scan.report.name
        uses[name] += 1
        renamed.append(scan.renamed(f"{name}-{uses[name]}") if uses[name] > 1 else scan)
    return renamed
