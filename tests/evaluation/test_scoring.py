"""From verdicts to metrics and comparisons, and the results file."""

import json
from dataclasses import replace

import numpy as np
import pytest

from bfpo.core.conversation import user_says
from bfpo.core.samples import Completion, Prompt, Sampling, Verdict
from bfpo.errors import DataError
from bfpo.evaluation.differences import compare_scores
from bfpo.evaluation.judge_outputs import JudgeOutput, compute_agreement
from bfpo.evaluation.metric_specs import HELPFULNESS, SAFETY, MetricSpec
from bfpo.evaluation.pipeline import evaluate
from bfpo.evaluation.results import Results, format_metric, read_results
from bfpo.evaluation.scoring import BY_SCORE, PromptScores, compute_metrics, join_verdicts, score_prompts
from bfpo.evaluation.suite import Task, tasks_by_kind
from bfpo.generation.scripted import ScriptedEngine
from bfpo.stats.agreement import kappa_interval
from bfpo.stats.intervals import score_interval, wilson

PROMPTS = [
    *(Prompt(f"h{i}", user_says(f"bad {i}"), "harmful") for i in range(4)),
    *(Prompt(f"b{i}", user_says(f"good {i}"), "benign") for i in range(4)),
    Prompt("none", user_says("unsorted")),
]


def completion(prompt, text="an answer", sample=0):
    return Completion(prompt.prompt_id, sample, prompt.prompt, text, "stop", 3, len(text.split()), "m", "e", "s")


def verdict(answer, safe=True, **values):
    return Verdict(answer.prompt_id, answer.sample, answer.text_hash, "judge", "1", safe, **values)


def scores(safe, helpful):
    """Return scores where harmful prompts have these safety verdicts, benign ones this helpfulness."""
    completions = [completion(prompt) for prompt in PROMPTS]
    verdicts = [
        *(verdict(answer, value, reason="?") for answer, value in zip(completions[:4], safe, strict=True)),
        *(
            verdict(answer, helpfulness=value, refusal=value == 0)
            for answer, value in zip(completions[4:8], helpful, strict=True)
        ),
        verdict(completions[8]),
    ]
    return score_prompts(PROMPTS, join_verdicts(PROMPTS, completions, verdicts))


def test_undecided_counts_as_not_safe_and_is_counted():
    metrics = {
        (metric.task, metric.metric): metric
        for metric in compute_metrics("s", scores([True, True, None, False], [1, 1, 0.5, 0]))
    }
    safety = metrics["harmful", "safety"]
    assert (safety.value, safety.n, safety.unscored) == (0.5, 4, 1)
    assert safety.interval.startswith("95 % Wilson")
    assert metrics["benign", "helpfulness"].value == 0.625
    assert metrics["benign", "over_refusal"].value == 0.25
    assert metrics["all", "harmonic_mean"].value == pytest.approx(2 * 0.5 * 0.625 / 1.125)
    assert ("lookalike", "helpfulness") not in metrics
    assert ("harmful", "severity") not in metrics


def test_undecided_answers_widen_the_bounds_not_the_interval():
    metrics = {
        (metric.task, metric.metric): metric
        for metric in compute_metrics("s", scores([True, True, None, False], [1, 1, 0.5, 0]))
    }
    safety = metrics["harmful", "safety"]
    # Undecided is not safe already: 2 of 4; if it were, 3 of 4.
    assert (safety.low, safety.least, safety.most) == (wilson(2, 4).low, wilson(2, 4).low, wilson(3, 4).high)
    assert format_metric(safety) == "0.50 [0.15, 0.85] (1 undecided: 0.15 to 0.95)"
    # All refusals are decided, and a mean has no bounds.
    assert (metrics["benign", "over_refusal"].least, metrics["benign", "helpfulness"].most) == (None, None)


def test_an_answer_of_which_nothing_is_known_may_be_a_refusal():
    completions = [completion(prompt) for prompt in PROMPTS[4:8]]
    refusals = (True, False, None, None)
    verdicts = [verdict(answer, refusal=value) for answer, value in zip(completions, refusals, strict=True)]
    refusal_scores = score_prompts(PROMPTS, join_verdicts(PROMPTS[4:8], completions, verdicts))
    metrics = {metric.metric: metric for metric in compute_metrics("s", refusal_scores)}
    refused = metrics["over_refusal"]
    assert (refused.value, refused.n, refused.unscored) == (0.5, 2, 2)
    assert (refused.least, refused.most) == (wilson(1, 4).low, wilson(3, 4).high)


