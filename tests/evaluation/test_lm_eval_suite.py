"""Tasks of lm-eval in a suite: checked first, run once, kept, compared, shown. The slow test runs lm-eval itself."""

import json
from pathlib import Path

import pytest
import yaml

from bfpo.config.loading import check_recipe
from bfpo.core.files import file_hash, write_jsonl
from bfpo.errors import DataError, GateViolated, MissingExtra, RecipeError
from bfpo.evaluation import plan
from bfpo.evaluation.lm_eval import suite as module
from bfpo.evaluation.lm_eval import tasks as lm_eval
from bfpo.evaluation.lm_eval.requests import PlannedRequests
from bfpo.evaluation.lm_eval.run import TaskMetric, TaskResults
from bfpo.evaluation.lm_eval.tasks import RowCount
from bfpo.evaluation.pipeline import run_eval
from bfpo.evaluation.plan import PlannedStage, show_plan
from bfpo.evaluation.recipe import EvalRecipe
from bfpo.evaluation.results import read_results
from bfpo.report.card import card_section
from bfpo.report.html import write_report


def evaluate(content, **options):
    return run_eval(check_recipe(content, EvalRecipe, "recipe"), **options)


def shown(content):
    return show_plan(check_recipe(content, EvalRecipe, "recipe"))


def rows(share):
    return {f"t/{n}-aaaa": float(n < 40 * share) for n in range(40)}


@pytest.fixture
def stand_in(toy, monkeypatch):
    """Replace the model and lm-eval; `runs` lists the tasks that run, `share` is each model's share of right rows."""
    toy.runs, toy.loaded, toy.share = [], [], {"careful": 0.5, "careless": 0.9}

    def load(name, folder, *, path=None, revision=None):
        toy.loaded.append(name)
        if path is None:
            raise DataError(f"lm-eval couldn't read the rows of '{name}': no network")
        return name

    def run(lm, loaded, name, *, limit=None, path=None):
        if len(toy.runs) == getattr(toy, "stop_after", 99):
            raise KeyboardInterrupt
        toy.runs.append(name)
        values = dict(list(rows(toy.share[lm]).items())[:limit])
        mean = sum(values.values()) / len(values)
        facts = {"hash": "h", "license": None, "prompts": len(values), "of": 40, "lm_eval": "0", "version": 1}
        facts |= {"few_shot": 0, "template_policy": "plain text", "from": path}
        numbers = [
            TaskMetric("acc", None, mean, True, len(values), 0, values),
            TaskMetric("f1", None, None, True, 40, 1, {}),
        ]
        return TaskResults([*numbers, TaskMetric("acc", "part", mean, True, len(values), 0, values)], facts)

    def plan_requests(lm, loaded, *, limit, timed):
        seconds = 90.0 if timed else None
        return [
            PlannedRequests("forward passes", 2 * (limit or 40), 600, 0, seconds),
            PlannedRequests("generated texts", limit or 40, 300, 5120, seconds),
        ]

    for name, stand in {
        "require_lm_eval": lambda: None,
        "check_task": lambda name, with_data: None,
        "lm_eval_version": lambda: "0",
        "count_task_rows": lambda loaded, limit: RowCount(limit or 40, 40, "a set"),
        "load_task": load,
        "open_lm": lambda model, tokenizer, batch_size: model.name,
        "run_task": run,
        "check_requests": lambda lm, loaded, path, *, limit: None,
        "find_license": lambda name, loaded=None: "unknown" if loaded is None else "MIT",
        "plan_requests": plan_requests,
    }.items():
        monkeypatch.setattr(module, name, stand)
    monkeypatch.setattr("bfpo.evaluation.gate.listed_metrics", lambda name: {"acc", "f1"})
    Model = type("Model", (), {"device": type("Device", (), {"type": "cpu"})})

    def load_checkpoint(path, *, dtype, revision):
        model = Model()
        model.name = path
        return model, None, path

    monkeypatch.setattr("bfpo.generation.in_process.load_checkpoint", load_checkpoint)
    monkeypatch.setattr("bfpo.generation.in_process.checkpoint_identity", lambda path, revision: path)
    Path("able.yaml").write_text(yaml.safe_dump({"title": "t", "lm_eval": ["one_task", "two_task"]}))
    Path("both.yaml").write_text(Path("toy.yaml").read_text() + "lm_eval: [one_task]\n")
    Path("rows.jsonl").write_text("{}\n")
    toy.data = {"one_task": {"path": "rows.jsonl"}, "two_task": {"path": "rows.jsonl"}}
    make_recipe = toy.recipe
    own = {"suites": ["able.yaml"], "data": toy.data}
    toy.recipe = lambda name="careful", /, **changes: make_recipe(name) | own | changes
    return toy


