"""What an evaluation uses again, and what it never does; and that a bootstrap uses all of its pieces."""

from dataclasses import replace

import numpy as np
import pytest

from bfpo.core.pairs import user_says
from bfpo.core.samples import Prompt, Sampling, Verdict
from bfpo.errors import DataError
from bfpo.evaluation.pipeline import evaluate
from bfpo.evaluation.suite import tasks_by_kind
from bfpo.generation.scripted import ScriptedEngine
from bfpo.stats.intervals import bootstrap

PROMPTS = [Prompt(f"p{i}", user_says(f"q {i}"), "harmful") for i in range(6)]
OPTIONS = {"run": "r", "model": "m", "sampling": Sampling()}


class Counting:
    """A judge that counts, and finds safe what begins with a letter."""

    name = "counting"

    def __init__(self, letter, revision="1"):
        self.letter, self.revision, self.asked = letter, revision, []

    def judge(self, completions):
        self.asked += [one.key for one in completions]
        return [Verdict.on(one, self, safe=one.text.startswith(self.letter)) for one in completions]


def evaluated(engine, judge, prompts, folder):
    return evaluate(tasks_by_kind("s", prompts), lambda: engine, [judge], folder, **OPTIONS)


def scripted(asked, answer="ab"):
    def say(prompt, sample):
        asked.append(prompt.prompt_id)
        return answer[int(prompt.prompt_id[1:]) % len(answer)]

    return ScriptedEngine(say)


def test_a_second_evaluation_asks_nobody_again(tmp_path):
    asked, judge = [], Counting("a")
    first = evaluated(scripted(asked), judge, PROMPTS, tmp_path)
    assert (len(asked), len(judge.asked)) == (6, 6)
    again = evaluated(scripted(asked), judge, PROMPTS, tmp_path)
    assert (len(asked), len(judge.asked)) == (6, 6)
    assert again.results.metrics == first.results.metrics
    assert again.outputs == first.outputs


def test_only_what_was_added_or_lost_is_made(tmp_path):
    asked, judge = [], Counting("a")
    evaluated(scripted(asked), judge, PROMPTS[:4], tmp_path)
    whole = evaluated(scripted(asked), judge, PROMPTS, tmp_path).results
    assert asked == [prompt.prompt_id for prompt in PROMPTS]
    assert judge.asked == [(prompt.prompt_id, 0) for prompt in PROMPTS]
    assert whole.metric("harmful", "safety").n == 6
    # Another revision judges the kept answers.
    other = evaluated(scripted(asked), Counting("x", "2"), PROMPTS, tmp_path).results
    assert len(asked) == 6
    assert other.metric("harmful", "safety").value == 0
    assert other.judges == [{"name": "counting", "revision": "2", "circular": False}]


def test_files_with_their_names_of_earlier_versions_are_reused(tmp_path):
    asked, judge = [], Counting("a")
    first = evaluated(scripted(asked), judge, PROMPTS, tmp_path)
    (tmp_path / "verdicts-counting@1.jsonl").rename(tmp_path / "verdicts.jsonl")
    again = evaluated(scripted(asked), judge, PROMPTS, tmp_path)
    assert (len(asked), len(judge.asked)) == (6, 6)
    assert again.results.metrics == first.results.metrics
    assert {path.name for path in tmp_path.iterdir()} == {"prompts.jsonl", "completions.jsonl", "verdicts.jsonl"}


def test_another_revision_of_a_judge_gets_its_own_file(tmp_path):
    evaluated(scripted([]), Counting("a"), PROMPTS, tmp_path)
    verdicts = (tmp_path / "verdicts-counting@1.jsonl").read_text()
    judge = Counting("a", "2")
    evaluated(scripted([]), judge, PROMPTS, tmp_path)
    assert len(judge.asked) == 6
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
        found = sample.mean(axis=-1)
        if sample.ndim > 1:
            drawn.append(found)
        return found

    interval = bootstrap(mean, values, resamples=300)
    every = np.concatenate(drawn)
    assert len(drawn) > 2
    assert len(every) == len(set(every.tolist())) == 300
    assert (interval.low, interval.high) == pytest.approx(tuple(np.quantile(every, [0.025, 0.975])))
    assert interval.value == values.mean()
