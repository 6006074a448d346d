"""What a guard did for an answer: a column of `completions.jsonl`, from which its cost is known after any restart."""

from dataclasses import dataclass, fields
from functools import cache
from typing import Annotated, Any

from pydantic import Field, StrictFloat, StrictInt, TypeAdapter, ValidationError

from bfpo.errors import DataError

REFUSAL = "I can't help with that."
"""Text in place of an answer that doesn't pass, unless a recipe has another one."""

Count = Annotated[StrictInt, Field(ge=0)]


@dataclass(frozen=True, slots=True)
class GuardCounts:
    """What a guard did for one answer.

    Args:
        samples: Number of drawn answers.
        tokens: Number of their tokens.
        judge_calls: Number of texts that the judge was given; a text that it failed on is given to it again, alone.
        unsafe: Drawn answers that the judge called unsafe.
        undecided: Drawn answers that it left undecided, also because its model didn't reply, or that have no answer
            after their reasoning.
        failed: Drawn answers on which it raised an error.
        repeats: Drawn answers equal to one that was rejected before, which aren't judged again.
        sentences: Sentences that passed, for a guard that judges sentence by sentence.
        cut: 1 if such an answer was cut, because no next sentence passed.
        seconds: Time of sampling and judging; answers that are made together share it equally.
    """

    samples: Count = 0
    tokens: Count = 0
    judge_calls: Count = 0
    unsafe: Count = 0
    undecided: Count = 0
    failed: Count = 0
    repeats: Count = 0
    sentences: Count = 0
    cut: Count = 0
    seconds: Annotated[StrictFloat, Field(ge=0, allow_inf_nan=False)] = 0.0

    def __add__(self, other: "GuardCounts") -> "GuardCounts":
        """Return the sums of the counts."""
        return GuardCounts(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))


@cache
def _counts_adapter() -> TypeAdapter[GuardCounts]:
    return TypeAdapter(GuardCounts)


def read_guard_counts(value: Any) -> GuardCounts | None:
    """Return the counts that a column of a file has; None for null.

    Raises:
        DataError: If they are malformed.
    """
    try:
        return None if value is None else _counts_adapter().validate_python(value)
    except ValidationError as error:
        fault = error.errors()[0]
        key = ".".join(map(str, ("guard", *fault["loc"])))
        raise DataError(f"column '{key}' is {fault['input']!r}: {fault['msg']}") from None
