"""`bfpo eval` with human labels: rates corrected for the judges' errors on them."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from bfpo.config.loading import check_recipe
from bfpo.core.files import content_hash, file_hash, write_json, write_jsonl
from bfpo.errors import DataError, RecipeError
from bfpo.evaluation import plan
from bfpo.evaluation.pipeline import run_eval
from bfpo.evaluation.recipe import EvalRecipe
from bfpo.evaluation.results import read_results
from bfpo.report.card import card_section
from bfpo.report.html import write_report
from bfpo.stats.judge_error import JudgeErrors, corrected_rate


def evaluate(content, **options):
    return run_eval(check_recipe(content, EvalRecipe, "recipe"), **options)


def metric_of(results, **key):
    key = {"suite": "toy", "category": None, "judge": "one"} | key
    (result,) = [
        metric for metric in results.metrics if all(getattr(metric, name) == value for name, value in key.items())
    ]
    return result


def labeled(model="careless", *, kind="harmful", first=200, refusals=40, answers=40, missed=4, alarms=8, **columns):
    """Return labeled answers; the toy's judges call an answer that starts with `no` a refusal."""
    texts = ["sorry"] * missed + ["no"] * (refusals - missed) + ["no way"] * alarms + ["yes"] * (answers - alarms)
    return [
        {
            "prompt": f"open {first + number}",
            "text": text,
            "refusal": number < refusals,
            "safe": True,
            "model": model,
            "kind": kind,
            **columns,
        }
        for number, text in enumerate(texts)
    ]


def test_each_rate_is_followed_by_the_corrected_one(toy):
    write_jsonl(Path("people.jsonl"), labeled())
    results = evaluate(toy.recipe("careless", calibration="people.jsonl"))
    plain, corrected = (metric_of(results, task="fine", metric=f"over_refusal{end}") for end in ("", "_corrected"))
    assert plain.value == 0.25
    # The judge detects 36 of 40 refusals, and calls 8 of 40 other answers refusals.
    interval = corrected_rate(0.25, 12, JudgeErrors(0.9, 40, 0.8, 40))
    assert (corrected.value, corrected.low, corrected.high) == pytest.approx(interval)
    assert corrected.value == pytest.approx(0.05 / 0.7)
    assert (corrected.n, corrected.higher_is_better, corrected.judge) == (12, False, "one")
    assert "Lang and Reiczigel" in corrected.interval
    assert results.metrics.index(corrected) == results.metrics.index(plain) + 1
    assert metric_of(results, task="lookalike", metric="over_refusal_corrected", judge="two").value == corrected.value
    assert not any(metric.category for metric in results.metrics if metric.metric.endswith("_corrected"))
    refusal = next(row for row in results.calibration if (row.judge, row.question) == ("one", "refusal"))
    assert asdict(refusal) == {
        "judge": "one",
        "question": "refusal",
        "labeled": "people.jsonl",
        "hash": file_hash(Path("people.jsonl")),
        "models": ["careless"],
        "own": True,
        "answers": 80,
        "sensitivity": 0.9,
        "yes": 40,
        "specificity": 0.8,
        "no": 40,
    }
    assert not any("other models" in text for text in results.warnings)
    assert read_results(Path("out/careless")) == results


def test_judges_read_the_labeled_answers_once(toy):
    write_jsonl(Path("people.jsonl"), labeled())
    first = evaluate(toy.recipe("careless", calibration="people.jsonl"))
    calls = toy.judges["one"].calls
    assert calls == 32 + 80
    assert evaluate(toy.recipe("careless", calibration="people.jsonl")).metrics == first.metrics
    assert toy.judges["one"].calls == calls
    assert Path("out/careless/calibration-one@1.jsonl").is_file()


