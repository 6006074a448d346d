"""Win rates against reference outputs: both orders, resuming, AlpacaEval's files."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import yaml

from bfpo.config.loading import check_recipe
from bfpo.core.samples import Preference, Verdict
from bfpo.errors import DataError, RecipeError
from bfpo.evaluation import pipeline as module
from bfpo.evaluation import plan, subject, win_rates
from bfpo.evaluation.alpaca_eval import read_alpaca_annotations, read_length_control
from bfpo.evaluation.pipeline import run_eval
from bfpo.evaluation.recipe import EvalRecipe
from bfpo.generation.scripted import ScriptedEngine
from bfpo.judging.open import open_judge
from bfpo.report.html import render
from bfpo.report.lengths import length_figures
from bfpo.report.run_files import read_runs
from bfpo.stats.length_control import alpaca_eval_win_rate, win_rate

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
    assert metrics["tell", "win_rate_length_controlled_approximate", "sees"].value < seen.value
    assert ("tell", "win_rate_length_controlled", "sees") not in metrics
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


def test_prompts_whose_reference_outputs_changed_are_left_out_of_the_comparison(toy):
    run_eval(recipe())
    rows = json.loads(Path("outputs.json").read_text())
    rows[3]["output"] = "h" * 25
    Path("outputs.json").write_text(json.dumps(rows))
    results = run_eval(recipe(out="out/b", base="out/a"))
    compared = {(comparison.metric, comparison.judge): comparison for comparison in results.comparisons}
    assert compared["win_rate", "rates"].n == 10
    assert any("is without 1 prompts, whose reference outputs" in warning for warning in results.warnings)


def test_the_refusal_rule_compares_nothing(toy, monkeypatch):
    monkeypatch.setattr(subject, "open_judge", open_judge_or(toy))
    metrics = numbers(run_eval(recipe(judges=["refusal-rule", "rates"])))
    assert metrics["benign", "helpfulness", "refusal-rule"].value == pytest.approx(11 / 12)
    assert {judge for _, name, judge in metrics if "win_rate" in name} == {"rates"}


def open_judge_or(toy):
    def open_one(spec, **options):
        return open_judge(spec, **options) if spec == "refusal-rule" else toy.open(spec)

    return open_one


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


def length_control_files(count=12):
    """Write the two files of AlpacaEval's length control for this many instructions; return their recipe section."""
    rows = [
        f"{baseline},{index},{(index + 3 * sign) % 5 / 4},{sign * (index + 1) / 6},{(index % 5 - 2) / 2},False"
        for baseline, sign in (("concise", 1), ("verbose", -1))
        for index in range(count)
    ]
    header = "model,index,preference,std_delta_len,instruction_difficulty,not_gamed_baseline"
    Path("df_gamed.csv").write_text("\n".join([header, *rows]) + "\n")
    difficulties = [f"{index},{(index % 5 - 2) / 2}" for index in range(count)]
    Path("difficulty.csv").write_text("\n".join([",instruction_difficulty", *difficulties]) + "\n")
    return {"gamed": "df_gamed.csv", "difficulty": "difficulty.csv"}


@pytest.fixture
def few_resamples(monkeypatch):
    """Shorten the bootstrap of AlpacaEval's regression."""
    rate = partial(alpaca_eval_win_rate, resamples=10)
    monkeypatch.setattr(win_rates, "alpaca_eval_win_rate", rate)
    return rate


