"""Composite indices: unweighted means over named tasks of a suite."""

from collections.abc import Mapping, Sequence

import numpy as np

from bfpo.evaluation.results import MetricResult
from bfpo.evaluation.scoring import BY_PARTS
from bfpo.evaluation.suite import Suite
from bfpo.stats.intervals import Interval, Values, combine


def compute_indices(suites: Mapping[str, Suite], metrics: Sequence[MetricResult]) -> list[MetricResult]:
    """Compute the indices of suites by each judge.

    A metric of which lower is better enters as 1 minus its value. If a part is missing, the index has no value and
    its recipe names the part: a mean over the rest would be another index with the same name.

    Args:
        suites: Suites by name.
        metrics: Metrics of all suites and judges.
    """
    indices = []
    for name, suite in suites.items():
        by_key = {
            (metric.task, metric.metric, metric.judge): metric
            for metric in metrics
            if metric.suite == name and metric.category is None and metric.value is not None
        }
        judges = list(dict.fromkeys(judge for _, _, judge in by_key if judge)) or [""]
        for index, parts in suite.indices.items():
            for judge in judges:
                # A metric that needs no judge is part of every judge's index.
                index_metrics = {
                    (task, metric): by_key.get((task, metric, judge)) or by_key.get((task, metric, ""))
                    for task, metric in parts.items()
                }
                indices.append(_compute_index(name, index, judge, index_metrics))
    return indices


def _compute_index(
    suite: str, name: str, judge: str, parts: Mapping[tuple[str, str], MetricResult | None]
) -> MetricResult:
    metrics = [metric for metric in parts.values() if metric is not None]
    n, unscored = sum(metric.n for metric in metrics), sum(metric.unscored for metric in metrics)
    if missing := [f"{metric} on {task}" for (task, metric), part in parts.items() if part is None]:
        recipe = f"no value, missing {', '.join(missing)}"
        return MetricResult(suite, "all", name, None, None, None, n, unscored, BY_PARTS, True, judge, recipe=recipe)
    value, low, high = map(float, combine(_mean, *map(_oriented, metrics)))
    # A part without an interval isn't certain, so the mean has no interval either.
    has_interval = all(metric.low is not None and metric.high is not None for metric in metrics)
    return MetricResult(
        suite,
        "all",
        name,
        value,
        low if has_interval else None,
        high if has_interval else None,
        n,
        unscored,
        BY_PARTS,
        True,
        judge,
        recipe=f"unweighted mean of {', '.join(map(_term, metrics))}",
        smallest_part=min(metric.n for metric in metrics),
    )


def _mean(*values: Values) -> Values:
    return np.asarray(np.mean(values, axis=0))


def _oriented(metric: MetricResult) -> Interval:
    """Return the interval of a metric, or of 1 minus it if lower is better."""
    value = metric.value or 0.0
    low, high = (value if limit is None else limit for limit in (metric.low, metric.high))
    return Interval(1 - value, 1 - high, 1 - low) if metric.higher_is_better is False else Interval(value, low, high)


def _term(metric: MetricResult) -> str:
    return f"{'1 - ' if metric.higher_is_better is False else ''}{metric.metric} on {metric.task}"
