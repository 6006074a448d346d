"""Cat-DPO's margins: the update of the README, whatever a step is split into, and after a resume."""

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from transformers import TrainingArguments

from bfpo.config.loading import check_recipe, dump_yaml, parse_yaml
from bfpo.config.recipes import TrainRecipe
from bfpo.core.files import write_jsonl
from bfpo.data.table import harm_categories, pair_table
from bfpo.errors import DataError
from bfpo.losses.baselines import CatDPO
from bfpo.losses.inputs import PairLogps
from bfpo.training.category_margins import CategoryMargins
from bfpo.training.run import run_training
from bfpo.training.trainer import BFPOTrainer

from .test_processes import launched

CATEGORIES = [("noise",), ("damage", "noise"), (), ("damage",)]


@pytest.fixture
def categorized(main_pairs):
    return [replace(pair, harm_categories=CATEGORIES[number % 4]) for number, pair in enumerate(main_pairs)]


def run(folder: Path, **trainer) -> list[dict]:
    recipe = {
        "model": {"new": {"shape": "nano", "vocab_size": 300}},
        "data": [{"path": "pairs.jsonl"}],
        "loss": {"name": "cat_dpo", "beta": 0.5, "rate": 0.4},
        "labels": {"from": "safety"},
        "holdout": 0.0,
        "trainer": {
            "output_dir": str(folder), "max_steps": 6, "per_device_train_batch_size": 4, "logging_steps": 1,
            "learning_rate": 1e-3, "save_strategy": "no", "use_cpu": True, **trainer,
        },
    }  # fmt: skip
    run_training(check_recipe(recipe, TrainRecipe, "toy"))
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def margins_of(logs, name):
    return {line["step"]: line[f"cat_dpo/margin/{name}"] for line in logs if f"cat_dpo/margin/{name}" in line}


def test_the_update_is_that_of_the_readme_for_the_pairs_of_a_step():
    loss, beta = CatDPO(beta=0.5, rate=0.2, tolerance=0.3), 0.5
    margins = CategoryMargins(loss, ["damage", "noise"], Accelerator(cpu=True))
    expected = np.zeros(2)
    rng = np.random.default_rng(0)
    for _ in range(20):
        h, categories = rng.normal(3, 4, 6), rng.integers(0, 2, (6, 2)).astype(float)
        categories[:, 1] *= rng.integers(0, 2)
        violations = 1 - 1 / (1 + np.exp(-beta * h))
        # A step is two batches.
        for part in (slice(0, 2), slice(2, 6)):
            zero = torch.zeros(len(h[part]), dtype=torch.float64)
            margins.add(PairLogps(torch.tensor(h[part]), *[zero] * 5), torch.tensor(categories[part]))
        for k in range(2):
            if categories[:, k].any():
                mean = (violations * categories[:, k]).sum() / categories[:, k].sum()
                expected[k] = max(0, expected[k] + 0.2 * (mean - 0.3))
        margins.on_step_end(None, None, None)
        np.testing.assert_allclose(margins.margins.numpy(), expected, atol=1e-12)
    assert (expected > 0).any()
    of_pairs = margins.of(torch.tensor([[0.0, 0], [1, 0], [0, 1], [1, 1]]))
    np.testing.assert_allclose(of_pairs.numpy(), [0, *expected, expected.mean()], atol=1e-12)


def test_margins_do_not_depend_on_the_split_of_a_step_and_survive_a_resume(tmp_path, monkeypatch, categorized):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "pairs.jsonl", (pair.to_row() for pair in categorized))
    whole = run(tmp_path / "whole")
    split = run(tmp_path / "split", per_device_train_batch_size=1, gradient_accumulation_steps=4)
    for name in ("damage", "noise"):
        assert margins_of(whole, name)[1] == 0
        assert margins_of(whole, name)[6] > 0.1
        assert margins_of(split, name) == pytest.approx(margins_of(whole, name), abs=1e-6)
        assert 0 < whole[0][f"cat_dpo/violation/{name}"] < 1
    saving = {"save_strategy": "steps", "save_steps": 3, "resume_from_checkpoint": True}

    class Killed(Exception):
        pass

    step_end = CategoryMargins.on_step_end

    def stop_after_four(self, args, state, control, **kwargs):
        step_end(self, args, state, control, **kwargs)
        if state.global_step == 4:
            raise Killed

    monkeypatch.setattr(CategoryMargins, "on_step_end", stop_after_four)
    with pytest.raises(Killed):
        run(tmp_path / "resumed", **saving)
    monkeypatch.setattr(CategoryMargins, "on_step_end", step_end)
    assert (tmp_path / "resumed" / "checkpoint-3").is_dir()
    resumed = run(tmp_path / "resumed", **saving)
    assert margins_of(resumed, "noise") == pytest.approx(margins_of(whole, "noise"), abs=1e-9)


