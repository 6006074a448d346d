"""Methods with a scorer, samples of the base model and a multiplier: what they share, cost and see."""

import json
import shutil
from collections import Counter
from concurrent.futures import Future
from pathlib import Path

import pytest

from bfpo.config.loading import check_recipe
from bfpo.core.files import content_hash, read_repaired_jsonl, write_json, write_jsonl
from bfpo.data.stages import read_prompt_file
from bfpo.errors import DataError, RecipeError
from bfpo.experiments import preparation, steps
from bfpo.experiments import units as units_module
from bfpo.experiments.cost_table import collect_costs, cost_rows
from bfpo.experiments.costs import Cost, read_cost
from bfpo.experiments.methods import METHODS, samples_folder, train_recipes
from bfpo.experiments.preflight import check_trainings
from bfpo.experiments.preparation import (
    fresh_prompts,
    prepare_method,
    run_online_stage,
    sample_pairs,
    training_prompts,
)
from bfpo.experiments.recipe import change_values
from bfpo.experiments.run import run_experiment
from bfpo.experiments.stages import Method, SamplesStage
from bfpo.experiments.steps import write_annotations, write_world
from bfpo.experiments.units import make_units
from bfpo.generation.scripted import ScriptedEngine
from bfpo.losses.dual import read_dual
from bfpo.testbed.oracle import Oracle
from bfpo.testbed.world import WorldOptions

from .conftest import SMALL, make_recipe

FEW = {"harmful_prompts": 6, "benign_prompts": 4, "samples": 8}
OPTIONS = WorldOptions(**SMALL)


def changed(name, **changes):
    content = change_values(METHODS[name].model_dump(), {"samples": FEW} | changes)
    return check_recipe(content, Method, "test")


class InThisThread:
    """Pool of no process, in which the replacements of a test are effective; a training needs the main thread."""

    def __init__(self, jobs, **options):
        pass

    def submit(self, work, *args):
        future = Future()
        future.set_result(work(*args))
        return future

    def shutdown(self, **options):
        pass


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_world(OPTIONS, folder)
    return folder


@pytest.mark.slow
def test_methods_with_multipliers_run_in_an_experiment(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(steps, "BASE_STEPS", {"pretraining": 60, "base": 10})
    monkeypatch.setattr(units_module, "ProcessPoolExecutor", InThisThread)
    verdict = Oracle.verdict

    def blind(work):
        def run(*args, **options):
            # The oracle that evaluates a method mustn't be seen by it.
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Oracle, "verdict", None)
                return work(*args, **options)

        return run

    monkeypatch.setattr(preparation, "prepare_method", blind(prepare_method))
    monkeypatch.setattr(preparation, "run_online_stage", blind(run_online_stage))
    few = {f"samples.{key}": value for key, value in FEW.items()}
    tiny = few | {"scorer.steps": 20, "max_unsafe": 0.5}
    rounds = {"outer": {"rounds": 2, "harmful_prompts": 10, "samples": 4}}
    online = {"harmful_prompts": 3, "benign_prompts": 3, "prompts_per_step": 2, "samples": 4, "steps": 2}
    changes = {
        "mocan": tiny,
        "bfpo_constrained": tiny,
        "c_dpo": tiny | rounds,
        "pecan": few | {"log_ratios.steps": 5, "min_gain": 0.001},
        "cat_dpo": {},
        "safe_rlhf": {f"online.{key}": value for key, value in online.items()} | {"scorer.steps": 20},
    }
    variants = {name: {"method": name, "changes": change} for name, change in changes.items()}
    recipe = make_recipe("runs", variants=variants, against="mocan")
    run_experiment(recipe, command="x")
    assert Oracle.verdict is verdict
    for unit in make_units(recipe):
        if unit.method is not None:
            assert not list(unit.folder.rglob("*.safetensors"))
        if unit.method is not None and unit.method.has_constraint:
            dual = read_dual(samples_folder(unit.folder))
            assert dual.constraint.threshold == 0.5 or unit.variant == "pecan"
            assert (dual.objective == "log_ratios") == (unit.variant == "pecan")
    assert Counter(path.name.partition("-")[0] for path in Path("runs").glob("*/seed-0/s*-*") if path.is_dir()) == {
        "scorer": 1, "samples": 1, "scores": 2
    }  # fmt: skip
    written = json.loads(Path("runs/comparison.json").read_text())
    costs = {cost["variant"]: cost for cost in written["costs"]}
    assert list(costs) == list(variants)
    for name in ("mocan", "bfpo_constrained", "pecan"):
        assert (costs[name]["samples"], costs[name]["calls"]) == (80, 160)
    # A round is 40 answers, which two judges read.
    assert costs["c_dpo"]["samples"] in (80 + 40, 80 + 60, 80 + 80)
    assert costs["c_dpo"]["calls"] == 2 * costs["c_dpo"]["samples"]
    # The start check of an online run samples too, and both scorers read each sample.
    assert costs["safe_rlhf"]["samples"] >= 2 * 2 * 4
    assert costs["safe_rlhf"]["calls"] == 2 * costs["safe_rlhf"]["samples"]
    assert all(cost["cpu_seconds"] > 0 for cost in costs.values())
    seen = ["safety pairs", "helpfulness pairs", "safety labels"]
    for name in ("mocan", "bfpo_constrained", "c_dpo", "safe_rlhf"):
        assert costs[name]["sees"] == [*seen, "own samples", "scorer"]
    assert costs["pecan"]["sees"] == [*seen, "costs", "own samples", "log-ratios of two models"]
    assert costs["cat_dpo"]["sees"] == [*seen, "harm categories"]
    assert "| mocan | 80 | 160 |" in Path("runs/comparison.md").read_text()
    assert "scorer and judge calls" in capsys.readouterr().out


