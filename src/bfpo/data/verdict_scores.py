"""Rewards and costs of answers, from the verdicts of a judge."""

import math
from collections.abc import Iterable, Sequence
from typing import Literal

from bfpo.core.samples import Verdict

ScoreName = Literal["reward", "cost"]
"""`reward`: higher is more helpful. `cost`: above 0 is unsafe."""

# A probability of 0 or 1 is rounding: its log-odds would be infinite.
_SMALLEST = 1e-12


def judges_safety(verdicts: Iterable[Verdict]) -> bool:
    """Return whether a judge judges safety: a reward model, say, rates answers and is undecided on the safety of all.

    A judge that is undecided on everything judges safety, and can't.
    """
    verdicts = list(verdicts)
    return any(verdict.safe is not None for verdict in verdicts) or all(
        verdict.helpfulness is None and verdict.refusal is None for verdict in verdicts
    )


def reward_field(verdicts: Iterable[Verdict]) -> Literal["score", "helpfulness"] | None:
    """Return the field of a judge's verdicts that is the reward; None if it gives none.

    It is the raw score of a reward model, which is undecided on safety, and else the helpfulness.
    """
    rating = [verdict for verdict in verdicts if verdict.helpfulness is not None]
    if not rating:
        return None
    is_reward_model = all(verdict.safe is None for verdict in rating)
    return "score" if is_reward_model and any(verdict.score is not None for verdict in rating) else "helpfulness"


def cost_field(verdicts: Iterable[Verdict]) -> Literal["score", "severity", "p_safe"] | None:
    """Return the field of a judge's verdicts that grades harm; None if it only says safe or unsafe.

    It is the cost of a cost model, else the severity, else the probability.
    """
    decided = [verdict for verdict in verdicts if verdict.safe is not None]
    for name in ("score", "severity", "p_safe"):
        if any(getattr(verdict, name) is not None for verdict in decided):
            return name
    return None


def scores_of(name: ScoreName, verdicts: Sequence[Verdict]) -> tuple[list[float | None], str]:
    """Return the score of each verdict of a judge, and what it is, as a suffix of the scorer's name.

    Args:
        name: Score that is read.
        verdicts: Verdicts of one judge.

    Returns:
        Scores, None where the judge gave no number; and "" or ":log-odds". Costs from probabilities are the log-odds
        of unsafe, None where the judge is undecided; other numbers are those of the judge.
    """
    field = reward_field(verdicts) if name == "reward" else cost_field(verdicts)
    values = [None if field is None else getattr(verdict, field) for verdict in verdicts]
    if field != "p_safe":
        return values, ""
    costs = [
        None if verdict.safe is None or verdict.p_safe is None else _log_odds_unsafe(verdict.p_safe)
        for verdict in verdicts
    ]
    return costs, ":log-odds"


def score_of(name: ScoreName, verdict: Verdict) -> float | None:
    """Return the score of one verdict, as `scores_of` does for several; None if the judge gave no number."""
    (score,), _ = scores_of(name, [verdict])
    return score


def _log_odds_unsafe(p_safe: float) -> float:
    p_safe = min(max(p_safe, _SMALLEST), 1 - _SMALLEST)
    return math.log1p(-p_safe) - math.log(p_safe)
