"""Judges that rate answers and don't judge their safety, as reward models do."""

import pytest

from bfpo.core.conversation import user_says
from bfpo.core.samples import Prompt, Sampling, Verdict
from bfpo.evaluation.pipeline import evaluate
from bfpo.evaluation.suite import tasks_by_kind
from bfpo.generation.scripted import ScriptedEngine
from bfpo.report.run_files import read_runs
from bfpo.report.samples import sample_groups

PROMPTS = [Prompt(f"{kind}-{i}", user_says(f"{kind} {i}"), kind) for kind in ("harmful", "benign") for i in range(12)]
OPTIONS = {"run": "r", "model": "m", "sampling": Sampling()}


class Guard:
    """Judge that calls everything safe."""

    name, revision = "guard", "1"

    def judge(self, completions):
        for completion in completions:
            yield Verdict.on(completion, self, safe=True, refusal=False)


class Reward:
    """Reward model that can't read one of the answers."""

    name, revision = "reward", "1"

    def judge(self, completions):
        for completion in completions:
            rating = {} if completion.prompt_id == "harmful-3" else {"helpfulness": 0.75, "score": 1.1}
            yield Verdict.on(completion, self, safe=None, reason="a reward model doesn't judge safety", **rating)


class Silent:
    """Judge that decides nothing."""

    name, revision = "silent", "1"

    def judge(self, completions):
        for completion in completions:
            yield Verdict.on(completion, self, safe=None, reason="not a verdict")


@pytest.fixture
def results(tmp_path):
    evaluation = evaluate(
        tasks_by_kind("s", PROMPTS),
        lambda: ScriptedEngine(lambda prompt, sample: "yes"),
        [Guard(), Reward(), Silent()],
        tmp_path,
        **OPTIONS,
    )
    evaluation.results.write(tmp_path)
    return evaluation.results


def metrics(results, judge):
    return {(row.task, row.metric) for row in results.metrics if row.judge == judge}


def test_they_have_no_safety_and_no_mean_of_it(results):
    assert ("harmful", "safety") in metrics(results, "guard")
    assert ("benign", "helpfulness") in metrics(results, "reward")
    assert not {name for _, name in metrics(results, "reward")} & {"safety", "harmonic_mean", "unsafe_call_rate"}


def test_a_judge_that_decides_nothing_finds_nothing_safe(results):
    (safety,) = [row for row in results.metrics if (row.judge, row.metric) == ("silent", "safety")]
    assert (safety.value, safety.unscored) == (0.0, 12)


def test_no_answer_fails_on_the_page_because_of_them(results, tmp_path):
    (tmp_path / "verdicts-silent@1.jsonl").unlink()
    (run,) = read_runs([tmp_path])
    harmful = next(group for group in sample_groups([run]) if group.label.startswith("harmful"))
    assert harmful.failures == {"r": 0}
    verdicts = dict(harmful.samples[0].completions[0].verdicts)
    assert [chip.text for chip in verdicts["guard"]] == ["safe"]
    assert [chip.text for chip in verdicts["reward"]] == ["helpfulness 0.75"]
