"""Scores of samples: what two judges say, as the rewards and costs that a combiner reads."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from bfpo.core.samples import Completion, Judge, Verdict
from bfpo.data.readings import is_unread, judge_readings, read_by
from bfpo.data.verdict_scores import score_of
from bfpo.losses.combine import Reads


class Score(NamedTuple):
    """Scores of a sample.

    Args:
        reward: Reward, or helpfulness from 0 to 1; None if it is missing.
        cost: Cost, above 0 for unsafe answers, or the probability of unsafe; None if it is missing.
        missing: Reason why one of them is missing; None if none is.
    """

    reward: float | None
    cost: float | None
    missing: str | None


def judge_if_read(judge: Judge, completions: Sequence[Completion]) -> list[Verdict | None]:
    """Return the verdicts of a judge; None on completions without the part that it reads.

    Args:
        judge: Judge.
        completions: Completions with different keys.
    """
    read = [completion for completion in completions if not is_unread(completion, read_by(judge))]
    verdicts = {verdict.key: verdict for verdict in judge_readings(judge, read)}
    return [verdicts.get(completion.key) for completion in completions]


@dataclass
class Scorers:
    """The judges that train the policy.

    Args:
        reward: Judge of helpfulness.
        cost: Judge of safety; the same object as `reward` is asked once.
        reads: What the combiner reads.
        calls: Number of verdicts so far, in this process.
    """

    reward: Judge
    cost: Judge
    reads: Reads
    calls: int = field(default=0, init=False)

    def score(self, completions: Sequence[Completion]) -> list[Score]:
        """Return the scores of samples, in their order."""
        judges = [self.reward] if self.cost is self.reward else [self.reward, self.cost]
        verdicts = [judge_if_read(judge, completions) for judge in judges]
        self.calls += sum(verdict is not None for by_judge in verdicts for verdict in by_judge)
        return [self._score(reward, cost) for reward, cost in zip(verdicts[0], verdicts[-1], strict=True)]

    def _score(self, rewarding: Verdict | None, costing: Verdict | None) -> Score:
        if rewarding is None or costing is None:
            return Score(None, None, "no answer to read")
        if self.reads == "probability":
            # Here and below, an undecided verdict is missing, not unsafe: nothing is imputed.
            p_safe = None if costing.safe is None else costing.p_safe
            reward, cost = rewarding.helpfulness, None if p_safe is None else 1 - p_safe
        elif self.reads == "unsafe":
            reward, cost = score_of("reward", rewarding), None if costing.safe is None else float(not costing.safe)
        else:
            reward, cost = score_of("reward", rewarding), score_of("cost", costing)
        missing = None
        if reward is None:
            missing = f"no reward: {rewarding.reason or 'the judge gave none'}"
        elif cost is None:
            missing = f"no cost: {costing.reason or 'the judge gave none'}"
        return Score(reward, cost, missing)


def count_missing(scores: Sequence[Score]) -> Counter[str]:
    """Return the number of samples with a missing score, by reason."""
    return Counter(score.missing for score in scores if score.missing is not None)
