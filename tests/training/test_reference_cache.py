"""The reference's numbers on disk: what they depend on, who shares them, and what happens when they are damaged."""

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
from bfpo.model.reference_cache import ReferenceEntry, model_content
from bfpo.training.reference_values import ReferencePass
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
            model or make_model(),
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
    kept = np.load(entries(tmp_path)[0] / "values.npy")
    assert kept.dtype == np.float64
    assert len(entries(tmp_path)) == 2
    assert not list((tmp_path / "runs").rglob("parts"))


def test_an_entry_is_named_by_what_it_is_made_of_and_by_nothing_else(make_trainer, make_model, main_pairs, tmp_path):
    make_trainer()
    (first,) = entries(tmp_path)
    made = first.stat().st_mtime_ns, (first / "values.npy").stat().st_mtime_ns
    relabeled = [replace(pair, labels=SafetyLabels(True, True)) for pair in main_pairs]
    make_trainer(learning_rate=1.0, out="runs/b", pairs=relabeled, buffer_weight=3.0)
    assert entries(tmp_path) == [first]
    assert (first.stat().st_mtime_ns, (first / "values.npy").stat().st_mtime_ns) == made
    make_trainer(pairs=main_pairs[1:])
    make_trainer(layout=LayoutSection(kind="padded"))
    other = make_model()
    with torch.no_grad():
        next(other.parameters())[3, 5] += 1e-3
    make_trainer(model=other)
    make_trainer(model=make_model().to(torch.bfloat16))
    assert len(entries(tmp_path)) == 5


def test_under_autocast_the_numbers_are_those_of_autocast(make_trainer, tmp_path):
    plain, rounded = make_trainer(), make_trainer(bf16=True)
    assert len(entries(tmp_path)) == 2
    difference = np.abs(plain.table.reference_logps - rounded.table.reference_logps).max()
    # 8 bits of some 30 nats; equal ones would mean that the pass ran in float32
    assert 1e-4 < difference < 1
    rounded.train()
    first = rounded.state.log_history[0]
    assert abs(first["rewards/margins"]) < 1e-3 * abs(first["logps/chosen"])


def test_the_configuration_counts_and_where_it_came_from_does_not(make_model):
    model, moved, changed = make_model(), make_model(), make_model()
    moved.config._name_or_path = "elsewhere"
    moved.config.use_cache = not moved.config.use_cache
    changed.config.rms_norm_eps *= 2
    assert model_content(model) == model_content(moved) != model_content(changed)


def test_an_interrupted_pass_goes_on_where_it_was(make_trainer, monkeypatch, tmp_path):
    make_trainer()
    (entry,) = entries(tmp_path)
    unbroken = np.load(entry / "values.npy")
    for file in (entry / "entry.json", entry / "values.npy"):
        file.unlink()
    scored, plain = [], ReferencePass._finite

    def stops_at_the_third(self, table, rows):
        if len(scored) == 2:
            raise KeyboardInterrupt
        scored.append(rows)
        return plain(self, table, rows)

    monkeypatch.setattr(ReferencePass, "_finite", stops_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        make_trainer()
    (entry / "parts/000001.npy").write_bytes(b"half")

    def counts(self, table, rows):
        scored.append(rows)
        return plain(self, table, rows)

    monkeypatch.setattr(ReferencePass, "_finite", counts)
    make_trainer()
    # the third and what followed, the damaged second, and the recheck
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


def made_elsewhere(entry: Path) -> None:
    note = json.loads((entry / "entry.json").read_text())
    note["cache_key"]["layout"] = "packed 0"
    (entry / "entry.json").write_text(json.dumps(note))


def other_numbers(entry: Path) -> None:
    """Stand for an entry made by libraries that computed something else."""
    values = np.load(entry / "values.npy")
    np.save(entry / "values.npy", values * 1.01)
    note = json.loads((entry / "entry.json").read_text())
    note["sha256"] = reference_cache.file_hash(entry / "values.npy")
    (entry / "entry.json").write_text(json.dumps(note))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, "values.npy is cut or damaged"),
        (flip, "values.npy is cut or damaged"),
        (lambda entry: (entry / "values.npy").unlink(), "values.npy can't be read"),
        (lambda entry: (entry / "entry.json").write_text('{"half'), "entry.json can't be read"),
        (made_elsewhere, "it is stale: entry.json says"),
        (other_numbers, r"it is stale: pair \w+ has -\d+.* nats in it, the model now gives -\d+"),
    ],
)
def test_a_damaged_or_stale_entry_is_refused_by_name(make_trainer, tmp_path, damage, message):
    make_trainer()
    (entry,) = entries(tmp_path)
    damage(entry)
    with pytest.raises(DataError, match=message) as caught:
        make_trainer()
    assert str(entry) in str(caught.value)
    assert "delete that folder, and it is made anew" in str(caught.value)
    assert caught.value.exit_code == 2


def test_processes_that_do_not_see_the_same_folder_are_told(tmp_path):
    entry = ReferenceEntry(tmp_path, {"a": 1}, (600, 2))
    entry.write_part(0, np.zeros((256, 2)))
    with pytest.raises(DataError, match=r"2 of 3 parts .* every process must see the cache's folder"):
        entry.finish()


def test_a_run_that_made_the_same_entry_first_is_no_harm(tmp_path):
    mine, other = (ReferenceEntry(tmp_path, {"a": 1}, (3, 2)) for _ in range(2))
    for entry in (mine, other):
        entry.write_part(0, np.ones((3, 2)))
        entry.finish()
    mine.write_part(0, np.ones((3, 2)))
    mine.finish()
    assert (mine.read() == 1).all()
    assert not (mine.folder / "parts").exists()


def test_a_model_that_gives_no_numbers_is_refused_with_the_rows(make_trainer, make_model, tmp_path):
    model = make_model()
    with torch.no_grad():
        model.get_output_embeddings().weight.fill_(torch.nan)
    with pytest.raises(TrainingError, match="the reference's log-probability is not finite for rows"):
        make_trainer(model=model, reference="cache")
    assert not list((tmp_path / "runs").rglob("values.npy"))


def test_auto_takes_what_fits(make_trainer, make_model, monkeypatch):
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    tied = make_model()
    tied.config.tie_word_embeddings = True
    tied.tie_weights()
    assert make_trainer(peft_config=lora).reference_kind == "adapter"
    assert make_trainer(train_only=["down_proj"]).reference_kind == "shared"
    assert make_trainer(model=tied, train_only=["embed_tokens", "down_proj"]).reference_kind == "cache"
    monkeypatch.setattr(BFPOTrainer, "shards_weights", True)
    assert make_trainer(train_only=["down_proj"]).reference_kind == "cache"


def test_a_cache_under_a_new_adapter_is_the_model_without_it(make_trainer):
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    cached = make_trainer(peft_config=lora, reference="cache")
    assert losses(cached) == pytest.approx(losses(make_trainer(peft_config=lora)), rel=1e-4, abs=1e-3)


@pytest.mark.parametrize(
    ("options", "sharded", "message"),
    [
        ({"reference": "adapter"}, False, "starts without a new one"),
        ({"reference": "shared"}, True, "needs whole weights on every process"),
    ],
)
def test_a_reference_that_would_be_wrong_is_refused(make_trainer, monkeypatch, options, sharded, message):
    monkeypatch.setattr(BFPOTrainer, "shards_weights", sharded)
    with pytest.raises(RecipeError, match=message):
        make_trainer(**options)
