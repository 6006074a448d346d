"""Low-rank adapters: training, resuming, training further, merging, and where they are loaded from."""

import contextlib
import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from pydantic import ValidationError
from transformers import AutoModelForCausalLM, AutoTokenizer

from bfpo.config.loading import check_recipe
from bfpo.config.recipes import LoraSection, ModelSection, SftRecipe, TrainRecipe
from bfpo.core.files import file_hash, write_jsonl
from bfpo.errors import MissingExtra, ModelError, RecipeError
from bfpo.model.load import load_model, load_tokenizer
from bfpo.model.lora import add_adapter, lora_config
from bfpo.model.merge import merge_checkpoint
from bfpo.model.selective import select_parameters
from bfpo.training.checkpoints import MARK
from bfpo.training.run import run_training
from bfpo.training.run_sft import run_sft

RECIPE = {
    "data": [{"path": "pairs.jsonl"}],
    "loss": {"name": "bfpo", "beta": 0.5},
    "trainer": {
        "output_dir": "runs/first",
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
    },
}


SAVING = {**RECIPE["trainer"], "save_strategy": "steps", "save_steps": 1}
SECOND = {**RECIPE["trainer"], "output_dir": "runs/second"}


def recipe(**changes):
    return check_recipe(RECIPE | changes, TrainRecipe, "lora")


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory, make_model, tokenizer, main_pairs):
    folder = tmp_path_factory.mktemp("base")
    write_jsonl(folder / "pairs.jsonl", (pair.to_row() for pair in main_pairs))
    make_model().save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    return folder