def test_margins_move_by_all_pairs_of_a_step_whatever_share_is_trained_on(
    tmp_path, categorized, make_model, tokenizer
):
    args = TrainingArguments(str(tmp_path / "run"), max_steps=2, use_cpu=True, report_to="none", logging_steps=1,
                             per_device_train_batch_size=len(categorized), learning_rate=1e-3)  # fmt: skip
    logs = []
    for tail in (1.0, 0.25):
        trainer = BFPOTrainer(make_model(), args, categorized, processing_class=tokenizer, reference="shared",
                              loss=CatDPO(beta=0.5, tail=tail))  # fmt: skip
        trainer.train()
        # In the first step all pairs have one loss, so both models are the same in the second.
        logs.append(trainer.state.log_history[1])
    assert logs[1]["loss"] > 1.1 * logs[0]["loss"]
    for name in ("damage", "noise"):
        assert logs[1][f"cat_dpo/violation/{name}"] == pytest.approx(logs[0][f"cat_dpo/violation/{name}"], rel=1e-6)


@pytest.mark.slow
def test_two_processes_have_the_margins_of_one(tmp_path, monkeypatch, categorized):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    write_jsonl(tmp_path / "pairs.jsonl", (pair.to_row() for pair in categorized))
    # Plain SGD: the order of float32 sums differs, and nothing amplifies the difference.
    options = {"optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0, "learning_rate": 1e-2}
    whole = run(tmp_path / "whole", **options)
    recipe = parse_yaml((tmp_path / "whole" / "recipe.resolved.yaml").read_text(), "resolved")
    recipe["trainer"] |= {"output_dir": str(tmp_path / "two"), "per_device_train_batch_size": 2}
    (tmp_path / "two.yaml").write_text(dump_yaml(recipe))
    done = subprocess.run(launched(2, "-m", "bfpo", "train", "two.yaml"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    logs = [json.loads(line) for line in (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()]
    for name in ("damage", "noise"):
        assert margins_of(whole, name)[6] > 0.1
        assert margins_of(logs, name) == pytest.approx(margins_of(whole, name), abs=1e-5)


def test_trainer_in_python_shares_the_categories_of_the_training_pairs(tmp_path, categorized, make_model, tokenizer):
    args = TrainingArguments(str(tmp_path / "run"), max_steps=2, use_cpu=True, report_to="none", logging_steps=1,
                             per_device_train_batch_size=4)  # fmt: skip
    held_out = [replace(categorized[0], harm_categories=("unheard", "noise"))]
    trainer = BFPOTrainer(make_model(), args, categorized, eval_dataset=held_out, processing_class=tokenizer,
                          loss=CatDPO())  # fmt: skip
    trainer.train()
    assert trainer.eval_tables[""].category_names == trainer.table.category_names == ("damage", "noise")
    assert trainer.eval_tables[""].signals["categories"].tolist() == [[0, 1]]
    assert np.isfinite(trainer.evaluate()["eval_loss"])


def test_pairs_without_categories_are_refused(tmp_path, monkeypatch, main_pairs, categorized):
    assert harm_categories(categorized) == ("damage", "noise")
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "pairs.jsonl", (pair.to_row() for pair in main_pairs))
    with pytest.raises(DataError, match="CatDPO needs pairs with `harm_categories`, and no pair has any; add the"):
        run(tmp_path / "run")


def test_other_data_can_not_be_resumed(categorized):
    examples = [None] * 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bfpo.data.table._concatenate", lambda examples: (np.zeros(1, np.int32), np.zeros((2, 4), int)))
        tables = [pair_table(examples, categorized[:2], categories=names) for names in (("noise",), ("damage",))]
    hashes = {table.hash_signals(CatDPO().needs) for table in tables}
    assert len(hashes) == 2