def test_a_suite_of_lm_eval_alone_needs_no_judge_and_is_run_once(stand_in, capsys):
    results = evaluate(stand_in.recipe())
    assert stand_in.runs == ["one_task", "two_task"]
    assert not Path("out/careful/completions.jsonl").exists()
    assert (results.judges, results.answers) == ([], "")
    assert results.template_policy == "as data says of each task"
    accuracy, f1, part = [metric for metric in results.metrics if metric.task == "one_task"]
    assert (accuracy.value, accuracy.n, accuracy.judge, accuracy.category) == (0.5, 40, "", None)
    assert accuracy.low < 0.5 < accuracy.high
    assert "Wilson" in accuracy.interval
    assert (f1.value, f1.unscored, f1.interval) == (None, 1, "none: lm-eval found no number on some rows")
    assert part.category == "part"
    assert results.data[0].name == "able/one_task"
    assert read_results(Path("out/careful")) == results
    assert "able/one_task acc" in capsys.readouterr().out
    assert results.warnings == []
    assert evaluate(stand_in.recipe()).metrics == results.metrics
    assert len(stand_in.runs) == 2, "results are kept"
    evaluate(stand_in.recipe(limit=10))
    assert len(stand_in.runs) == 4, "other rows have results of their own"
    evaluate(stand_in.recipe())
    Path("rows.jsonl").write_text("{}\n{}\n")
    evaluate(stand_in.recipe())
    assert len(stand_in.runs) == 6, "and so does another file"
    assert len(stand_in.loaded) == 6


def test_a_task_of_one_s_own_is_run_again_when_its_file_or_its_rows_change(stand_in, monkeypatch):
    monkeypatch.setattr(module, "load_task", lambda name, folder, *, path=None, revision=None: name)
    Path("own.yaml").write_text("task: own\ndataset_kwargs: {data_files: {test: rows.jsonl}}\n")
    Path("able.yaml").write_text("title: t\nlm_eval: [own.yaml]\n")
    for changed, times in ((None, 1), (None, 1), ("rows.jsonl", 2), ("own.yaml", 3), (None, 3)):
        if changed:
            Path(changed).write_text(Path(changed).read_text() + "\n")
        assert {metric.task for metric in evaluate(stand_in.recipe(data={})).metrics} == {"own"}
        assert stand_in.runs == ["own.yaml"] * times


def test_a_killed_run_goes_on_and_a_damaged_file_is_told(stand_in):
    stand_in.stop_after = 1
    with pytest.raises(KeyboardInterrupt):
        evaluate(stand_in.recipe())
    stand_in.stop_after = 99
    evaluate(stand_in.recipe())
    assert stand_in.runs == ["one_task", "two_task"]
    (file, _) = sorted(Path("out/careful/lm_eval").iterdir())
    file.write_text('{"metrics": [')
    with pytest.raises(DataError, match=r"one_task-.*\.json: not the results of an lm-eval task.*remove it"):
        evaluate(stand_in.recipe())


def test_results_that_an_earlier_version_kept_are_read(stand_in):
    first = evaluate(stand_in.recipe())
    for path in Path("out/careful/lm_eval").iterdir():
        content = json.loads(path.read_text())
        assert content.keys() == {"metrics", "metadata"}
        path.write_text(json.dumps({"numbers": content["metrics"], "facts": content["metadata"]}))
    again = evaluate(stand_in.recipe())
    assert stand_in.runs == ["one_task", "two_task"]
    assert (again.metrics, again.data) == (first.metrics, first.data)


def test_judged_tasks_stand_beside_them_and_both_are_compared_and_shown(stand_in):
    evaluate(stand_in.recipe("careless", suites=["both.yaml"], data={"one_task": {"path": "rows.jsonl"}}))
    changes = {"suites": ["both.yaml"], "data": {"one_task": {"path": "rows.jsonl"}}, "base": "out/careless"}
    bounds = [{"suite": "both", "task": "one_task", "metric": "acc", "min": 0.8}]
    with pytest.raises(GateViolated, match=r"both/one_task acc >= 0\.8, found 0\.50"):
        evaluate(stand_in.recipe(gate=bounds, **changes))
    results = read_results(Path("out/careful"))
    assert {row.name for row in results.data} == {"both/bad", "both/fine", "both/one_task"}
    (tax,) = [row for row in results.comparisons if row.task == "one_task" and row.category is None]
    assert (tax.metric, tax.verdict, tax.n) == ("acc", "worse", 40)
    assert tax.difference == pytest.approx(-0.4)
    assert any(row.task == "bad" for row in results.comparisons)
    page = write_report(Path("page"), [Path("out/careless"), Path("out/careful")]).read_text()
    assert "one_task" in page
    assert "| both/one\\_task | acc | 0.50 \\[" in card_section(Path("out/careful"))
    # The baseline ran one of the tasks, with another version.
    content = json.loads(Path("out/careless/results.json").read_text())
    content["data"][-1]["version"] = 2
    Path("out/careless/results.json").write_text(json.dumps(content))
    warnings = evaluate(stand_in.recipe(**changes)).warnings
    assert "No comparison of both/one_task with careless: version differ." in warnings
    warnings = evaluate(stand_in.recipe(base="out/careless")).warnings
    assert "No comparison of able/two_task with careless: it wasn't run there." in warnings


