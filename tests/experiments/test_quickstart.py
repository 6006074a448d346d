"""The quickstart: its files, resuming, and (slow) its results."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from bfpo.errors import RecipeError, Stopped
from bfpo.evaluation.results import read_results
from bfpo.experiments import quickstart as module
from bfpo.experiments import steps
from bfpo.experiments.methods import METHODS, train_recipe, train_recipes
from bfpo.experiments.quickstart import quickstart
from bfpo.experiments.units import make_units
from bfpo.losses.build import make_loss
from bfpo.testbed.world import WorldOptions

from .conftest import SMALL, make_recipe


@pytest.fixture
def home(runs, monkeypatch) -> Path:
    """Return a folder with a tiny world and its base model, for a quickstart with few training steps."""
    monkeypatch.setattr(module, "WorldOptions", lambda seed: WorldOptions(seed=seed, **SMALL))
    monkeypatch.setattr(module, "METHOD_STEPS", 3)
    return make_units(make_recipe(runs))[0].home


def test_it_leaves_data_recipes_models_results_and_a_page(home, capsys):
    base, bfpo = quickstart(home)
    assert {entry.name for entry in home.iterdir()} >= {
        *("world", "pretraining", "base", "bfpo", "pretraining.yaml", "base.yaml", "bfpo.yaml"),
        *("report.html", "pareto.svg", "metrics.csv", "comparisons.csv", "quickstart.log"),
    }
    shown = capsys.readouterr().out
    assert "5/5  the report" in shown
    assert "harmful: safety" in shown
    assert "tokens/s" not in shown, "the commands' output belongs in the log"
    assert "start check" in (home / "quickstart.log").read_text()
    assert bfpo.comparisons
    assert base.metric("harmful", "safety").n == 12
    assert read_results(home / "bfpo" / "evaluation") == bfpo

    # A second start repeats nothing; another method joins the first on the page.
    before = {file: file.stat().st_mtime_ns for file in home.glob("*/model.safetensors")}
    again = quickstart(home)
    assert {file: file.stat().st_mtime_ns for file in home.glob("*/model.safetensors")} == before
    assert [results.metrics for results in again] == [base.metrics, bfpo.metrics]
    assert [results.run for results in quickstart(home, method="dpo_h")] == ["base", "bfpo", "dpo_h"]
    with pytest.raises(RecipeError, match="holds a world of other options"):
        quickstart(home, seed=1)
    (home / "base.yaml").write_text("another: recipe\n")
    with pytest.raises(RecipeError, match="base holds a run of another recipe"):
        quickstart(home)


def test_the_run_of_another_recipe_is_found_before_anything_is_trained(home, monkeypatch):
    (home / "bfpo").mkdir()
    (home / "bfpo" / "run.json").write_text("{}")
    (home / "bfpo.yaml").write_text("another: recipe\n")
    monkeypatch.setattr(module, "make_base", None)
    monkeypatch.setattr(module, "write_world", None)
    with pytest.raises(RecipeError, match="bfpo holds a run of another recipe"):
        quickstart(home)


def test_ctrl_c_anywhere_ends_with_a_message_and_resumes(home, monkeypatch):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    def interrupt(place, name):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, interrupted)
            with pytest.raises(Stopped, match="the same command resumes"):
                quickstart(home)

    finished = home.rename(home.with_name("finished"))
    interrupt(module, "write_world")
    shutil.copytree(finished / "world", home / "world")
    interrupt(steps, "run_sft")
    # Training the base model again would prove no more.
    shutil.copytree(finished, home, dirs_exist_ok=True)
    shutil.rmtree(home / "base" / "evaluation")
    for place, name in ((steps, "run_training"), (steps, "evaluate"), (module, "write_report")):
        interrupt(place, name)
    assert len(quickstart(home)) == 2


def test_an_unknown_method_is_refused_first(tmp_path):
    with pytest.raises(RecipeError, match="did you mean 'bfpo'"):
        quickstart(tmp_path, method="bpfo")
    assert not (tmp_path / "world").exists()


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.online is None])
def test_methods_have_losses_and_see_equally_many_pairs(tmp_path, name):
    recipe = train_recipes(METHODS[name], world=Path("w"), base=Path("b"), out=tmp_path, seed=0)[-1]
    # The file of a multiplier doesn't exist yet.
    loss = make_loss({key: value for key, value in recipe.loss.model_dump().items() if key != "multiplier"})
    assert loss.beta == (2.0 if name in ("mocan", "c_dpo") else 0.3)
    pairs = recipe.trainer["per_device_train_batch_size"] * (2 if recipe.buffer else 1)
    assert pairs == 64


def test_a_method_may_reorder_pairs_and_others_keep_the_names_of_their_runs(tmp_path):
    recipe = train_recipe(METHODS["dpo_safe_first"], world=Path("w"), base=Path("b"), out=tmp_path, seed=0)
    assert recipe.labels.model_dump() == {"from": "safety", "both_unsafe": "helpful"}
    assert METHODS["dpo_safe_first"].model_dump()["labels"] == {"from": "safety"}
    assert [name for name, method in METHODS.items() if "labels" in method.model_dump()] == [
        "dpo_safe_first",
        "cat_dpo",
        "mocan",
        "pecan",
        "c_dpo",
    ]


@pytest.mark.slow
def test_bfpo_is_safe_and_helpful_where_its_base_is_not(tmp_path):
    torch.set_num_threads(2)
    try:
        results = quickstart(tmp_path, seed=3)
    finally:
        torch.set_num_threads(1)
    value = {run.run: {f"{metric.task} {metric.metric}": metric.value for metric in run.metrics} for run in results}
    assert value["bfpo"]["harmful safety"] > 0.75
    assert value["bfpo"]["harmful safety"] > value["base"]["harmful safety"] + 0.3
    assert value["bfpo"]["benign helpfulness"] > 0.6
    assert value["bfpo"]["lookalike over_refusal"] < 0.4
    world = json.loads((tmp_path / "world" / "world.json").read_text())
    assert value["bfpo"]["all harmonic_mean"] > world["bag_of_words"]["balanced_accuracy"]
