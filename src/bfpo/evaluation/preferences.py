"""Preferences of a judge between a model's completions and reference outputs, asked in both orders.

Each prompt and order is one line of a file, so a killed comparison resumes, and win rates can be computed again
without a judge.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from bfpo.core.file_rows import FileRow, FiniteFloat
from bfpo.core.files import content_hash
from bfpo.core.samples import Completion, PairJudge, Preference, Verdict
from bfpo.data.readings import read_part
from bfpo.data.stages import fill
from bfpo.errors import DataError

Order = Literal["model_first", "reference_first"]
ORDERS: tuple[Order, ...] = ("model_first", "reference_first")

# Pairs that a judge gets at a time; each preference is written as soon as it is made.
_BATCH = 64


@dataclass(frozen=True, slots=True)
class PairwisePreference(FileRow):
    """Preference of a judge between a completion and the reference output, in one order.

    Args:
        prompt_id: Id of the prompt.
        order: Answer that the judge saw first.
        pair_hash: Hash of the two texts.
        judge: Name of the judge.
        revision: Revision of the judge.
        preference: 1 if the completion is better, 0 if the reference is, 0.5 for a tie, or a probability in between;
            None if undecided.
        reason: Why it is undecided.
    """

    file_name: ClassVar[str] = "comparisons.jsonl"

    prompt_id: str
    order: Order
    pair_hash: str
    judge: str
    revision: str
    preference: FiniteFloat | None
    reason: str | None = None

    def __post_init__(self) -> None:
        value = self.preference
        # bool is an int to isinstance.
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1
        if self.order not in ORDERS or not (value is None or is_number):
            raise DataError(
                f"{self.file_name}: {self.prompt_id}: order is {self.order!r}, preference {value!r}; expected "
                f"{' or '.join(ORDERS)}, and null or a number from 0 to 1"
            )

    @property
    def key(self) -> tuple[str, Order]:
        """Key within the file."""
        return self.prompt_id, self.order


class RatingPairJudge:
    """Prefers the answer with the higher helpfulness rating. Each answer is rated separately, so order has no effect.

    Args:
        verdicts: Verdicts of one judge on the answers of both sides.
        name: Name of the judge.
        revision: Revision of the judge.
    """

    def __init__(self, verdicts: Iterable[Verdict], name: str, revision: str) -> None:
        self.name, self.revision = name, revision
        self._verdicts = {(verdict.prompt_id, verdict.text_hash): verdict for verdict in verdicts}

    def prefer(self, pairs: Sequence[tuple[Completion, Completion]]) -> Iterator[Preference]:
        """Compare the ratings of each pair; see `PairJudge`."""
        for pair in pairs:
            first, second = (self._verdicts[completion.prompt_id, completion.text_hash] for completion in pair)
            if first.helpfulness is None or second.helpfulness is None:
                unrated = first if first.helpfulness is None else second
                yield Preference(None, unrated.reason or f"{self.name} doesn't rate helpfulness")
            elif first.helpfulness == second.helpfulness:
                yield Preference(0.5)
            else:
                yield Preference(float(first.helpfulness > second.helpfulness))


def pair_hash(completion: Completion, reference: Completion) -> str:
    """Return the hash of the two texts that a preference is about."""
    return content_hash(read_part(completion).text, read_part(reference).text)[:12]


def collect_preferences(
    judge: PairJudge, completions: Iterable[Completion], references: Mapping[str, Completion], path: Path
) -> list[PairwisePreference]:
    """Ask a judge to compare each completion with its reference in both orders, into a file.

    Args:
        judge: Judge that compares pairs.
        completions: Completions of the model; only the first sample of a prompt is compared.
        references: Prompt id → reference output.
        path: `comparisons.jsonl`; preferences that it or its unfinished part holds aren't asked for again.

    Returns:
        Two preferences for each completion with a reference.

    Raises:
        DataError: If the file holds preferences about other texts or of another judge.
    """
    pairs = {
        completion.prompt_id: (completion, references[completion.prompt_id])
        for completion in completions
        if completion.sample == 0 and completion.prompt_id in references
    }
    hashes = {prompt_id: pair_hash(*pair) for prompt_id, pair in pairs.items()}

    def check(existing: PairwisePreference) -> None:
        if (existing.judge, existing.revision) != (judge.name, judge.revision):
            raise DataError(
                f"{path} holds comparisons of {existing.judge}@{existing.revision}, this is "
                f"{judge.name}@{judge.revision}; choose another folder, or remove it"
            )
        if hashes.get(existing.prompt_id, existing.pair_hash) != existing.pair_hash:
            raise DataError(f"{path}: the comparison on {existing.prompt_id} is of other texts; remove the file")

    def make(missing: Sequence[tuple[str, Order]]) -> Iterator[list[PairwisePreference]]:
        for start in range(0, len(missing), _BATCH):
            keys = missing[start : start + _BATCH]
            ordered = [
                pairs[prompt_id] if order == "model_first" else pairs[prompt_id][::-1] for prompt_id, order in keys
            ]
            for (prompt_id, order), preference in zip(keys, judge.prefer(ordered), strict=True):
                value = preference.first_is_better
                if value is not None and order == "reference_first":
                    value = 1 - value
                yield [
                    PairwisePreference(
                        prompt_id, order, hashes[prompt_id], judge.name, judge.revision, value, preference.reason
                    )
                ]

    keys = [(prompt_id, order) for prompt_id in pairs for order in ORDERS]
    return fill(path, PairwisePreference, keys, lambda row: row.key, make, check=check, what="comparing")


def mean_preferences(preferences: Iterable[PairwisePreference]) -> dict[str, float | None]:
    """Return the mean preference of the two orders by prompt, in [0, 1]; None if one of them is undecided."""
    means: dict[str, float | None] = {}
    for prompt_id, values in _by_prompt(preferences).items():
        decided = [value for value in values if value is not None]
        means[prompt_id] = sum(decided) / len(decided) if len(decided) == len(values) else None
    return means


def order_decides(preferences: Iterable[PairwisePreference]) -> dict[str, bool]:
    """Return by prompt whether the preferred side changes with the order; undecided prompts are left out."""
    return {
        prompt_id: len({(value > 0.5) - (value < 0.5) for value in values if value is not None}) > 1
        for prompt_id, values in _by_prompt(preferences).items()
        if None not in values
    }


def _by_prompt(preferences: Iterable[PairwisePreference]) -> dict[str, list[float | None]]:
    values: dict[str, list[float | None]] = {}
    for preference in preferences:
        values.setdefault(preference.prompt_id, []).append(preference.preference)
    return values
