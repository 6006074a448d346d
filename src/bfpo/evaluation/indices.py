"""Composite indices: unweighted means over named tasks of a suite, each with its recipe."""

from collections.abc import Mapping, Sequence

import numpy as np

from bfpo.evaluation.results import MetricResult
from bfpo.evaluation.scoring import BY_PARTS
from bfpo.evaluation.suite import Suite
from bfpo.stats.intervals import Interval, Values, combine


def index_metrics(suites: Mapping[str, Suite], metrics: Sequence[MetricResult]) -> list[MetricResult]:
    """Return the indices of the suites by each judge, over metrics that were measured.

    A metric of which less is better counts as 1 minus itself. Where one is missing the index has no number, and its
    recipe names what is missing: a mean over the rest would be another index under the same name.

    Args:
        suites: By name.
        metrics: Of all suites and judges.
    """
    found = []
    for name, suite in suites.items():
        measured = {
            (one.task, one.metric, one.judge): one
            for one in metrics
            if one.suite == name and one.category is None and one.value is not None
        }
        judges = list(dict.fromkeys(judge for _, _, judge in measured if judge)) or [""]
        for index, of in suite.indices.items():
            for judge in judges:
                # What needs no judge counts beside each.
                parts = {
                    (task, metric): measured.get((task, metric, judge)) or measured.get((task, metric, ""))
                    for task, metric in of.items()
                }
                found.append(_index(name, index, judge, parts))
    return found


def _index(suite: str, name: str, judge: str, parts: Mapping[tuple[str, str], MetricResult | None]) -> MetricResult:
    known = [one for one in parts.values() if one is not None]
    n, unscored = sum(one.n for one in known), sum(one.unscored for one in known)
    if missing := [f"{metric} on {task}" for (task, metric), one in parts.items() if one is None]:
        recipe = f"no number, for want of {', '.join(missing)}"
        return MetricResult(suite, "all", name, None, None, None, n, unscored, BY_PARTS, True, judge, recipe=recipe)
    value, low, high = map(float, combine(_mean, *map(_upwards, known)))
    # A part without an interval isn't certain: then the mean has none either.
    sure = all(one.low is not None and one.high is not None for one in known)
    ends = (low, high) if sure else (None, None)
    recipe = f"unweighted mean of {', '.join(map(_told, known))}"
    return MetricResult(
        suite,
        "all",
        name,
        value,
        low=ends[0],
        high=ends[1],
        n=n,
        unscored=unscored,
        interval=BY_PARTS,
        higher_is_better=True,
        judge=judge,
        recipe=recipe,
        smallest_part=min(one.n for one in known),
    )


def _mean(*values: Values) -> Values:
    return np.asarray(np.mean(values, axis=0))


def _upwards(one: MetricResult) -> Interval:
    """Return a metric's interval, turned round where less is better."""
    value = one.value or 0.0
    low, high = (value if end is None else end for end in (one.low, one.high))
    return Interval(1 - value, 1 - high, 1 - low) if one.higher_is_better is False else Interval(value, low, high)


def _told(one: MetricResult) -> str:
    return f"{'1 - ' if one.higher_is_better is False else ''}{one.metric} on {one.task}"
