"""The data of a recipe: read, cleaned, split by prompt and checked for leaks, with counts of what happened."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from bfpo.config.recipes import DataRecipe, Source
from bfpo.core.conversation import Answer, Conversation, answer_turns, in_nfc, last_request, prompt_key
from bfpo.core.files import write_json, write_jsonl
from bfpo.core.pairs import CELLS, PreferencePair, StreamName, TemplateInputs
from bfpo.data.load import Reason, SourceReport, load_pairs
from bfpo.data.rows import read_prompts
from bfpo.errors import DataError


@dataclass
class Part:
    """Pairs of one source.

    Args:
        report: Report on the source.
        train: Pairs to train on.
        eval: Pairs to evaluate on.
    """

    report: SourceReport
    train: list[PreferencePair] = field(default_factory=list)
    eval: list[PreferencePair] = field(default_factory=list)


@dataclass
class PreparedData:
    """Pairs that a run trains and evaluates on.

    Args:
        parts: Pairs by source.
    """

    parts: list[Part]

    @property
    def train(self) -> list[PreferencePair]:
        """Pairs to train on, of both streams."""
        return [pair for part in self.parts for pair in part.train]

    @property
    def eval(self) -> list[PreferencePair]:
        """Pairs to evaluate on, of both streams."""
        return [pair for part in self.parts for pair in part.eval]

    def manifest(self) -> dict[str, Any]:
        """Return the content of `data_manifest.json`: sources, label sources, and counts by stream and cell."""
        return {
            "schema": 1,
            "sources": [part.report.to_json() for part in self.parts],
            # A judge that labeled the training pairs is not an independent judge of the model.
            "label_sources": dict(Counter(pair.provenance.safety_label_source or "" for pair in self.train)),
            "train": cell_counts(self.train),
            "eval": cell_counts(self.eval),
        }


def cell_counts(pairs: Iterable[PreferencePair]) -> dict[str, dict[str, int]]:
    """Return the number of pairs by stream and cell, including 0 for cells without pairs."""
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
        recipe: Recipe with the sources.
        limit: Maximum number of pairs from each source.
        log: Function that is called with a progress message for each source.

    Raises:
        DataError: If a row is malformed, there are conflicts or leaks that the recipe makes errors, too many pairs
            would be dropped, or nothing is left to train on.
        RecipeError: If an adapter is unknown or can't be imported.
    """

    def read(source: Source, stream: StreamName) -> tuple[SourceReport, list[PreferencePair]]:
        log(f"reading {source.path}")
        return load_pairs(source, stream, limit=limit, ignored_keys=recipe.text.ignore_message_keys)

    parts = [Part(*read(source, "main")) for source in recipe.data]
    parts += [Part(*read(source, "buffer")) for source in recipe.buffer]
    evals = []
    for source in recipe.eval:
        report, pairs = read(source, "main")
        evals.append(Part(report, train=[], eval=pairs))
    _make_names_unique([*parts, *evals])

    clean_train = clean([(part.report, part.train) for part in parts], recipe.conflicts)
    for part, pairs in zip(parts, clean_train, strict=True):
        part.train, part.eval = [], []
        for pair in pairs:
            (part.eval if is_held_out(pair.prompt_key, recipe.holdout) else part.train).append(pair)
    clean_eval = clean([(part.report, part.eval) for part in evals], recipe.conflicts)
    for part, pairs in zip(evals, clean_eval, strict=True):
        part.eval = pairs
    _handle_leaks(parts, evals, recipe)
    prepared = PreparedData(parts + evals)
    for part in prepared.parts:
        part.report.check_cap(recipe.max_dropped)
    if not prepared.train:
        raise DataError("no pairs are left to train on; see holdout, limit and fraction in the recipe")
    return prepared


def is_held_out(key: str, share: float) -> bool:
    """Return whether the prompt with this key belongs to the held-out share.

    This depends only on the prompt: a prompt is on the same side in every source, run and machine, and a smaller
    share is a subset of a larger one.

    Args:
        key: Key of the prompt.
        share: Share of the prompts that are held out, in [0, 1].
    """
    return int(key, 16) < share * 2.0 ** (4 * len(key))


def write_prepared(prepared: PreparedData, out: Path) -> list[Path]:
    """Write `pairs.jsonl`, `eval.jsonl` if there are evaluation pairs, and `data_manifest.json`.

    Args:
        prepared: Prepared data.
        out: Output folder.

    Returns:
        The files that were written.
    """
    write_jsonl(out / "pairs.jsonl", (pair.to_row() for pair in prepared.train))
    written = [out / "pairs.jsonl"]
    if prepared.eval:
        write_jsonl(out / "eval.jsonl", (pair.to_row() for pair in prepared.eval))
        written.append(out / "eval.jsonl")
    else:
        # The file of an earlier preparation doesn't belong to this one.
        (out / "eval.jsonl").unlink(missing_ok=True)
    write_json(out / "data_manifest.json", prepared.manifest())
    return [*written, out / "data_manifest.json"]