def test_samples_are_counted_decided_or_not():
    completions = [completion(prompt, sample=i) for prompt in PROMPTS[4:8] for i in range(2)]
    verdicts = [verdict(answer, refusal=None if answer.sample else True) for answer in completions]
    (refused, *_) = score_prompts(PROMPTS, join_verdicts(PROMPTS[4:8], completions, verdicts))
    (metric,) = compute_metrics("s", [refused])
    assert refused.samples == 2
    assert (metric.value, metric.unscored, metric.interval) == (1.0, 4, BY_SCORE)
    # Half of the completions of each prompt may be no refusals.
    assert (metric.least, metric.most) == (score_interval(np.full(4, 0.5), most=8).low, 1.0)


def test_several_samples_are_averaged_by_prompt_first():
    prompt = PROMPTS[0]
    completions = [completion(prompt, sample=i) for i in range(4)]
    verdicts = [verdict(answer, safe) for answer, safe in zip(completions, (True, False, True, True), strict=True)]
    safety = score_prompts([prompt], join_verdicts([prompt], completions, verdicts))[0]
    assert safety.by_prompt == {"h0": 0.75}
    (metric, *_) = compute_metrics("s", [safety])
    assert (metric.n, metric.interval) == (1, "95 % Wilson at the effective sample size, over prompts")
    # One prompt is little evidence, however many samples it has.
    assert (metric.low, metric.high) == pytest.approx((0.12, 0.99), abs=0.01)


def test_what_never_differs_is_not_certain():
    metrics = {
        (metric.task, metric.metric): metric for metric in compute_metrics("s", scores([True] * 4, [1, 1, 1, 1]))
    }
    helpfulness = metrics["benign", "helpfulness"]
    assert (helpfulness.value, helpfulness.high) == (1, 1)
    assert helpfulness.low == metrics["harmful", "safety"].low < 0.6
    # A length has no upper bound.
    assert metrics["benign", "tokens"].interval == "95 % bootstrap over prompts"


def test_severity_brings_the_mean_of_its_worst_tenth():
    prompts = [Prompt(f"h{i}", user_says("bad"), "harmful", "arson" if i else None) for i in range(20)]
    completions = [completion(prompt) for prompt in prompts]
    severities = [1.0, 0.5, 0.25, *[0.0] * 17]
    verdicts = [verdict(answer, severity=value) for answer, value in zip(completions, severities, strict=True)]
    severity_scores = score_prompts(prompts, join_verdicts(prompts, completions, verdicts), judge="judge")
    metrics = {metric.metric: metric for metric in compute_metrics("s", severity_scores)}
    worst = metrics["severity_worst_tenth"]
    assert (worst.value, worst.n, worst.judge, worst.higher_is_better) == (0.75, 20, "judge", False)
    assert worst.low < 0.75 < worst.high


def test_several_samples_bring_the_safety_of_the_least_safe_tenth():
    prompts = [Prompt(f"h{i}", user_says("bad"), "harmful") for i in range(20)]
    completions = [completion(prompt, sample=sample) for prompt in prompts for sample in range(4)]
    # The first prompt is safe in none of four samples, the second in one, the others in three.
    safe = [False] * 4 + [True, *[False] * 3] + [True, True, True, False] * 18
    verdicts = [verdict(answer, value) for answer, value in zip(completions, safe, strict=True)]
    metrics = {
        metric.metric: metric
        for metric in compute_metrics("s", score_prompts(prompts, join_verdicts(prompts, completions, verdicts)))
    }
    worst = metrics["safety_worst_tenth"]
    assert (worst.value, worst.n, worst.higher_is_better) == (pytest.approx(0.125), 20, True)
    assert worst.low < 0.125 < worst.high < metrics["safety"].high
    # With one sample it is the rate, capped.
    assert "safety_worst_tenth" not in {metric.metric for metric in compute_metrics("s", scores([True] * 4, [1] * 4))}


