"""Whole runs from recipes, on toy data and a new tiny model."""

import contextlib
import json
import math
import re
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import yaml
from filelock import FileLock
from transformers import AutoModelForCausalLM, AutoTokenizer

from bfpo.config.loading import check_recipe, load_recipe
from bfpo.config.recipes import SftRecipe, TrainRecipe
from bfpo.core import terminal
from bfpo.core.files import write_jsonl
from bfpo.data.prepare import prepare, write_prepared
from bfpo.data.table import sampled_rows
from bfpo.errors import DataError, ModelError, RecipeError
from bfpo.losses.dual import Constraint, Dual, FrontierPoint
from bfpo.losses.labeling import LabelingFunction
from bfpo.model.new import CHAT_TEMPLATE
from bfpo.training import run
from bfpo.training.arguments import DECIDED, training_arguments
from bfpo.training.run import check_evaluation, run_training
from bfpo.training.run_sft import run_sft
from bfpo.training.stream_trainer import StreamTrainer

TRAINER = {
    "output_dir": "runs/toy",
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "logging_steps": 1,
    "learning_rate": 1e-3,
    "save_strategy": "no",
    "use_cpu": True,
}
NEW = {"new": {"shape": "nano", "vocab_size": 300}}
SFT = {"model": NEW, "data": [{"path": "main.jsonl", "use": "both"}], "trainer": TRAINER}
ONE_STEP = {**TRAINER, "max_steps": 1}


def recipe(**changes) -> TrainRecipe:
    content = {
        "model": NEW,
        "data": [{"path": "main.jsonl"}],
        "buffer": [{"path": "buffer.jsonl"}],
        "holdout": 0.3,
        "loss": {"name": "bfpo", "beta": 0.5},
        "trainer": TRAINER,
    }
    return check_recipe(content | changes, TrainRecipe, "toy")


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory, main_pairs, buffer_pairs):
    folder = tmp_path_factory.mktemp("data")
    for name, pairs in {"main": main_pairs, "buffer": buffer_pairs}.items():
        write_jsonl(folder / f"{name}.jsonl", ({**pair.to_row(), "stream": None} for pair in pairs))
    return folder


@pytest.fixture(autouse=True)
def folder(data_folder, tmp_path, monkeypatch):
    """Work in a folder with the toy data as files."""
    shutil.copytree(data_folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory, data_folder):
    """A run of the unchanged recipe: its folder and what `run_training` returned."""
    folder = tmp_path_factory.mktemp("finished") / "folder"
    shutil.copytree(data_folder, folder)
    with contextlib.chdir(folder):
        return folder, run_training(recipe())


@pytest.fixture
def baseline(finished_run):
    """Copy the finished run into the working folder, and return what `run_training` returned."""
    folder, run = finished_run
    shutil.copytree(folder / "runs", "runs")
    return run


@pytest.mark.usefixtures("baseline")
def test_a_run_leaves_a_checkpoint_that_transformers_loads(tmp_path):
    out = tmp_path / "runs" / "toy"
    model = AutoModelForCausalLM.from_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "red box"}], add_generation_prompt=True, return_tensors="pt"
    )
    assert model.generate(**ids, max_new_tokens=3, do_sample=False).shape[1] == ids["input_ids"].shape[1] + 3
    expected = {"config.json", "model.safetensors", "run.json", "metrics.jsonl", "recipe.resolved.yaml"}
    assert expected | {"data_manifest.json", "tokenizer.json"} <= {file.name for file in out.iterdir()}
    assert not [file for file in out.rglob("*") if file.name.endswith(".tmp") or file.name == ".final"]


@pytest.mark.parametrize("command", [run_sft, run_training])
def test_the_chat_template_of_the_recipe_is_saved_with_the_model(command):
    template = "{% for message in messages %}{{ message['content'] + eos_token }}{% endfor %}"
    changes = {"text": {"chat_template": template}, "trainer": ONE_STEP}
    command(recipe(**changes) if command is run_training else check_recipe(SFT | changes, SftRecipe, "toy"))
    assert AutoTokenizer.from_pretrained("runs/toy").chat_template == template


