"""All sources of a recipe: cleaned, split by prompt, checked for leaks, and counted."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from bfpo.config.recipes import DataRecipe, Source
from bfpo.core.files import write_json, write_jsonl
from bfpo.core.pairs import CELLS, PreferencePair, prompt_key
from bfpo.data.load import SourceReport, Why, load_pairs
from bfpo.data.rows import read_prompts
from bfpo.errors import DataError


@dataclass
class Part:
    """The pairs of one source, with what happened to them.

    Args:
        report: Counts.
        train: Pairs to train on.
        eval: Pairs to evaluate on.
    """

    report: SourceReport
    train: list[PreferencePair] = field(default_factory=list)
    eval: list[PreferencePair] = field(default_factory=list)


@dataclass
class PreparedData:
    """Everything that a run trains and evaluates on."""

    parts: list[Part]

    @property
    def train(self) -> list[PreferencePair]:
        """Pairs to train on, both streams."""
        return [pair for part in self.parts for pair in part.train]

    @property
    def eval(self) -> list[PreferencePair]:
        """Pairs to evaluate on, both streams."""
        return [pair for part in self.parts for pair in part.eval]

    def manifest(self) -> dict[str, Any]:
        """Return what a reader needs to know about the data, as one JSON object."""
        return {
            "schema": 1,
            "sources": [part.report.to_json() for part in self.parts],
            # Who labeled what is trained on: a judge among them is no independent judge of the model.
            "label_sources": dict(Counter(pair.provenance.safety_label_source or "" for pair in self.train)),
            "train": cell_counts(self.train),
            "eval": cell_counts(self.eval),
        }


def cell_counts(pairs: Iterable[PreferencePair]) -> dict[str, dict[str, int]]:
    """Count pairs by stream and cell; a cell without pairs is there with 0."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for pair in pairs:
        counts[pair.provenance.stream or "main"][pair.cell or "unlabeled"] += 1
    return {
        stream: {cell: by_cell[cell] for cell in (*CELLS, "unlabeled") if cell != "unlabeled" or by_cell[cell]}
        for stream, by_cell in sorted(counts.items(), reverse=True)
    }


def prepare(
    recipe: DataRecipe, *, limit: int | None = None, log: Callable[[str], None] = lambda message: None
) -> PreparedData:
    """Read, clean and split all data of a recipe.

    Args:
        recipe: What to read.
        limit: Take at most so many pairs of each source.
        log: Told what is being read.

    Raises:
        DataError: If rows are malformed, conflicts or leaks are to be errors, or too much would be dropped.
    """

    def read(source: Source, stream: str) -> tuple[SourceReport, list[PreferencePair]]:
        log(f"reading {source.path}")
        return load_pairs(source, "buffer" if stream == "buffer" else "main", limit=limit)

    parts = [Part(*read(source, "main")) for source in recipe.data]
    parts += [Part(*read(source, "buffer")) for source in recipe.buffer]
    evals = []
    for source in recipe.eval:
        report, pairs = read(source, "main")
        evals.append(Part(report, train=[], eval=pairs))
    _name_apart([*parts, *evals])

    clean_train = clean([(part.report, part.train) for part in parts], recipe.conflicts)
    for part, kept in zip(parts, clean_train, strict=True):
        held_out = [is_held_out(pair.prompt_key, recipe.holdout) for pair in kept]
        part.train = [pair for pair, out in zip(kept, held_out, strict=True) if not out]
        part.eval = [pair for pair, out in zip(kept, held_out, strict=True) if out]
    clean_eval = clean([(part.report, part.eval) for part in evals], recipe.conflicts)
    for part, kept in zip(evals, clean_eval, strict=True):
        part.eval = kept
    _handle_leaks(parts, evals, recipe)
    prepared = PreparedData(parts + evals)
    for part in prepared.parts:
        part.report.check_cap(recipe.max_dropped)
    if not prepared.train:
        raise DataError("no pairs are left to train on; see holdout, limit and fraction in the recipe")
    return prepared


def is_held_out(key: str, share: float) -> bool:
    """Return whether the prompt with this key belongs to the held-out share.

    It depends on the prompt alone: the same prompt falls on the same side in every source, run and machine, and a
    smaller share is a subset of a larger one.
    """
    return int(key, 16) < share * 2.0 ** (4 * len(key))


def write_prepared(prepared: PreparedData, out: Path) -> list[Path]:
    """Write `pairs.jsonl`, `eval.jsonl` when there are evaluation pairs, and `data_manifest.json`.

    Returns:
        The files written.
    """
    write_jsonl(out / "pairs.jsonl", (pair.to_row() for pair in prepared.train))
    written = [out / "pairs.jsonl"]
    if prepared.eval:
        write_jsonl(out / "eval.jsonl", (pair.to_row() for pair in prepared.eval))
        written.append(out / "eval.jsonl")
    else:
        # One of an earlier preparation would be taken for part of this one.
        (out / "eval.jsonl").unlink(missing_ok=True)
    write_json(out / "data_manifest.json", prepared.manifest())
    return [*written, out / "data_manifest.json"]


