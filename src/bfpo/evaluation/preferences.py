"""Helpfulness against given outputs: which of two answers is the better one, asked in both orders.

One line per prompt and order stands in `comparisons.jsonl`, so that a killed comparison goes on where it was, and a
win rate can be told again without a judge.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import StrictFloat

from bfpo.core.files import content_hash
from bfpo.core.samples import Completion, FileRow, PairJudge, Preference, Verdict
from bfpo.data.stages import fill
from bfpo.errors import DataError

Order = Literal["model_first", "reference_first"]
ORDERS: tuple[Order, ...] = ("model_first", "reference_first")

# Pairs that a judge gets at a time; each is written as soon as it is decided.
_PIECE = 64


@dataclass(frozen=True, slots=True)
class PairwisePreference(FileRow):
    """What a judge says about a model's answer beside the given output, in one order.

    Args:
        prompt_id: Of the prompt.
        order: Which answer the judge saw first.
        pair_hash: Of the two texts.
        judge: Name of the judge.
        revision: Of the judge.
        preference: 1 when the model's answer is better, 0 when the given output is, 0.5 when they are equal, or a
            probability between; None when undecided.
        reason: Why it is undecided.
    """

    file_name: ClassVar[str] = "comparisons.jsonl"

    prompt_id: str
    order: Order
    pair_hash: str
    judge: str
    revision: str
    preference: StrictFloat | None
    reason: str | None = None

    def __post_init__(self) -> None:
        said = self.preference
        # bool is an int to isinstance.
        number = isinstance(said, int | float) and not isinstance(said, bool) and 0 <= said <= 1
        if self.order not in ORDERS or not (said is None or number):
            raise DataError(
                f"{self.file_name}: {self.prompt_id}: order is {self.order!r}, preference {said!r}; expected "
                f"{' or '.join(ORDERS)}, and null or a number from 0 to 1"
            )

    @property
    def key(self) -> tuple[str, Order]:
        """What names the comparison."""
        return self.prompt_id, self.order


class ByRating:
    """Prefers the answer that a judge rates as the more helpful, each by itself: the order can't sway it.

    Args:
        verdicts: Of one judge, on the answers of both sides.
        name: Of the judge.
        revision: Of the judge.
    """

    def __init__(self, verdicts: Iterable[Verdict], name: str, revision: str) -> None:
        self.name, self.revision = name, revision
        self._of = {(one.prompt_id, one.text_hash): one for one in verdicts}

    def prefer(self, pairs: Sequence[tuple[Completion, Completion]]) -> Iterator[Preference]:
        """Compare the ratings of each pair; see `PairJudge`."""
        for pair in pairs:
            one, other = (self._of[answer.prompt_id, answer.text_hash] for answer in pair)
            if one.helpfulness is None or other.helpfulness is None:
                unrated = one if one.helpfulness is None else other
                yield Preference(None, unrated.reason or f"{self.name} doesn't rate helpfulness")
            else:
                ours, theirs = one.helpfulness, other.helpfulness
                yield Preference(1.0 if ours > theirs else 0.0 if ours < theirs else 0.5)


def compare_with_references(
    judge: PairJudge, completions: Iterable[Completion], references: Mapping[str, Completion], path: Path
) -> list[PairwisePreference]:
    """Ask a judge about every prompt in both orders, into a file of comparisons.

    Args:
        judge: What compares.
        completions: The model's answers; of several samples of a prompt the first takes part.
        references: Prompt → the given output.
        path: `comparisons.jsonl`; what it or its unfinished part holds isn't asked again.

    Returns:
        Two for each answered prompt that has a reference.

    Raises:
        DataError: If the file holds comparisons of other texts or of another judge.
    """
    pairs = {
        one.prompt_id: (one, references[one.prompt_id])
        for one in completions
        if one.sample == 0 and one.prompt_id in references
    }
    hashes = {name: content_hash(ours.text, theirs.text)[:12] for name, (ours, theirs) in pairs.items()}

    def check(done: PairwisePreference) -> None:
        if (done.judge, done.revision) != (judge.name, judge.revision):
            raise DataError(
                f"{path} holds comparisons of {done.judge}@{done.revision}, this is {judge.name}@{judge.revision}; "
                "choose another folder, or remove it"
            )
        if hashes.get(done.prompt_id, done.pair_hash) != done.pair_hash:
            raise DataError(f"{path}: the comparison on {done.prompt_id} is of other texts; remove the file")

    def make(missing: Sequence[tuple[str, Order]]) -> Iterator[list[PairwisePreference]]:
        for start in range(0, len(missing), _PIECE):
            piece = missing[start : start + _PIECE]
            said = judge.prefer([pairs[name] if order == ORDERS[0] else pairs[name][::-1] for name, order in piece])
            for (name, order), one in zip(piece, said, strict=True):
                preference = _of_model(one, order)
                yield [
                    PairwisePreference(name, order, hashes[name], judge.name, judge.revision, preference, one.reason)
                ]

    wanted = [(name, order) for name in pairs for order in ORDERS]
    return fill(path, PairwisePreference, wanted, lambda one: one.key, make, check=check, what="comparing")


def _of_model(said: Preference, order: Order) -> float | None:
    if said.first_is_better is None or order == "model_first":
        return said.first_is_better
    return 1 - said.first_is_better


def preferences(compared: Iterable[PairwisePreference]) -> dict[str, float | None]:
    """Return the mean preference of the two orders by prompt, in [0, 1]; None where one is undecided."""
    return {
        name: None if None in both else sum(one for one in both if one is not None) / len(both)
        for name, both in _by_prompt(compared).items()
    }


def order_decides(compared: Iterable[PairwisePreference]) -> dict[str, bool]:
    """Return by prompt whether the preferred side changes with the order; undecided prompts are left out."""
    return {
        name: len({(one > 0.5) - (one < 0.5) for one in both if one is not None}) > 1
        for name, both in _by_prompt(compared).items()
        if None not in both
    }


def _by_prompt(compared: Iterable[PairwisePreference]) -> dict[str, list[float | None]]:
    found: dict[str, list[float | None]] = {}
    for one in compared:
        found.setdefault(one.prompt_id, []).append(one.preference)
    return found
