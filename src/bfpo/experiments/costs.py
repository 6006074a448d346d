"""What the stages of a method cost, without the base model and the evaluation, which are the same for all methods."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter, ValidationError

from bfpo.core.file_rows import FiniteFloat
from bfpo.core.files import write_json
from bfpo.errors import DataError

_FILE_NAME = "cost.json"
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
        write_json(folder / _FILE_NAME, asdict(self))


def read_cost(folder: Path) -> Cost | None:
    """Return the cost of the finished stage or method in a folder; None if it isn't recorded.

    Raises:
        DataError: If the file is malformed.
    """
    path = folder / _FILE_NAME
    try:
        return _adapter().validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        where = ".".join(map(str, fault["loc"])) or "the file"
        raise DataError(f"{path}: {where}: {fault['msg']}; remove the folder to run its stage again") from None


def measured(work: Callable[[], tuple[int, int]]) -> Cost:
    """Return the cost of work that returns its numbers of samples and of calls.

    The time is that of this process: work that runs beside it in other threads would count, too.
    """
    start = time.process_time()
    samples, calls = work()
    return Cost(samples, calls, round(time.process_time() - start, 2))


@cache
def _adapter() -> TypeAdapter[Cost]:
    return TypeAdapter(Cost)
