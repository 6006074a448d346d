"""Every pair of runs in safety and helpfulness together."""

from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

from bfpo.evaluation.comparisons import AxisResult
from bfpo.evaluation.dominance import PooledScores, compare_models
from bfpo.report.run_files import Run
from bfpo.report.tables import DifferenceCell
from bfpo.report.words import TASKS, interval, measure, signed


class AxisText(NamedTuple):
    """How a pair differs in one thing.

    Args:
        what: Was measured, and on which prompts.
        difference: With its interval and what follows.
        p_value: Adjusted, as text.
    """

    what: str
    difference: DifferenceCell
    p_value: str


class PairText(NamedTuple):
    """What a run is to another.

    Args:
        run: Name of the run.
        verdict: One of the four words.
        against: Name of the other run.
        judge: Whose verdicts it rests on.
        safety: How they differ in safety.
        helpfulness: And in helpfulness.
    """

    run: str
    verdict: str
    against: str
    judge: str
    safety: AxisText
    helpfulness: AxisText


class Pairs(NamedTuple):
    """All pairs of the runs of a page.

    Args:
        rows: One for each pair, a later run against an earlier one.
        tests: How many the p-values are adjusted for.
        left_out: Pairs that nothing is said of, as texts.
    """

    rows: list[PairText]
    tests: int
    left_out: list[str]


def pairs(runs: Sequence[Run]) -> Pairs:
    """Return what each run is to each earlier one, by the first judge of the later that judged both."""
    both, left_out = [], []
    for base, run in combinations(runs, 2):
        there = {one.judge: one for one in base.measurements}
        ours = next((one for one in run.measurements if one.judge in there), None)
        if ours is None:
            left_out.append(f"{run.name} and {base.name} (no answers with verdicts of one judge)")
        else:
            both.append((ours, there[ours.judge]))
    found = compare_models(both)
    told = {(one.run, one.against) for one in found}
    left_out += [_names(one) + " (not measured on prompts of both kinds)" for one in both if _key(one) not in told]
    rows = [
        PairText(one.run, one.verdict, one.against, one.judge, _axis(one.safety), _axis(one.helpfulness))
        for one in found
    ]
    return Pairs(rows, found[0].tests if found else 0, left_out)


def _key(pair: tuple[PooledScores, PooledScores]) -> tuple[str, str]:
    return pair[0].run, pair[1].run


def _names(pair: tuple[PooledScores, PooledScores]) -> str:
    return " and ".join(_key(pair))


def _axis(axis: AxisResult) -> AxisText:
    what = f"{measure(axis.metric).label.lower()} on {axis.n:,} {TASKS.get(axis.task, axis.task)}"
    difference = DifferenceCell(signed(axis.difference), interval(axis.low, axis.high, of=signed), axis.verdict)
    # On one line: a sign and a number apart would be read wrongly.
    p_value = f"p = {axis.p_adjusted:.3f}" if axis.p_adjusted >= 0.001 else "p < 0.001"
    return AxisText(what, difference, p_value.replace(" ", "\u00a0"))