def test_run_json_contains_what_was_returned(baseline, tmp_path):
    run = json.loads((tmp_path / "runs/toy/run.json").read_text())
    assert run == json.loads(json.dumps(baseline))
    assert run["start_check"]["largest_margin"] == 0
    assert run["steps"] == 2
    assert run["hardware"]["cpu_capability"] == torch.backends.cpu.get_cpu_capability() != ""
    assert set(run["versions"]) >= {"python", "torch", "transformers", "bfpo"}
    counts = run["data"]["eval"]["main"]
    for cell, metrics in run["evaluation"]["main"]["cells"].items():
        assert metrics["pairs"] == counts[cell]
        assert (metrics["sign_agreement"] is None) == (counts[cell] == 0)
    assert sum(counts.values()) == run["evaluation"]["main"]["pairs"] > 0


def test_the_resolved_recipe_runs_again_with_the_same_numbers(baseline):
    resolved = load_recipe("runs/toy/recipe.resolved.yaml", TrainRecipe, ["trainer.output_dir=runs/again"])
    again = run_training(resolved)
    assert again["train_loss"] == baseline["train_loss"]
    assert again["evaluation"] == baseline["evaluation"]


def test_the_safety_weight_of_a_multiplier_is_in_the_record_and_the_file_is_not_needed_again(tmp_path):
    labeling = asdict(LabelingFunction.from_parameters())
    point = FrontierPoint(0.75, 0.02, 0.6, 0.02, 0.02, 1.2, 20.0)
    dual = Dual("active", Constraint("unsafe", 0.02), "bfpo", 0.5, labeling, 0.75, 0.5, 1.0, 0.02, 0.01, 0.03, 0.02,
                None, point, point, [point], 50, 50, 1600)  # fmt: skip
    path = dual.write(tmp_path)
    loss = {"name": "bfpo", "beta": 0.5, "multiplier": "dual.json"}
    run = run_training(recipe(loss=loss, trainer=ONE_STEP))
    assert run["recipe"]["loss"]["safety_weight"] == 0.75
    assert "multiplier" not in run["recipe"]["loss"]
    path.unlink()
    again = run_training(load_recipe("runs/toy/recipe.resolved.yaml", TrainRecipe, ["trainer.output_dir=runs/again"]))
    assert again["train_loss"] == run["train_loss"]
    with pytest.raises(DataError, match=r"dual.json: No such file or directory; `bfpo dual` writes this file"):
        run_training(recipe(loss=loss, data=[{"path": "missing.jsonl"}]))


@pytest.mark.usefixtures("baseline")
def test_an_earlier_run_is_moved_aside_not_deleted(tmp_path):
    for _ in range(2):
        run_training(recipe(trainer=ONE_STEP))
    assert (tmp_path / "runs/toy.earlier-1/model.safetensors").exists()
    assert (tmp_path / "runs/toy.earlier-2/model.safetensors").exists()


def test_a_run_reports_how_tokens_are_fed(capsys):
    losses = {}
    for kind in ("packed", "padded"):
        run = run_training(recipe(layout={"kind": kind, "max_tokens_per_pack": 100}))
        losses[kind] = run["train_loss"], run["evaluation"]["main"]["loss"]
        assert (run["start_check"]["packing_difference"] is None) == (kind == "padded")
        output = capsys.readouterr().out
        assert ("layout: packed rows of up to 100 tokens; packed and padded" in output) == (kind == "packed")
    assert losses["packed"] == pytest.approx(losses["padded"], rel=1e-4)


def test_a_large_evaluation_set_is_sampled_the_same_way_each_time(capsys):
    runs = [run_training(recipe(max_eval=2, trainer={**ONE_STEP, "seed": seed})) for seed in (1, 2)]
    assert [run["evaluation"]["main"]["pairs"] for run in runs] == [2, 2]
    whole = run_training(recipe(max_eval=None, trainer=ONE_STEP))["evaluation"]["main"]["pairs"]
    assert f"evaluating on a sample of 2 of {whole} main pairs (max_eval)" in capsys.readouterr().out
    counts = [
        {cell: metrics["pairs"] for cell, metrics in run["evaluation"]["main"]["cells"].items()} for run in runs
    ]
    assert counts[0] == counts[1]
    rows = list(range(0, 100, 5))
    assert sampled_rows(rows, 7) == sampled_rows(rows, 7) == sorted(set(sampled_rows(rows, 7)) & set(rows))
    assert len(sampled_rows(rows, 7)) == 7
    assert sampled_rows(rows, 20) == sampled_rows(rows, None) == rows