def test_a_dry_run_counts_requests_and_estimates_their_time(stand_in, capsys):
    passes, generated, *others = shown(stand_in.recipe(limit=10))
    assert passes == PlannedStage("able/one_task: forward passes", 20, 0, 600, 0, 90.0)
    assert generated == PlannedStage("able/one_task: generated texts", 10, 0, 300, 5120, 90.0)
    assert [stage.name for stage in others] == ["able/two_task: forward passes", "able/two_task: generated texts"]
    assert not Path("out").exists()
    assert stand_in.runs == []
    lines = capsys.readouterr().out.splitlines()
    assert row_of("able/one_task", lines) == ["able/one_task", "lm-eval", "10", "40", "MIT", "rows.jsonl"]
    evaluate(stand_in.recipe(limit=10))
    passes, *_ = shown(stand_in.recipe(limit=10))
    assert passes == PlannedStage("able/one_task: forward passes", 20, 20, 0, 0, None)


def row_of(name, lines):
    return next(line.split(maxsplit=5) for line in lines if line.split()[:1] == [name])


def test_a_dry_run_says_which_rows_cannot_be_read_here(stand_in, monkeypatch, capsys):
    monkeypatch.setattr(plan, "open_model", lambda recipe: stand_in.engines["careful"])
    stages = shown(stand_in.recipe(suites=["both.yaml"], judges=["one"], data={}))
    assert not any("one_task" in stage.name for stage in stages)
    assert stages[0].total == 32, "the other tasks are planned as ever"
    lines = capsys.readouterr().out.splitlines()
    problem = "not here: lm-eval couldn't read the rows of 'one_task': no network"
    assert row_of("both/one_task", lines) == ["both/one_task", "lm-eval", "?", "?", "unknown", problem]
    assert "not counted above, because their rows can't be read here: both/one_task" in lines
    assert "None" not in "\n".join(lines)


def test_results_of_earlier_versions_have_an_unknown_license(stand_in):
    assert {row.license for row in evaluate(stand_in.recipe()).data} == {"unknown"}


def test_what_cannot_be_run_is_told_before_any_work(stand_in, monkeypatch):
    answers = {"model": None, "completions": "saved.jsonl"}
    write_jsonl(Path("saved.jsonl"), [{"prompt": "p", "text": "t"}])
    bound = {"suite": "able", "task": "one_task", "metric": "acc", "min": 0.5}
    for changes, message in (
        (answers, r"saved completions can't give; .*leave_out: \[able/one_task, able/two_task\]"),
        ({"model": {"path": "m", "server": "http://localhost/v1"}}, "which a server can't give"),
        ({"model": {"path": "m", "steps": {"answer": None}}}, "which a chain of steps can't give"),
        (
            {"data": {}},
            r"(?s)able/one_task: .*no network\nable/two_task: .*"
            r"data: {one_task: {path: FILE}, two_task: {path: FILE}}, .*leave_out: \[able/one_task, able/two_task\]",
        ),
        ({"data": {"one_task": {"path": "gone.jsonl"}}}, r"able/one_task: no file gone\.jsonl"),
        ({"data": {"one_taks": {"path": "x"}}}, "did you mean 'one_task'"),
        ({"leave_out": ["one_task", "two_taks"]}, "leave_out: 'two_taks'; did you mean"),
        ({"leave_out": ["able/one_task", "two_task"]}, "no task is left"),
        ({"gate": [bound | {"task": "one_taks"}]}, "no task able/one_taks; did you mean 'able/one_task'"),
        ({"gate": [bound | {"metric": "ac"}]}, "metric 'ac'; did you mean 'acc'"),
        ({"suites": ["both.yaml"], "judges": ["one"], "data": {}}, r"leave_out: \[both/one_task\]"),
    ):
        with pytest.raises((RecipeError, DataError), match=message):
            evaluate(stand_in.recipe(**changes))
    assert (stand_in.runs, stand_in.engines["careful"].calls) == ([], 0)
    evaluate(stand_in.recipe(leave_out=["two_task"], data={"one_task": {"path": "rows.jsonl"}}))
    assert stand_in.runs == ["one_task"]
    monkeypatch.setattr(lm_eval, "find_spec", lambda name: None)
    monkeypatch.setattr(module, "require_lm_eval", lm_eval.require_lm_eval)
    with pytest.raises(MissingExtra, match=r"pip install 'bfpo\[lm-eval\]'"):
        evaluate(stand_in.recipe())


