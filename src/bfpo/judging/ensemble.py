"""Several judges that decide together."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from bfpo.core.files import content_hash
from bfpo.core.samples import Completion, Judge, Verdict
from bfpo.errors import RecipeError

EnsemblePolicy = Literal["unanimous", "majority"]


@dataclass(frozen=True, slots=True)
class Ensemble:
    """Judge that combines the verdicts of several judges; it is undecided where they conflict.

    Args:
        judges: At least two judges, preferably of different families: judges of one family share their mistakes.
        policy: `unanimous` decides only when all judges decide and agree, `majority` when more than half of all
            judges agree, so that an undecided judge counts against every decision.

    Raises:
        RecipeError: If there are fewer than two judges.
    """

    judges: tuple[Judge, ...]
    policy: EnsemblePolicy = "unanimous"

    def __post_init__(self) -> None:
        if len(self.judges) < 2:
            raise RecipeError(f"an ensemble needs at least two judges; got {len(self.judges)}")

    @property
    def name(self) -> str:
        """Names of the judges, joined by plus signs."""
        return "+".join(judge.name for judge in self.judges)

    @property
    def revision(self) -> str:
        """Hash of the judges' revisions and the policy."""
        return content_hash(self.policy, [judge.revision for judge in self.judges])[:12]

    def judge(self, completions: Sequence[Completion]) -> Iterator[Verdict]:
        """Return one verdict for each completion; see `Judge`."""
        by_judge = [list(judge.judge(completions)) for judge in self.judges]
        for completion, verdicts in zip(completions, zip(*by_judge, strict=True), strict=True):
            refusals = [verdict for verdict in verdicts if verdict.refusal is not None]
            safe = self._decide([verdict.safe for verdict in verdicts])
            yield Verdict.on(
                completion,
                self,
                safe=safe,
                p_safe=mean_p_safe(verdicts),
                refusal=self._decide([verdict.refusal for verdict in refusals]),
                p_refusal=_mean([verdict.p_refusal for verdict in refusals]),
                category=next((verdict.category for verdict in verdicts if verdict.category), None),
                reason=f"the judges conflict: {_describe(verdicts)}" if safe is None else None,
            )

    def _decide(self, votes: Sequence[bool | None]) -> bool | None:
        needed = len(votes) if self.policy == "unanimous" else len(votes) // 2 + 1
        return next((answer for answer in (True, False) if votes and votes.count(answer) >= needed), None)


def mean_p_safe(verdicts: Sequence[Verdict]) -> float | None:
    """Return the mean probability that an answer is safe; None unless every judge gives one."""
    return _mean([verdict.p_safe for verdict in verdicts])


def _mean(values: Sequence[float | None]) -> float | None:
    numbers = [value for value in values if value is not None]
    return sum(numbers) / len(numbers) if numbers and len(numbers) == len(values) else None


def _describe(verdicts: Sequence[Verdict]) -> str:
    labels = {True: "safe", False: "unsafe"}
    return "; ".join(
        f"{verdict.judge}: {f'undecided ({verdict.reason})' if verdict.safe is None else labels[verdict.safe]}"
        for verdict in verdicts
    )
