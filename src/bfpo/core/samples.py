"""What stands between the stages of an evaluation: prompts, completions, verdicts, and who makes them.

A stage reads the file of the one before and writes its own (`prompts.jsonl`, `completions.jsonl`, `verdicts.jsonl`;
one JSON object per line), so completions generated once can be judged again and by others. Nothing here needs torch.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from functools import cache
from types import NoneType
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Protocol, Self, get_args, get_type_hints

from pydantic import (
    BeforeValidator,
    PlainValidator,
    StrictBool,
    StrictFloat,
    StrictInt,
    TypeAdapter,
    ValidationError,
)
from pydantic_core import ErrorDetails

from bfpo.core.files import content_hash
from bfpo.core.pairs import Conversation, as_messages
from bfpo.errors import DataError

Kind = Literal["harmful", "benign", "lookalike"]
"""`lookalike`: a benign prompt that looks like a harmful one, for measuring over-refusal."""
KINDS: tuple[Kind, ...] = get_args(Kind)

Key = tuple[str, int]
"""`prompt_id` and `sample`: what names one completion of one model."""


# Columns of files that earlier versions wrote.
_RENAMED = {"licence": "license"}
_EXPECTED = {
    "string_type": "a string",
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
}

Messages = Annotated[Conversation, PlainValidator(as_messages)]
# A table that isn't ours may have the column and no value in it.
OptionalText = Annotated[str, BeforeValidator(lambda value: "" if value is None else value)]


@dataclass(frozen=True, slots=True)
class FileRow:
    """One line of a file: the fields are the columns, None is null.

    Annotate numbers and flags with pydantic's strict types: `from_row` checks every column against its annotation.
    """

    file_name: ClassVar[str]

    def to_row(self) -> dict[str, Any]:
        """Return the columns as an object of JSON."""
        row = {field.name: getattr(self, field.name) for field in fields(self)}
        if "prompt" in row:
            row["prompt"] = [message._asdict() for message in row["prompt"]]
        return row

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Self:
        """Return the value that an object of JSON describes; unknown columns are ignored.

        Raises:
            DataError: If a column is missing or has a value of another type.
        """
        kind: Any = cls  # mypy doesn't take the class of a dataclass for hashable
        current = {_RENAMED.get(name, name): value for name, value in row.items()}
        try:
            value: Self = _columns_of(kind).validate_python(current)
        except ValidationError as error:
            raise DataError(_describe(error.errors()[0], cls)) from None
        return value


@cache
def _columns_of(kind: type[FileRow]) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _describe(fault: ErrorDetails, kind: type[FileRow]) -> str:
    if fault["type"] == "missing":
        return f"no column '{fault['loc'][0]}'; {kind.file_name} needs {', '.join(_required_columns(kind))}"
    if fault["type"] == "value_error":
        return fault["msg"].removeprefix("Value error, ")
    column = str(fault["loc"][0])
    expected = _EXPECTED.get(fault["type"]) or fault.get("ctx", {}).get("expected", fault["msg"])
    nullable = ", or null" if NoneType in get_args(get_type_hints(kind)[column]) else ""
    return f"column '{column}' is {fault['input']!r}; expected {expected}{nullable}"


def _required_columns(kind: type[FileRow]) -> list[str]:
    return [field.name for field in fields(kind) if field.default is MISSING]


@dataclass(frozen=True, slots=True)
class Prompt(FileRow):
    """Something to ask a model.

    Args:
        prompt_id: Names the prompt; unique in its file.
        prompt: The conversation up to and including the last user turn.
        kind: What the prompt is for; None when it isn't known.
        category: Kind of harm, or of task.
        source: Data set it comes from.
        license: Of that data set.
    """

    file_name: ClassVar[str] = "prompts.jsonl"

    prompt_id: str
    prompt: Messages
    kind: Kind | None = None
    category: str | None = None
    source: OptionalText = ""
    license: OptionalText = ""

    def __post_init__(self) -> None:
        if self.kind is not None and self.kind not in KINDS:
            raise DataError(f"prompt {self.prompt_id}: kind is {self.kind!r}; expected {', '.join(KINDS)} or null")
        if not self.prompt or self.prompt[-1].role != "user":
            raise DataError(f"prompt {self.prompt_id}: expected it to end with a user turn")


@dataclass(frozen=True, slots=True)
class Completion(FileRow):
    """What a model answered.

    Args:
        prompt_id: Of the prompt.
        sample: Number of the answer to this prompt, from 0.
        prompt: The conversation it answers, as in the prompt's file.
        text: The answer, without special tokens.
        finish_reason: `stop` when the model ended its turn, `length` when it was cut.
        prompt_tokens: Length of the prompt with its template.
        completion_tokens: Length of the answer, its end of turn included.
        model: Folder, hub id or name on a server.
        engine: What ran the model.
        settings_hash: Of everything that the text depends on beside the prompt and the sample's number.
    """

    file_name: ClassVar[str] = "completions.jsonl"

    prompt_id: str
    sample: StrictInt
    prompt: Messages
    text: str
    finish_reason: Literal["stop", "length"]
    prompt_tokens: StrictInt
    completion_tokens: StrictInt
    model: str
    engine: str
    settings_hash: str

    @property
    def key(self) -> Key:
        """What names the completion."""
        return self.prompt_id, self.sample

    @property
    def text_hash(self) -> str:
        """Hash of the answer's text: a verdict says by it what was judged."""
        return content_hash(self.text)[:12]


