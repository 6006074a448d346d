"""Win rates against reference outputs: both orders, resuming, AlpacaEval's files."""

import json
from pathlib import Path

import pytest
import yaml

from bfpo.config.loading import check_recipe
from bfpo.core.samples import Preference, Verdict
from bfpo.errors import DataError, RecipeError
from bfpo.evaluation import pipeline as module
from bfpo.evaluation import plan, subject
from bfpo.evaluation.alpaca_eval import read_alpaca_annotations
from bfpo.evaluation.pipeline import run_eval
from bfpo.evaluation.recipe import EvalRecipe
from bfpo.generation.scripted import ScriptedEngine
from bfpo.report.html import render
from bfpo.report.lengths import length_figures
from bfpo.report.run_files import read_runs
from bfpo.stats.length_control import win_rate

from .conftest import Judges

SUITE = {
    "title": "Against reference outputs",
    "judges": ["helpfulness"],
    "tasks": [{"name": "tell", "source": "alpaca_eval", "path": "outputs.json", "compare": "output"}],
}


class Rates:
    """A judge that rates long answers as helpful, and can't rate those with a question mark."""

    name, revision = "rates", "1"

    def __init__(self):
        self.calls = 0

    def judge(self, completions):
        for completion in completions:
            self.calls += 1
            rating = None if "?" in completion.text else min(len(completion.text) / 100, 1.0)
            yield Verdict.on(completion, self, safe=True, helpfulness=rating)


class Sees(Rates):
    """A judge that sees two answers and prefers the longer one, or the first of two alike; it may be stopped."""

    name = "sees"
    stop_after = 10**9

    def prefer(self, pairs):
        for first, second in pairs:
            if self.calls >= self.stop_after:
                raise KeyboardInterrupt
            self.calls += 1
            gap = len(first.text) - len(second.text)
            if "?" in first.text + second.text:
                yield Preference(None, "can't read it")
            else:
                yield Preference(1.0 if gap > -3 else 0.0)

    def judge(self, completions):
        for completion in completions:
            yield Verdict.on(completion, self, safe=True)


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """Twelve prompts: reference outputs of 20 characters, completions of 18 to 40, one of which can't be rated."""
    monkeypatch.chdir(tmp_path)
    rows = [
        {"instruction": f"tell {i}", "output": "g" * 20, "generator": "given", "dataset": "toys"} for i in range(12)
    ]
    Path("outputs.json").write_text(json.dumps(rows))
    Path("beside.yaml").write_text(yaml.safe_dump(SUITE))

    def answer(prompt, sample):
        number = int(prompt.prompt[-1].content.split()[-1])
        return "?" * 30 if number == 11 else "a" * (18 + 2 * number)

    judges = Judges(monkeypatch, compares="rating", rates=Rates(), sees=Sees())
    monkeypatch.setattr(module, "open_model", lambda recipe: ScriptedEngine(answer, name="scripted"))
    monkeypatch.setattr(plan, "open_model", lambda recipe: ScriptedEngine(answer, name="scripted"))
    monkeypatch.setattr(subject, "open_judge", judges.open)
    return judges


def recipe(**changes):
    plain = {"out": "out/a", "model": {"path": "m"}, "suites": ["beside.yaml"], "judges": ["rates", "sees"]}
    return check_recipe(plain | changes, EvalRecipe, "toy")


def numbers(results):
    return {(metric.task, metric.metric, metric.judge): metric for metric in results.metrics}


def test_win_rates_by_a_judge_that_sees_both_and_by_one_that_rates(toy):
    metrics = numbers(run_eval(recipe()))
    # Of the 11 that can be rated: 18 characters lose, 20 tie, the others win.
    rated = metrics["tell", "win_rate", "rates"]
    assert (rated.value, rated.n, rated.unscored) == (pytest.approx(9.5 / 11), 11, 1)
    assert rated.low < rated.value < rated.high
    assert rated.least < rated.low
    assert rated.most > rated.value
    # The order decides where the gap is below 3: 18, 20 and 22 characters.
    seen = metrics["tell", "win_rate", "sees"]
    assert (seen.value, seen.n) == (pytest.approx((3 * 0.5 + 8) / 11), 11)
    assert metrics["tell", "order_decides", "sees"].value == pytest.approx(3 / 11)
    assert ("tell", "order_decides", "rates") not in metrics
    # It is lower at equal length, as nearly all winners are longer.
    assert metrics["tell", "win_rate_length_controlled", "sees"].value < seen.value
    # The reference outputs are rated once each; the ratings of the completions are in their verdicts.
    assert toy["rates"].calls == 12 + 12
    assert toy["sees"].calls == 2 * 12


