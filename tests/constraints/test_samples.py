"""Scored samples are read as they are, and refused where no multiplier follows from them."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from bfpo.constraints.samples import read_scored_samples
from bfpo.core.files import write_json, write_jsonl
from bfpo.errors import DataError

from .scored import rows, write_evaluation, write_table


def test_a_table_is_read_prompt_by_prompt(tmp_path):
    table = [
        {"prompt_id": "b", "sample": 1, "reward": 1, "cost": -1, "kind": "harmful"},
        {"prompt_id": "a", "sample": 0, "reward": 2.5, "cost": 0.5},
        {"prompt_id": "b", "sample": 0, "reward": 3, "cost": 0.0, "kind": "harmful"},
        {"prompt_id": "a", "sample": 1, "reward": 4, "cost": -2, "safe": False},
        {"prompt_id": "a", "sample": 2, "reward": 5, "cost": 0.25, "safe": True},
    ]
    samples = read_scored_samples(write_table(tmp_path / "s.jsonl", table))
    assert samples.prompt_ids == ("b", "a")
    assert samples.kinds == ("harmful", None)
    assert samples.counts.tolist() == [2, 3]
    assert samples.reward.tolist() == [[3, 1, 0], [2.5, 4, 5]]
    assert samples.cost.tolist() == [[0, -1, 0], [0.5, -2, 0.25]]
    # By the sign of the cost, unless the row says whether it is safe.
    assert samples.is_unsafe.tolist() == [[False, False, False], [True, True, False]]
    assert list(samples.files) == [str(tmp_path / "s.jsonl")]


def test_rows_without_ids_belong_to_the_prompt_of_their_text(tmp_path):
    table = [{"prompt": text, "reward": n, "cost": n - 1} for n, text in enumerate(["one", "two", "one", "two"])]
    samples = read_scored_samples(write_table(tmp_path / "s.jsonl", table))
    assert samples.reward.tolist() == [[0, 2], [1, 3]]


def test_verdicts_are_scores(tmp_path):
    completions, verdicts = write_evaluation(tmp_path)
    samples = read_scored_samples(tmp_path)
    assert samples.prompt_ids == tuple(f"q{x}" for x in range(6))
    assert samples.kinds == ("harmful", "benign") * 3
    assert samples.reward.ravel().tolist() == [verdict.helpfulness for verdict in verdicts]
    assert samples.cost.ravel().tolist() == [verdict.severity for verdict in verdicts]
    # An undecided verdict counts as unsafe, and an unsafe answer without severity too.
    assert samples.is_unsafe[0].tolist() == [True, False, True, False]
    assert samples.is_unsafe[1].tolist() == [False] * 4
    assert (samples.model, samples.reward_scorer, samples.cost_scorer) == ("base", "grader@1", "grader@1")
    assert {name.rpartition("/")[2] for name in samples.files} == {
        "completions.jsonl", "prompts.jsonl", "verdicts-grader@1.jsonl",
    }  # fmt: skip
    assert len(completions) == samples.exists.sum() == 24


def test_a_run_with_an_evaluation_is_read_with_its_temperature(tmp_path):
    write_evaluation(tmp_path / "evaluation")
    assert read_scored_samples(tmp_path).temperature is None
    write_json(tmp_path / "evaluation" / "results.json", {"sampling": {"temperature": 0.7}})
    assert read_scored_samples(tmp_path).temperature == 0.7


def test_two_judges_one_of_rewards_one_of_costs(tmp_path):
    _, verdicts = write_evaluation(tmp_path)
    (tmp_path / "verdicts-grader@1.jsonl").unlink()
    costs = [
        replace(v, judge="beaver-cost", helpfulness=None, severity=None, score=1.5, safe=False) for v in verdicts
    ]
    costs[0] = replace(costs[0], score=-2.0, safe=True)
    rewards = [replace(v, judge="reward", safe=None, severity=None, score=10 * v.helpfulness) for v in verdicts]
    for judged in (costs, rewards):
        write_jsonl(tmp_path / f"verdicts-{judged[0].judge}@1.jsonl", (verdict.to_row() for verdict in judged))
    samples = read_scored_samples(tmp_path)
    assert samples.cost.ravel()[:2].tolist() == [-2.0, 1.5]
    # The raw score of a reward model, not its squashed helpfulness.
    assert samples.reward.ravel()[0] == 10 * verdicts[0].helpfulness
    assert (samples.reward_scorer, samples.cost_scorer) == ("reward@1", "beaver-cost@1")


def test_several_judges_must_be_chosen_from(tmp_path):
    _, verdicts = write_evaluation(tmp_path)
    others = [replace(verdict, revision="2", helpfulness=0.5 + 0.01 * n) for n, verdict in enumerate(verdicts)]
    write_jsonl(tmp_path / "verdicts-grader@2.jsonl", (verdict.to_row() for verdict in others))
    with pytest.raises(DataError, match=r"several judges: grader@1, grader@2; set `reward_judge` to one that rates"):
        read_scored_samples(tmp_path)
    with pytest.raises(DataError, match=r"`cost_judge` is 'grader'; set `cost_judge` to one that judges safety"):
        read_scored_samples(tmp_path, reward_judge="grader@2", cost_judge="grader")
    with pytest.raises(DataError, match=r"`reward_judge` is 'nobody'"):
        read_scored_samples(tmp_path, reward_judge="nobody")
    chosen = read_scored_samples(tmp_path, reward_judge="grader@2", cost_judge="grader@1")
    assert chosen.reward.ravel()[1] == 0.51


def test_verdicts_on_the_reasoning_are_no_scores_of_answers(tmp_path):
    _, verdicts = write_evaluation(tmp_path)
    thoughts = [replace(verdict, judge="grader:reasoning", safe=False) for verdict in verdicts]
    write_jsonl(tmp_path / "verdicts-grader:reasoning@1.jsonl", (verdict.to_row() for verdict in thoughts))
    samples = read_scored_samples(tmp_path)
    assert (samples.reward_scorer, samples.cost_scorer) == ("grader@1", "grader@1")
    (tmp_path / "verdicts-grader@1.jsonl").unlink()
    with pytest.raises(DataError, match="no judge with verdicts here rates helpfulness"):
        read_scored_samples(tmp_path)


def test_log_ratios_of_three_models_are_scores(tmp_path):
    table = [
        {"prompt_id": "a", "base_logp": -10, "helpful_logp": -8, "safe_logp": -14},
        {"prompt_id": "a", "base_logp": -10, "helpful_logp": -11, "safe_logp": -9},
    ]
    samples = read_scored_samples(write_table(tmp_path / "s.jsonl", table), log_ratio_beta=0.1)
    np.testing.assert_allclose(samples.reward, [[0.2, -0.1]])
    np.testing.assert_allclose(samples.cost, [[0.4, -0.1]])
    with pytest.raises(DataError, match="no column 'reward'"):
        read_scored_samples(tmp_path / "s.jsonl")
    with pytest.raises(DataError, match="is a folder; log-ratios of three models are read from a table"):
        read_scored_samples(tmp_path, log_ratio_beta=0.1)


def without(table, column):
    return [{name: value for name, value in row.items() if name != column} for row in table]


GOOD = rows(3, 2)
BAD_TABLES = {
    "no costs": (without(GOOD, "cost"), "no column 'cost'; the columns are prompt_id, reward"),
    "no prompts": (without(GOOD, "prompt_id"), "no column 'prompt_id'"),
    "NaN": ([*GOOD, GOOD[0] | {"reward": math.nan}], r"row 7: column 'reward' is nan; expected a finite number"),
    "null": ([*GOOD, GOOD[0] | {"cost": None}], "row 7: column 'cost' is None; expected a finite number: score this"),
    "too large": ([GOOD[0] | {"reward": -1e300}, *GOOD[1:]], r"a reward is -1e\+300; expected a size of at most 1e9"),
    "a text": ([*GOOD, GOOD[0] | {"cost": "much"}], "column 'cost' is 'much'; expected a finite number"),
    "true": ([*GOOD, GOOD[0] | {"cost": True}], "column 'cost' is True; expected a finite number"),
    "one cost": ([row | {"cost": 0.5} for row in GOOD], "the cost of all 6 samples is 0.5; check the scorer"),
    "one reward": ([row | {"reward": 2} for row in GOOD], "the reward of all 6 samples is 2; check the scorer"),
    "mixed scorers": (
        [row | {"cost_scorer": f"cm@{index % 2}"} for index, row in enumerate(GOOD)],
        r"column 'cost_scorer' has 2 values \('cm@0', 'cm@1'\); scores of different scorers or models can't be",
    ),
    "scorers of some": ([*GOOD[:-1], GOOD[-1] | {"reward_scorer": "rm"}], "column 'reward_scorer' has 2 values"),
    "mixed models": ([GOOD[0] | {"model": "a"}, *GOOD[1:]], "column 'model' has 2 values"),
    "a single sample": (
        [*GOOD, {"prompt_id": "x", "reward": 1, "cost": 1}],
        "1 of 4 prompts have a single sample .the first is 'x'.*generate 32 or more of each prompt",
    ),
    "a duplicate": (
        [row | {"sample": 0} for row in GOOD],
        "sample 0 of prompt 'p0' is duplicated",
    ),
    "a wrong number": ([GOOD[0] | {"sample": -1}, *GOOD[1:]], "column 'sample' is -1; expected a whole number"),
    "two kinds": (
        [row | {"kind": ("harmful", "benign")[index % 2]} for index, row in enumerate(GOOD)],
        "column 'kind' is 'benign', and 'harmful' in another row of this prompt",
    ),
    "nothing": ([], "has no rows"),
}


@pytest.mark.parametrize(("table", "message"), BAD_TABLES.values(), ids=BAD_TABLES)
def test_a_table_without_usable_scores_is_refused(tmp_path, table, message):
    with pytest.raises(DataError, match=message):
        read_scored_samples(write_table(tmp_path / "s.jsonl", table))


def test_a_folder_without_usable_scores_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"has no completions.jsonl; generate completions first"):
        read_scored_samples(tmp_path)
    completions, verdicts = write_evaluation(tmp_path)
    path = tmp_path / "verdicts-grader@1.jsonl"
    write_jsonl(path, (replace(v, safe=None, severity=None).to_row() for v in verdicts))
    with pytest.raises(DataError, match="no judge with verdicts here judges safety"):
        read_scored_samples(tmp_path)
    write_jsonl(path, (replace(v, helpfulness=None).to_row() for v in verdicts))
    with pytest.raises(DataError, match="no judge with verdicts here rates helpfulness"):
        read_scored_samples(tmp_path)
    write_jsonl(path, (v.to_row() for v in verdicts[1:]))
    with pytest.raises(DataError, match=r"grader@1: no verdict on \('q0', 0\); judge the completions again"):
        read_scored_samples(tmp_path)
    write_jsonl(path, (replace(v, text_hash="other").to_row() for v in verdicts))
    with pytest.raises(
        DataError, match=r"grader@1: a verdict about another text on \('q0', 0\); judge the completions"
    ):
        read_scored_samples(tmp_path)
    write_jsonl(path, (v.to_row() for v in verdicts))
    mixed = [replace(completion, model=f"m{n % 2}") for n, completion in enumerate(completions)]
    write_jsonl(tmp_path / "completions.jsonl", (completion.to_row() for completion in mixed))
    with pytest.raises(DataError, match="has completions of 2 models or settings"):
        read_scored_samples(tmp_path)


def test_a_judge_of_a_table_is_refused(tmp_path):
    path = write_table(tmp_path / "s.jsonl", GOOD)
    with pytest.raises(DataError, match="is a table, which has no verdicts of judges to choose from"):
        read_scored_samples(path, cost_judge="x")
    assert json.loads(path.read_text().splitlines()[0]) == GOOD[0]


def test_a_judge_that_rates_everything_useless_rates_helpfulness(tmp_path):
    _, verdicts = write_evaluation(tmp_path)
    path = tmp_path / "verdicts-grader@1.jsonl"
    write_jsonl(path, (replace(verdict, helpfulness=0.0).to_row() for verdict in verdicts))
    with pytest.raises(DataError, match="the reward of all 24 samples is 0; check the scorer"):
        read_scored_samples(tmp_path)