@pytest.fixture
def base(base_folder, tmp_path, monkeypatch):
    """Work in a folder with a base model and pairs; returns the base's path."""
    shutil.copytree(base_folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return "base"


@pytest.fixture(scope="module")
def trained_folder(base_folder, tmp_path_factory):
    """A folder in which an adapter was trained; `run.json` is in `runs/first`."""
    folder = tmp_path_factory.mktemp("trained") / "folder"
    shutil.copytree(base_folder, folder)
    with contextlib.chdir(folder):
        run_training(recipe(model={"path": "base"}, lora={"r": 4}, trainer=SAVING))
    return folder


@pytest.fixture
def trained(trained_folder, tmp_path, monkeypatch):
    """Work in a copy of the folder with the trained adapter; returns the base's path."""
    shutil.copytree(trained_folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return "base"


def test_lora_trains_only_the_adapter_and_saves_it(trained):
    run = json.loads(Path("runs/first/run.json").read_text())
    assert run["start_check"]["largest_margin"] == 0
    assert run["trained"]["parameters"] < 0.1 * run["trained"]["of"]
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(trained), "runs/first")
    largest = [weight.abs().max().item() for name, weight in adapted.named_parameters() if "lora_B" in name]
    assert min(largest) > 0
    names = [file.name for file in Path("runs/first").iterdir()]
    assert not any(name.endswith("model.safetensors") and "adapter" not in name for name in names)


@pytest.mark.usefixtures("trained")
def test_training_an_adapter_further_keeps_the_adapted_model_as_reference():
    run = run_training(recipe(model={"path": "runs/first"}, trainer=SECOND))
    # With the base as reference the margins would be those that the first run learned.
    assert run["start_check"]["largest_margin"] == 0
    assert run["trained"]["parameters"] > 0


def test_a_resumed_adapter_has_the_bits_of_the_unbroken_one(trained):
    unbroken = file_hash(Path("runs/first/adapter_model.safetensors"))
    (Path("runs/first/checkpoint-3") / MARK).unlink()
    resuming = SAVING | {"resume_from_checkpoint": True}
    run_training(recipe(model={"path": trained}, lora={"r": 4}, trainer=resuming))
    assert file_hash(Path("runs/first/adapter_model.safetensors")) == unbroken


@pytest.mark.usefixtures("trained")
def test_a_second_adapter_is_refused():
    for dry_run in (True, False):
        with pytest.raises(ModelError, match="already has an adapter"):
            run_training(recipe(model={"path": "runs/first"}, lora={"r": 4}, trainer=SECOND), dry_run=dry_run)


def test_patterns_and_an_adapter_exclude_each_other(base, make_model):
    with pytest.raises(RecipeError, match="train_only and lora can't be combined"):
        recipe(model={"path": base}, lora={}, train_only=["down"])
    adapted = add_adapter(make_model(), lora_config(LoraSection(r=2)), seed=0)
    with pytest.raises(RecipeError, match="train_only and an adapter exclude each other"):
        select_parameters(adapted, ["down_proj"])


def test_missing_target_modules_are_refused(make_model):
    with pytest.raises(ModelError, match="lora: Target modules"):
        add_adapter(make_model(), lora_config(LoraSection(target_modules=["query_key_value"])), seed=0)


def test_quantized_weights_need_an_adapter_and_a_gpu(base):
    with pytest.raises(RecipeError, match="load_in_4bit needs lora, or a path to an adapter"):
        run_training(recipe(model={"path": base, "load_in_4bit": True}), dry_run=True)
    with pytest.raises((ImportError, RecipeError), match=r"bitsandbytes|needs a GPU"):
        load_model(ModelSection(path=base, load_in_4bit=True))


def test_a_missing_bitsandbytes_is_reported_in_one_line(base, monkeypatch):
    monkeypatch.setattr("bfpo.model.lora.find_spec", lambda name: None)
    with pytest.raises(MissingExtra) as caught:
        run_training(recipe(model={"path": base, "load_in_4bit": True}, lora={"r": 4}))
    assert "pip install 'bfpo[qlora]'" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not Path("runs/first").exists()


def test_rank_must_be_positive():
    with pytest.raises(ValidationError):
        LoraSection(r=0)


def test_a_new_adapter_does_not_change_the_logits(make_model):
    model, ids = make_model(), torch.tensor([[4, 5, 6]])
    before = copy.deepcopy(model)(input_ids=ids).logits
    torch.testing.assert_close(
        add_adapter(model, lora_config(LoraSection()), seed=0)(input_ids=ids).logits, before, rtol=0, atol=0
    )


def test_from_fine_tuning_to_a_merged_model(base, tokenizer):
    sft = {"model": {"path": base}, "data": [{"path": "pairs.jsonl"}], "lora": {"r": 4}}
    sft["trainer"] = {**RECIPE["trainer"], "output_dir": "runs/sft"}
    run_sft(check_recipe(sft, SftRecipe, "sft"))
    run = run_training(recipe(model={"path": "runs/sft"}))
    # The reference is the fine-tuned model: with the base as reference, the margins would be those it learned.
    assert run["start_check"]["largest_margin"] == 0
    merge_checkpoint(Path("runs/first"), Path("merged"))
    ids = torch.tensor([[4, 5, 6, 7]])
    merged = AutoModelForCausalLM.from_pretrained("merged")(input_ids=ids).logits
    for folder, same in (("runs/first", True), ("runs/sft", False)):
        plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
        assert torch.allclose(plain(input_ids=ids).logits, merged, rtol=1e-4, atol=1e-4) == same
    # transformers loads the adapter's folder too.
    native = AutoModelForCausalLM.from_pretrained("runs/first")(input_ids=ids).logits
    torch.testing.assert_close(native, merged, rtol=1e-4, atol=1e-4)
    assert AutoTokenizer.from_pretrained("runs/first").chat_template == tokenizer.chat_template
    # vLLM supports none of these, and requires the names of the layers.
    config = json.loads(Path("runs/first/adapter_config.json").read_text())
    assert (config["modules_to_save"], config["bias"], config["use_dora"]) == (None, "none", False)
    assert isinstance(config["target_modules"], list)


def copy_to_hub_cache(folder, repository, revision, cache):
    """Copy a folder to where the hub's client would download it."""
    target = cache / f"models--{repository.replace('/', '--')}"
    (target / "refs").mkdir(parents=True)
    (target / "refs" / revision).write_text("0" * 40)
    shutil.copytree(folder, target / "snapshots" / ("0" * 40))


def test_an_adapter_on_the_hub_has_its_own_revision(base, tmp_path, monkeypatch, make_model):
    add_adapter(make_model(), lora_config(LoraSection(r=2), revision="v1"), seed=0).save_pretrained("adapter")
    config = json.loads(Path("adapter/adapter_config.json").read_text())
    Path("adapter/adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "org/base"}))
    copy_to_hub_cache(base, "org/base", "v1", tmp_path / "hub")
    copy_to_hub_cache("adapter", "org/adapter", "v2", tmp_path / "hub")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    section = ModelSection(path="org/adapter", revision="v2")
    assert isinstance(load_model(section), PeftModel)
    # The adapter has no tokenizer of its own.
    assert load_tokenizer(section).chat_template
    with pytest.raises(ModelError):
        load_model(ModelSection(path="org/adapter", revision="v1"))


def test_an_adapter_names_the_revision_of_its_base(base):
    run_training(recipe(model={"path": base, "revision": "v3"}, lora={"r": 2}))
    assert json.loads(Path("runs/first/adapter_config.json").read_text())["revision"] == "v3"


def test_an_adapter_without_a_tokenizer_uses_that_of_its_base(base, tokenizer):
    adapted = add_adapter(AutoModelForCausalLM.from_pretrained(base), lora_config(LoraSection(r=2)), seed=0)
    adapted.save_pretrained("bare")
    assert load_tokenizer(ModelSection(path="bare")).get_vocab() == tokenizer.get_vocab()


def test_if_the_model_cannot_be_loaded_an_earlier_run_is_not_moved(base):
    run_training(recipe(model={"path": base}))
    before = file_hash(Path("runs/first/model.safetensors"))
    (Path(base) / "model.safetensors").unlink()
    with pytest.raises(ModelError):
        run_training(recipe(model={"path": base}))
    assert file_hash(Path("runs/first/model.safetensors")) == before