def test_comparison_says_better_worse_or_neither():
    ours, base = scores([True] * 4, [0, 0, 0, 0.5]), scores([False] * 4, [1, 1, 1, 1])
    against = Results("base", "models/base", "", [], {}, [], answers="abc")
    comparisons = compare_scores("s", ours, base, against=against)
    by_key = {(comparison.task, comparison.metric): comparison for comparison in comparisons}
    assert by_key["benign", "helpfulness"].verdict == "worse"
    # Four prompts of four differ: Tango's interval excludes 0, McNemar's test says p = 0.0625.
    assert by_key["harmful", "safety"].low > 0
    assert by_key["harmful", "safety"].verdict == "not distinguishable"
    assert by_key["benign", "over_refusal"].verdict == "not distinguishable"
    assert by_key["benign", "tokens"].verdict is None
    assert by_key["all", "harmonic_mean"].verdict == "not distinguishable"
    assert all(comparison.is_against(against) for comparison in comparisons)
    other = replace(against, answers="another's")
    assert not any(comparison.is_against(other) for comparison in comparisons)


@pytest.mark.parametrize(("differ", "expected"), [(4, "not distinguishable"), (5, "better")])
def test_a_rate_is_better_only_where_mcnemar_agrees(differ, expected):
    against = Results("base", "models/base", "", [], {}, [], answers="abc")

    def safety(safe):
        return PromptScores("harmful", SAFETY, {f"h{i}": float(i < safe) for i in range(40)}, 0, 1, "judge")

    (comparison,) = compare_scores("s", [safety(20 + differ)], [safety(20)], against=against)
    assert comparison.low > 0
    assert comparison.verdict == expected


def test_gaps_are_refused():
    completions = [completion(prompt) for prompt in PROMPTS[:2]]
    with pytest.raises(DataError, match="1 prompts have no completion, the first is h2"):
        join_verdicts(PROMPTS[:3], completions, [])
    with pytest.raises(DataError, match="1 completions have no verdict, the first is"):
        join_verdicts(PROMPTS[:2], completions, [verdict(completions[0])])


class Strict:
    """A judge that calls only the text `no` safe."""

    name, revision = "judge", "1"

    def judge(self, completions):
        return [verdict(answer, answer.text == "no") for answer in completions]


def evaluated(engine, prompts, folder):
    tasks = tasks_by_kind("s", prompts)
    options = {"run": "r", "model": "m", "sampling": Sampling()}
    results = evaluate(tasks, lambda: engine, [Strict()], folder, **options).results
    results.write(folder)
    return results


def test_an_evaluation_leaves_its_files_and_reads_them_again(tmp_path):
    engine = ScriptedEngine(lambda prompt, sample: "no" if prompt.prompt_id == "h0" else "yes")
    results = evaluated(engine, PROMPTS, tmp_path)
    assert results.metric("harmful", "safety").value == 0.25
    assert {file.name for file in tmp_path.iterdir()} == {
        "prompts.jsonl",
        "completions.jsonl",
        "verdicts-judge@1.jsonl",
        "results.json",
    }
    assert read_results(tmp_path) == results


def test_a_folder_of_other_prompts_is_left_alone(tmp_path):
    engine = ScriptedEngine(lambda prompt, sample: "yes")
    evaluated(engine, PROMPTS[:6], tmp_path)
    before = (tmp_path / "prompts.jsonl").read_text()
    for others, reason in (
        ([Prompt("h0", user_says("another"), "harmful")], "'h0' isn't the prompt of that id"),
        ([*PROMPTS[:2], Prompt("new", user_says("new"), "harmful")], "6 of another choice"),
    ):
        with pytest.raises(DataError, match=reason):
            evaluated(engine, others, tmp_path)
        assert (tmp_path / "prompts.jsonl").read_text() == before
    more = evaluated(engine, PROMPTS, tmp_path)
    assert more.metric("benign", "tokens").n == 4


def rate_and_continuous(ours, base):
    """Return the comparison of a metric of which this run has only zeros and ones."""
    spec = MetricSpec("f1", True, True, needs_judge=False)
    both = (
        PromptScores("task", spec, {str(index): value for index, value in enumerate(values)}, 0, 1)
        for values in (ours, base)
    )
    return compare_scores("s", [next(both)], [next(both)], against=Results("base", "b", "", [], {}, []))[0]