def test_labels_that_do_not_show_a_judge_s_errors_leave_the_rate_open(toy):
    # No answer is labeled unsafe, so how often the judge misses unsafe ones is unknown.
    write_jsonl(Path("people.jsonl"), labeled())
    bound = {"suite": "toy", "task": "bad", "metric": "safety_corrected", "min": 0.9}
    results = evaluate(toy.recipe("careless", calibration="people.jsonl", gate=[bound]))
    safety = metric_of(results, task="bad", metric="safety_corrected")
    assert (safety.value, safety.low, safety.high) == (None, 0, 1)
    assert any(
        "one: the human labels of 'safe' (80 yes, 0 no) don't show how often it errs" in text
        for text in results.warnings
    )


def test_safety_is_calibrated_on_harmful_prompts_and_refusals_on_all(toy):
    rows = labeled(kind="harmful", refusals=10, answers=10, missed=1, alarms=0)
    rows += labeled(kind="lookalike", first=300, refusals=10, answers=10, missed=0, alarms=0)
    write_jsonl(Path("people.jsonl"), rows)
    results = evaluate(toy.recipe("careless", calibration="people.jsonl"))
    counts = {row.question: (row.answers, row.yes) for row in results.calibration if row.judge == "one"}
    assert counts == {"safe": (20, 20), "refusal": (40, 20)}


def test_calibration_on_other_models_is_warned_of_and_own_answers_are_preferred(toy):
    write_jsonl(Path("others.jsonl"), labeled("another") + labeled("third", first=400))
    results = evaluate(toy.recipe("careless", calibration="others.jsonl"))
    (warning,) = [text for text in results.warnings if "answers of other models" in text]
    assert "not of the evaluated one" in warning
    assert results.calibration[0].own is False
    assert results.calibration[0].models == ["another", "third"]
    write_jsonl(Path("mixed.jsonl"), labeled("another") + labeled("careless", first=400, answers=30))
    results = evaluate(toy.recipe("careless", calibration="mixed.jsonl", out="out/mixed"))
    assert {(tuple(row.models), row.own) for row in results.calibration} == {(("careless",), True)}
    assert {row.answers for row in results.calibration if row.question == "refusal"} == {70}


def test_another_run_s_checkpoint_of_the_same_number_is_another_model(toy):
    toy.engines["runs/a/checkpoint-5"] = toy.engines["careless"]
    for model, own in (("runs/b/checkpoint-5", False), ("checkpoint-5", True), ("runs/a/checkpoint-5", True)):
        write_jsonl(Path("labels.jsonl"), labeled(model))
        out = f"out/{content_hash(model)[:6]}"
        results = evaluate(toy.recipe("runs/a/checkpoint-5", calibration="labels.jsonl", out=out))
        assert {row.own for row in results.calibration} == {own}, model


def test_a_rate_that_does_not_fit_the_errors_is_warned_of(toy):
    # The judge calls a third of the labeled non-refusals refusals, but no answer of the careful model.
    write_jsonl(Path("people.jsonl"), labeled("careful", answers=120, alarms=40, missed=0))
    results = evaluate(toy.recipe("careful", calibration="people.jsonl"))
    (first, *_) = [text for text in results.warnings if "errs differently on these answers" in text]
    assert first.startswith("one: toy/lookalike over_refusal 0.00 is impossible with the")


def test_a_question_without_labels_is_not_corrected(toy):
    write_jsonl(Path("people.jsonl"), [row | {"safe": None} for row in labeled()])
    results = evaluate(toy.recipe("careless", calibration="people.jsonl"))
    assert not [metric for metric in results.metrics if metric.metric == "safety_corrected"]
    assert any("no label says whether answers are 'safe'" in text for text in results.warnings)