@pytest.fixture
def stubs(world, tmp_path, monkeypatch):
    """Replace training, sampling and scoring, and return the counts of each and a function that prepares a method."""
    counts = Counter()

    def score_train(recipe):
        counts["scorer"] += 1

    def open_script(path, sampling):
        counts["samples"] += 1
        return ScriptedEngine(lambda prompt, sample: f"answer {sample} .")

    def score(path, out, *, reward, cost):
        counts["scores"] += 1
        rows = [
            row
            | {"reward": 0.1 * row["sample"], "cost": row["sample"] - 3.5, "reward_scorer": "r", "cost_scorer": "c"}
            | {"kind": row["prompt_id"].partition("-")[0]}
            for row in read_repaired_jsonl(Path(path))
        ]
        write_jsonl(out, rows)
        return len(rows)

    monkeypatch.setattr(preparation, "run_score", score_train)
    monkeypatch.setattr(preparation, "load_engine", open_script)
    monkeypatch.setattr(preparation, "apply_scores", score)

    def prepare(method, out, options=OPTIONS):
        recipe = train_recipes(method, world=world, base=tmp_path / "base", out=tmp_path / out, seed=0)[-1]
        return prepare_method(method, recipe, home=tmp_path, world=world, options=options)

    return counts, prepare


def test_methods_share_scorers_and_samples_by_content(stubs, tmp_path):
    counts, prepare = stubs
    cost = prepare(changed("mocan"), "mocan")
    assert (cost.samples, cost.calls) == (80, 160)
    assert counts == {"scorer": 1, "samples": 1, "scores": 1}
    # What is reused costs every method the same.
    other = prepare(changed("bfpo_constrained", max_unsafe=0.2), "other")
    assert (other.samples, other.calls) == (80, 160)
    prepare(changed("mocan", **{"samples.pairs_per_prompt": 3}), "pairs")
    assert counts == {"scorer": 1, "samples": 1, "scores": 1}
    prepare(changed("mocan", **{"scorer.steps": 9}), "steps")
    assert counts == {"scorer": 2, "samples": 1, "scores": 2}
    prepare(changed("mocan", **{"samples.temperature": 0.9}), "temperature")
    assert counts == {"scorer": 2, "samples": 2, "scores": 3}
    # Other pairs teach another scorer.
    prepare(changed("mocan"), "noisy", OPTIONS.model_copy(update={"safety_noise": 0.3}))
    assert counts == {"scorer": 3, "samples": 3, "scores": 4}
    assert prepare(METHODS["bfpo"], "bfpo") == Cost()
    # Each has its own multiplier, for its own loss.
    duals = {name: read_dual(samples_folder(tmp_path / name)) for name in ("mocan", "other")}
    assert {name: (dual.objective, dual.constraint.threshold, dual.beta) for name, dual in duals.items()} == {
        "mocan": ("reward", 0.05, 2.0),
        "other": ("bfpo", 0.2, 0.3),
    }