def test_a_metric_is_a_rate_only_if_both_runs_have_zeros_and_ones():
    small = rate_and_continuous([0.0] * 20, [0.05] * 20)
    assert small.difference == pytest.approx(-0.05)
    rate = rate_and_continuous([0.0] * 20, [1.0] * 20)
    assert (rate.difference, rate.interval) == (-1, "95 % Tango, paired over prompts")


def test_harmonic_means_of_few_prompts_have_no_verdict():
    against = Results("base", "b", "", [], {}, [])

    def harmonic(count, helpful):
        names = [str(index) for index in range(count)]
        return [
            PromptScores("harmful", SAFETY, dict.fromkeys(names, 1.0), 0, 1),
            PromptScores("benign", HELPFULNESS, dict.fromkeys(names, helpful), 0, 1),
        ]

    for count, verdict in ((9, "not distinguishable"), (10, "better")):
        comparisons = compare_scores("s", harmonic(count, 0.6), harmonic(count, 0.5), against=against)
        assert [row.verdict for row in comparisons if row.metric == "harmonic_mean"] == [verdict]
    other = [PromptScores("harmful", SAFETY, {"x": 1.0}, 0, 1), PromptScores("benign", HELPFULNESS, {"0": 0.5}, 0, 1)]
    comparisons = compare_scores("s", harmonic(10, 0.6), other, against=against)
    assert "harmonic_mean" not in {row.metric for row in comparisons}


def test_results_without_the_newer_columns_are_read(tmp_path):
    metrics = compute_metrics("s", scores([True, True, None, False], [1, 1, 0.5, 0]))
    against = Results("base", "models/base", "", [], {}, [], answers="abc")
    comparisons = compare_scores("s", scores([True] * 4, [1] * 4), scores([False] * 4, [0] * 4), against=against)
    Results("r", "m", "p", [], {}, metrics, comparisons).write(tmp_path)
    content = json.loads((tmp_path / "results.json").read_text())
    del content["model_comparisons"]
    for row in content["metrics"]:
        del row["least"], row["most"], row["recipe"]
    for row in content["comparisons"]:
        del row["p_value"]
    (tmp_path / "results.json").write_text(json.dumps(content))
    old = read_results(tmp_path)
    assert old.model_comparisons == []
    assert old.metric("harmful", "safety").low == metrics[0].low
    assert {comparison.p_value for comparison in old.comparisons} == {None}


def test_results_of_another_schema_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"no results\.json"):
        read_results(tmp_path)
    (tmp_path / "results.json").write_text(json.dumps({"schema": 4}))
    with pytest.raises(DataError, match="schema is 4; this version reads schemas 1 to 3: evaluate again"):
        read_results(tmp_path)
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(DataError, match="not JSON"):
        read_results(tmp_path)


def test_agreement_resamples_variants_of_a_prompt_together():
    prompts = [Prompt(f"p{n}", user_says(str(n)), "harmful", group=f"g{n // 5}") for n in range(40)]

    def output(name, is_safe):
        verdicts = [Verdict(prompt.prompt_id, 0, "h", name, "1", is_safe(n)) for n, prompt in enumerate(prompts)]
        return JudgeOutput(name, name, "1", (name,), verdicts)

    # They agree on whole groups, and differ on whole groups.
    labels = [lambda n: n // 5 % 2 == 0, lambda n: n // 5 % 4 != 1]
    outputs = [output(name, is_safe) for name, is_safe in zip("ab", labels, strict=True)]
    (safe, _) = compute_agreement([Task("s", "harmful", "harmful", prompts)], outputs)
    ours, theirs = ([is_safe(n) for n in range(40)] for is_safe in labels)
    by_group = kappa_interval(ours, theirs, [prompt.group for prompt in prompts])
    by_prompt = kappa_interval(ours, theirs, [prompt.prompt_id for prompt in prompts])
    assert (safe.kappa, safe.low, safe.high) == by_group
    assert by_group.high - by_group.low > 1.5 * (by_prompt.high - by_prompt.low)
