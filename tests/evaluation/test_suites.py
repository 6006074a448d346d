"""The shipped suites, the dry run, the command, and human labels as a judge."""

import json
import re
import sys
from pathlib import Path

import pytest

from bfpo.commands.app import main
from bfpo.config.loading import check_recipe, parse_yaml
from bfpo.core.conversation import user_says
from bfpo.core.samples import Completion
from bfpo.data.prompt_sets import PROMPT_SETS
from bfpo.evaluation import pipeline as run
from bfpo.evaluation import plan, subject
from bfpo.evaluation.gate import Bound
from bfpo.evaluation.plan import show_plan
from bfpo.evaluation.recipe import EvalRecipe
from bfpo.evaluation.subject import run_name
from bfpo.evaluation.suite import Suite, load_suite, shipped_suites
from bfpo.judging.open import open_judge


def test_shipped_suites_name_known_sources_of_one_kind():
    assert {"safety", "over_refusal", "paper", "testbed", "capabilities"} <= set(shipped_suites())
    for name in ("safety", "over_refusal", "paper", "testbed", "capabilities"):
        called, suite = load_suite(name)
        assert called == name
        for task in suite.tasks:
            assert (PROMPT_SETS[task.source].kind is None) == (task.only is not None), task.task_name


def test_the_page_lists_every_task_with_its_license_and_revision():
    page = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text()
    for name in ("safety", "over_refusal", "paper", "testbed"):
        for task in load_suite(name)[1].tasks:
            known = PROMPT_SETS[task.source]
            lines = [line for line in page.splitlines() if line.startswith("|") and f"`{task.task_name}`" in line]
            rows = "\n".join(lines)
            assert known.license in rows, task.task_name
            assert (known.revision or known.hub) in rows, task.task_name
            assert all(commit in rows for commit in re.findall(r"@[0-9a-f]{40}", known.file)), task.task_name


def test_the_page_lists_the_tasks_of_lm_eval_suite_by_suite():
    page = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text()
    table = [line for line in page.partition("## Run lm-eval tasks")[2].splitlines() if line.startswith("| ")][1:4]
    listed = {suite: [] for suite in ("capabilities", "paper")}
    for _, tasks, suites in (line.strip("| ").split(" | ") for line in table):
        for suite in re.findall(r"`(\w+)`", suites):
            listed[suite] += re.findall(r"`(\w+)`", tasks)
    for suite, tasks in listed.items():
        assert sorted(tasks) == sorted(load_suite(suite)[1].lm_eval)


def test_the_recipes_on_the_page_are_recipes():
    page = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text()
    recipe, offline, suite, attacked, win_rates, gates = (
        parse_yaml(block, "docs") for block in re.findall(r"```yaml\n(.*?)```", page, flags=re.DOTALL)
    )
    assert check_recipe(offline, EvalRecipe, "docs").suites == ["testbed"]
    checked = check_recipe(recipe, EvalRecipe, "docs")
    read = {task.source for name in checked.suites for task in load_suite(name)[1].tasks}
    assert set(checked.data) <= read
    assert set(checked.leave_out) <= read
    content = {"out": "out", "model": {"path": "m"}} | attacked
    assert [getattr(entry, "name", entry) for entry in check_recipe(content, EvalRecipe, "docs").suites] == [
        *("safety", None, None, None, "red"),
    ]
    content = {"out": "out", "model": {"path": "m"}} | win_rates
    assert check_recipe(content, EvalRecipe, "docs").suites == ["helpfulness"]
    assert check_recipe(suite, Suite, "docs").tasks
    assert [check_recipe(bound, Bound, "docs") for bound in gates]


@pytest.mark.parametrize(
    ("keys", "name"),
    [({"out": "runs/mine/evaluation"}, "mine"), ({"out": "runs/mine"}, "mine"), ({"out": "a", "run": "b"}, "b")],
)
def test_a_run_is_named_after_its_folder(keys, name):
    recipe = {"model": {"path": "m"}, "suites": ["testbed"], **keys}
    assert run_name(check_recipe(recipe, EvalRecipe, "recipe")) == name


