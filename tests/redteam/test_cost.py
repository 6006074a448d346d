"""What a red-team run cost: over all its starts, with a server's faults, whatever kills it."""

import json
from collections import Counter

import pytest

from bfpo.core.pairs import user_says
from bfpo.core.samples import Prompt, Verdict
from bfpo.generation.scripted import ScriptedEngine
from bfpo.redteam import cost
from bfpo.redteam.cost import Meter

WANTED = [(Prompt(f"p{i}", user_says(f"small box {i}")), 0) for i in range(10)]


class Faulty(ScriptedEngine):
    """Has a fault in every batch."""

    def __init__(self):
        super().__init__(lambda prompt, sample: "lamp", batch=4)
        self.seen = Counter()

    @property
    def faults(self):
        return self.seen

    def generate(self, wanted):
        for batch in super().generate(wanted):
            self.seen["HTTP 500"] += 1
            yield batch


class Safe:
    """Finds all safe."""

    name, revision = "safe", "1"

    def judge(self, completions):
        for one in completions:
            yield Verdict.on(one, self, safe=True)


def test_a_start_adds_to_those_before_it(tmp_path):
    path = tmp_path / "cost.jsonl"
    for starts in (1, 2):
        meter = Meter(path)
        engine, judge = meter.engine(Faulty()), meter.judge(Safe())
        made = [one for batch in engine.generate(WANTED) for one in batch]
        assert len(list(judge.judge(made))) == 10
        meter.write()
        assert (meter.count("generations"), meter.count("judge_calls")) == (10 * starts, 10 * starts)
        assert meter.faults == {"HTTP 500": 3 * starts}
    (row,) = map(json.loads, path.read_text().splitlines())
    assert row == {"generations": 20, "judge_calls": 20, "seconds": row["seconds"], "faults": {"HTTP 500": 6}}
    assert 0 <= row["seconds"] <= Meter(path).seconds


def test_what_is_counted_is_what_passes_through(tmp_path):
    meter = Meter(tmp_path / "cost.jsonl")
    scripted, safe = Faulty(), Safe()
    engine, judge = meter.engine(scripted), meter.judge(safe)
    assert (engine.settings_hash, engine.faults) == (scripted.settings_hash, Counter())
    assert (judge.name, judge.revision) == ("safe", "1")
    next(engine.generate(WANTED))
    assert meter.count("generations") == 4


@pytest.mark.parametrize(("seconds", "kept"), [(0.0, 8), (1000.0, 4)])
def test_a_killed_start_is_counted_but_for_its_last_moment(tmp_path, monkeypatch, seconds, kept):
    monkeypatch.setattr(cost, "_SECONDS_BETWEEN_WRITES", seconds)
    path = tmp_path / "cost.jsonl"
    batches = Meter(path).engine(Faulty()).generate(WANTED)
    next(batches)
    next(batches)
    # Here it is killed: nobody writes the counts down.
    again = Meter(path)
    assert again.count("generations") == kept
    assert again.faults == {"HTTP 500": kept // 4}
