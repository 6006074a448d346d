"""Cost of a red-team run over all its starts, counted during the run and stored in a file."""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, Field, ValidationError

from bfpo.core.files import read_repaired_jsonl, write_jsonl
from bfpo.core.samples import Completion, Engine, Judge, Prompt, Verdict
from bfpo.data.readings import Reads, read_by
from bfpo.errors import DataError

# An atomic write takes milliseconds, which may be more than a verdict takes.
_SECONDS_BETWEEN_WRITES = 1.0


class _Costs(BaseModel):
    """The row of the file."""

    generations: Annotated[int, Field(strict=True, ge=0)] = 0
    judge_calls: Annotated[int, Field(strict=True, ge=0)] = 0
    seconds: Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)] = 0.0
    faults: dict[str, Annotated[int, Field(strict=True, ge=0)]] = Field(default={})


class Meter:
    """Counts generations, judge calls, seconds and server faults over all starts of a run.

    Work that is repeated after a kill is counted twice. At most the last second of a killed start is missing.

    Args:
        path: File of the counts; existing counts are added to.

    Raises:
        DataError: If the file is malformed.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._started = path, time.monotonic()
        self._earlier = _Costs()
        for row in read_repaired_jsonl(path):
            try:
                self._earlier = _Costs.model_validate(row)
            except ValidationError as error:
                fault = error.errors()[0]
                key = ".".join(map(str, fault["loc"]))
                raise DataError(f"{path}: {key}: {fault['msg']}; remove the file to count from 0") from None
        self._counts: Counter[str] = Counter()
        self._engine: Engine | None = None
        # The first count is written at once.
        self._last_write = -_SECONDS_BETWEEN_WRITES

    @property
    def seconds(self) -> float:
        """Time of all starts, in seconds."""
        return self._earlier.seconds + time.monotonic() - self._started

    @property
    def faults(self) -> Counter[str]:
        """Server faults of all starts, by kind."""
        return Counter(self._earlier.faults) + (self._engine.faults if self._engine else Counter())

    def count(self, name: str) -> int:
        """Return the number of `generations` or `judge_calls` of all starts."""
        return int(getattr(self._earlier, name)) + self._counts[name]

    def engine(self, engine: Engine, watch: Callable[[Sequence[Completion]], object]) -> Engine:
        """Return an engine whose completions are counted.

        Args:
            engine: The engine.
            watch: Called with completions as they end.
        """
        self._engine = engine
        return _CountedEngine(engine, self, watch)

    def judge(self, judge: Judge) -> Judge:
        """Return a judge whose verdicts are counted."""
        return _CountedJudge(judge, self)

    def add(self, name: str, number: int) -> None:
        """Add to a count, and write the counts if the last write is more than a second ago."""
        self._counts[name] += number
        if time.monotonic() - self._last_write >= _SECONDS_BETWEEN_WRITES:
            self.write()

    def write(self) -> None:
        """Write the counts to the file."""
        counts: dict[str, float] = {name: self.count(name) for name in ("generations", "judge_calls")}
        seconds = round(self.seconds, 2)
        write_jsonl(self._path, [{**counts, "seconds": seconds, "faults": dict(self.faults)}])
        self._last_write = time.monotonic()


class _CountedEngine:
    def __init__(self, engine: Engine, meter: Meter, watch: Callable[[Sequence[Completion]], object]) -> None:
        self._inner, self._meter, self._watch = engine, meter, watch

    @property
    def faults(self) -> Counter[str]:
        return self._inner.faults

    @property
    def settings_hash(self) -> str:
        return self._inner.settings_hash

    @property
    def former_settings_hash(self) -> str | None:
        return getattr(self._inner, "former_settings_hash", None)

    def generate(self, requests: Sequence[tuple[Prompt, int]]) -> Iterator[list[Completion]]:
        for batch in self._inner.generate(requests):
            self._meter.add("generations", len(batch))
            self._watch(batch)
            yield batch


class _CountedJudge:
    def __init__(self, judge: Judge, meter: Meter) -> None:
        self._inner, self._meter = judge, meter

    @property
    def name(self) -> str:
        return self._inner.name

    @property
    def revision(self) -> str:
        return self._inner.revision

    @property
    def reads(self) -> Reads:
        return read_by(self._inner)

    def judge(self, completions: Sequence[Completion]) -> Iterator[Verdict]:
        for verdict in self._inner.judge(completions):
            self._meter.add("judge_calls", 1)
            yield verdict