def require_labels(pairs: Iterable[PreferencePair]) -> None:
    """Check that all pairs are labeled.

    Raises:
        DataError: If a pair is unlabeled; the message has its data set and row.
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
    """Return the pairs that can be trained on, and count the others by source, reason and cell.

    Args:
        sources: Pairs of each source, with the report that counts them.
        conflicts: What to do with contradictions.

    Returns:
        The clean pairs of each source.

    Raises:
        DataError: If there are conflicts, and `conflicts` is `error`.
    """
    contradictions = _Contradictions(pair for _, pairs in sources for pair in pairs)
    seen: set[tuple[Any, ...]] = set()
    cleaned: list[list[PreferencePair]] = []
    for report, pairs in sources:
        cleaned.append([])
        for pair in pairs:
            key = (pair.provenance.stream, pair.row_id, pair.labels)
            if key in seen:
                report.removed[Reason("duplicate", pair.cell)] += 1
                continue
            seen.add(key)
            fault = _fault_of(pair)
            conflict = None if fault else contradictions.find(pair)
            if conflict and conflicts == "error":
                raise DataError(
                    f"{report.name}: row {pair.row_id}: {conflict}; fix the data, or set conflicts to drop or keep"
                )
            if fault or (conflict and conflicts == "drop"):
                report.dropped[Reason(fault or str(conflict), pair.cell)] += 1
                continue
            if conflict:
                report.noted[Reason(f"kept though {conflict}", pair.cell)] += 1
            cleaned[-1].append(pair)
    return cleaned


# What two answers must share to be compared.
_Question = tuple[Answer, TemplateInputs]
# Prompt with its inputs, and both answers, in NFC.
_Compared = tuple[_Question, Answer, Answer]


class _Contradictions:
    """Answers that are labeled both safe and unsafe, and pairs that occur in both orders."""

    def __init__(self, pairs: Iterable[PreferencePair]) -> None:
        self._labels: dict[tuple[_Question, Answer], set[bool]] = defaultdict(set)
        self._orders: set[_Compared] = set()
        for pair in pairs:
            question, chosen, rejected = _compared(pair)
            self._orders.add((question, chosen, rejected))
            if pair.labels is not None:
                self._labels[question, chosen].add(pair.labels.chosen)
                self._labels[question, rejected].add(pair.labels.rejected)

    def find(self, pair: PreferencePair) -> str | None:
        """Return how a pair contradicts another one; None if it doesn't."""
        question, chosen, rejected = _compared(pair)
        if any(len(self._labels.get((question, answer), ())) > 1 for answer in (chosen, rejected)):
            return "an answer is labeled both safe and unsafe"
        if (question, rejected, chosen) in self._orders:
            return "the pair occurs in both orders"
        return None


def _compared(pair: PreferencePair) -> _Compared:
    chosen, rejected = map(in_nfc, pair.answers)
    return (in_nfc(pair.prompt), pair.inputs), chosen, rejected


def _fault_of(pair: PreferencePair) -> str | None:
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


def _handle_leaks(parts: list[Part], evals: list[Part], recipe: DataRecipe) -> None:
    """Remove or refuse training pairs whose prompt, or its last turn, is a prompt of an evaluation set.

    The last turn is only compared with whole prompts: two conversations that end with the same "why?" are no leak.
    """
    evaluated: dict[str, str] = {}
    for part in evals:
        evaluated |= {pair.prompt_key: part.report.name for pair in part.eval}
    for path in recipe.benchmarks:
        evaluated |= {prompt_key(prompt): path for prompt in read_prompts(path)}
    for part in parts if evaluated else []:
        leaks = [pair for pair in part.train if any(key in evaluated for key in _leak_keys(pair))]
        if leaks and recipe.leaks == "error":
            name = next(evaluated[key] for key in _leak_keys(leaks[0]) if key in evaluated)
            raise DataError(
                f"{part.report.name}: {len(leaks)} training pairs have a prompt of the evaluation set {name} "
                f"(rows {', '.join(pair.row_id for pair in leaks[:3])}); set 'leaks: drop' to train without them"
            )
        leaked = {id(pair) for pair in leaks}
        part.train = [pair for pair in part.train if id(pair) not in leaked]
        for pair in leaks:
            part.report.removed[Reason("prompt of an evaluation set", pair.cell)] += 1


def _leak_keys(pair: PreferencePair) -> tuple[str, ...]:
    return (pair.prompt_key, prompt_key(last_request(pair.prompt)))


def _make_names_unique(parts: list[Part]) -> None:
    """Rename sources so that two files of the same name are counted separately."""
    uses: Counter[str] = Counter()
    for part in parts:
        name = part.report.name
        uses[name] += 1
        if uses[name] > 1:
            part.report.name = f"{name}-{uses[name]}"
            for pairs in (part.train, part.eval):
                pairs[:] = [_rename_dataset(pair, name, part.report.name) for pair in pairs]


def _rename_dataset(pair: PreferencePair, old: str, new: str) -> PreferencePair:
    if pair.provenance.dataset_name != old:
        return pair
    return replace(pair, provenance=replace(pair.provenance, dataset_name=new))