def test_a_killed_comparison_resumes(toy):
    toy["sees"].stop_after = 7
    with pytest.raises(KeyboardInterrupt):
        run_eval(recipe())
    unfinished = Path("out/a/comparisons-sees@1.jsonl.unfinished")
    assert len(unfinished.read_text().splitlines()) == 7
    with unfinished.open("a") as file:
        file.write('{"prompt_id": "half')
    toy["sees"].stop_after = 10**9
    whole = run_eval(recipe())
    assert toy["sees"].calls == 24
    again = run_eval(recipe())
    assert (toy["sees"].calls, toy["rates"].calls) == (24, 24)
    assert again.metrics == whole.metrics
    Path("outputs.json").write_text(Path("outputs.json").read_text().replace("g" * 20, "h" * 20))
    with pytest.raises(DataError, match="another text"):
        run_eval(recipe())


def test_the_files_have_alpaca_eval_s_format(toy):
    metrics = numbers(run_eval(recipe()))
    folder = Path("out/a/alpaca_eval/tell")
    outputs = json.loads((folder / "model_outputs.json").read_text())
    assert len(outputs) == 12
    assert outputs[0] == {"dataset": "toys", "instruction": "tell 0", "output": "a" * 18, "generator": "a"}
    for judge in ("rates", "sees"):
        annotations = read_alpaca_annotations(folder / judge / "annotations.json")
        metric = metrics["tell", "win_rate", judge]
        assert win_rate(annotations.preferences) == pytest.approx((metric.value, metric.low, metric.high))
        assert annotations.reference_outputs == ["g" * 20] * 11


def test_two_runs_are_compared_prompt_by_prompt_only_with_the_same_references(toy, monkeypatch):
    run_eval(recipe())
    better = ScriptedEngine(lambda prompt, sample: "b" * 60, name="better")
    monkeypatch.setattr(module, "open_model", lambda recipe: better)
    results = run_eval(recipe(out="out/b", base="out/a"))
    compared = {(comparison.metric, comparison.judge): comparison for comparison in results.comparisons}
    assert compared["win_rate", "sees"].difference == pytest.approx(1 - (3 * 0.5 + 8) / 11)
    assert compared["win_rate", "rates"].n == 11
    Path("outputs.json").write_text(Path("outputs.json").read_text().replace('"given"', '"others"'))
    results = run_eval(recipe(out="out/c", base="out/a"))
    assert "win_rate" not in {comparison.metric for comparison in results.comparisons}
    assert any("with other outputs" in warning for warning in results.warnings)


def test_the_page_draws_length_against_win_rate(toy):
    run_eval(recipe())
    (by_rates, by_sees) = length_figures(read_runs([Path("out/a")]))
    assert (by_rates.label, by_sees.label) == ("beside/tell by rates", "beside/tell by sees")
    assert by_sees.lines[0].startswith("a: 1 tokens, win rate 0.86 [")
    assert "length-controlled" in by_sees.lines[0]
    drawn = by_sees.drawing.standalone()
    assert drawn.count('class="dot') + drawn.count('class="ring') == 2
    assert "Length against win rate" in render(read_runs([Path("out/a")]), title="t")


def test_gates_and_the_dry_run_cover_win_rates(toy, capsys):
    bound = {"suite": "beside", "task": "tell", "metric": "win_rate", "judge": "sees", "min": 0.2}
    run_eval(recipe(gate=[bound]))
    assert "passed" in capsys.readouterr().out
    with pytest.raises(RecipeError, match="did you mean 'win_rate'"):
        run_eval(recipe(gate=[bound | {"metric": "winrate"}]))
    stages = {stage.name: stage for stage in plan.show_plan(recipe(out="out/new"))}
    assert stages["comparisons by sees, both orders"].total == 24


def test_impossible_comparisons_are_refused_first(toy, monkeypatch):
    with pytest.raises(
        RecipeError, match=r"none of linear:j\.npz compares answers.*oracle, rubric, beaver-reward, reward"
    ):
        run_eval(recipe(judges=["linear:j.npz"]))
    rows = json.loads(Path("outputs.json").read_text())
    for change, message in (
        ([{**rows[0], "output": None}], "no text in column 'output'"),
        ([rows[0], {**rows[0], "output": "other"}], "a second reference output for the same prompt"),
    ):
        Path("outputs.json").write_text(json.dumps(change))
        with pytest.raises(DataError, match=message):
            run_eval(recipe(out="out/none"))
    assert not Path("out/none").exists()