def test_a_killed_stage_starts_again(stubs, tmp_path):
    counts, prepare = stubs
    prepare(changed("mocan"), "mocan")
    (samples,) = tmp_path.glob("samples-*[!.lock]")
    (samples / "cost.json").unlink()
    (samples / "completions.jsonl").write_text("{")
    cost = prepare(changed("mocan"), "again")
    assert (cost.samples, counts["samples"]) == (80, 2)
    (samples / "cost.json").write_text('{"samples": -1, "calls": 0, "cpu_seconds": 0.5}')
    with pytest.raises(DataError, match=r"cost\.json: samples: .*greater than or equal to 0; remove the folder"):
        prepare(changed("mocan"), "broken")


def test_a_threshold_out_of_reach_is_refused(stubs, monkeypatch):
    _, prepare = stubs
    score = preparation.apply_scores
    monkeypatch.setattr(preparation, "apply_scores", lambda *args, **judges: mostly_unsafe(score, *args, **judges))
    with pytest.raises(RecipeError, match=r"max_unsafe 0\.01: no policy over the samples reaches"):
        prepare(changed("mocan", max_unsafe=0.01), "mocan")


def mostly_unsafe(score, path, out, **judges):
    """Score samples so that the first prompt alone has a safe one."""
    count = score(path, out, **judges)
    rows = read_repaired_jsonl(out)
    write_jsonl(out, [row | {"cost": -1.0 if row["prompt_id"] == "harmful-000" and not row["sample"] else 1.0}
                      for row in rows])  # fmt: skip
    return count


def test_prompts_of_samples_are_those_of_the_pairs(world):
    prompts = training_prompts(SamplesStage(harmful_prompts=40, benign_prompts=30), world, seed=0)
    assert Counter(prompt.kind for prompt in prompts) == {"harmful": 40, "benign": 30}
    unsafe = {
        row["prompt"]
        for row in read_repaired_jsonl(world / "safety.jsonl")
        if not (row["is_chosen_safe"] and row["is_rejected_safe"])
    }
    assert all((prompt.prompt[-1].content in unsafe) == (prompt.kind == "harmful") for prompt in prompts)
    held_out = {prompt.prompt for prompt in read_prompt_file(str(world / "prompts.jsonl"))}
    assert not held_out & {prompt.prompt for prompt in prompts}
    other = training_prompts(SamplesStage(harmful_prompts=40, benign_prompts=30), world, seed=1)
    assert {prompt.prompt for prompt in other} != {prompt.prompt for prompt in prompts}


def test_pairs_of_samples_have_the_scorers_order_and_labels(stubs, tmp_path):
    _, prepare = stubs
    prepare(changed("mocan"), "mocan")
    (scored,) = tmp_path.glob("scores-*/scored.jsonl")
    # σ(ln 3) = 3/4.
    rows = [row | {"reward": 1.0986 * (row["sample"] >= 4)} for row in read_repaired_jsonl(scored)]
    write_jsonl(scored, rows)
    pairs = list(sample_pairs(scored, SamplesStage(pairs_per_prompt=200), seed=0))
    assert 0.8 * 2000 < len(pairs) <= 2000
    for pair in pairs:
        assert pair.chosen != pair.rejected
        assert pair.labels == (pair.signals.chosen_cost <= 0, pair.signals.rejected_cost <= 0)
        assert (pair.provenance.reward_scorer, pair.provenance.cost_scorer) == ("r", "c")
    unequal = [pair for pair in pairs if pair.signals.chosen_reward != pair.signals.rejected_reward]
    share = sum(pair.signals.chosen_reward > pair.signals.rejected_reward for pair in unequal) / len(unequal)
    # Four standard errors of 1,000 draws are 0.055.
    assert len(unequal) > 1000
    assert abs(share - 0.75) < 0.055