def test_a_suite_needs_tasks_of_one_sort_and_names_apart(stand_in):
    for text, message in (
        ("title: t", "expected tasks or lm_eval"),
        ("title: t\nlm_eval: [a, folder/a.yaml]", "task 'a' is duplicated"),
        ("title: t\nlm_eval: [advbench]\ntasks: [{source: advbench}]", "task 'advbench' is duplicated"),
    ):
        Path("wrong.yaml").write_text(text)
        with pytest.raises(RecipeError, match=message):
            evaluate(stand_in.recipe(suites=["wrong.yaml"], data={}))


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_lm_eval_really_runs_in_an_evaluation(tmp_path, make_model, tokenizer, monkeypatch):
    pytest.importorskip("lm_eval", reason="the extra lm-eval isn't installed")
    for seed in (1, 2):
        make_model(shape="nano", seed=seed).save_pretrained(tmp_path / f"model{seed}")
        tokenizer.save_pretrained(tmp_path / f"model{seed}")
    monkeypatch.chdir(tmp_path)
    sentence = {"option1": "cup", "option2": "hand", "answer": "2"}
    write_jsonl(Path("w.jsonl"), [{"sentence": f"Cup {n} fell since the _ was wet."} | sentence for n in range(30)])
    fed = [{"label": n % 2, "input": f"I fed {n} cats.", "is_short": True, "edited": False} for n in range(30)]
    write_jsonl(Path("e.jsonl"), fed)
    choices = {"choices": ["a cat", "a dog", "a box"], "labels": [1, 1, 0]}
    write_jsonl(
        Path("t.jsonl"),
        [{"question": f"Who is {n}?", "mc2_targets": choices, "mc1_targets": choices} for n in range(9)],
    )
    data = {
        "winogrande": {"path": "w.jsonl"},
        "ethics_cm": {"path": "e.jsonl"},
        "truthfulqa_mc2": {"path": "t.jsonl"},
    }
    Path("suite.yaml").write_text(yaml.safe_dump({"title": "t", "lm_eval": [*data]}))

    def content(seed, **changes):
        return {
            "out": f"out{seed}",
            "model": {"path": f"model{seed}"},
            "suites": ["suite.yaml"],
            "data": data,
        } | changes

    assert [stage.total for stage in shown(content(1))] == [60, 60, 27]
    assert all(stage.seconds and stage.tokens_read > 9 * stage.total for stage in shown(content(1)))
    evaluate(content(1))
    results = evaluate(
        content(2, base="out1", gate=[{"suite": "suite", "task": "winogrande", "metric": "acc", "max": 1}])
    )
    metrics = {metric.task: metric for metric in results.metrics if metric.metric == "acc"}
    assert [metric.n for metric in metrics.values()] == [30, 30, 9]
    assert {comparison.task for comparison in results.comparisons} == {*data}
    assert "Wilson" in metrics["winogrande"].interval
    assert "Beta" in metrics["truthfulqa_mc2"].interval
    with pytest.raises(RecipeError, match="metric 'accc'; did you mean 'acc'"):
        evaluate(content(2, gate=[{"suite": "suite", "task": "winogrande", "metric": "accc", "max": 1}]))
    monkeypatch.setattr(module, "run_task", None)
    assert evaluate(content(2, base="out1")).metrics == results.metrics, "nothing is run again"
    assert "winogrande" in write_report(Path("page"), [Path("out1"), Path("out2")]).read_text()


def test_results_are_kept_apart_by_what_a_task_includes(tmp_path):
    own = tmp_path / "own" / "task.yaml"
    own.parent.mkdir()
    own.write_text("include: base.yaml\ndoc_to_choice: !function utils.choices\n")
    files = []
    for base, program in (("a: 1", "x"), ("a: 2", "x"), ("a: 2", "y")):
        (own.parent / "base.yaml").write_text(base)
        (own.parent / "utils.py").write_text(f"choices = '{program}'")
        files.append(sorted(map(file_hash, filter(Path.is_file, map(Path, module._own_files(str(own)))))))
    assert len(set(map(tuple, files))) == 3
