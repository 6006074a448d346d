"""What a red-team run cost over all its starts: counted where it is spent, and kept in a file."""

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from bfpo.core.files import read_repaired_jsonl, write_jsonl
from bfpo.core.samples import Completion, Engine, Judge, Prompt, Verdict

# A file that outlives a power cut takes milliseconds to write, a verdict may take less.
_SECONDS_BETWEEN_WRITES = 1.0


class Meter:
    """Counts generations, judge calls, seconds and a server's faults; a killed start's are kept.

    What a kill makes a run do twice was paid twice, and counts twice. Of a killed start at most what came in its last
    second is missing.

    Args:
        path: File of the counts; one that is there is added to.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._began = path, time.monotonic()
        self._before: dict[str, float] = {}
        self._faults_before: Counter[str] = Counter()
        for row in read_repaired_jsonl(path):
            self._faults_before = Counter(row.pop("faults"))
            self._before = row
        self._counts: Counter[str] = Counter()
        self._engine: Engine | None = None
        # The first thing that is spent is written down at once.
        self._written = -_SECONDS_BETWEEN_WRITES

    @property
    def seconds(self) -> float:
        """Time that all starts took, in seconds."""
        return self._before.get("seconds", 0.0) + time.monotonic() - self._began

    @property
    def faults(self) -> Counter[str]:
        """What a server got wrong in all starts, by kind."""
        return self._faults_before + (self._engine.faults if self._engine else Counter())

    def count(self, what: str) -> int:
        """Return how many `generations` or `judge_calls` all starts made."""
        return int(self._before.get(what, 0)) + self._counts[what]

    def engine(self, engine: Engine) -> Engine:
        """Return an engine that is counted."""
        self._engine = engine
        return _CountedEngine(engine, self)

    def judge(self, judge: Judge) -> Judge:
        """Return a judge that is counted."""
        return _CountedJudge(judge, self)

    def spent(self, what: str, number: int) -> None:
        """Count, and write it down, though not more than once in a second."""
        self._counts[what] += number
        if time.monotonic() - self._written >= _SECONDS_BETWEEN_WRITES:
            self.write()

    def write(self) -> None:
        """Write the counts down."""
        names = ("generations", "judge_calls")
        counts = {name: self.count(name) for name in names} | {"seconds": round(self.seconds, 2)}
        write_jsonl(self._path, [counts | {"faults": dict(self.faults)}])
        self._written = time.monotonic()


class _CountedEngine:
    def __init__(self, engine: Engine, meter: Meter) -> None:
        self._inner, self._meter = engine, meter

    @property
    def faults(self) -> Counter[str]:
        return self._inner.faults

    @property
    def settings_hash(self) -> str:
        return self._inner.settings_hash

    def generate(self, wanted: Sequence[tuple[Prompt, int]]) -> Iterator[list[Completion]]:
        for batch in self._inner.generate(wanted):
            self._meter.spent("generations", len(batch))
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

    def judge(self, completions: Sequence[Completion]) -> Iterator[Verdict]:
        for verdict in self._inner.judge(completions):
            self._meter.spent("judge_calls", 1)
            yield verdict
