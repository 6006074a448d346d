"""What a guard did for an answer: a column of `completions.jsonl`, from which its cost is known after any restart."""

from dataclasses import dataclass, fields
from typing import Annotated

from pydantic import Field, StrictFloat, StrictInt

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