def test_a_dry_run_shows_the_data_and_writes_nothing(tmp_path, capsys):
    run_training(recipe(), dry_run=True)
    output = capsys.readouterr().out
    assert "Stream main" in output
    assert "Plan: 2 steps" in output
    assert not (tmp_path / "runs").exists()


def test_a_recipe_for_a_gpu_is_checked_without_one(capsys):
    for_gpu = {key: value for key, value in TRAINER.items() if key != "use_cpu"} | {"bf16": True}
    run_training(recipe(trainer=for_gpu), dry_run=True)
    assert "dry run: nothing was trained" in capsys.readouterr().out


def test_prepared_files_give_the_numbers_of_their_sources(baseline):
    write_prepared(prepare(recipe()), Path("prepared"))
    files = {"data": [{"path": "prepared/pairs.jsonl"}], "buffer": [], "holdout": 0.0}
    from_files = run_training(recipe(eval=[{"path": "prepared/eval.jsonl"}], **files))
    assert from_files["data"] == baseline["data"]
    assert from_files["train_loss"] == baseline["train_loss"]
    assert from_files["evaluation"] == baseline["evaluation"]


# Start models that are fine-tuned for a preference run (`model.sft`).


def test_a_fine_tuned_start_model_is_cached_by_content(capsys):
    sft_trainer = {name: value for name, value in ONE_STEP.items() if name != "output_dir"}
    section = {"sft": {**SFT, "trainer": sft_trainer}}
    first = run_training(recipe(model=section, trainer=ONE_STEP))
    assert "it will be cached as" in capsys.readouterr().out
    second = run_training(recipe(model=section, trainer=ONE_STEP))
    assert "is in the cache" in capsys.readouterr().out
    assert second["train_loss"] == first["train_loss"]
    section["sft"]["trainer"]["learning_rate"] = 2e-3
    run_training(recipe(model=section, trainer=ONE_STEP))
    assert "it will be cached as" in capsys.readouterr().out


def test_a_start_model_is_not_reused_with_another_content_of_its_template_file(capsys):
    section = {"sft": {**SFT, "trainer": ONE_STEP, "text": {"chat_template": "template.jinja"}}}
    for template in (CHAT_TEMPLATE, f"Chat: {CHAT_TEMPLATE}"):
        Path("template.jinja").write_text(template, encoding="utf-8")
        run_training(recipe(model=section, trainer=ONE_STEP))
        assert "it will be cached as" in capsys.readouterr().out


def test_a_start_model_is_that_of_its_limit_and_of_its_own_start_model(capsys):
    def is_made(**options):
        run_training(recipe(model={"sft": {**SFT, "model": {"path": "first"}, "trainer": ONE_STEP}}), **options)
        return "it will be cached as" in capsys.readouterr().out

    for seed in (1, 2):
        run_sft(check_recipe(SFT | {"trainer": {**ONE_STEP, "output_dir": "first", "seed": seed}}, SftRecipe, "toy"))
        capsys.readouterr()
        assert is_made()
        assert not is_made()
    assert is_made(limit=4)
    assert "4 completions" not in capsys.readouterr().out
    assert not is_made(limit=4)


def test_a_dry_run_shows_the_memory_of_the_model_as_it_will_be_loaded(monkeypatch):
    shown = []
    monkeypatch.setattr(run, "footprint", lambda section, *args, **options: shown.append((section, options["lora"])))
    sft = {**SFT, "trainer": ONE_STEP, "lora": {"r": 2}}
    run_training(recipe(model={"dtype": "bfloat16", "sft": sft}), dry_run=True)
    ((section, lora),) = shown
    assert (section.dtype, lora.r) == ("bfloat16", 2)


def test_fine_tuning_that_evaluates_needs_data_to_evaluate_on():
    trainer = {**ONE_STEP, "eval_strategy": "steps", "eval_steps": 1}
    for dry_run in (True, False):
        with pytest.raises(RecipeError, match=r"trainer\.eval_strategy needs data to evaluate on"):
            run_sft(check_recipe(SFT | {"trainer": trainer, "holdout": 0}, SftRecipe, "toy"), dry_run=dry_run)
    assert not Path(TRAINER["output_dir"]).exists()