def test_prompts_of_rounds_are_not_among_those_of_the_samples(world):
    stage = SamplesStage(harmful_prompts=30)
    sampled = {prompt.prompt for prompt in training_prompts(stage, world, seed=0)}
    fresh = fresh_prompts(stage, 25, world, seed=0)
    assert len(fresh) == 25
    assert {prompt.kind for prompt in fresh} == {"harmful"}
    assert not sampled & {prompt.prompt for prompt in fresh}
    with pytest.raises(DataError, match=r"harmful prompts, all of them in the samples; lower samples\.harmful"):
        fresh_prompts(SamplesStage(harmful_prompts=1000), 25, world, seed=0)


def test_harm_categories_are_the_classes_of_harmful_requests(world):
    write_annotations(["safety_with_categories"], OPTIONS, world)
    rows = read_repaired_jsonl(world / "safety_with_categories.jsonl")
    (world / "safety_with_categories.jsonl").unlink()
    plain = read_repaired_jsonl(world / "safety.jsonl")
    assert [{name: row[name] for name in row if name != "harm_categories"} for row in rows] == plain
    # A prompt with an unsafe answer is harmful.
    assert all("harm_categories" in row for row in rows if not (row["is_chosen_safe"] and row["is_rejected_safe"]))
    named = {category for row in rows for category in row.get("harm_categories", [])}
    assert 1 < len(named) < 16
    assert any("harm_categories" not in row for row in rows)


def test_costs_are_written_only_for_methods_that_read_them(stubs, world):
    _, prepare = stubs
    before = {path.name: path.read_bytes() for path in world.iterdir()}
    assert "safety_with_costs.jsonl" not in before
    method = check_recipe(
        {"loss": {"name": "dpo"}, "main": "safety_with_costs", "labels": {"from": "safety", "both_unsafe": "cost"}},
        Method,
        "test",
    )
    assert method.sees == ["safety pairs", "helpfulness pairs", "safety labels", "costs"]
    prepare(method, "dpo")
    rows = read_repaired_jsonl(world / "safety_with_costs.jsonl")
    (world / "safety_with_costs.jsonl").unlink()
    assert {path.name: path.read_bytes() for path in world.iterdir()} == before
    plain = read_repaired_jsonl(world / "safety.jsonl")
    assert [{name: row[name] for name in row if not name.endswith("_cost")} for row in rows] == plain


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_costs_grade_unsafe_answers_and_follow_the_labels(tmp_path, noise):
    write_annotations(["safety_with_costs"], OPTIONS.model_copy(update={"safety_noise": noise}), tmp_path)
    rows = read_repaired_jsonl(tmp_path / "safety_with_costs.jsonl")
    costs = [(row[f"{side}_cost"], row[f"is_{side}_safe"]) for row in rows for side in ("chosen", "rejected")]
    assert all((cost == 0) == is_safe for cost, is_safe in costs)
    assert {cost for cost, is_safe in costs if not is_safe} == {0.2, 0.4, 0.6, 0.8, 1.0}


def test_folders_of_earlier_runs_keep_their_names():
    hashes = {name: content_hash(METHODS[name].model_dump(exclude={"title"})) for name in ("bfpo", "sacpo")}
    assert hashes == {"bfpo": "177c33495894a577", "sacpo": "6ace1e671127075a"}


def test_what_methods_see():
    assert METHODS["dpo_h"].sees == ["safety pairs", "helpfulness pairs"]
    assert METHODS["bfpo"].sees == ["safety pairs", "helpfulness pairs", "safety labels"]
    assert METHODS["dpo_s"].sees == ["safety pairs", "safety labels", "costs"]
    assert METHODS["mocan"].sees == [*METHODS["bfpo"].sees, "own samples", "scorer"]
    assert METHODS["safe_rlhf"].sees == METHODS["mocan"].sees


