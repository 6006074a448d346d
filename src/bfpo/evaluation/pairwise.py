"""Helpfulness against given reference outputs: which of two answers is better, asked in both orders.

One line per prompt and order stands in `comparisons.jsonl`, so that a killed comparison goes on where it was, and a
win rate can be read again without a judge.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from bfpo.data.rows import read_rows
from bfpo.errors import DataError
from bfpo.files import content_hash
from bfpo.pairs import as_messages
from bfpo.protocols import Completion, FileRow, Judge, PairJudge, Preference, Prompt, prompt_id
from bfpo.recipe import Source
from bfpo.stages import fill

Order = Literal["model_first", "reference_first"]
ORDERS: tuple[Order, ...] = ("model_first", "reference_first")

# Pairs are compared in pieces of this size: no more is lost when a judge is killed.
_PIECE = 32


@dataclass(frozen=True, slots=True)
class Compared(FileRow):
    """What a judge says about a model's answer beside the reference, in one order.

    Args:
        prompt_id: Of the prompt.
        order: Which answer the judge saw first.
        pair_hash: Of the two texts.
        judge: Name of the judge.
        revision: Of the judge.
        preference: 1 when the model's answer is better, 0 when the reference is, 0.5 when they are equal, or between;
            None when undecided.
        reason: Why it is undecided.
    """

    file_name: ClassVar[str] = "comparisons.jsonl"

    prompt_id: str
    order: Order
    pair_hash: str
    judge: str
    revision: str
    preference: float | None
    reason: str | None = None

    @property
    def key(self) -> tuple[str, Order]:
        """What names the comparison."""
        return self.prompt_id, self.order


@dataclass(frozen=True, slots=True)
class Beside:
    """A prompt with the model's answer, the reference, and what the judge prefers.

    Args:
        model: The model's answer.
        reference: The given one.
        model_first: Preference for the model's answer when it stands first; None when undecided.
        reference_first: When the reference does.
    """

    model: Completion
    reference: Completion
    model_first: float | None
    reference_first: float | None

    @property
    def preference(self) -> float | None:
        """Mean over the two orders, in [0, 1]; None when one is undecided."""
        if self.model_first is None or self.reference_first is None:
            return None
        return (self.model_first + self.reference_first) / 2

    @property
    def order_decides(self) -> bool:
        """Whether the preferred answer changes with the order."""
        sides = [
            None if one is None else (one > 0.5) - (one < 0.5) for one in (self.model_first, self.reference_first)
        ]
        return None not in sides and sides[0] != sides[1]


@dataclass(frozen=True, slots=True)
class ByHelpfulness:
    """Prefers the answer that a judge finds more helpful by itself; the order can't sway it.

    Args:
        judge: Must rate helpfulness, as the testbed's oracle and the rubric judge do.
    """

    judge: Judge

    @property
    def name(self) -> str:
        """Name of the judge."""
        return self.judge.name

    @property
    def revision(self) -> str:
        """Of the judge."""
        return self.judge.revision

    def prefer(self, pairs: Sequence[tuple[Completion, Completion]]) -> Iterator[Preference]:
        """Compare the ratings of each pair; see `PairJudge`."""
        verdicts = list(self.judge.judge([one for pair in pairs for one in pair]))
        for one, other in zip(verdicts[::2], verdicts[1::2], strict=True):
            if one.helpfulness is None or other.helpfulness is None:
                unrated = one if one.helpfulness is None else other
                yield Preference(None, unrated.reason or f"{self.name} doesn't rate helpfulness")
            else:
                ours, theirs = one.helpfulness, other.helpfulness
                yield Preference(1.0 if ours > theirs else 0.0 if ours < theirs else 0.5)


def read_references(path: str) -> tuple[list[Prompt], list[Completion]]:
    """Read given outputs: AlpacaEval's model outputs (`instruction`, `output`, `generator`) or completions.jsonl.

    Args:
        path: A local file; AlpacaEval publishes its baselines' outputs as `model_outputs.json`.

    Returns:
        The prompts, all benign, and the answer to each.

    Raises:
        DataError: If a row is malformed, a prompt stands twice, or there is none.
    """
    prompts, answers = [], dict[str, Completion]()
    for row in read_rows(Source(path=path)):
        try:
            if "instruction" in row.values:
                messages, text = as_messages(row.text("instruction")), row.text("output")
                name, source = prompt_id(messages), str(row.values.get("dataset") or path)
                words = len(text.split())
                generator = str(row.values.get("generator") or path)
                answer = Completion(name, 0, messages, text, "stop", 0, words, generator, "given", content_hash(path))
            else:
                answer, source = Completion.from_row(row.values), path
                if answer.sample:
                    continue
        except DataError as error:
            raise DataError(f"{row.where}: {error}") from None
        if answer.prompt_id in answers:
            raise DataError(f"{row.where}: the prompt '{answer.prompt_id}' stands twice; expected one output of each")
        answers[answer.prompt_id] = answer
        prompts.append(Prompt(answer.prompt_id, answer.prompt, kind="benign", source=source))
    if not prompts:
        raise DataError(f"{path} holds no reference outputs")
    return prompts, list(answers.values())


def compare_with_references(
    judge: PairJudge, completions: Sequence[Completion], references: Sequence[Completion], path: Path
) -> list[Beside]:
    """Ask a judge about every prompt in both orders, into a file of comparisons.

    Args:
        judge: What compares.
        completions: The model's answers; of several samples to a prompt the first takes part.
        references: One answer to each prompt.
        path: `comparisons.jsonl`; what it or its unfinished part holds isn't asked again.

    Returns:
        One for each reference, in their order.

    Raises:
        DataError: If a prompt isn't answered, or the file holds comparisons of other texts or of another judge.
    """
    answered = {one.prompt_id: one for one in completions if one.sample == 0}
    if missing := [one.prompt_id for one in references if one.prompt_id not in answered]:
        raise DataError(f"{len(missing)} reference prompts have no answer of the model, the first is {missing[0]}")
    pairs = {one.prompt_id: (answered[one.prompt_id], one) for one in references}
    differing = next((name for name, (ours, theirs) in pairs.items() if ours.prompt != theirs.prompt), None)
    if differing is not None:
        raise DataError(f"the model and the reference answer different prompts under the id '{differing}'")
    hashes = {name: content_hash(ours.text, theirs.text)[:12] for name, (ours, theirs) in pairs.items()}

    def check(done: Compared) -> None:
        if (done.judge, done.revision) != (judge.name, judge.revision):
            raise DataError(
                f"{path} holds comparisons of {done.judge}@{done.revision}, this is {judge.name}@{judge.revision}; "
                "choose another folder, or remove it"
            )
        if hashes.get(done.prompt_id, done.pair_hash) != done.pair_hash:
            raise DataError(f"{path}: the comparison on {done.prompt_id} is of other texts; remove it")

    def make(missing: Sequence[tuple[str, Order]]) -> Iterator[list[Compared]]:
        for start in range(0, len(missing), _PIECE):
            piece = missing[start : start + _PIECE]
            yield [
                Compared(name, order, hashes[name], judge.name, judge.revision, _for_model(said, order), said.reason)
                for (name, order), said in zip(
                    piece, judge.prefer([_shown(pairs[n], o) for n, o in piece]), strict=True
                )
            ]

    made = fill(
        path,
        Compared,
        [(name, order) for name in pairs for order in ORDERS],
        lambda one: one.key,
        make,
        check=check,
        what="comparing",
    )
    said = {one.key: one.preference for one in made}
    return [Beside(*pair, said[name, "model_first"], said[name, "reference_first"]) for name, pair in pairs.items()]


def _shown(pair: tuple[Completion, Completion], order: Order) -> tuple[Completion, Completion]:
    return pair if order == "model_first" else (pair[1], pair[0])


def _for_model(said: Preference, order: Order) -> float | None:
    if said.first_is_better is None or order == "model_first":
        return said.first_is_better
    return 1 - said.first_is_better
