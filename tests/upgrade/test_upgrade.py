"""Recipes and run folders of an earlier version go on working: `307359b` was made by the program at that commit.

Its training was killed after step 5 of 12, its other folders are finished. Everything is copied before it is used.
"""

import json
import shutil
import sys
from pathlib import Path

import pytest

from bfpo.commands.app import main
from bfpo.config.loading import load_recipe
from bfpo.experiments.recipe import ExperimentRecipe
from bfpo.experiments.units import make_units
from bfpo.judging.people import PeopleJudge
from bfpo.report.html import write_report

OLD = Path(__file__).parent / "307359b"
# Logged by the run of that commit that nobody killed.
LAST_LOSS = 54.659854888916016


@pytest.fixture
def bfpo(tmp_path, monkeypatch, capsys):
    """Return a function that runs a command in a copy of the old folder, and returns its exit code and output."""
    shutil.copytree(OLD, tmp_path / "old")
    monkeypatch.chdir(tmp_path / "old")

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["bfpo", *arguments])
        try:
            main()
            code = 0
        except SystemExit as ended:
            code = ended.code or 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def judged(monkeypatch):
    """Count the completions that judges are asked about."""
    completions = []
    judge = PeopleJudge.judge

    def counting(self, batch):
        completions.extend(batch)
        return judge(self, batch)

    monkeypatch.setattr(PeopleJudge, "judge", counting)
    return completions


def numbers(folder, key="metrics"):
    rows = json.loads((Path(folder) / "results.json").read_text())[key]
    return [[row[name] for name in ("task", "metric", "judge", "category")] + list(row.values())[3:6] for row in rows]


def test_a_killed_training_resumes(bfpo):
    code, out, err = bfpo("train", "train.yaml")
    assert code == 0
    assert "'licence' is deprecated, use 'license' (data.0.licence)" in err
    assert "step 8/12" in out
    assert "step 4/12" not in out
    rows = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    losses = {row["step"]: row["loss"] for row in rows if "loss" in row}
    assert sorted(losses) == [4, 8, 12]
    assert losses[12] == pytest.approx(LAST_LOSS, rel=1e-4)


def test_a_finished_evaluation_is_only_scored_again(bfpo, judged):
    before = numbers("evaluation")
    code, _, err = bfpo("eval", "eval.yaml")
    assert code == 0
    assert "'labelled_by' is deprecated, use 'labeled_by' (labelled_by)" in err
    assert judged == []
    assert numbers("evaluation") == before
    assert json.loads(Path("evaluation/results.json").read_text())["schema"] == 3


def test_unfinished_verdicts_under_an_old_name_are_continued(bfpo, judged):
    for path in Path("evaluation").glob("verdicts*.jsonl"):
        lines = path.read_text().splitlines(keepends=True)
        path.with_name(f"{path.name}.unfinished").write_text("".join(lines[:20]))
        path.unlink()
    assert bfpo("eval", "eval.yaml")[0] == 0
    assert len(judged) == 2 * 12


def test_an_old_evaluation_is_a_baseline(bfpo):
    before = numbers("evaluation2", "comparisons")
    assert before
    assert bfpo("eval", "eval2.yaml")[0] == 0
    assert numbers("evaluation2", "comparisons") == before


def test_old_results_are_drawn(bfpo, tmp_path):
    page = write_report(tmp_path / "page", [Path("evaluation"), Path("evaluation2")])
    assert "second" in page.read_text(encoding="utf-8")


def test_old_labels_are_not_judged_again(bfpo, judged):
    before = Path("labels/pairs.jsonl").read_text()
    judges = ("--judge", "people:a.jsonl", "--judge", "people:b.jsonl")
    assert bfpo("label", "unlabelled.jsonl", *judges, "--out", "labels", "--conflicts", "unsafe")[0] == 0
    assert judged == []
    assert Path("labels/pairs.jsonl").read_text() == before


def test_the_verdicts_of_an_old_judge_evaluation_are_found(bfpo, judged):
    assert bfpo("judge", "eval", "a.jsonl", "--judge", "people:b.jsonl", "--out", "judged.json")[0] == 0
    assert judged == []


def test_an_old_red_teaming_resumes(bfpo, judged):
    completions = Path("redteam/completions.jsonl").read_text()
    code, _, err = bfpo("redteam", "redteam.yaml")
    # The random model of the fixture made no pair then, and makes none now.
    assert code == 2
    assert "no pair could be made" in err
    assert judged == []
    assert Path("redteam/completions.jsonl").read_text() == completions


def test_an_old_red_teaming_of_another_recipe_is_refused(bfpo):
    code, _, err = bfpo("redteam", "redteam.yaml", "samples=3")
    assert code == 2
    assert "another recipe" in err


def test_the_runs_of_an_old_experiment_are_found(monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[2])
    recipe = load_recipe(OLD / "experiment.yaml", ExperimentRecipe, ["seeds=[0,1]"])
    folders = [str(unit.folder) for unit in make_units(recipe)[:4]]
    assert folders == [
        "runs/testbed/shared-b4c5e4b1/seed-0/base",
        "runs/testbed/shared-b4c5e4b1/seed-0/run-e56f10e6bc8e",
        "runs/testbed/shared-b4c5e4b1/seed-0/run-97949105bef5",
        "runs/testbed/shared-b4c5e4b1/seed-0/run-ae9ada84cc78",
    ]


def test_whole_numbers_of_a_loss_are_the_same_loss(bfpo):
    mark = Path("run/checkpoint-4/complete.json")
    mark.write_text(mark.read_text().replace("b1=3.0", "b1=3"))
    code, out, _ = bfpo("train", "train.yaml")
    assert code == 0
    assert "step 4/12" not in out