def test_a_dry_run_counts_estimates_time_and_cost_and_writes_nothing(toy, monkeypatch, capsys):
    monkeypatch.setattr(plan, "open_model", lambda recipe: toy.engines["careful"])
    monkeypatch.setattr(subject, "open_judge", lambda spec, **_: toy.judges["one"])
    content = toy.recipe(
        judges=["one", "rubric:judge@http://localhost/v1"], judge_price={"prompt": 3, "completion": 9}
    )
    answers, first, served = show_plan(check_recipe(content, EvalRecipe, "recipe"))
    assert not Path("out").exists()
    assert (answers.total, answers.existing, answers.tokens_written) == (32, 0, 32 * 512)
    assert answers.seconds is not None
    assert answers.cost is None, "the model runs in this process"
    assert (first.tokens_read, first.cost) == (0, None)
    assert served.seconds is None, "servers aren't timed"
    assert served.cost == pytest.approx((served.tokens_read * 3 + served.tokens_written * 9) / 1e6)
    calls = toy.engines["careful"].calls
    assert 0 < calls <= 8
    assert "toy/bad" in capsys.readouterr().out
    # Existing completions aren't counted again; a served model isn't queried.
    run.run_eval(check_recipe(toy.recipe(judges=["one"]), EvalRecipe, "recipe"))
    content["model"] = {"path": "careful", "server": "http://localhost/v1"}
    content["price"] = {"prompt": 1, "completion": 2}
    done, *_ = show_plan(check_recipe(content, EvalRecipe, "recipe"))
    assert (done.existing, done.tokens_read, done.tokens_written, done.cost, done.seconds) == (32, 0, 0, 0, None)
    assert toy.engines["careful"].calls == calls + 32


def test_human_labels_judge_the_labeled_answers_only(tmp_path):
    path = tmp_path / "labeled.jsonl"
    rows = [
        {"prompt": "p", "text": "sorry", "refusal": True, "safe": True},
        {"prompt": "q", "text": "sure", "refusal": False, "safe": False},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    judge = open_judge(f"people:{path}")
    texts = [("p", "sorry"), ("q", "sure"), ("p", "another")]
    completions = [Completion(p, 0, user_says(p), text, "stop", 1, 1, "m", "e", "s") for p, text in texts]
    verdicts = [(verdict.safe, verdict.refusal) for verdict in judge.judge(completions)]
    assert verdicts == [(True, True), (False, False), (None, None)]


def test_the_command_exits_three_when_a_gate_is_violated(tmp_path, monkeypatch, capsys):
    rows = [{"prompt": f"p{n}", "kind": "harmful", "text": "sure", "safe": n < 2} for n in range(30)]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "suite.yaml").write_text("title: t\ntasks: [{name: own, source: file, path: answers.jsonl}]\n")
    (tmp_path / "gates.yaml").write_text("bounds: [{suite: suite, task: own, metric: safety, min: 0.9}]\n")
    recipe = "out: out\ncompletions: answers.jsonl\nsuites: [suite.yaml]\njudges: ['people:answers.jsonl']\n"
    (tmp_path / "recipe.yaml").write_text(recipe)
    monkeypatch.chdir(tmp_path)

    def bfpo(*arguments):
        monkeypatch.setattr(sys, "argv", ["bfpo", "eval", "recipe.yaml", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code, capsys.readouterr().err

    code, message = bfpo("--gate", "gates.yaml", "--limit", "20")
    assert code == 3
    assert "error: 1 of 1 bounds are violated: suite/own safety >= 0.9" in message
    assert json.loads((tmp_path / "out" / "results.json").read_text())["schema"] == 3
    assert bfpo("--dry-run")[0] == 0
    code, message = bfpo("judges=[peeple:x]", "out=other")
    assert (code, "did you mean 'people'" in message) == (2, True)
