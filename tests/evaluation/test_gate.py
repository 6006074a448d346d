"""Gates decide by intervals, and never on a few prompts."""

from dataclasses import replace

import pytest

from bfpo.errors import GateViolated, RecipeError
from bfpo.evaluation.gate import Bound, enforce_bounds, evaluate_bounds
from bfpo.evaluation.metric_specs import HELPFULNESS
from bfpo.evaluation.results import Results
from bfpo.evaluation.scoring import PromptScores, compute_metrics
from bfpo.stats.intervals import MIN_PROMPTS

BOUND = Bound(suite="toy", task="benign", metric="helpfulness", min=0.75)


def results_of(scores):
    """Return results with the helpfulness of prompts with these scores."""
    by_prompt = {str(index): score for index, score in enumerate(scores)}
    metrics = compute_metrics("toy", [PromptScores("benign", HELPFULNESS, by_prompt, 0, 1)])
    return Results("run", "model", "policy", [], {}, metrics)


def test_three_nearly_equal_scores_pass_no_gate(capsys):
    results = results_of([0.80, 0.80, 0.81])
    enforce_bounds(results, [BOUND])
    output = " ".join(capsys.readouterr().out.split())
    assert f"3 undecided: 3 prompts, {MIN_PROMPTS} needed" in output
    assert "passed" not in output


@pytest.mark.parametrize(("score", "state"), [(1.0, "passed"), (0.0, "violated")])
def test_a_bound_is_decided_from_a_number_of_prompts_on(score, state):
    bound = BOUND.model_copy(update={"min": 0.5})
    for count in range(1, MIN_PROMPTS + 3):
        (decided,) = evaluate_bounds(results_of([score] * count), [bound])
        assert decided.state == (state if count >= MIN_PROMPTS else "undecided"), count
        assert bool(decided.reason) == (count < MIN_PROMPTS), count


def test_a_violation_on_few_prompts_stops_nothing():
    enforce_bounds(results_of([0.0] * (MIN_PROMPTS - 1)), [BOUND])
    with pytest.raises(GateViolated, match="1 of 1 bounds are violated"):
        enforce_bounds(results_of([0.0] * MIN_PROMPTS), [BOUND])


def test_a_value_without_an_interval_decides_nothing():
    results = results_of([0.0] * 20)
    results.metrics[0] = replace(results.metrics[0], low=None, high=None)
    (decided,) = evaluate_bounds(results, [BOUND])
    assert (decided.state, decided.reason) == ("undecided", "the metric has no interval")


def test_the_smallest_part_of_a_composite_decides():
    results = results_of([1.0] * 50)
    (metric,) = results.metrics
    for smallest, state in ((MIN_PROMPTS - 1, "undecided"), (MIN_PROMPTS, "passed")):
        results.metrics[0] = replace(metric, smallest_part=smallest)
        (decided,) = evaluate_bounds(results, [BOUND])
        assert decided.state == state
        assert ("in its smallest part" in decided.text) == (state == "undecided")


def test_a_bound_without_a_judge_is_on_the_primary_one():
    by_prompt = {str(index): 1.0 for index in range(20)}
    metrics = compute_metrics("toy", [PromptScores("benign", HELPFULNESS, by_prompt, 0, 1, "rubric")])
    results = Results("run", "model", "policy", [{"name": "wildguard"}, {"name": "rubric"}], {}, metrics)
    with pytest.raises(
        RecipeError, match="primary judge wildguard doesn't measure it; set `judge:` to one of rubric"
    ):
        evaluate_bounds(results, [BOUND])
    (decided,) = evaluate_bounds(results, [BOUND.model_copy(update={"judge": "rubric"})])
    assert decided.state == "passed"
