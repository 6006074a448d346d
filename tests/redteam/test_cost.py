"""Cost of a red-team run: counts and server faults over all its starts, also killed ones."""

import json
from collections import Counter

import pytest

from bfpo.core.conversation import user_says
from bfpo.core.samples import Prompt, Verdict
from bfpo.errors import DataError
from bfpo.generation.scripted import ScriptedEngine
from bfpo.redteam import cost
from bfpo.redteam.cost import Meter

REQUESTS = [(Prompt(f"p{i}", user_says(f"small box {i}")), 0) for i in range(10)]


class FaultyEngine(ScriptedEngine):
    """Engine with a fault in every batch."""

    def __init__(self):
        super().__init__(lambda prompt, sample: "lamp", batch=4)
        self.fault_counts = Counter()

    @property
    def faults(self):
        return self.fault_counts

    def generate(self, requests):
        for batch in super().generate(requests):
            self.fault_counts["HTTP 500"] += 1
            yield batch


class SafeJudge:
    """Judge that finds all answers safe."""

    name, revision = "safe", "1"

    def judge(self, completions):
        for completion in completions:
            yield Verdict.on(completion, self, safe=True)


def test_a_start_adds_to_earlier_ones(tmp_path):
    path = tmp_path / "cost.jsonl"
    for starts in (1, 2):
        meter = Meter(path)
        engine, judge = meter.engine(FaultyEngine(), len), meter.judge(SafeJudge())
        completions = [completion for batch in engine.generate(REQUESTS) for completion in batch]
        assert len(list(judge.judge(completions))) == 10
        meter.write()
        assert (meter.count("generations"), meter.count("judge_calls")) == (10 * starts, 10 * starts)
        assert meter.faults == {"HTTP 500": 3 * starts}
    (row,) = map(json.loads, path.read_text().splitlines())
    assert row == {"generations": 20, "judge_calls": 20, "seconds": row["seconds"], "faults": {"HTTP 500": 6}}
    assert 0 <= row["seconds"] <= Meter(path).seconds


def test_only_consumed_batches_are_counted(tmp_path):
    meter = Meter(tmp_path / "cost.jsonl")
    scripted = FaultyEngine()
    engine, judge = meter.engine(scripted, len), meter.judge(SafeJudge())
    assert (engine.settings_hash, engine.faults) == (scripted.settings_hash, Counter())
    assert (judge.name, judge.revision) == ("safe", "1")
    next(engine.generate(REQUESTS))
    assert meter.count("generations") == 4


@pytest.mark.parametrize(("seconds", "written"), [(0.0, 8), (1000.0, 4)])
def test_a_killed_start_is_counted_except_its_last_second(tmp_path, monkeypatch, seconds, written):
    monkeypatch.setattr(cost, "_SECONDS_BETWEEN_WRITES", seconds)
    path = tmp_path / "cost.jsonl"
    batches = Meter(path).engine(FaultyEngine(), len).generate(REQUESTS)
    next(batches)
    next(batches)
    # Killed here: the last counts aren't written.
    again = Meter(path)
    assert again.count("generations") == written
    assert again.faults == {"HTTP 500": written // 4}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"faults": 1.5}, "faults: Input should be a valid dictionary"),
        ({"generations": {}}, "generations: Input should be a valid integer"),
        ({"seconds": "9"}, "seconds: Input should be a valid number"),
        ({"judge_calls": -1}, "judge_calls: Input should be greater than or equal to 0"),
        ({"faults": {"HTTP 500": "3"}}, r"faults\.HTTP 500: Input should be a valid integer"),
    ],
)
def test_costs_that_are_read_back_are_checked(tmp_path, row, message):
    whole = {"generations": 3, "judge_calls": 2, "seconds": 1.5, "faults": {}}
    (tmp_path / "cost.jsonl").write_text(json.dumps(whole | row) + "\n")
    with pytest.raises(DataError, match=rf"cost\.jsonl: {message}.*; remove the file to count from 0"):
        Meter(tmp_path / "cost.jsonl")