def require_labels(pairs: Iterable[PreferencePair]) -> None:
    """Refuse to train on unlabeled pairs.

    Raises:
        DataError: Naming the data set.
    """
    for pair in pairs:
        if pair.labels is None:
            raise DataError(
                f"{pair.provenance.dataset_name}: pairs without safety labels (row {pair.row_id}); add the columns "
                "is_chosen_safe and is_rejected_safe, or set 'assume_safe: true' for this source"
            )


def clean(
    sources: list[tuple[SourceReport, list[PreferencePair]]], conflicts: Literal["drop", "keep", "error"]
) -> list[list[PreferencePair]]:
    """Drop what can't be trained on, and count it by source, reason and cell.

    Args:
        sources: Pairs, and the report that counts what happens to them.
        conflicts: What to do with contradictions.

    Returns:
        The pairs that are kept, source by source.

    Raises:
        DataError: If there are conflicts and they are to be errors.
    """
    found = _Conflicts(pair for _, pairs in sources for pair in pairs)
    seen: set[tuple[Any, ...]] = set()
    kept: list[list[PreferencePair]] = []
    for report, pairs in sources:
        kept.append([])
        for pair in pairs:
            key = (pair.provenance.stream, pair.row_id, pair.labels)
            if key in seen:
                report.removed[Why("duplicate", pair.cell)] += 1
                continue
            seen.add(key)
            fault = _fault(pair)
            conflict = None if fault else found.conflict_of(pair)
            if conflict and conflicts == "error":
                raise DataError(
                    f"{report.name}: row {pair.row_id}: {conflict}; mend the data, or set conflicts to drop or keep"
                )
            if fault or (conflict and conflicts == "drop"):
                report.dropped[Why(fault or str(conflict), pair.cell)] += 1
                continue
            if conflict:
                report.noted[Why(f"kept though {conflict}", pair.cell)] += 1
            kept[-1].append(pair)
    return kept


class _Conflicts:
    """Answers with both safety labels, and pairs that stand in both orders."""

    def __init__(self, pairs: Iterable[PreferencePair]) -> None:
        self._labels: dict[tuple[Any, str], set[bool]] = defaultdict(set)
        self._orders: set[tuple[Any, str, str]] = set()
        for pair in pairs:
            self._orders.add((pair.prompt, pair.chosen, pair.rejected))
            if pair.labels is not None:
                self._labels[pair.prompt, pair.chosen].add(pair.labels.chosen)
                self._labels[pair.prompt, pair.rejected].add(pair.labels.rejected)

    def conflict_of(self, pair: PreferencePair) -> str | None:
        if any(len(self._labels.get((pair.prompt, text), ())) > 1 for text in (pair.chosen, pair.rejected)):
            return "an answer is labeled both safe and unsafe"
        if (pair.prompt, pair.rejected, pair.chosen) in self._orders:
            return "the pair stands in both orders"
        return None


def _fault(pair: PreferencePair) -> str | None:
    if not pair.prompt[-1].content.strip():
        return "empty prompt"
    if not pair.chosen.strip() or not pair.rejected.strip():
        return "empty answer"
    if pair.chosen.strip() == pair.rejected.strip():
        return "identical answers"
    return None


def _handle_leaks(parts: list[Part], evals: list[Part], recipe: DataRecipe) -> None:
    """Find training prompts that stand in an evaluation set, by the words of the prompt or of its last turn.

    The last turn is compared with whole prompts only: that two conversations end with the same "why?" is no leak.
    """
    named: dict[str, str] = {}
    for part in evals:
        named |= {pair.prompt_key: part.report.name for pair in part.eval}
    for path in recipe.benchmarks:
        named |= {prompt_key(prompt): path for prompt in read_prompts(path)}
    for part in parts if named else []:
        leaks = [pair for pair in part.train if any(key in named for key in _leak_keys(pair))]
        if leaks and recipe.leaks == "error":
            where = next(named[key] for key in _leak_keys(leaks[0]) if key in named)
            raise DataError(
                f"{part.report.name}: {len(leaks)} training pairs have a prompt of the evaluation set {where} "
                f"(rows {', '.join(pair.row_id for pair in leaks[:3])}); set 'leaks: drop' to train without them"
            )
        leaked = {id(pair) for pair in leaks}
        part.train = [pair for pair in part.train if id(pair) not in leaked]
        for pair in leaks:
            part.report.removed[Why("prompt of an evaluation set", pair.cell)] += 1


def _leak_keys(pair: PreferencePair) -> tuple[str, ...]:
    return (pair.prompt_key, prompt_key(pair.prompt[-1].content))


def _name_apart(parts: list[Part]) -> None:
    """Give every source a name of its own, so that counts of two files of one name stay apart."""
    taken: Counter[str] = Counter()
    for part in parts:
        name = part.report.name
        taken[name] += 1
        if taken[name] > 1:
            part.report.name = f"{name}-{taken[name]}"
            for pairs in (part.train, part.eval):
                pairs[:] = [_renamed(pair, name, part.report.name) for pair in pairs]


def _renamed(pair: PreferencePair, old: str, new: str) -> PreferencePair:
    if pair.provenance.dataset_name != old:
        return pair
    return replace(pair, provenance=replace(pair.provenance, dataset_name=new))