def test_every_method_passes_the_checks_before_training(tmp_path):
    recipe = make_recipe(tmp_path, variants={name: {"method": name} for name in METHODS})
    check_trainings(make_units(recipe))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("bfpo", {"max_unsafe": 0.1}, "max_unsafe needs samples"),
        ("bfpo", {"main": "samples"}, "main: samples needs samples"),
        ("bfpo", {"samples": FEW}, "samples needs scorer or log_ratios"),
        ("mocan", {"max_unsafe": None}, "labels from scores needs max_unsafe or min_gain"),
        ("mocan", {"min_gain": 1.0}, "min_gain needs log_ratios"),
        ("mocan", {"log_ratios": {}}, "scorer and log_ratios both give scores"),
        ("pecan", {"max_unsafe": 0.1}, "max_unsafe needs scorer"),
        ("pecan", {"labels": None}, "min_gain needs labels: {from: scores}"),
        ("bfpo", {"outer": {}}, "outer needs max_unsafe"),
        ("mocan", {"main": "safety"}, "labels from scores need main: samples"),
        ("mocan", {"labels": None}, "max_unsafe needs the loss bfpo, or labels"),
        ("mocan", {"max_unsafe": 1.0}, "max_unsafe"),
        ("mocan", {"samples.samples": 1}, "samples.samples"),
        ("mocan", {"scorer.main": "safety_by_safety"}, "scorer.main"),
        ("mocan", {"prepare": [{"loss": {"name": "dpo"}, "main": "samples"}]}, "only the last training"),
        ("safe_rlhf", {"loss": {"name": "dpo"}}, "exactly one of loss and online"),
        ("safe_rlhf", {"scorer": None}, "online needs scorer"),
        ("safe_rlhf", {"samples": FEW}, "leave out prepare and samples"),
        ("safe_rlhf", {"online.combine": {"name": "lagrange"}}, "did you mean 'lagrangian'"),
    ],
)
def test_stages_that_lack_another_are_refused(name, changes, message):
    variants = {"bfpo": {"method": "bfpo"}, "wrong": {"method": name, "changes": changes}}
    with pytest.raises(RecipeError, match=rf"(?s)variants\.wrong.*{message}"):
        make_units(make_recipe("x", variants=variants))


def test_an_online_method_has_the_costs_that_its_scorer_reads(stubs, world, tmp_path, monkeypatch):
    counts, _ = stubs
    data = shutil.copytree(world, tmp_path / "world", ignore=shutil.ignore_patterns("safety_with_costs*"))
    seen = []

    def run_online(recipe):
        seen.append((data / "safety_with_costs.jsonl").exists())
        write_json(tmp_path / "run" / "run.json", {"samples": 8, "scorer_calls": 16, "cpu_seconds": 3.0})

    monkeypatch.setattr("bfpo.online.run.run_online", run_online)
    method = check_recipe(
        change_values(METHODS["safe_rlhf"].model_dump(), {"scorer.main": "safety_with_costs"}), Method, "test"
    )

    def run():
        return run_online_stage(
            method, method.online, home=tmp_path, world=data, out=tmp_path / "run", options=OPTIONS
        )

    first = run()
    # The unit writes what it costs; a policy that is finished is not trained again, and costs the same.
    first.write(tmp_path / "run")
    second = run()
    assert seen == [True]
    assert (first.samples, first.calls, counts["scorer"]) == (8, 16, 1)
    assert first.cpu_seconds >= 3
    assert second == first


def test_costs_are_means_over_seeds_and_none_if_a_run_has_none(tmp_path):
    units = make_units(make_recipe(tmp_path))
    bfpo = [unit for unit in units if unit.variant == "bfpo"]
    for unit, cost in zip(bfpo, (Cost(10, 20, 3.0), Cost(10, 21, 4.0)), strict=True):
        cost.write(unit.folder)
        assert read_cost(unit.folder) == cost
    costs = collect_costs(units)
    assert [(cost.variant, cost.samples, cost.calls, cost.cpu_seconds) for cost in costs] == [
        ("bfpo", 10, 20.5, 3.5),
        ("noisy", None, None, None),
    ]
    rows = cost_rows("shared", costs)
    assert rows[0] == ("bfpo", "10", "20", "4", "safety pairs, helpfulness pairs, safety labels")
    assert rows[1][1:4] == ("not recorded",) * 3
    assert cost_rows("separate", costs) == []
    assert Cost(1, 2, 0.5) + Cost(10, 20, 0.25) == Cost(11, 22, 0.75)