def test_a_judge_fitted_on_its_calibration_answers_is_warned_of(toy):
    write_jsonl(Path("people.jsonl"), labeled())
    Path("judge.npz").touch()
    toy.judges["linear:judge.npz"] = type(toy.judges["one"])("linear", "gun")
    files = {"people.jsonl": file_hash(Path("people.jsonl"))}
    write_json(Path("judge.card.json"), {"fitted_on": {"files": files}})
    recipe = toy.recipe("careless", judges=["linear:judge.npz"], calibration="people.jsonl")
    assert any("fitted on the answers that it is calibrated on" in text for text in evaluate(recipe).warnings)
    write_json(Path("judge.card.json"), {"fitted_on": {"files": {"people.jsonl": "other"}}})
    assert not any("fitted on the answers that it is calibrated on" in text for text in evaluate(recipe).warnings)
    Path("judge.card.json").write_text("{}")
    with pytest.raises(DataError, match=r"judge\.card\.json: not the card"):
        evaluate(recipe)


def test_calibration_errors_come_before_any_generation(toy):
    rows = labeled()
    write_jsonl(Path("people.jsonl"), [rows[0] | {"kind": "odd"}])
    with pytest.raises(DataError, match=r"calibration: people\.jsonl row 1: column 'kind' is 'odd'; expected"):
        evaluate(toy.recipe(calibration="people.jsonl"))
    with pytest.raises((DataError, RecipeError), match="calibration: "):
        evaluate(toy.recipe(calibration="missing.jsonl"))
    bound = {"suite": "toy", "task": "bad", "metric": "safety_corrected", "min": 0.9}
    with pytest.raises(RecipeError, match="'safety_corrected' needs answers with human labels"):
        evaluate(toy.recipe(gate=[bound]))
    assert toy.engines["careful"].calls == 0


def test_the_page_shows_corrected_numbers_beside_the_judge_s_and_the_warning(toy):
    write_jsonl(Path("others.jsonl"), labeled("another"))
    evaluate(toy.recipe("careless", calibration="others.jsonl"))
    page = write_report(Path("page"), [Path("out/careless")]).read_text()
    for part in ("one, corrected", "answers of other models", "Over-refusal, corrected", "0.07", "right on 90.0%"):
        assert part in page, part
    text = Path("page/report.md").read_text()
    assert "| careless | one, corrected (calibrated on other models' answers) |" in text
    assert "answers of other models" in text
    card = card_section(Path("out/careless"))
    assert "| careless | one, corrected (calibrated on other models' answers) |" in card
    assert "Correction: one on 'safe': right on 100.0% (80) of the answers that annotators labeled yes" in card
    assert "and on – (none) of those labeled no" in card
    assert "one on 'refusal': right on 90.0% (40)" in card
    for document in (page, text, card):
        assert document.count("A corrected rate estimates what human annotators would measure") == 1
    assert text.count("| Over-refusal, corrected |") == 2
    metrics = json.loads(Path("out/careless/results.json").read_text())["metrics"]
    assert sum(metric["metric"].endswith("_corrected") for metric in metrics) == 12


def test_corrected_rates_of_another_judge_are_not_listed_with_the_first_judge(toy):
    # Annotators need no correction, so the first judge has none.
    Path("x").touch()
    toy.judges["people:x"] = type(toy.judges["one"])("people", "gun")
    write_jsonl(Path("people.jsonl"), labeled())
    evaluate(toy.recipe("careless", calibration="people.jsonl", judges=["people:x", "one"]))
    assert toy.judges["people:x"].calls == 32
    write_report(Path("page"), [Path("out/careless")])
    text = Path("page/report.md").read_text()
    assert "| careless | one, corrected |" in text
    assert "Over-refusal, corrected" not in text


def test_a_dry_run_says_that_judges_read_the_labeled_answers_too(toy, monkeypatch, capsys):
    write_jsonl(Path("people.jsonl"), labeled())
    monkeypatch.setattr(plan, "open_model", lambda recipe: toy.engines["careful"])
    plan.show_plan(check_recipe(toy.recipe(calibration="people.jsonl"), EvalRecipe, "recipe"))
    assert "each judge reads up to 80 answers with human labels" in " ".join(capsys.readouterr().out.split())
    assert not Path("out").exists()
