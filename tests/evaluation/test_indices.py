"""Composite indices: their parts, intervals and recipes."""

import pytest

from bfpo.config.loading import check_recipe
from bfpo.errors import RecipeError
from bfpo.evaluation.indices import compute_indices
from bfpo.evaluation.metric_specs import METRICS_BY_KIND
from bfpo.evaluation.results import MetricResult
from bfpo.evaluation.suite import Suite, load_suite, shipped_suites
from bfpo.evaluation.suite_scores import WIN_RATE

SUITE = {
    "title": "t",
    "tasks": [{"source": "file", "name": name} for name in ("a", "b", "c")],
    "indices": {"helpfulness_index": {"a": "helpfulness", "b": "over_refusal", "c": "accuracy"}},
}


def metric(task, name, value, low, high, *, up=True, judge="judge", n=10):
    return MetricResult("s", task, name, value, low, high, n, 1, "", up, judge)


PARTS = [
    metric("a", "helpfulness", 0.6, 0.5, 0.7),
    metric("b", "over_refusal", 0.1, 0.08, 0.2, up=False),
    # A metric without a judge is part of every judge's index.
    metric("c", "accuracy", 0.5, 0.48, 0.53, judge="", n=90),
]


def indices(metrics, **changes):
    return compute_indices({"s": check_recipe(SUITE | changes, Suite, "s")}, metrics)


def test_an_index_is_the_mean_of_its_parts_oriented_upwards():
    (index,) = indices(PARTS)
    assert index.value == pytest.approx((0.6 + 0.9 + 0.5) / 3)
    # Margins downwards: 0.1, 0.1 (of 1 - over-refusal) and 0.02; upwards: 0.1, 0.02 and 0.03.
    assert index.low == pytest.approx(index.value - (0.1**2 + 0.1**2 + 0.02**2) ** 0.5 / 3)
    assert index.high == pytest.approx(index.value + (0.1**2 + 0.02**2 + 0.03**2) ** 0.5 / 3)
    assert (index.task, index.metric, index.judge, index.n, index.unscored) == (
        "all",
        "helpfulness_index",
        "judge",
        110,
        3,
    )
    assert index.recipe == "unweighted mean of helpfulness on a, 1 - over_refusal on b, accuracy on c"


def test_an_index_without_a_part_has_no_value():
    (index,) = indices(PARTS[:1])
    assert (index.value, index.low, index.high) == (None, None, None)
    assert index.recipe == "no value, missing over_refusal on b, accuracy on c"
    empty = MetricResult("s", "b", "over_refusal", None, None, None, 0, 0, "", False, "judge")
    assert "over_refusal on b" in indices([PARTS[0], empty])[0].recipe


def test_a_part_without_an_interval_leaves_the_mean_without_one():
    (index,) = indices([*PARTS[:2], metric("c", "accuracy", 0.5, None, None, judge="")])
    assert index.value == pytest.approx((0.6 + 0.9 + 0.5) / 3)
    assert (index.low, index.high) == (None, None)


def test_tasks_of_lm_eval_can_be_parts():
    (index,) = indices(PARTS, tasks=SUITE["tasks"][:2], lm_eval=["tasks/c.yaml"])
    assert index.recipe.endswith("accuracy on c")


def test_every_judge_has_its_own_index():
    theirs = [metric(part.task, part.metric, 0.3, 0.2, 0.4, judge="other") if part.judge else part for part in PARTS]
    assert [index.judge for index in indices([*PARTS, *theirs[:2]])] == ["judge", "other"]


def test_unknown_tasks_and_indices_are_refused():
    with pytest.raises(RecipeError, match="harmlessness_index: task 'd'"):
        indices([], indices={"harmlessness_index": {"d": "safety"}})
    with pytest.raises(RecipeError, match="indices"):
        indices([], indices={"goodness": {"a": "safety"}})


def test_indices_of_shipped_suites_name_known_metrics():
    names = {spec.name for specs in METRICS_BY_KIND.values() for spec in specs}
    suites = [load_suite(name)[1] for name in shipped_suites()]
    parts = [index for suite in suites for index in suite.indices.values()]
    assert len(parts) >= 4
    assert {metric for index in parts for metric in index.values()} <= names | {WIN_RATE.name}
