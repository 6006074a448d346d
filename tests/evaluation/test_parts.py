"""Reasoning and tool calls in an evaluation: what each judge's rates are about, and metrics of calls."""

from dataclasses import replace
from pathlib import Path

import pytest

from bfpo.core.conversation import user_says
from bfpo.core.samples import Completion, Prompt, Sampling, Verdict
from bfpo.core.tools import FrozenJson, ToolCall
from bfpo.evaluation.baseline import Baseline
from bfpo.evaluation.pipeline import evaluate
from bfpo.evaluation.results import read_results
from bfpo.evaluation.suite import tasks_by_kind
from bfpo.evaluation.warnings import _verdict_warnings
from bfpo.generation.scripted import ScriptedEngine
from bfpo.judging.readings import ReadingJudge

TOOLS = FrozenJson.freeze([{"type": "function", "function": {"name": name}} for name in ("pay", "look_up")])
CALL = ToolCall("pay", FrozenJson.freeze({"amount": 2}))
# Reasoning, answer and call of each harmful prompt. "bad" is unsafe, "odd" undecided.
HARMFUL = [
    ("bad plan", "fine", None),
    ("bad plan", "bad", CALL),
    ("good plan", "fine", None),
    ("good plan", "bad", None),
    ("odd plan", "fine", None),
    ("bad plan", "", None),
    (None, "fine", CALL),
    (None, "bad", ToolCall("look_up", FrozenJson.freeze({}))),
]


class Words:
    """Judge by the words of what it reads; it calls everything a refusal that has no call in words."""

    def __init__(self, name="words"):
        self.name, self.revision = name, "1"

    def judge(self, completions):
        for completion in completions:
            safe = None if "odd" in completion.text else "bad" not in completion.text
            yield Verdict.on(completion, self, safe=safe, refusal=True, reason="odd" if safe is None else None)


class Thinking(ScriptedEngine):
    """Model that thinks and calls tools, as `HARMFUL` says of each prompt."""

    def _completion(self, prompt: Prompt, sample: int) -> Completion:
        reasoning, text, call = HARMFUL[int(prompt.prompt[-1].content.split()[-1])]
        completion = super()._completion(prompt, sample)
        return replace(
            completion,
            text=text,
            reasoning=reasoning,
            tool_calls=(call,) if call else (),
            finish_reason="stop" if text or call else "length",
        )


def prompts(**columns):
    return [
        Prompt(f"h{number}", user_says(f"prompt {number}"), "harmful", tools=TOOLS, **columns)
        for number in range(len(HARMFUL))
    ]


def run(folder, judges, harmful=None, samples=1, **options):
    evaluation = evaluate(
        tasks_by_kind("suite", harmful or prompts()),
        lambda: Thinking(lambda prompt, sample: "", name="thinker"),
        judges,
        Path(folder),
        run="run",
        model="thinker",
        sampling=Sampling(samples=samples),
        **options,
    )
    evaluation.results.write(Path(folder))
    assert read_results(Path(folder)) == evaluation.results
    return evaluation


def metrics_of(results):
    return {(metric.metric, metric.judge): metric for metric in results.metrics if metric.task == "harmful"}


@pytest.fixture
def evaluation(tmp_path):
    words = Words()
    return run(tmp_path / "run", [words, ReadingJudge(words, "reasoning"), ReadingJudge(words, "both")])


def test_rates_of_answers_are_about_answers(evaluation):
    metrics = metrics_of(evaluation.results)
    # Five of eight are safe; the one without an answer is undecided, and counts as not safe.
    safety = metrics["safety", "words"]
    assert (safety.value, safety.n, safety.unscored) == (4 / 8, 8, 1)
    # Calls aren't refusals, and an unfinished thought is none either.
    assert metrics["refusal", "words"].value == 4 / 7


def test_rates_of_reasoning_are_about_the_completions_that_have_some(evaluation):
    metrics = metrics_of(evaluation.results)
    reasoning = metrics["reasoning_safety", "words:reasoning"]
    assert (reasoning.value, reasoning.n, reasoning.unscored) == (2 / 6, 6, 1)
    assert {name for name, judge in metrics if judge == "words:reasoning"} == {"reasoning_safety"}
    # Of both together, unsafe if either is.
    assert metrics["safety", "words:both"].value == 2 / 8
    assert [judge.get("reads") for judge in evaluation.results.judges] == [None, "reasoning", "both"]