def test_with_alpaca_evals_files_the_rate_is_the_published_one(toy, capsys, few_resamples):
    files = length_control_files()
    bound = {"suite": "beside", "task": "tell", "metric": "win_rate_length_controlled", "judge": "sees", "min": 0.01}
    metrics = numbers(run_eval(recipe(length_control=files, gate=[bound])))
    assert "passed" in capsys.readouterr().out
    control = read_length_control("df_gamed.csv")
    # The prompt that can't be read has lengths and a difficulty, but no preference.
    lengths = np.array([18.0 + 2 * index for index in range(11)] + [30.0])
    preferences = np.array([0.5] * 3 + [1.0] * 8 + [np.nan])
    expected = few_resamples(preferences, lengths, np.full(12, 20.0), control.difficulties, control.gamed)
    metric = metrics["tell", "win_rate_length_controlled", "sees"]
    assert (metric.value, metric.low, metric.high) == pytest.approx(tuple(expected))
    assert (metric.n, metric.unscored) == (11, 1)
    assert ("tell", "win_rate_length_controlled_approximate", "sees") not in metrics
    # A sample has the difficulties of its own instructions.
    sampled = run_eval(recipe(length_control=files, limit=8, out="out/limit"))
    assert numbers(sampled)["tell", "win_rate_length_controlled", "sees"].n in (7, 8)


def test_short_answers_have_no_length_controlled_rate_without_the_files(toy, monkeypatch, few_resamples):
    short = ScriptedEngine(lambda prompt, sample: "a" * 17, name="short")
    monkeypatch.setattr(module, "open_model", lambda recipe: short)
    results = run_eval(recipe())
    assert {"win_rate", "order_decides"} <= {metric.metric for metric in results.metrics}
    assert not any("length_controlled" in metric.metric for metric in results.metrics)
    (warning,) = [warning for warning in results.warnings if "length-controlled" in warning]
    assert "the answers have 17 characters on average, the reference outputs 20. Below 90%" in warning
    assert "Set `length_control:`" in warning
    results = run_eval(recipe(out="out/files", length_control=length_control_files()))
    assert "win_rate_length_controlled" in {metric.metric for metric in results.metrics}
    assert not [warning for warning in results.warnings if "no length-controlled" in warning]
    # Exactly nine tenths of the reference's length is enough.
    monkeypatch.setattr(module, "open_model", lambda recipe: ScriptedEngine(lambda *_: "a" * 18, name="nearly"))
    results = run_eval(recipe(out="out/nearly"))
    assert "win_rate_length_controlled_approximate" in {metric.metric for metric in results.metrics}


def test_no_gate_on_an_approximation(toy):
    bound = {"suite": "beside", "task": "tell", "min": 0.2}
    files = length_control_files()
    for changes, metric, message in (
        ({}, "win_rate_length_controlled_approximate", "_approximate' is an approximation, which decides no bound"),
        ({"length_control": files}, "win_rate_length_controlled_approximate", "is an approximation"),
        ({}, "win_rate_length_controlled", "needs AlpacaEval's files; set `length_control:`"),
    ):
        with pytest.raises(RecipeError, match=message):
            run_eval(recipe(gate=[bound | {"metric": metric}], **changes))
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: Path("df_gamed.csv").unlink(), "no file df_gamed.csv"),
        (lambda: length_control_files(11), "has 11 instructions, outputs.json 12"),
        (lambda: _replace("df_gamed.csv", "concise,1,", "concise,2,"), "doesn't start with each instruction once"),
        (lambda: _replace("df_gamed.csv", "concise,0,0.75", "concise,0,x"), "'preference' is 'x'; expected a number"),
        (lambda: _replace("df_gamed.csv", "concise,0,0.75", "concise,0,1.75"), "'preference' isn't from 0 to 1"),
        (lambda: _replace("difficulty.csv", "\n3,0.5", "\n3,0.25"), "the difficulties aren't those of df_gamed.csv"),
        (
            lambda: _replace("difficulty.csv", "instruction_difficulty", "hardness"),
            "no column 'instruction_diff",
        ),
        (lambda: _replace("difficulty.csv", "\n3,0.5", "\n3,hard"), "is 'hard'; expected a number"),
    ],
)
def test_files_of_length_control_are_checked_first(toy, change, message):
    files = length_control_files()
    change()
    with pytest.raises(DataError, match=message):
        run_eval(recipe(length_control=files))
    assert not Path("out").exists()


def _replace(path, old, new):
    text = Path(path).read_text()
    assert old in text
    Path(path).write_text(text.replace(old, new, 1))
