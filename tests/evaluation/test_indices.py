"""Composite indices: what they are the mean of, and what they say where a part is missing."""

import pytest

from bfpo.config.loading import check_recipe
from bfpo.errors import RecipeError
from bfpo.evaluation.indices import index_metrics
from bfpo.evaluation.panel import WIN_RATE
from bfpo.evaluation.results import MetricResult
from bfpo.evaluation.scoring import MEASURES
from bfpo.evaluation.suite import Suite, load_suite, shipped_suites

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
    # What is scored without a judge counts beside each.
    metric("c", "accuracy", 0.5, 0.48, 0.53, judge="", n=90),
]


def indices(metrics, **changes):
    return index_metrics({"s": check_recipe(SUITE | changes, Suite, "s")}, metrics)


def test_an_index_is_the_mean_of_its_parts_turned_upwards():
    (found,) = indices(PARTS)
    assert found.value == pytest.approx((0.6 + 0.9 + 0.5) / 3)
    # Margins downwards: 0.1, 0.1 (over-refusal upwards) and 0.02; upwards: 0.1, 0.02 and 0.03.
    assert found.low == pytest.approx(found.value - (0.1**2 + 0.1**2 + 0.02**2) ** 0.5 / 3)
    assert found.high == pytest.approx(found.value + (0.1**2 + 0.02**2 + 0.03**2) ** 0.5 / 3)
    assert (found.task, found.metric, found.judge, found.n, found.unscored) == (
        "all",
        "helpfulness_index",
        "judge",
        110,
        3,
    )
    assert found.recipe == "unweighted mean of helpfulness on a, 1 - over_refusal on b, accuracy on c"


def test_an_index_without_a_part_has_no_number():
    (found,) = indices(PARTS[:1])
    assert (found.value, found.low, found.high) == (None, None, None)
    assert found.recipe == "no number, for want of over_refusal on b, accuracy on c"
    empty = MetricResult("s", "b", "over_refusal", None, None, None, 0, 0, "", False, "judge")
    assert "over_refusal on b" in indices([PARTS[0], empty])[0].recipe


def test_a_part_without_an_interval_leaves_none_to_the_mean():
    (found,) = indices([*PARTS[:2], metric("c", "accuracy", 0.5, None, None, judge="")])
    assert found.value == pytest.approx((0.6 + 0.9 + 0.5) / 3)
    assert (found.low, found.high) == (None, None)


def test_tasks_of_lm_eval_have_their_place():
    (found,) = indices(PARTS, tasks=SUITE["tasks"][:2], lm_eval=["tasks/c.yaml"])
    assert found.recipe.endswith("accuracy on c")


def test_every_judge_has_its_own():
    theirs = [one if not one.judge else metric(one.task, one.metric, 0.3, 0.2, 0.4, judge="other") for one in PARTS]
    assert [one.judge for one in indices([*PARTS, *theirs[:2]])] == ["judge", "other"]


def test_a_task_that_is_none_is_refused():
    with pytest.raises(RecipeError, match="harmlessness_index: task 'd'"):
        indices([], indices={"harmlessness_index": {"d": "safety"}})
    with pytest.raises(RecipeError, match="indices"):
        indices([], indices={"goodness": {"a": "safety"}})


def test_indices_of_shipped_suites_name_what_is_measured():
    known = {one.name for several in MEASURES.values() for one in several}
    suites = [load_suite(name)[1] for name in shipped_suites()]
    of = [index for suite in suites for index in suite.indices.values()]
    assert len(of) >= 4
    assert {metric for index in of for metric in index.values()} <= known | {WIN_RATE.name}