def test_safe_answers_after_unsafe_reasoning_are_counted_and_rated(evaluation):
    (counts,) = evaluation.results.reasoning
    assert (counts.judge, counts.completions) == ("words", 6)
    assert (counts.both_safe, counts.safe_answer_unsafe_reasoning) == (1, 1)
    assert (counts.unsafe_answer_safe_reasoning, counts.both_unsafe, counts.undecided) == (1, 1, 2)
    metric = metrics_of(evaluation.results)["safe_answer_unsafe_reasoning", "words"]
    # The answer of the odd thought, and the thought without an answer, could go either way.
    assert (metric.value, metric.n, metric.unscored) == (1 / 4, 4, 2)
    assert 0 < metric.least < metric.low < metric.value < metric.high < metric.most < 1


def test_without_a_judge_of_reasoning_nothing_is_said_of_it(tmp_path):
    results = run(tmp_path / "run", [Words()]).results
    assert results.reasoning == []
    assert not any("reasoning_safety" in key or "unsafe_reasoning" in key[0] for key in metrics_of(results))
    # Another judge's verdicts on the reasoning aren't mixed with it.
    judges = [Words(), ReadingJudge(Words("others"), "reasoning")]
    results = run(tmp_path / "other", judges).results
    assert results.reasoning == []
    assert ("safe_answer_unsafe_reasoning", "words") not in metrics_of(results)


def test_lengths_and_missing_answers_are_told_apart(evaluation):
    metrics = metrics_of(evaluation.results)
    assert metrics["reasoning_words", ""].value == 2
    assert metrics["answer_words", ""].n == 6
    assert (metrics["no_answer", ""].value, metrics["no_answer", ""].n) == (1 / 6, 6)
    (warning,) = [warning for warning in evaluation.results.warnings if "1 of 8 completions" in warning]
    assert "`max_new_tokens`" in warning


def test_completions_without_reasoning_are_no_undecided_ones(evaluation):
    (warning,) = _verdict_warnings({}, [output for output in evaluation.outputs if output.reads == "reasoning"])
    assert warning.startswith("words:reasoning left 1 of 6 thoughts undecided (17%)")


def test_judges_of_different_parts_are_not_compared_in_agreement(evaluation, tmp_path):
    assert evaluation.results.agreement == []
    judges = [Words(), Words("others"), *(ReadingJudge(Words(name), "reasoning") for name in ("words", "others"))]
    agreement = run(tmp_path / "four", judges).results.agreement
    assert [(row.judges, row.question) for row in agreement] == [
        (["words", "others"], "safe"),
        (["words", "others"], "refusal"),
        (["words:reasoning", "others:reasoning"], "safe"),
    ]


def test_calls_are_rated(tmp_path, evaluation):
    metrics = metrics_of(evaluation.results)
    assert metrics["call_rate", ""].value == 3 / 8
    # Of three calls one is safe.
    assert metrics["unsafe_call_rate", "words"].value == 2 / 8
    assert ("target_call_rate", "") not in metrics
    targeted = run(tmp_path / "t", [Words()], prompts(target_functions=("pay", "mail"))).results
    target = metrics_of(targeted)["target_call_rate", ""]
    assert (target.value, target.higher_is_better) == (2 / 8, False)
    without = [replace(prompt, tools=None) for prompt in prompts()]
    assert not any("call" in name for name, _ in metrics_of(run(tmp_path / "w", [Words()], without).results))


def test_an_undecided_call_leaves_its_rate_open(tmp_path):
    class Undecided(Words):
        def judge(self, completions):
            for completion in completions:
                yield Verdict.on(completion, self, safe=None, reason="?")

    metric = metrics_of(run(tmp_path / "run", [Undecided()]).results)["unsafe_call_rate", "words"]
    assert (metric.value, metric.unscored) == (0, 3)
    assert metric.most > 3 / 8


def test_variants_of_a_prompt_are_scored_as_one(tmp_path):
    grouped = [replace(prompt, group=f"g{number // 4}") for number, prompt in enumerate(prompts())]
    safety = metrics_of(run(tmp_path / "run", [Words()], grouped).results)["safety", "words"]
    single = metrics_of(run(tmp_path / "single", [Words()]).results)["safety", "words"]
    assert (safety.value, safety.n, single.n) == (single.value, 2, 8)
    assert safety.high - safety.low > single.high - single.low


def test_a_run_with_parts_is_compared_with_a_baseline(tmp_path):
    words = Words()
    judges = [words, ReadingJudge(words, "reasoning")]
    first = run(tmp_path / "a", judges)
    second = run(tmp_path / "b", judges, baseline=Baseline(tmp_path / "a", first.results))
    names = {comparison.metric for comparison in second.results.comparisons}
    assert {"safety", "reasoning_safety", "safe_answer_unsafe_reasoning", "call_rate", "no_answer"} <= names
    assert all(comparison.difference == 0 for comparison in second.results.comparisons)
