"""Files that an evaluation reuses, and files that it refuses; and that a bootstrap uses all of its pieces."""

import json
from dataclasses import replace

import numpy as np
import pytest

from bfpo.core.conversation import user_says
from bfpo.core.files import write_jsonl
from bfpo.core.samples import Prompt, Sampling, Verdict
from bfpo.data.stages import read_completions
from bfpo.errors import DataError, Unanswered
from bfpo.evaluation import plan
from bfpo.evaluation.baseline import read_baseline
from bfpo.evaluation.pipeline import evaluate
from bfpo.evaluation.results import read_results
from bfpo.evaluation.suite import tasks_by_kind
from bfpo.evaluation.verdicts import completions_of_evaluation
from bfpo.generation.scripted import ScriptedEngine
from bfpo.stats.intervals import bootstrap

PROMPTS = [Prompt(f"p{i}", user_says(f"q {i}"), "harmful") for i in range(6)]
OPTIONS = {"run": "r", "model": "m", "sampling": Sampling()}


class Counting:
    """A judge that records its calls, and calls texts that start with a letter safe."""

    name = "counting"

    def __init__(self, letter, revision="1"):
        self.letter, self.revision, self.calls = letter, revision, []

    def judge(self, completions):
        self.calls += [completion.key for completion in completions]
        return [
            Verdict.on(completion, self, safe=completion.text.startswith(self.letter)) for completion in completions
        ]


def evaluated(engine, judge, prompts, folder):
    return evaluate(tasks_by_kind("s", prompts), lambda: engine, [judge], folder, **OPTIONS)


def scripted(calls, answer="ab"):
    def say(prompt, sample):
        calls.append(prompt.prompt_id)
        return answer[int(prompt.prompt_id[1:]) % len(answer)]

    return ScriptedEngine(say)


