"""Cached log-probabilities of the reference: what entries depend on, and damaged and stale entries."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig
from transformers import TrainingArguments

import bfpo.model.reference_cache as reference_cache
from bfpo.config.recipes import LayoutSection
from bfpo.core.pairs import SafetyLabels
from bfpo.errors import DataError, RecipeError, TrainingError
from bfpo.losses.pairwise import BFPO
from bfpo.model.reference_cache import ReferenceEntry, hash_model
from bfpo.training.reference_pass import ReferencePass
from bfpo.training.trainer import BFPOTrainer


@pytest.fixture
def make_trainer(make_model, tokenizer, tmp_path, main_pairs, buffer_pairs, monkeypatch):
    monkeypatch.setattr(reference_cache, "PART", 5)

    def make(model=None, pairs=None, learning_rate=1e-3, out="runs/a", bf16=False, **options):
        args = TrainingArguments(
            str(tmp_path / out), max_steps=3, per_device_train_batch_size=4, learning_rate=learning_rate, bf16=bf16,
            logging_steps=1, save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        return BFPOTrainer(
            model or make_model(shape="nano"),
            args,
            pairs or main_pairs,
            buffer_dataset=buffer_pairs,
            processing_class=tokenizer,
            loss=BFPO(beta=0.5),
            **options,
        )

    return make


def entries(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "runs/cache/reference").iterdir())


def losses(trainer: BFPOTrainer) -> list[float]:
    trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def test_training_everything_from_the_cache_gives_the_numbers_of_a_copy(make_trainer, main_pairs, tmp_path):
    cached = make_trainer(eval_dataset=main_pairs[:5])
    copied = make_trainer(reference="shared", eval_dataset=main_pairs[:5])
    assert (cached.reference_kind, copied.reference_kind) == ("cache", "shared")
    assert cached.reference is None
    # float32 sums in packs of other sizes: about 1e-6 of a log-probability of some 100 nats, squared by the loss
    assert losses(cached) == pytest.approx(losses(copied), rel=1e-4, abs=1e-3)
    assert cached.evaluate()["eval_loss"] == pytest.approx(copied.evaluate()["eval_loss"], rel=1e-4, abs=1e-3)
    assert cached.start_check.largest_margin < 1e-3
    values = np.load(entries(tmp_path)[0] / "values.npy")
    assert values.dtype == np.float64
    assert len(entries(tmp_path)) == 2
    assert not list((tmp_path / "runs").rglob("parts"))


def test_an_entry_depends_on_model_tokens_and_layout_only(make_trainer, make_model, main_pairs, tmp_path):
    make_trainer()
    (first,) = entries(tmp_path)
    times = first.stat().st_mtime_ns, (first / "values.npy").stat().st_mtime_ns
    relabeled = [replace(pair, labels=SafetyLabels(True, True)) for pair in main_pairs]
    make_trainer(learning_rate=1.0, out="runs/b", pairs=relabeled, buffer_weight=3.0)
    assert entries(tmp_path) == [first]
    assert (first.stat().st_mtime_ns, (first / "values.npy").stat().st_mtime_ns) == times
    make_trainer(pairs=main_pairs[1:])
    make_trainer(layout=LayoutSection(kind="padded"))
    other = make_model(shape="nano")
    with torch.no_grad():
        next(other.parameters())[3, 5] += 1e-3
    make_trainer(model=other)
    make_trainer(model=make_model(shape="nano").to(torch.bfloat16))
    assert len(entries(tmp_path)) == 5


def test_the_reference_is_scored_under_autocast_too(make_trainer, tmp_path):
    plain, rounded = make_trainer(), make_trainer(bf16=True)
    assert len(entries(tmp_path)) == 2
    difference = np.abs(plain.table.reference_logps - rounded.table.reference_logps).max()
    # The precision of 8 bits at some 30 nats; equal numbers would mean that the pass ran in float32.
    assert 1e-4 < difference < 1
    rounded.train()
    first = rounded.state.log_history[0]
    assert abs(first["rewards/margins"]) < 1e-3 * abs(first["logps/chosen"])


def test_the_hash_depends_on_the_configuration_but_not_on_its_provenance(make_model):
    model, moved, changed = make_model(), make_model(), make_model()
    moved.config._name_or_path = "elsewhere"
    moved.config.use_cache = not moved.config.use_cache
    changed.config.rms_norm_eps *= 2
    assert hash_model(model) == hash_model(moved) != hash_model(changed)


def test_an_interrupted_pass_resumes(make_trainer, monkeypatch, tmp_path):
    make_trainer()
    (entry,) = entries(tmp_path)
    unbroken = np.load(entry / "values.npy")
    for file in (entry / "entry.json", entry / "values.npy"):
        file.unlink()
    scored, score_rows = [], ReferencePass._score_rows

    def interrupt_at_the_third(self, table, rows):
        if len(scored) == 2:
            raise KeyboardInterrupt
        scored.append(rows)
        return score_rows(self, table, rows)

    monkeypatch.setattr(ReferencePass, "_score_rows", interrupt_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        make_trainer()
    (entry / "parts/000001.npy").write_bytes(b"half")

    def record(self, table, rows):
        scored.append(rows)
        return score_rows(self, table, rows)

    monkeypatch.setattr(ReferencePass, "_score_rows", record)
    make_trainer()
    # First pass: two parts. Second pass: the damaged second part, the third and later parts, and the check.
    assert [rows[0] for rows in scored] == [0, 5, 5, 10, 15, 20, 0]
    np.testing.assert_array_equal(np.load(entry / "values.npy"), unbroken)
    assert sorted(file.name for file in entry.iterdir()) == ["entry.json", "values.npy"]


def cut(entry: Path) -> None:
    content = (entry / "values.npy").read_bytes()
    (entry / "values.npy").write_bytes(content[:-9])


def flip(entry: Path) -> None:
    content = bytearray((entry / "values.npy").read_bytes())
    content[-3] ^= 1
    (entry / "values.npy").write_bytes(content)


def change_key(entry: Path) -> None:
    metadata = json.loads((entry / "entry.json").read_text())
    metadata["cache_key"]["layout"] = "packed 0"
    (entry / "entry.json").write_text(json.dumps(metadata))


def change_values(entry: Path) -> None:
    """Change the values as other library versions might compute them."""
    values = np.load(entry / "values.npy")
    np.save(entry / "values.npy", values * 1.01)
    metadata = json.loads((entry / "entry.json").read_text())
    metadata["sha256"] = reference_cache.file_hash(entry / "values.npy")
    (entry / "entry.json").write_text(json.dumps(metadata))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, "values.npy is cut or damaged"),
        (flip, "values.npy is cut or damaged"),
        (lambda entry: (entry / "values.npy").unlink(), "values.npy can't be read"),
        (lambda entry: (entry / "entry.json").write_text('{"half'), "entry.json can't be read"),
        (change_key, "it is stale: the cache key in entry.json doesn't match"),
        (change_values, r"it is stale: pair \w+ has -\d+.* nats in it, the model now gives -\d+"),
    ],
)
def test_a_damaged_or_stale_entry_is_refused_by_name(make_trainer, tmp_path, damage, message):
    make_trainer()
    (entry,) = entries(tmp_path)
    damage(entry)
    with pytest.raises(DataError, match=message) as caught:
        make_trainer()
    assert str(entry) in str(caught.value)
    assert "delete that folder, and it is computed again" in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_cache_folder_that_not_all_processes_see_is_refused(tmp_path):
    entry = ReferenceEntry(tmp_path, {"a": 1}, (600, 2))
    entry.write_part(0, np.zeros((256, 2)))
    with pytest.raises(DataError, match=r"2 of 3 parts .* every process must see the cache's folder"):
        entry.finish()


def test_two_runs_can_make_the_same_entry(tmp_path):
    entry, other = (ReferenceEntry(tmp_path, {"a": 1}, (3, 2)) for _ in range(2))
    for writer in (entry, other, entry):
        writer.write_part(0, np.ones((3, 2)))
        writer.finish()
    assert (entry.read() == 1).all()
    assert not (entry.folder / "parts").exists()


def test_a_reference_that_is_not_finite_is_refused_with_the_rows(make_trainer, make_model, tmp_path):
    model = make_model()
    with torch.no_grad():
        model.get_output_embeddings().weight.fill_(torch.nan)
    with pytest.raises(TrainingError, match="the reference's log-probability is not finite for rows"):
        make_trainer(model=model, reference="cache")
    assert not list((tmp_path / "runs").rglob("values.npy"))


def test_auto_depends_on_what_is_trained(make_trainer, make_model, monkeypatch):
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    tied = make_model(shape="nano")
    tied.config.tie_word_embeddings = True
    tied.tie_weights()
    assert make_trainer(peft_config=lora).reference_kind == "adapter"
    assert make_trainer(train_only=["down_proj"]).reference_kind == "shared"
    assert make_trainer(model=tied, train_only=["embed_tokens", "down_proj"]).reference_kind == "cache"
    monkeypatch.setattr(BFPOTrainer, "shards_weights", True)
    assert make_trainer(train_only=["down_proj"]).reference_kind == "cache"


def test_a_cached_reference_of_a_new_adapter_is_the_model_without_it(make_trainer):
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    cached = make_trainer(peft_config=lora, reference="cache")
    assert losses(cached) == pytest.approx(losses(make_trainer(peft_config=lora)), rel=1e-4, abs=1e-3)


@pytest.mark.parametrize(
    ("options", "sharded", "message"),
    [
        ({"reference": "adapter"}, False, "this run doesn't start with a new one"),
        ({"reference": "shared"}, True, "needs whole weights on every process"),
    ],
)
def test_a_reference_with_wrong_numbers_is_refused(make_trainer, monkeypatch, options, sharded, message):
    monkeypatch.setattr(BFPOTrainer, "shards_weights", sharded)
    with pytest.raises(RecipeError, match=message):
        make_trainer(**options)
