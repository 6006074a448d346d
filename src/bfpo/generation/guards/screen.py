"""The judge of a guard: a text passes only if the judge calls it safe."""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from bfpo.core.guarding import GuardCounts
from bfpo.core.samples import Completion, Judge, Key, Verdict
from bfpo.core.terminal import warn
from bfpo.data.readings import is_unread, judge_readings, read_by
from bfpo.errors import DataError


class Screening(NamedTuple):
    """Whether a drawn text passes, and what that took.

    Args:
        passes: Whether it is known to be safe.
        counts: Its judge calls, and why it doesn't pass.
    """

    passes: bool
    counts: GuardCounts


class Screen:
    """Screens texts by a judge. What it calls unsafe, leaves undecided or fails on doesn't pass.

    A refusal or an empty text that a server put in place of an answer passes unread.

    Args:
        judge: Judge of safety; it reads what it reads in any other place.
    """

    def __init__(self, judge: Judge) -> None:
        self.judge = judge
        self._reads = read_by(judge)
        self._has_warned = False

    def screen(self, completions: Sequence[Completion]) -> list[Screening]:
        """Return whether each completion passes; the others of the batch have no influence on it.

        Args:
            completions: Completions, each with a key of its own.
        """
        to_read = [
            completion
            for completion in completions
            if not completion.is_blocked and not is_unread(completion, self._reads)
        ]
        calls: Counter[Key] = Counter()
        verdicts = self._try(to_read, calls)
        # The judge may have failed because of a single text, which must not decide about others.
        for completion in to_read:
            if completion.key not in verdicts and len(to_read) > 1:
                verdicts |= self._try([completion], calls)
        read = {completion.key for completion in to_read}
        return [
            self._screening(completion, verdicts.get(completion.key), calls[completion.key], completion.key in read)
            for completion in completions
        ]

    def _screening(self, completion: Completion, verdict: Verdict | None, calls: int, is_read: bool) -> Screening:
        passes = completion.is_blocked or (verdict is not None and verdict.safe is True)
        has_failed = is_read and verdict is None
        is_unsafe = verdict is not None and verdict.safe is False
        counts = GuardCounts(
            judge_calls=calls,
            unsafe=int(is_unsafe),
            undecided=int(not (passes or has_failed or is_unsafe)),
            failed=int(has_failed),
        )
        return Screening(passes, counts)

    def _try(self, completions: Sequence[Completion], calls: Counter[Key]) -> dict[Key, Verdict]:
        """Return the verdicts that the judge gives before it fails, and count what it was given."""
        verdicts: dict[Key, Verdict] = {}
        calls.update(completion.key for completion in completions)
        try:
            # Not strict: a judge with too few verdicts has failed on the other texts.
            for completion, verdict in zip(completions, judge_readings(self.judge, completions), strict=False):
                if (verdict.key, verdict.text_hash) != (completion.key, completion.text_hash):
                    raise DataError(f"its verdict on {completion.key} is about {verdict.key}, or about another text")
                verdicts[completion.key] = verdict
            if len(verdicts) < len(completions):
                raise DataError(f"it returned {len(verdicts)} verdicts on {len(completions)} texts")
        except Exception as error:
            # Whatever a judge raises, its own bugs included: without a verdict nothing is known to be safe.
            if not self._has_warned:
                self._has_warned = True
                warn(
                    f"the guard's judge {self.judge.name} failed ({self._describe(error)}); a text without a verdict "
                    "doesn't pass. Further failures are only counted"
                )
        return verdicts

    def _describe(self, error: Exception) -> str:
        """Return what is printed of a judge's error."""
        return f"{type(error).__name__}: {error}".removesuffix(": ")
