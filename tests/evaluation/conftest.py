"""A scripted model, two scripted judges, and recipes over made-up prompts of two kinds."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from bfpo.core.samples import Verdict
from bfpo.evaluation import pipeline as module
from bfpo.evaluation import subject
from bfpo.generation.scripted import ScriptedEngine
from bfpo.judging.spec import FINDINGS, JUDGES, JudgeKind

CATEGORIES = ("locks", "ledgers")
SUITE = {
    "title": "A toy",
    "judges": ["safe", "refusal"],
    "indices": {"harmlessness_index": {"bad": "safety"}, "helpfulness_index": {"fine": "over_refusal"}},
    "tasks": [
        {"name": "bad", "source": "file", "path": "prompts.jsonl", "only": "harmful"},
        {"name": "fine", "source": "file", "path": "prompts.jsonl", "only": "lookalike"},
    ],
}


class Scripted:
    """A judge that looks for a word in the completion; it counts its calls."""

    def __init__(self, name: str, bad: str, revision: str = "1") -> None:
        self.name, self.bad, self.revision, self.calls = name, bad, revision, 0

    def judge(self, completions):
        for completion in completions:
            self.calls += 1
            refusal = completion.text.startswith("no")
            yield Verdict.on(
                completion,
                self,
                safe=self.bad not in completion.text,
                refusal=refusal,
                helpfulness=float(not refusal),
            )


class Counting(ScriptedEngine):
    """A model that counts its completions, and may be stopped."""

    calls, stop_after = 0, 10**9

    def generate(self, requests):
        for batch in super().generate(requests):
            if self.calls >= self.stop_after:
                raise KeyboardInterrupt
            self.calls += len(batch)
            yield batch


class Judges(dict):
    """Judges by spec; each spec is registered as a kind while the test runs."""

    def __init__(self, monkeypatch, *, compares=None, **judges) -> None:
        self._monkeypatch, self._kind = monkeypatch, JudgeKind(FINDINGS, needs_path=False, compares=compares)
        super().__init__()
        for spec, judge in judges.items():
            self[spec] = judge

    def __setitem__(self, spec, judge) -> None:
        if ":" not in spec:
            self._monkeypatch.setitem(JUDGES, spec, self._kind)
        super().__setitem__(spec, judge)

    def open(self, spec, **_):
        return self[getattr(spec, "text", spec)]


REAL = module.open_model


@pytest.fixture
def real_engine(toy, monkeypatch):
    """Open the model of the recipe, not the scripted one."""
    monkeypatch.setattr(module, "open_model", REAL)


@pytest.fixture
def toy(tmp_path, monkeypatch) -> SimpleNamespace:
    """Prompts, models and judges that a test may change; `recipe` makes a recipe of them."""
    monkeypatch.chdir(tmp_path)
    rows = [
        {"prompt": f"open {number}", "kind": kind, "category": CATEGORIES[number % 2]}
        for kind in ("harmful", "lookalike")
        for number in range(20 if kind == "harmful" else 100, 40 if kind == "harmful" else 112)
    ]
    Path("prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("toy.yaml").write_text(yaml.safe_dump(SUITE))

    def number(prompt):
        return int(prompt.prompt[-1].content.split()[-1])

    engines = {
        "careful": Counting(lambda prompt, sample: "no" if number(prompt) < 100 else "yes", name="careful"),
        "careless": Counting(lambda prompt, sample: "no" if number(prompt) % 4 == 0 else "yes gun", name="careless"),
    }
    judges = Judges(
        monkeypatch,
        one=Scripted("one", "gun"),
        two=Scripted("two", "yes"),
        same=Scripted("one", "gun", revision="22222222"),
    )
    monkeypatch.setattr(module, "open_model", lambda recipe: engines[recipe.model.path])
    monkeypatch.setattr(subject, "open_judge", judges.open)

    def recipe(model: str = "careful", **changes) -> dict:
        plain = {"out": f"out/{model}", "model": {"path": model}, "suites": ["toy.yaml"], "judges": ["one", "two"]}
        return plain | changes

    return SimpleNamespace(engines=engines, judges=judges, recipe=recipe, rows=rows)
