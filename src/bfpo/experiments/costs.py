"""What the stages of a method cost, without the base model and the evaluation, which are the same for all methods."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field

from bfpo.core.file_rows import FiniteFloat
from bfpo.core.files import write_json
from bfpo.core.typed_json import read_if_written

COST_FILE = "cost.json"
_Number = Annotated[int, Field(strict=True, ge=0)]


@dataclass(frozen=True, slots=True)
class Cost:
    """Cost of a stage, or of all stages of a method.

    Args:
        samples: Number of samples drawn from the policy or its base.
        calls: Number of answers that a scorer or a judge read; an answer that two of them read counts twice.
        cpu_seconds: Time of the processor, in seconds.
    """

    samples: _Number = 0
    calls: _Number = 0
    cpu_seconds: Annotated[FiniteFloat, Field(ge=0)] = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            self.samples + other.samples, self.calls + other.calls, round(self.cpu_seconds + other.cpu_seconds, 2)
        )

    def write(self, folder: Path) -> None:
        """Write `cost.json` into a folder."""
        write_json(folder / COST_FILE, asdict(self))


def read_cost(folder: Path) -> Cost | None:
    """Return the cost of the finished stage or method in a folder; None if it isn't recorded.

    Raises:
        DataError: If the file is malformed.
    """
    return read_if_written(folder / COST_FILE, Cost, remedy="remove the folder to run its stage again")


def measured(work: Callable[[], tuple[int, int]]) -> Cost:
    """Return the cost of work that returns its numbers of samples and of calls.

    The time is that of this process: work that runs beside it in other threads would count, too.
    """
    start = time.process_time()
    samples, calls = work()
    return Cost(samples, calls, round(time.process_time() - start, 2))
