"""Labels of annotators, as `bfpo judge annotate` writes them: a row names an answer by its hash, without its text."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import ClassVar, Literal, NamedTuple

from pydantic import StrictBool, StrictInt

from bfpo.config.recipes import Source
from bfpo.core.file_rows import FileRow
from bfpo.core.samples import Completion
from bfpo.data.rows import read_rows
from bfpo.errors import DataError
from bfpo.stats.agreement import Kappa, kappa_interval

Label = Literal["safe", "unsafe", "undecided"]
LabelerKind = Literal["person", "program"]

_SAFE: dict[Label, bool | None] = {"safe": True, "unsafe": False, "undecided": None}
# A longer part of an answer would be a quotation.
_MAX_QUOTED = 20

AnswerKey = tuple[str, str]
"""Prompt id and hash of the text: an annotator labels an identical answer to the same prompt once."""


class Labeler(NamedTuple):
    """Annotator.

    Args:
        name: Name of the annotator.
        kind: Whether it is a person, or a program that reads.
    """

    name: str
    kind: LabelerKind

    def __str__(self) -> str:
        """Return the name, with a note if it is a program."""
        return self.name if self.kind == "person" else f"{self.name} (a program)"


@dataclass(frozen=True, slots=True)
class Annotation(FileRow):
    """Label of one annotator on one answer.

    Args:
        prompt_id: Identifier of the prompt.
        sample: Number of the completion.
        text_hash: Hash of the answer's text.
        label: Whether the answer is safe.
        refusal: Whether the answer refuses; None if the annotator can't say.
        labeler: Name of the annotator.
        labeler_kind: `person`, or `program` for a program that reads.
        reason: Reason of the label.
    """

    file_name: ClassVar[str] = "annotations.jsonl"

    prompt_id: str
    sample: StrictInt
    text_hash: str
    label: Label
    refusal: StrictBool | None
    labeler: str
    labeler_kind: LabelerKind
    reason: str = ""

    @property
    def key(self) -> AnswerKey:
        """Identity of the answer."""
        return self.prompt_id, self.text_hash

    @property
    def safe(self) -> bool | None:
        """Whether the answer is safe; None if undecided."""
        return _SAFE[self.label]

    @property
    def by(self) -> Labeler:
        """The annotator."""
        return Labeler(self.labeler, self.labeler_kind)


def answer_key(completion: Completion) -> AnswerKey:
    """Return the identity of an answer in a file of annotations."""
    return completion.prompt_id, completion.text_hash


def quotes_answer(reason: str, text: str) -> bool:
    """Return whether a reason contains a part of the answer, which a file of annotations never does."""
    words = " ".join(reason.split())
    answer = " ".join(text.split())
    return any(words[start : start + _MAX_QUOTED] in answer for start in range(len(words) - _MAX_QUOTED + 1))


def read_annotations(path: str) -> list[Annotation]:
    """Read a file of annotations, or several by a pattern: the last label of each annotator on each answer.

    Raises:
        DataError: If a row is malformed, or an annotator is called both a person and a program.
    """
    annotations: dict[tuple[str, AnswerKey], Annotation] = {}
    kinds: dict[str, LabelerKind] = {}
    for row in read_rows(Source(path=path)):
        with row.locate_errors():
            annotation = Annotation.from_row(row.values)
            if kinds.setdefault(annotation.labeler, annotation.labeler_kind) != annotation.labeler_kind:
                raise DataError(
                    f"labeler '{annotation.labeler}' is a {annotation.labeler_kind}, and a "
                    f"{kinds[annotation.labeler]} in another row; give them different names"
                )
        annotations[annotation.labeler, annotation.key] = annotation
    return list(annotations.values())


def combine_labels(annotations: Sequence[Annotation]) -> tuple[bool | None, bool | None, tuple[Labeler, ...]]:
    """Return the labels of one answer that all its annotators agree on: safe, refusal, and who gave them.

    Labels of programs count only where no person labeled the answer.
    """
    people = [annotation for annotation in annotations if annotation.labeler_kind == "person"]
    counted = people or list(annotations)
    safe, refusal = (
        _unanimous([getattr(annotation, question) for annotation in counted]) for question in ("safe", "refusal")
    )
    return safe, refusal, tuple(annotation.by for annotation in counted)


def _unanimous(labels: Sequence[bool | None]) -> bool | None:
    return labels[0] if len(set(labels)) == 1 else None


class AnnotatorAgreement(NamedTuple):
    """Agreement of two annotators on one question.

    Args:
        labelers: The two annotators.
        question: `safe` or `refusal`.
        answers: Number of answers that both labeled.
        undecided: Number of those on which at least one of them is undecided.
        share: Share of the others with equal labels; None if there are none.
        kappa: Cohen's kappa on the others.
        disagreements: Labels of both on the answers on which they differ, undecided against decided included.
    """

    labelers: tuple[Labeler, Labeler]
    question: Literal["safe", "refusal"]
    answers: int
    undecided: int
    share: float | None
    kappa: Kappa
    disagreements: list[tuple[Annotation, Annotation]]


def compare_annotators(annotations: Iterable[Annotation]) -> list[AnnotatorAgreement]:
    """Compare every two annotators on the answers that both labeled."""
    by_labeler: dict[Labeler, dict[AnswerKey, Annotation]] = {}
    for annotation in annotations:
        by_labeler.setdefault(annotation.by, {})[annotation.key] = annotation
    return [
        _compare(labelers, question, [(ours[key], theirs[key]) for key in ours if key in theirs])
        for labelers in combinations(by_labeler, 2)
        for ours, theirs in [(by_labeler[labelers[0]], by_labeler[labelers[1]])]
        for question in ("safe", "refusal")
    ]


def _compare(
    labelers: tuple[Labeler, Labeler],
    question: Literal["safe", "refusal"],
    pairs: Sequence[tuple[Annotation, Annotation]],
) -> AnnotatorAgreement:
    labels = [(getattr(ours, question), getattr(theirs, question)) for ours, theirs in pairs]
    decided = [index for index, both in enumerate(labels) if None not in both]
    ours, theirs = ([bool(labels[index][column]) for index in decided] for column in (0, 1))
    num_equal = sum(a == b for a, b in zip(ours, theirs, strict=True))
    return AnnotatorAgreement(
        labelers,
        question,
        answers=len(pairs),
        undecided=len(pairs) - len(decided),
        share=num_equal / len(decided) if decided else None,
        kappa=kappa_interval(ours, theirs, [pairs[index][0].prompt_id for index in decided]),
        disagreements=[pair for pair, (a, b) in zip(pairs, labels, strict=True) if a != b],
    )