@dataclass(frozen=True, slots=True)
class Verdict(FileRow):
    """What a judge says about one completion. What it doesn't judge is None.

    Args:
        prompt_id: Of the prompt.
        sample: Number of the answer.
        text_hash: Of the text that was judged.
        judge: Name of the judge.
        revision: Of the judge: its verdicts are reproducible by name and revision.
        safe: Whether the answer is safe; None when **undecided**, which never counts as safe.
        p_safe: Probability in [0, 1] that it is safe.
        refusal: Whether it refuses.
        p_refusal: Probability in [0, 1] that it does.
        helpfulness: From 0 to 1.
        severity: How harmful it is, from 0 (safe) to 1.
        malformed: Whether it isn't a proper answer at all.
        category: Kind of harm found.
        score: The judge's raw number, such as a cost.
        reason: Why the judge is undecided, or what it found.
    """

    file_name: ClassVar[str] = "verdicts.jsonl"

    prompt_id: str
    sample: StrictInt
    text_hash: str
    judge: str
    revision: str
    safe: StrictBool | None
    p_safe: StrictFloat | None = None
    refusal: StrictBool | None = None
    p_refusal: StrictFloat | None = None
    helpfulness: StrictFloat | None = None
    severity: StrictFloat | None = None
    malformed: StrictBool | None = None
    category: str | None = None
    score: StrictFloat | None = None
    reason: str | None = None

    @classmethod
    def on(cls, completion: Completion, judge: "Judge", *, safe: bool | None, **found: Any) -> "Verdict":
        """Return a judge's verdict on a completion.

        Args:
            completion: What was judged.
            judge: Whose verdict it is.
            safe: As above.
            found: Whatever else the judge found, by the names above.

        Raises:
            DataError: If it is undecided without a reason.
        """
        about = completion.prompt_id, completion.sample, completion.text_hash
        return cls(*about, judge.name, judge.revision, safe, **found)

    def __post_init__(self) -> None:
        if self.safe is None and not self.reason:
            raise DataError(f"verdict of {self.judge} on {self.prompt_id}: undecided without a reason")

    @property
    def key(self) -> Key:
        """What names the completion it is about."""
        return self.prompt_id, self.sample


@dataclass(frozen=True, slots=True)
class Sampling:
    """How completions are sampled.

    Args:
        samples: Answers per prompt; at least 1.
        temperature: At least 0; 0 takes the likeliest token.
        top_p: Smallest probability mass kept, in (0, 1]; 1 keeps all.
        max_new_tokens: Longest answer, in tokens.
        seed: With a prompt's id and the sample's number it fixes the answer.

    Raises:
        DataError: If a value is out of its range.
    """

    samples: int = 1
    temperature: float = 0.7
    top_p: float = 1.0
    max_new_tokens: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        for name, fine, allowed in (
            ("samples", self.samples >= 1, "at least 1"),
            ("temperature", self.temperature >= 0, "at least 0"),
            ("top_p", 0 < self.top_p <= 1, "more than 0 and at most 1"),
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
        ):
            if not fine:
                raise DataError(f"{name} is {getattr(self, name)}; expected {allowed}")


class Engine(Protocol):
    """Runs a model on prompts."""

    @property
    def faults(self) -> Counter[str]:
        """What went wrong and was asked again, or mended, by kind; empty where nothing is asked twice."""

    @property
    def settings_hash(self) -> str:
        """Hash of everything that a completion's text depends on beside the prompt and the sample's number."""

    def generate(self, wanted: Sequence[tuple[Prompt, int]]) -> Iterator[list[Completion]]:
        """Answer prompts, in batches as they are done and in any order.

        Args:
            wanted: Prompts with the numbers of the samples wanted.

        Raises:
            Unanswered: At the end, if some could not be answered; the others were handed over.
        """


class Preference(NamedTuple):
    """What a judge says about two answers to one prompt.

    Args:
        first_is_better: 1 when the first is the better one, 0 when the second is, 0.5 when they are equal, or a
            probability between; None when undecided.
        reason: Why it is undecided.
    """

    first_is_better: float | None
    reason: str | None = None


class PairJudge(Protocol):
    """Says which of two answers to one prompt is the more helpful; the order may sway it."""

    @property
    def name(self) -> str:
        """Name of the judge."""

    @property
    def revision(self) -> str:
        """Changes when the same pair could get another preference."""

    def prefer(self, pairs: Sequence[tuple[Completion, Completion]]) -> Iterator[Preference]:
        """Say of each pair whether the first answer is the better one, in the pairs' order."""


class Judge(Protocol):
    """Says of completions whether they are safe, and what else it knows."""

    @property
    def name(self) -> str:
        """Name of the judge."""

    @property
    def revision(self) -> str:
        """Changes when the same completion could get another verdict."""

    def judge(self, completions: Sequence[Completion]) -> Iterable[Verdict]:
        """Return one verdict for each completion, in their order."""


def prompt_id(prompt: Conversation) -> str:
    """Return the id of a prompt that its source gives none: a hash of its text."""
    return content_hash(prompt)[:12]


def sample_seed(seed: int, prompt_id: str, sample: int) -> int:
    """Return 63 bits that name the noise of one completion."""
    digest = hashlib.sha256(f"{seed}\0{prompt_id}\0{sample}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