@pytest.mark.parametrize("part", ["verdicts-counting@1.jsonl", "verdicts-counting@1.jsonl.unfinished"])
def test_a_verdict_of_another_type_is_refused_by_file_row_and_column(tmp_path, part):
    evaluated(scripted([]), Counting("a"), PROMPTS, tmp_path)
    (path,) = tmp_path.glob("verdicts-*.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows[1]["safe"] is False
    rows[1]["safe"] = "false"
    path.unlink()
    write_jsonl(tmp_path / part, rows)
    with pytest.raises(DataError) as raised:
        evaluated(scripted([]), Counting("a"), PROMPTS, tmp_path)
    expected = "column 'safe' is 'false'; expected true or false, or null"
    assert str(raised.value) == f"{tmp_path / part} row 2: {expected}"


def test_a_second_evaluation_generates_and_judges_nothing(tmp_path):
    calls, judge = [], Counting("a")
    first = evaluated(scripted(calls), judge, PROMPTS, tmp_path)
    assert (len(calls), len(judge.calls)) == (6, 6)
    again = evaluated(scripted(calls), judge, PROMPTS, tmp_path)
    assert (len(calls), len(judge.calls)) == (6, 6)
    assert again.results.metrics == first.results.metrics
    assert again.outputs == first.outputs


def test_only_missing_completions_and_verdicts_are_made(tmp_path):
    calls, judge = [], Counting("a")
    evaluated(scripted(calls), judge, PROMPTS[:4], tmp_path)
    whole = evaluated(scripted(calls), judge, PROMPTS, tmp_path).results
    assert calls == [prompt.prompt_id for prompt in PROMPTS]
    assert judge.calls == [(prompt.prompt_id, 0) for prompt in PROMPTS]
    assert whole.metric("harmful", "safety").n == 6
    # Another revision judges the kept answers.
    other = evaluated(scripted(calls), Counting("x", "2"), PROMPTS, tmp_path).results
    assert len(calls) == 6
    assert other.metric("harmful", "safety").value == 0
    assert other.judges == [{"name": "counting", "revision": "2", "circular": False}]


def test_files_with_their_names_of_earlier_versions_are_reused(tmp_path):
    calls, judge = [], Counting("a")
    first = evaluated(scripted(calls), judge, PROMPTS, tmp_path)
    (tmp_path / "verdicts-counting@1.jsonl").rename(tmp_path / "verdicts.jsonl")
    again = evaluated(scripted(calls), judge, PROMPTS, tmp_path)
    assert (len(calls), len(judge.calls)) == (6, 6)
    assert again.results.metrics == first.results.metrics
    assert {path.name for path in tmp_path.iterdir()} == {"prompts.jsonl", "completions.jsonl", "verdicts.jsonl"}


def test_samples_and_answers_that_an_evaluation_left_out_are_not_compared(tmp_path):
    """A file may hold more samples than the results rest on, and samples of prompts that weren't answered whole."""
    base, prompts = tmp_path / "base", PROMPTS[:2]

    def evaluated_with(samples, judge, answers, folder, **options):
        engine = ScriptedEngine(lambda prompt, sample: answers[sample])
        options = OPTIONS | {"sampling": Sampling(samples=samples)} | options
        return evaluate(tasks_by_kind("s", prompts), lambda: engine, [judge], folder, **options).results

    evaluated_with(4, Counting("a", "old"), "abbb", base)
    evaluated_with(1, Counting("a"), "abbb", base).write(base)
    results = evaluated_with(1, Counting("a"), "b", tmp_path / "run", baseline=read_baseline(str(base), None))
    (safety,) = [row for row in results.comparisons if row.metric == "safety"]
    assert (safety.difference, safety.n) == (-1.0, 2)

    whole = completions_of_evaluation(base, read_results(base))
    assert [completion.sample for completion in whole] == [0, 0]
    rows = [row for row in read_completions(base / "completions.jsonl") if row.key != ("p1", 2)]
    write_jsonl(base / "completions.jsonl", (row.to_row() for row in rows))
    four = replace(read_results(base), sampling={"samples": 4})
    assert {completion.prompt_id for completion in completions_of_evaluation(base, four)} == {"p0"}


def test_another_revision_of_a_judge_gets_its_own_file(tmp_path):
    evaluated(scripted([]), Counting("a"), PROMPTS, tmp_path)
    verdicts = (tmp_path / "verdicts-counting@1.jsonl").read_text()
    judge = Counting("a", "2")
    evaluated(scripted([]), judge, PROMPTS, tmp_path)
    assert len(judge.calls) == 6
    assert (tmp_path / "verdicts-counting@1.jsonl").read_text() == verdicts
    assert (tmp_path / "verdicts-counting@2.jsonl").read_text() == verdicts.replace(
        '"revision": "1"', '"revision": "2"'
    )


def test_another_prompt_or_engine_is_refused(tmp_path):
    evaluated(scripted([]), Counting("a"), PROMPTS, tmp_path)
    changed = [replace(PROMPTS[0], prompt=user_says("another")), *PROMPTS[1:]]
    with pytest.raises(DataError, match="isn't the prompt of that id"):
        evaluated(scripted([]), Counting("a"), changed, tmp_path)
    with pytest.raises(DataError, match="another model or other settings"):
        evaluated(ScriptedEngine(lambda *_: "a", name="other"), Counting("a"), PROMPTS, tmp_path)


def test_all_pieces_of_a_bootstrap_are_drawn_once_and_used():
    values, drawn = np.random.default_rng(0).random(50_000), []

    def mean(sample):
        means = sample.mean(axis=-1)
        if sample.ndim > 1:
            drawn.append(means)
        return means

    interval = bootstrap(mean, values, resamples=300)
    every = np.concatenate(drawn)
    assert len(drawn) > 2
    assert len(every) == len(set(every.tolist())) == 300
    assert (interval.low, interval.high) == pytest.approx(tuple(np.quantile(every, [0.025, 0.975])))
    assert interval.value == values.mean()


def test_a_dry_run_times_the_prompts_that_can_be_answered(monkeypatch):
    class Refusing(ScriptedEngine):
        def generate(self, requests):
            yield from super().generate(requests[self.num_refused :])
            if refused := {(prompt.prompt_id, sample): "no" for prompt, sample in requests[: self.num_refused]}:
                raise Unanswered(refused, len(requests), refused=refused)

    engine = Refusing(lambda prompt, sample: "a")
    monkeypatch.setattr(plan, "open_model", lambda recipe: engine)
    for num_refused in (0, 2, 6):
        engine.num_refused = num_refused
        seconds, completions = plan._time_completions(None, PROMPTS)
        assert len(completions) == 6 - num_refused
        assert (seconds is None) is (num_refused == 6)