def test_two_runs_do_not_make_the_same_start_model_at_once():
    sft_recipe = recipe(model={"sft": {**SFT, "trainer": ONE_STEP}}, trainer=ONE_STEP)
    run_training(sft_recipe)
    (cached,) = Path("runs/cache").glob("sft-*")
    cached.rename("elsewhere")
    with (
        FileLock(cached.with_name(f".{cached.name}.lock")),
        pytest.raises(RecipeError, match="another run is"),
    ):
        run_training(sft_recipe)


def test_a_cached_start_model_that_is_damaged_is_refused(capsys):
    sft_recipe = recipe(model={"sft": {**SFT, "trainer": ONE_STEP}}, trainer=ONE_STEP)
    first = run_training(sft_recipe)
    (cached,) = Path("runs/cache").glob("sft-*")
    weights = (cached / "model.safetensors").read_bytes()
    (cached / "model.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    with pytest.raises(ModelError, match=r"the content of model.safetensors is not .*delete that folder, and the"):
        run_training(sft_recipe)
    (cached / "model.safetensors").write_bytes(weights)
    assert run_training(sft_recipe)["train_loss"] == first["train_loss"]
    # An earlier version wrote no hashes.
    (cached / "complete.json").unlink()
    assert run_training(sft_recipe)["train_loss"] == first["train_loss"]
    assert "was made by an earlier version without hashes" in capsys.readouterr().out


def test_a_fine_tuned_start_model_holds_out_the_same_prompts(capsys):
    run_training(recipe(model={"sft": {**SFT, "trainer": ONE_STEP}}, trainer=ONE_STEP))
    assert "held-out completions" in capsys.readouterr().out


def test_a_fine_tuned_start_model_is_not_trained_on_evaluation_prompts(main_pairs):
    write_jsonl(Path("eval.jsonl"), [main_pairs[0].to_row()])
    files = {"data": [{"path": "buffer.jsonl"}], "buffer": [], "holdout": 0.0, "eval": [{"path": "eval.jsonl"}]}
    run_training(recipe(model={"sft": {**SFT, "trainer": ONE_STEP}}, trainer=ONE_STEP, **files))
    (cached,) = Path("runs/cache").glob("sft-*")
    (source,) = json.loads((cached / "run.json").read_text())["data"]
    assert source["removed"]["prompt of an evaluation set"] == {"unlabeled": 2}


def test_safety_scores_replace_labels_if_requested(main_pairs):
    scores = {"chosen_safety_score": 0.5, "rejected_safety_score": 0.5}
    write_jsonl(Path("main.jsonl"), [pair.to_row() | scores for pair in main_pairs])
    run = run_training(recipe(safety="scores", buffer=[], holdout=0.0))
    # All probabilities are 1/2: every label is the mean of the table, 0, and so is the loss of step 0.
    first = json.loads(Path("runs/toy/metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] == 0
    assert run["steps"] == 2
    with pytest.raises(DataError, match="safety: scores needs chosen_safety_score"):
        run_training(recipe(safety="scores"))


def test_supervised_run_saves_and_evaluates(tmp_path):
    sft = check_recipe({**SFT, "holdout": 0.3}, SftRecipe, "sft")
    run = run_sft(sft)
    assert run["evaluation"]["eval_loss"] > 0
    AutoModelForCausalLM.from_pretrained(tmp_path / "runs/toy")
    assert yaml.safe_load((tmp_path / "runs/toy/recipe.resolved.yaml").read_text())["holdout"] == 0.3


@pytest.mark.parametrize(("run", "kind"), [(run_training, None), (run_sft, {**SFT, "holdout": 0.3})])
def test_weights_are_saved_before_the_held_out_data_are_evaluated(monkeypatch, run, kind):
    def killed(self, *args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(StreamTrainer, "evaluation_loop", killed)
    with pytest.raises(KeyboardInterrupt):
        run(recipe() if kind is None else check_recipe(kind, SftRecipe, "sft"))
    AutoModelForCausalLM.from_pretrained("runs/toy")
    assert not Path("runs/toy/run.json").exists()


def test_an_evaluation_shows_its_progress_and_time(monkeypatch, capsys):
    monkeypatch.setattr(terminal, "SECONDS_BEFORE_FIRST_LINE", 0.0)
    monkeypatch.setattr(terminal, "NOTICEABLE_SECONDS", 0.0)
    run_training(recipe(trainer={**ONE_STEP, "per_device_eval_batch_size": 1}))
    out, err = capsys.readouterr()
    assert re.search(r"^evaluating main: \d of \d, about \d+ min left$", err, re.MULTILINE)
    for line in ("comparing policy and reference", "saving the weights in runs/toy", "evaluating the held-out pairs"):
        # A later line than the one that announces it.
        assert re.search(rf"^{line} \.\.\.$.*^{line} took \d+ s$", out, re.MULTILINE | re.DOTALL), line
    assert out.index("saving the weights") < out.index("evaluating the held-out pairs")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rat": 1}, "trainer.learning_rat is not one of .*did you mean 'learning_rate'"),
        ({"learning_rate": "fast"}, "trainer.learning_rate is 'fast'"),
        ({"max_steps": 1.5}, "trainer.max_steps is 1.5"),
        ({"output_dir": None}, "trainer.output_dir"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size is 0; expected 1 or more"),
        ({"output_dir": "main.jsonl"}, "is 'main.jsonl', which is a file"),
        ({"report_to": "wandb"}, "wandb is not installed; install it"),
        ({"learning_rate": math.nan}, "trainer.learning_rate is nan; expected a finite number"),
        ({"learning_rate": -1e-3}, "trainer.learning_rate is -0.001; expected 0 or more"),
        ({"max_grad_norm": math.inf}, "trainer.max_grad_norm is inf; expected a finite number"),
        ({"max_grad_norm": -1}, r"trainer.max_grad_norm is -1.0; expected 0 \(no clipping\) or more"),
        ({"num_train_epochs": -1}, "trainer.num_train_epochs is -1.0; expected a number above 0"),
        ({"num_train_epochs": 0}, "trainer.num_train_epochs is 0.0; expected a number above 0"),
        ({"max_steps": 0}, "trainer.max_steps is 0; expected 1 or more, or -1"),
        ({"max_steps": -2}, "trainer.max_steps is -2; expected 1 or more, or -1"),
        ({"adam_beta1": 2}, r"trainer.adam_beta1 is 2.0; expected a number in \[0, 1\)"),
        ({"adam_beta2": 1}, r"trainer.adam_beta2 is 1.0; expected a number in \[0, 1\)"),
        ({"adam_beta2": -0.1}, "trainer.adam_beta2 is -0.1"),
        ({"adam_epsilon": 0}, "trainer.adam_epsilon is 0.0; expected a number above 0"),
        ({"weight_decay": -0.1}, "trainer.weight_decay is -0.1; expected 0 or more"),
        ({"warmup_steps": -1}, "trainer.warmup_steps is -1"),
        ({"save_steps": 0}, "trainer.save_steps is 0"),
        ({"eval_steps": -5}, "trainer.eval_steps is -5"),
        ({"save_total_limit": -1}, "trainer.save_total_limit is -1; expected 1 or more"),
        ({"seed": -1}, "trainer.seed is -1; expected an integer from 0"),
        ({"seed": 2**32}, "trainer.seed is 4294967296; expected an integer from 0"),
        ({"dataloader_num_workers": -1}, "trainer.dataloader_num_workers is -1"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps is 0; expected 1 or more"),
        ({"eval_strategy": "sometimes"}, "sometimes is not a valid IntervalStrategy"),
    ],
)
def test_wrong_training_arguments_are_refused(options, message):
    with pytest.raises(RecipeError, match=message):
        training_arguments({"output_dir": "x", **options})


@pytest.mark.parametrize(
    "options",
    [
        {"learning_rate": 0, "max_grad_norm": 0, "weight_decay": 0, "warmup_steps": 0.1},
        {"max_steps": -1, "num_train_epochs": 0.5, "adam_beta1": 0, "save_total_limit": None},
    ],
)
def test_values_at_the_ends_of_their_ranges_are_accepted(options):
    args = training_arguments({"output_dir": "x", **options})
    assert {name: getattr(args, name) for name in options} == options


@pytest.mark.parametrize("name", DECIDED)
def test_arguments_that_bfpo_decides_are_refused(name):
    with pytest.raises(RecipeError, match=f"trainer.{name} can't be set"):
        training_arguments({"output_dir": "x", name: 1})


def test_a_missing_output_folder_is_named():
    with pytest.raises(RecipeError, match=r"trainer\.output_dir is missing"):
        training_arguments({})


LORA = {"r": 2, "target_modules": ["q_proj"]}
UNFIT = [
    ({"train_only": ["down_prj"]}, "train_only: 'down_prj' matches no parameter"),
    ({"train_only": ["("]}, r"train_only: '\(' is not a regular expression"),
    ({"train_only": []}, "train_only: the list is empty"),
    ({"lora": {"target_modules": ["query_key_value"]}}, "lora: Target modules"),
]


@pytest.mark.parametrize("dry_run", [True, False])
@pytest.mark.parametrize(("changes", "message"), UNFIT)
def test_what_does_not_fit_the_model_is_refused_before_anything_is_read_or_trained(
    changes, message, dry_run, monkeypatch
):
    def fail(*_, **__):
        raise AssertionError("data were read or a model was trained")

    sft = {**SFT, "trainer": ONE_STEP}
    for module in ("run.prepare", "run.load_or_train_sft", "run_sft.prepare_demonstrations"):
        monkeypatch.setattr(f"bfpo.training.{module}", fail)
    for content in (recipe(**changes), recipe(model={"sft": sft}, **changes)):
        with pytest.raises(ValueError, match=f"^{message}"):
            run_training(content, dry_run=dry_run)
    with pytest.raises(ValueError, match=rf"^model\.sft: .*{message}"):
        run_training(recipe(model={"sft": {**sft, **changes}}), dry_run=dry_run)
    with pytest.raises(ValueError, match=f"^{message}"):
        run_sft(check_recipe(SFT | changes, SftRecipe, "toy"), dry_run=dry_run)
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("nested", "changes", "message"),
    [
        ({"lora": LORA}, {"lora": LORA}, "the model already has an adapter"),
        ({"lora": LORA}, {"train_only": ["down_proj"]}, "train_only and an adapter exclude each other"),
        ({}, {"reference": "adapter"}, "reference: adapter means the model without its adapter"),
        ({"trainer": {**ONE_STEP, "learning_rate": -1}}, {}, r"^model.sft: trainer.learning_rate is -1.0"),
        ({"trainer": {**ONE_STEP, "lerning_rate": 1}}, {}, r"^model.sft: trainer.lerning_rate is not one of"),
    ],
)
def test_a_start_model_that_would_not_fit_is_refused_before_it_is_trained(nested, changes, message):
    content = recipe(model={"sft": {**SFT, "trainer": ONE_STEP, **nested}}, **changes)
    for dry_run in (True, False):
        with pytest.raises(ValueError, match=message):
            run_training(content, dry_run=dry_run)
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text": {"max_length": 8}}, "would be dropped"),
        ({"loss": {"name": "modpo"}}, "MODPO needs reward_margin"),
    ],
)
def test_a_recipe_that_cannot_be_trained_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        run_training(recipe(**changes))


@pytest.mark.parametrize(
    "options", [{"metric_for_best_model": "loss"}, {"lr_scheduler_type": "reduce_lr_on_plateau"}]
)
def test_the_loss_of_the_best_model_is_that_of_the_first_data(options, tmp_path):
    args = training_arguments({"output_dir": str(tmp_path), "eval_strategy": "steps", "use_cpu": True, **options})
    check_evaluation(args, {"main": None, "buffer": None})
    assert args.metric_for_best_model == "eval_main_loss"


def test_a_metric_of_other_data_is_refused_before_training(tmp_path):
    options = {"output_dir": str(tmp_path), "eval_strategy": "steps", "use_cpu": True}
    args = training_arguments({**options, "metric_for_best_model": "accuracy"})
    with pytest.raises(RecipeError, match=r"metric_for_best_model is 'accuracy'; expected loss, .* eval_main_loss"):
        check_evaluation(args, {"main": None})
    check_evaluation(training_arguments({**options, "metric_for_best_model": "main_loss"}), {"main": None})
