"""Experiments: the units that are run, the units that are run again, and their results."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock

from bfpo.config.loading import load_recipe
from bfpo.core.files import read_repaired_jsonl
from bfpo.errors import DataError, RecipeError, TrainingError
from bfpo.evaluation.results import MetricResult, Results, read_results
from bfpo.experiments import steps
from bfpo.experiments import units as module
from bfpo.experiments.cost_table import collect_costs
from bfpo.experiments.methods import train_recipes
from bfpo.experiments.preflight import check_trainings
from bfpo.experiments.recipe import ExperimentRecipe, all_settings
from bfpo.experiments.results import METRICS, choose_settings, collect_results, show_comparison, write_comparison
from bfpo.experiments.run import run_experiment
from bfpo.experiments.stages import Stage
from bfpo.experiments.units import make_units, run_unit, run_units
from bfpo.testbed.oracle import Oracle

from .conftest import SMALL, make_recipe
from .killed_worker import exit_hard


def with_results(units, value):
    """Write results of units in which every metric is `value(unit)`."""
    for unit in units:
        metrics = [
            MetricResult("testbed", task, name, value(unit), None, None, 8, 0, "", True) for task, name in METRICS
        ]
        oracle = Oracle(unit.options.skills)
        judges = [{"name": oracle.name, "revision": oracle.revision}]
        Results(unit.variant, "m", "", judges, {}, metrics).write(unit.evaluation)


def test_units_have_folders_of_their_own(tmp_path):
    recipe = make_recipe(tmp_path, worlds={"a": SMALL, "b": SMALL | {"skills": "separate"}})
    units = make_units(recipe)
    assert len(units) == len({unit.folder for unit in units}) == 2 * 2 * 3
    assert [unit.variant for unit in units[:3]] == ["base", "bfpo", "noisy"]
    noisy = units[2]
    assert (noisy.options.safety_noise, noisy.base_options.safety_noise) == (0.3, 0.0)
    assert noisy.method.loss["alpha"] == 0.0
    # Another setting has another folder, so old results are never used for it.
    longer = make_units(make_recipe(tmp_path, steps=3))
    assert make_units(make_recipe(tmp_path))[1].folder != longer[1].folder
    assert make_units(make_recipe(tmp_path))[0].folder == longer[0].folder


def test_one_name_varies_at_a_time_around_a_center():
    vary = {"loss.beta": [0.1, 0.2, 0.4, 0.1], "learning_rate": [1e-3, 2e-3]}
    variant = {"method": "dpo_h", "changes": {"loss.beta": 0.2}, "vary": vary}
    settings = all_settings(make_recipe("x", variants={"dpo": variant}))["shared"]["dpo"]
    assert [setting.name for setting in settings] == [
        "dpo",
        "dpo beta=0.1",
        "dpo beta=0.4",
        "dpo learning_rate=0.002",
    ]
    assert [(setting.method.loss["beta"], setting.method.learning_rate) for setting in settings] == [
        (0.2, 1e-3), (0.1, 1e-3), (0.4, 1e-3), (0.2, 2e-3)
    ]  # fmt: skip
    assert settings[1].values == {"loss.beta": 0.1, "learning_rate": 1e-3}


def test_tuned_values_are_read_world_by_world(tmp_path):
    tuning = tmp_path / "comparison.json"
    shared = {"world": "shared", "variant": "bfpo", "values": {"loss.beta": 0.1, "learning_rate": 2e-3}}
    apart = shared | {"world": "apart", "values": {"loss.beta": 0.6, "learning_rate": 1e-3}}
    tuning.write_text(json.dumps({"chosen": [shared, apart]}))
    worlds = {"shared": SMALL, "apart": SMALL | {"skills": "separate"}}
    variants = {"bfpo": {"method": "bfpo", "tuned": "bfpo", "changes": {"loss.alpha": 0.0}}}
    recipe = make_recipe(tmp_path, worlds=worlds, variants=variants, tuning=str(tuning))
    methods = {world: settings["bfpo"][0].method for world, settings in all_settings(recipe).items()}
    assert (methods["shared"].loss["beta"], methods["shared"].learning_rate) == (0.1, 2e-3)
    assert (methods["apart"].loss["beta"], methods["apart"].loss["alpha"]) == (0.6, 0.0)
    with pytest.raises(RecipeError, match=r"variants\.bfpo\.tuned 'bpfo' isn't in .*did you mean 'bfpo'"):
        make_units(make_recipe(tmp_path, variants={"bfpo": {"method": "bfpo", "tuned": "bpfo"}}, tuning=str(tuning)))
    for wrong in (3, [3], "x", None):
        tuning.write_text(json.dumps({"chosen": [shared | {"values": wrong}, apart]}))
        with pytest.raises(RecipeError, match=r"isn't the comparison\.json of an experiment with 'vary'"):
            make_units(recipe)
    with pytest.raises(RecipeError, match="needs 'tuning'"):
        make_units(make_recipe(tmp_path, variants=variants))


def test_equal_runs_are_run_once(tmp_path, monkeypatch):
    variants = {"bfpo": {"method": "bfpo"}, "same": {"method": "bfpo", "changes": {"loss.beta": 0.3}}}
    units = make_units(make_recipe(tmp_path, variants=variants))
    started = []
    monkeypatch.setattr(module, "ProcessPoolExecutor", in_this_process)
    monkeypatch.setattr(module, "run_unit", started.append)
    run_units(units, tmp_path, jobs=2)
    assert len(started) == 2 * 2


TWICE = {
    "bfpo": {"method": "bfpo", "vary": {"loss.beta": [0.1]}},
    "bfpo beta=0.1": {"method": "bfpo", "changes": {"loss.beta": 0.1}},
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"against": "dpo"}, "against: 'dpo'"),
        ({"variants": {"bfpo": {"method": "bpfo"}}}, "did you mean 'bfpo'"),
        ({"variants": {"bfpo": {"method": "bfpo", "changes": {"loss.gamma": 1}}}}, "gamma"),
        ({"variants": {"bfpo": {"method": "bfpo", "changes": {"speed": 1}}}}, "speed"),
        (
            {"variants": {"bfpo": {"method": "bfpo", "changes": {"learning_rate.x": 1}}}},
            r"change 'learning_rate\.x': 'learning_rate' is 0\.\d+, not a section",
        ),
        ({"variants": {"bfpo": {"method": "bfpo", "dials": {"noise": 1}}}}, "noise"),
        ({"variants": {"bfpo": {"method": "bfpo", "dials": {"train_prompts": 9}}}}, "dials: 'train_prompts'"),
        ({"variants": {"bfpo": {"method": "bfpo", "vary": {"loss.alpha": [1]}}}}, "no center of loss.alpha"),
        ({"variants": TWICE}, "two are called 'bfpo beta=0.1'"),
        ({"variants": {"bfpo": {"method": "bfpo", "changes": {"loss.beta": -1}}}}, r"variants\.bfpo:\n  loss\.beta"),
        (
            {"variants": {"bfpo": {"method": "bfpo", "vary": {"loss.beta": [0.1, -1]}}}},
            r"variants\.bfpo:\n  loss\.beta",
        ),
        ({"variants": {"bfpo": {"method": "bfpo", "changes": {"pairs_per_step": 1}}}}, "with a buffer, half of them"),
        ({"variants": {"bfpo": {"method": "bfpo", "changes": {"learning_rate": float("inf")}}}}, "learning_rate"),
        ({"results": "taken"}, "results: taken is a file"),
        ({"seeds": [0]}, "seeds"),
        ({"seeds": [0, 2**32]}, r"seeds\.1"),
        (
            {"variants": {"rl": {"method": "safe_rlhf", "vary": {"learning_rate": [1e-3, 0.5]}}}},
            "'learning_rate' is an option of trainings on pairs, and 'safe_rlhf' has none; the options of 'online'",
        ),
        ({"seeds": [1, 1]}, "has a duplicate"),
        (
            {"results": "r", "tuning": "r/../r/comparison.json"},
            r"results: the comparison would replace r/comparison\.json, which is `tuning`",
        ),
        ({"variants": {"bfpo": {"method": "bfpo"}, "base": {"method": "bfpo"}}}, "the name of the base model"),
    ],
)
def test_impossible_recipes_are_refused_before_anything_runs(tmp_path, monkeypatch, changes, message):
    monkeypatch.chdir(tmp_path)
    Path("taken").touch()
    with pytest.raises(RecipeError, match=message):
        make_units(make_recipe(tmp_path, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_only": ["nosuchlayer"]}, "'nosuchlayer'"),
        ({"train_only": ["("]}, "regular expression"),
        ({"train_only": []}, "train_only: the list is empty"),
        ({"loss": {"name": "no_such_module:Loss"}}, "no_such_module"),
        ({"loss": {"name": "needy_loss:NeedyLoss"}}, "NeedyLoss needs chosen_mood, which worlds don't have"),
    ],
)
def test_the_shape_of_the_model_is_checked_before_the_first_training(tmp_path, monkeypatch, changes, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("needy_loss.py").write_text(
        "from dataclasses import dataclass\nfrom bfpo.losses.baselines import DPO\n@dataclass(frozen=True)\n"
        "class NeedyLoss(DPO):\n    needs = ('chosen_mood',)\n"
    )
    monkeypatch.setattr("bfpo.experiments.run.run_units", None)
    # Also one of the values to try, which isn't the center.
    key, value = next(iter(changes.items()))
    center = {"train_only": ["lm_head"]} if key == "train_only" else {}
    variants = {"bfpo": {"method": "bfpo", "changes": center, "vary": {key: [value]}}}
    with pytest.raises(RecipeError, match=rf"(?s)variants\.bfpo {key}=.*{message}"):
        run_experiment(make_recipe(tmp_path / "out", variants=variants), command="")
    assert not Path("out").exists()


def test_methods_on_corrected_labels_and_token_level_dpo_can_be_compared(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rates = {"sensitivity": 0.8, "specificity": 0.8}
    variants = {
        "bfpo": {"method": "bfpo", "changes": {"loss.label_errors": rates, "loss.tail": 0.5}},
        "tdpo": {"method": "dpo_mix", "changes": {"loss.name": "tdpo"}},
    }
    check_trainings(make_units(make_recipe(tmp_path / "out", variants=variants)))
    graded = {"bfpo": {"method": "bfpo", "changes": {"loss.graded": True}}}
    with pytest.raises(RecipeError, match="BFPO needs degree_difference, which worlds don't have"):
        check_trainings(make_units(make_recipe(tmp_path / "out", variants=graded)))


def test_wrong_keys_are_refused_without_torch(tmp_path):
    recipe = make_recipe("out").model_dump(mode="json")
    recipe["variants"]["noisy"]["changes"] = {"loss.beta": -1}
    (tmp_path / "r.yaml").write_text(json.dumps(recipe))
    script = "import sys; sys.argv = ['bfpo', 'experiment', 'r.yaml']\nfrom bfpo.commands.app import main\n"
    script += "try:\n    main()\nfinally:\n    assert 'torch' not in sys.modules, 'torch was loaded'"
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "variants.noisy:\n  loss.beta" in done.stderr


def test_a_unit_leaves_its_results_and_no_weights(runs):
    base, _, noisy = make_units(make_recipe(runs))[:3]
    assert base.is_done
    assert list(base.folder.glob("*.safetensors"))
    assert not noisy.is_done
    run_unit(noisy)
    assert noisy.is_done
    assert not list(noisy.folder.rglob("*.safetensors"))
    safety = read_repaired_jsonl(noisy.home / "world" / "safety.jsonl")
    flipped = read_repaired_jsonl(next(noisy.home.glob("world-*/safety.jsonl")))
    assert [row["chosen"] for row in safety] == [row["chosen"] for row in flipped]
    assert [row["is_chosen_safe"] for row in safety] != [row["is_chosen_safe"] for row in flipped]


def test_the_stages_of_a_method_share_its_steps_and_each_starts_from_the_one_before(runs):
    variants = {"bfpo": {"method": "bfpo"}, "sacpo": {"method": "sacpo", "changes": {"loss.beta": 0.1}}}
    unit = make_units(make_recipe(runs, variants=variants, steps=3))[2]
    first, second = train_recipes(
        unit.method, world=Path("w"), base=Path("b"), out=unit.folder, seed=0, steps=3, save=False
    )
    assert [recipe.trainer["max_steps"] for recipe in (first, second)] == [1, 2]
    assert [recipe.loss.beta for recipe in (first, second)] == [0.3, 0.1]
    assert [recipe.data[0].path for recipe in (first, second)] == ["w/safety.jsonl", "w/safety_by_safety.jsonl"]
    assert (first.model.path, second.model.path) == ("b", first.trainer["output_dir"])
    assert second.trainer["output_dir"] == str(unit.folder)
    run_unit(unit)
    assert unit.is_done
    stage = Path(first.trainer["output_dir"])
    assert json.loads((stage / "run.json").read_text())["steps"] == 1
    assert not [*unit.folder.rglob("*.safetensors"), *stage.rglob("*.safetensors")]
    # The hash in the name of the folder covers all stages.
    changed = unit.method.model_copy(update={"prepare": [Stage(loss={"name": "dpo", "beta": 0.2})]})
    assert replace(unit, method=changed).folder != unit.folder


def test_a_loss_that_worlds_can_not_feed_is_refused(tmp_path):
    variants = {
        "bfpo": {"method": "bfpo"},
        "cat": {"method": "dpo_safe_first", "changes": {"loss": {"name": "cat_dpo"}}},
    }
    with pytest.raises(RecipeError, match=r"variants\.cat: .*CatDPO needs categories, which worlds don't have"):
        run_experiment(make_recipe(tmp_path / "out", variants=variants), command="")


def test_another_oracle_judges_the_same_completions_again(runs, monkeypatch):
    unit = make_units(make_recipe(runs))[0]
    revision = Oracle("shared").revision
    files = ("completions.jsonl", f"verdicts-testbed-oracle@{revision}.jsonl", "results.json")
    completions, verdicts, results = ((unit.evaluation / name).read_text() for name in files)
    assert revision in verdicts
    assert revision in results
    # An earlier version named the file otherwise, and a killed judging leaves its unfinished part behind.
    (unit.evaluation / files[1]).unlink()
    (unit.evaluation / "verdicts.jsonl").write_text(verdicts.replace(revision, "0ldone"))
    (unit.evaluation / "verdicts.jsonl.unfinished").write_text(verdicts.replace(revision, "0lder"))
    (unit.evaluation / "results.json").write_text(results.replace(revision, "0ldone"))
    assert not unit.is_done
    monkeypatch.setattr(steps, "load_engine", None)
    run_unit(unit)
    assert unit.is_done
    assert [(unit.evaluation / name).read_text() for name in files[:2]] == [completions, verdicts]
    again = json.loads((unit.evaluation / "results.json").read_text())
    created = {"created": "at any time"}
    assert again | created == json.loads(results) | created
    # Results of an unknown schema are scored again too.
    (unit.evaluation / "results.json").write_text(results.replace('"schema": 3', '"schema": 9'))
    assert not unit.is_done
    run_unit(unit)
    assert unit.is_done


def test_results_of_different_judges_are_not_compared(tmp_path):
    recipe = make_recipe(tmp_path)
    units = make_units(recipe)
    with_results(units, lambda unit: 0.5)
    old = read_results(units[-1].evaluation)
    replace(old, judges=[{"name": "testbed-oracle", "revision": "0ldone"}]).write(units[-1].evaluation)
    with pytest.raises(DataError, match="was judged by testbed-oracle@0ldone"):
        collect_results(recipe, units)


def in_this_process(jobs, **options):
    """Return a pool of one thread, in which the replacements of a test are effective too."""
    return ThreadPoolExecutor(1)


def test_only_missing_units_run_and_bases_come_first(tmp_path, monkeypatch):
    units = make_units(make_recipe(tmp_path))
    with_results([units[1]], lambda unit: 0.5)
    started = []
    monkeypatch.setattr(module, "ProcessPoolExecutor", in_this_process)
    monkeypatch.setattr(module, "run_unit", started.append)
    assert run_units(units, tmp_path, jobs=2) == 5
    assert len(started) == 5
    assert units[1] not in started
    for unit in started:
        earlier = started[: started.index(unit)]
        assert unit.method is None or any(other.method is None and other.home == unit.home for other in earlier)
    with_results(units, lambda unit: 0.5)
    started.clear()
    run_units(units, tmp_path, jobs=2)
    assert started == []
    # A unit that another oracle judged isn't counted as a run.
    old = read_results(units[1].evaluation)
    replace(old, judges=[{"name": "testbed-oracle", "revision": "0ldone"}]).write(units[1].evaluation)
    assert run_units(units, tmp_path, jobs=2) == 0
    assert started == [units[1]]


def test_a_failing_unit_is_named(tmp_path, monkeypatch):
    def fail(unit):
        raise RecipeError("no room")

    monkeypatch.setattr(module, "ProcessPoolExecutor", in_this_process)
    monkeypatch.setattr(module, "run_unit", fail)
    with pytest.raises(TrainingError, match="base in world shared, seed 0: no room; the same command resumes"):
        run_units(make_units(make_recipe(tmp_path)), tmp_path, jobs=1)


def test_only_one_experiment_runs_in_a_folder(tmp_path):
    with (
        FileLock(tmp_path / ".lock"),
        pytest.raises(RecipeError, match=r"out: another experiment is running in .*choose another folder"),
    ):
        run_units(make_units(make_recipe(tmp_path)), tmp_path, jobs=1)


def test_a_killed_worker_is_explained(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "run_unit", exit_hard)
    with pytest.raises(TrainingError, match="a worker process was killed"):
        run_units(make_units(make_recipe(tmp_path)), tmp_path, jobs=1)


def test_verdicts_follow_from_the_differences_over_seeds(tmp_path, capsys):
    variants = {name: {"method": "bfpo", "changes": {"loss.beta": beta}} for beta, name in
                ((0.3, "bfpo"), (0.2, "above"), (0.1, "same"))}  # fmt: skip
    recipe = make_recipe(tmp_path, seeds=list(range(6)), variants=variants)
    units = make_units(recipe)
    rng = np.random.default_rng(0)
    noise = {(unit.variant, unit.options.seed): rng.normal(0, 0.01) for unit in units}
    level = {"base": 0.2, "bfpo": 0.5, "above": 0.6, "same": 0.5}
    with_results(units, lambda unit: level[unit.variant] + noise[unit.variant, unit.options.seed])
    results_by_key = {(line.variant, line.metric): line for line in collect_results(recipe, units)}
    assert results_by_key["above", "all/harmonic_mean"].verdict == "better"
    assert results_by_key["above", "harmful/severity"].verdict == "worse"
    assert results_by_key["same", "all/harmonic_mean"].verdict == "not distinguishable"
    assert results_by_key["base", "benign/helpfulness"].verdict == "worse"
    assert results_by_key["bfpo", "all/harmonic_mean"].verdict is None
    assert results_by_key["above", "all/harmonic_mean"].difference.value == pytest.approx(0.1, abs=0.02)
    assert len(results_by_key["above", "all/harmonic_mean"].values) == 6
    costs = collect_costs(units)
    show_comparison(recipe, list(results_by_key.values()), costs)
    shown = capsys.readouterr().out
    assert shown.index("above") < shown.index("base")
    for runs_made in (2, 1, 0):
        metadata = {"command": "x", "took": {"runs": runs_made, "seconds": 9}}
        write_comparison(tmp_path, recipe, list(results_by_key.values()), costs, metadata)
    written = json.loads((tmp_path / "comparison.json").read_text())
    assert written["chosen"] == []
    assert [call["runs"] for call in written["took"]] == [2, 1]
    table = (tmp_path / "comparison.md").read_text()
    assert "| above | 0.60 [" in table
    assert "better |" in table
    figure = (tmp_path / "plane-shared.svg").read_text()
    assert "above: helpfulness 0.60 [" in figure
    assert ">2  above<" in figure


def test_differences_that_are_equal_on_all_seeds_are_no_proof(tmp_path):
    """Two seeds that both differ by one prompt: their spread of 0 says nothing about other seeds."""
    variants = {"bfpo": {"method": "bfpo"}, "near": {"method": "bfpo", "changes": {"loss.beta": 0.2}}}
    recipe = make_recipe(tmp_path, seeds=[5, 3], variants=variants)
    units = make_units(recipe)
    with_results(units, lambda unit: unit.options.seed / 10 + 0.01 * (unit.variant == "near"))
    lines = {(line.variant, line.metric): line for line in collect_results(recipe, units)}
    line = lines["near", "harmful/malformed"]
    # In the order of the recipe.
    assert line.values == [0.51, 0.31]
    assert line.verdict == "not distinguishable"
    assert line.p_value > 0.1
    assert line.difference.high - line.difference.low > 0.5


def test_a_figure_of_earlier_runs_does_not_stay(tmp_path):
    recipe = make_recipe(tmp_path, seeds=[0, 1], variants={"bfpo": {"method": "bfpo"}})
    units = make_units(recipe)
    with_results(units, lambda unit: 0.5)
    (tmp_path / "plane-shared.svg").touch()
    metadata = {"command": "x", "took": {"runs": 1, "seconds": 9}}
    write_comparison(tmp_path, recipe, collect_results(recipe, units), collect_costs(units), metadata)
    assert not (tmp_path / "plane-shared.svg").exists()


def test_the_choice_is_mean_minus_spread_and_names_edges(tmp_path):
    vary = {"loss.beta": [0.1, 0.6], "learning_rate": [5e-4, 2e-3]}
    recipe = make_recipe(tmp_path, seeds=[0, 1, 2], variants={"bfpo": {"method": "bfpo", "vary": vary}})
    units = make_units(recipe)

    def value(unit):
        # The best mean has a large spread over seeds; the steady one is chosen.
        if unit.variant == "bfpo learning_rate=0.002":
            return 0.8 + 0.2 * (unit.options.seed - 1)
        return 0.7 if unit.variant == "bfpo beta=0.6" else 0.5

    with_results(units, value)
    (best,) = choose_settings(recipe, collect_results(recipe, units))
    assert best["values"] == {"loss.beta": 0.6, "learning_rate": 1e-3}
    assert (best["edges"], best["tried"]) == (["loss.beta"], 5)
    assert best["score"] == pytest.approx(0.7)


def test_values_that_have_no_order_have_no_edges(tmp_path):
    variant = {
        "method": "bfpo",
        "changes": {"train_only": ["*down_proj*"]},
        "vary": {"train_only": [["*down_proj*"], None]},
    }
    recipe = make_recipe(tmp_path, seeds=[0, 1], variants={"bfpo": variant})
    units = make_units(recipe)
    with_results(units, lambda unit: 0.5)
    (best,) = choose_settings(recipe, collect_results(recipe, units))
    assert best["edges"] == []


def test_recipes_of_the_testbed_build():
    files = sorted((Path(__file__).parents[2] / "recipes" / "testbed").glob("*.yaml"))
    assert files
    for file in files:
        assert make_units(load_recipe(file, ExperimentRecipe))


@pytest.mark.slow
def test_the_dials_do_what_they_are_for(tmp_path):
    """Run real workers on one seed; the effects are several times the spread over seeds (docs/testbed.md)."""
    changes = {"alpha 0": {"loss.alpha": 0.0}, "alpha 1": {"loss.alpha": 1.0}, "bfpo": {}}
    variants = {name: {"method": "bfpo", "changes": change} for name, change in changes.items()}
    variants |= {name: {"method": name} for name in ("bfpo_no_buffer", "dpo_h")}
    units = make_units(make_recipe(tmp_path, worlds={"shared": {}}, steps=100, variants=variants))
    units = [unit for unit in units if unit.options.seed == 0]
    assert run_units(units, tmp_path, jobs=2) == len(units) == 6
    results = {unit.variant: read_results(unit.evaluation) for unit in units}
    safety = {name: run.metric("harmful", "safety").value for name, run in results.items()}
    helpfulness = {name: run.metric("benign", "helpfulness").value for name, run in results.items()}
    assert safety["alpha 0"] < safety["alpha 1"]
    assert helpfulness["alpha 0"] > helpfulness["alpha 1"] + 0.1
    assert safety["bfpo_no_buffer"] > safety["bfpo"] - 0.02
    assert helpfulness["bfpo_no_buffer"] < helpfulness["bfpo"] - 0.05
    assert safety["dpo_h"] < 0.1
    assert safety["bfpo"] > safety["base"] + 0.3
