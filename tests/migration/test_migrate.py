"""Conversion of public files of four training stacks to recipes."""

from dataclasses import MISSING, fields
from pathlib import Path

import pytest
import yaml
from transformers import TrainingArguments

from bfpo.commands.migrate import migrate
from bfpo.config.loading import load_recipe
from bfpo.config.losses import BFPOSection, DPOSection, IPOAvgSection
from bfpo.config.recipes import SftRecipe, TrainRecipe
from bfpo.errors import RecipeError
from bfpo.losses.build import make_loss
from bfpo.migration.convert import convert
from bfpo.migration.rules import DEFAULTS
from bfpo.migration.stacks import detect_kind, detect_stack
from bfpo.training.arguments import training_arguments

from .public_files import (
    BALANCE,
    FACTORY_DPO,
    FACTORY_QLORA,
    FILES,
    HANDBOOK_APO,
    HANDBOOK_QLORA,
    HANDBOOK_SFT,
    MIX_SFT,
    OFFICIAL_BFPO,
    OFFICIAL_SFT,
    TRL_DPO,
    TRL_SFT,
)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write_yaml(content, name="old.yaml"):
    Path(name).write_text(yaml.safe_dump(content))
    return Path(name)


def migrate_content(content, *overrides, kind="train"):
    """Return the checked recipe that a file is converted to."""
    Path("recipe.yaml").unlink(missing_ok=True)
    migrate(write_yaml(content), list(overrides), Path("recipe.yaml"), kind=kind)
    return load_recipe("recipe.yaml", TrainRecipe if kind == "train" else SftRecipe)


def outcomes_by_key(content, kind="train"):
    """Return the outcome of every key but `other_data_config`, which is read before the conversion."""
    content = {key: value for key, value in content.items() if key != "other_data_config"}
    draft = convert(content, detect_stack(content, "here"), kind, name="old")
    keys = [outcome.key for outcome in draft.outcomes if outcome.key and "." not in outcome.key]
    assert len(keys) == len(set(keys)), "a key has two outcomes"
    return {outcome.key: outcome.outcome for outcome in draft.outcomes if outcome.key}


@pytest.mark.parametrize("name", FILES)
def test_the_recipe_can_be_built_and_every_key_has_an_outcome(name):
    content, kind = FILES[name]
    recipe = migrate_content(content, kind=kind)
    assert content.keys() - outcomes_by_key(content, kind).keys() <= {"other_data_config"}
    trainer = {key: value for key, value in recipe.trainer.items() if key not in ("report_to", "optim")}
    training_arguments(trainer | {"use_cpu": True})
    if kind == "train":
        make_loss(recipe.loss.model_dump())
    if "learning_rate" in content:
        assert recipe.trainer["learning_rate"] == content["learning_rate"]


@pytest.mark.parametrize(
    ("name", "unsupported"),
    [
        ("official BFPO", {"max_prompt_length"}),
        ("official SFT", set()),
        ("handbook QLoRA", {"lora_dropout", "max_prompt_length"}),
        ("handbook SFT", {"dataset_mixture.test_split_size"}),
        ("handbook APO", {"loss_type"}),
        ("TRL DPO", set()),
        ("factory DPO", {"dataset"}),
        ("factory full", {"dataset", "deepspeed"}),
        ("factory QLoRA", {"dataset"}),
    ],
)
def test_exactly_these_keys_are_unsupported(name, unsupported, capsys):
    content, kind = FILES[name]
    migrate_content(content, kind=kind)
    outcomes = outcomes_by_key(content, kind)
    assert {key for key, outcome in outcomes.items() if outcome == "unsupported"} == unsupported
    printed, recipe = capsys.readouterr().out, Path("recipe.yaml").read_text()
    for key in unsupported:
        assert key.split(".")[-1][:12] in printed
        assert f"# Not carried over: {key}:" in recipe


def test_the_official_launch_is_the_paper_recipe():
    """The second command of bfpo.sh @d165663, without its dashes."""
    write_yaml(BALANCE, "balance.yaml")
    recipe = migrate_content(
        OFFICIAL_BFPO,
        "per_device_train_batch_size=2",
        "gradient_accumulation_steps=4",
        "model_name_or_path=./models/sft-selective",
        "other_data_config=balance.yaml",
        "use_selective=True",
    )
    paper = load_recipe(Path(__file__).parents[2] / "recipes" / "paper" / "bfpo-mistral-7b.yaml", TrainRecipe)
    assert recipe.model.path == "./models/sft-selective"
    assert (recipe.loss, recipe.train_only, recipe.data, recipe.eval) == (
        paper.loss,
        paper.train_only,
        paper.data,
        paper.eval,
    )
    assert recipe.buffer == paper.buffer
    assert recipe.text.max_length == paper.text.max_length
    keys = set(paper.trainer) - {"output_dir"}
    assert {key: recipe.trainer[key] for key in keys} == {key: paper.trainer[key] for key in keys}


def test_the_official_fine_tuning_is_the_paper_recipe():
    """The first command of bfpo.sh @d165663, without its dashes."""
    write_yaml(MIX_SFT, "mix.yaml")
    recipe = migrate_content(
        OFFICIAL_SFT, "gradient_accumulation_steps=2", "learning_rate=5e-7", "other_data_config=mix.yaml", kind="sft"
    )
    paper = load_recipe(Path(__file__).parents[2] / "recipes" / "paper" / "sft-mistral-7b.yaml", SftRecipe)
    assert (recipe.data, recipe.train_only, recipe.holdout) == (paper.data, paper.train_only, paper.holdout)
    assert recipe.model.dtype == "float32"
    keys = set(paper.trainer) - {"output_dir", "optim"}
    assert {key: recipe.trainer[key] for key in keys} == {key: paper.trainer[key] for key in keys}


def test_all_layers_are_trained_without_use_selective():
    recipe = migrate_content(OFFICIAL_BFPO)
    assert recipe.train_only is None
    assert recipe.buffer == []
    assert recipe.loss == BFPOSection(beta=0.01, b1=3.0, alpha=0.5)


def test_lora_of_trl_and_of_llama_factory():
    handbook = migrate_content(HANDBOOK_QLORA)
    assert (handbook.lora.r, handbook.lora.alpha, len(handbook.lora.target_modules)) == (16, 16, 7)
    assert (handbook.model.load_in_4bit, handbook.model.dtype) == (True, "float16")
    factory = migrate_content(FACTORY_DPO)
    # hparams/finetuning_args.py: alpha is twice the rank unless it is given.
    assert (factory.lora.r, factory.lora.alpha, factory.lora.target_modules) == (8, 16, "all-linear")
    assert migrate_content(HANDBOOK_QLORA, "use_peft=false", "load_in_4bit=false").lora is None
    assert migrate_content(FACTORY_QLORA, kind="sft").model.load_in_4bit is True
    further = migrate_content(FACTORY_DPO, "adapter_name_or_path=saves/sft")
    assert (further.model.path, further.lora) == ("saves/sft", None)


def test_losses_keep_their_meaning():
    assert migrate_content(FACTORY_DPO).loss == DPOSection(beta=0.1)
    assert migrate_content(TRL_DPO | {"loss_type": ["ipo"], "beta": 0.2}).loss == IPOAvgSection(beta=0.2)
    smoothed = migrate_content(TRL_DPO | {"label_smoothing": 0.1})
    assert smoothed.loss == DPOSection(beta=0.1, label_smoothing=0.1)


def test_a_precomputed_reference_becomes_the_cache():
    assert migrate_content(TRL_DPO | {"precompute_ref_log_probs": True}).reference == "cache"
    assert migrate_content(TRL_DPO | {"precompute_ref_log_probs": False}).reference == "auto"


def test_unlabeled_sources_are_assumed_safe_if_the_loss_reads_no_labels():
    assert migrate_content(TRL_DPO).data[0].model_dump(exclude_defaults=True) == {
        "path": "anthropic/hh-rlhf",
        "adapter": "hh_rlhf",
        "split": "train",
        "assume_safe": True,
    }


def test_mixtures_of_trl_and_the_handbook():
    trl = {"model_name_or_path": "a/b", "beta": 0.1, "datasets": [{"path": "json", "data_files": "pairs.json"}]}
    assert migrate_content(trl).data[0].path == "pairs.json"
    apo = migrate_content(HANDBOOK_APO)
    assert [(source.name, source.fraction, source.seed) for source in apo.data] == [
        ("Preference", 0.5, 0),
        ("Preference", 0.25, 0),
    ]


def test_files_and_keys_of_trl_s_datasets_are_kept_or_named(capsys):
    entries = [
        {"path": "json", "data_files": ["a.jsonl", "b.jsonl"]},
        {"path": "json", "data_files": {"train": "c.jsonl", "test": "d.jsonl"}, "data_dir": "foo"},
        {"path": "org/set", "data_files": "e.jsonl", "columns": ["x"], "split": "train"},
    ]
    trl = {"model_name_or_path": "a/b", "beta": 0.1, "datasets": entries}
    sources = [(source.path, source.split) for source in migrate_content(trl).data]
    assert sources == [("a.jsonl", None), ("b.jsonl", None), ("foo/c.jsonl", None), ("org/set", "train")]
    shown = capsys.readouterr().out.partition("Unsupported")[2]
    assert "datasets.data_files: e.jsonl" in shown
    assert "datasets.columns: ['x']" in shown


@pytest.mark.filterwarnings("ignore")  # of importing trl
@pytest.mark.parametrize(("config", "kind"), [("DPOConfig", "train"), ("SFTConfig", "sft")])
def test_defaults_of_trl_are_written(config, kind):
    trl = pytest.importorskip("trl")
    ours = {field.name: field.default for field in fields(TrainingArguments)}
    theirs = {field.name: field.default for field in fields(getattr(trl, config)) if field.name in ours}
    other = {key: value for key, value in theirs.items() if value is not MISSING and value != ours[key]}
    # None turns it on.
    other["bf16"] = True
    written = {key: value for key, (_, value) in DEFAULTS["TRL"][kind].items()}
    assert written == other
    content = {"model_name_or_path": "a/b", "dataset_name": "c/d"}
    trainer = migrate_content(content, kind=kind).trainer
    assert (trainer["learning_rate"], trainer["bf16"]) == (other["learning_rate"], True)
    assert trainer["activation_checkpointing"] is True
    given = {"learning_rate": 1e-3, "bf16": False, "gradient_checkpointing": False, "logging_steps": 1}
    kept = migrate_content(content | given, kind=kind).trainer
    assert (kept["learning_rate"], kept["bf16"], kept["activation_checkpointing"], kept["logging_steps"]) == (
        1e-3,
        False,
        False,
        1,
    )
    # Half precision is one or the other.
    assert "bf16" not in migrate_content(content | {"fp16": True}, kind=kind).trainer


def test_defaults_of_other_stacks_are_written():
    short = {key: value for key, value in FACTORY_DPO.items() if key != "cutoff_len"}
    assert migrate_content(short).text.max_length == 2048
    handbook = {key: value for key, value in HANDBOOK_QLORA.items() if key != "optim"}
    assert migrate_content(handbook).trainer["optim"] == "rmsprop"


@pytest.mark.parametrize("tuning", ["freeze", "oft"])
def test_other_ways_of_tuning_are_not_taken_for_full_training(tuning):
    outcomes = outcomes_by_key(FACTORY_DPO | {"finetuning_type": tuning})
    assert outcomes["finetuning_type"] == "unsupported"


def test_secrets_are_neither_written_nor_shown(capsys):
    secrets = {"hub_token": "hf_secret", "swanlab_api_key": "hf_secret", "model_init_kwargs": {"token": "hf_secret"}}
    migrate_content(OFFICIAL_BFPO | secrets)
    migrate_content(FACTORY_DPO | {"hf_hub_token": "hf_secret", "swanlab_lark_webhook_url": "http://hf_secret"})
    assert "hf_secret" not in capsys.readouterr().out + Path("recipe.yaml").read_text()


@pytest.mark.parametrize(
    ("content", "kind", "message"),
    [
        ({"base_model": "a/b", "datasets": [{"path": "c/d"}], "lora_r": 8}, None, "old.yaml: axolotl isn't read"),
        ({"base_model": "a/b", "datasets": [], "rl": "dpo"}, "train", "axolotl isn't read; write a recipe"),
        ({"layers": 3}, None, "neither of official BFPO.*its keys are layers"),
        (FACTORY_DPO | {"stage": "ppo"}, None, "stage is 'ppo'; only dpo and sft have a counterpart"),
        (TRL_SFT, None, "add --kind sft or --kind train"),
        (TRL_SFT, "chat", "--kind is 'chat'; expected train or sft"),
        (
            HANDBOOK_SFT | {"dataset_mixture": {"datasets": [{"path": "a/b"}]}},
            None,
            r"does not have the structure .*KeyError",
        ),
        (HANDBOOK_QLORA | {"dataset_mixer": ["a/b"]}, None, "does not have the structure"),
        (HANDBOOK_QLORA | {"lora_r": 0.5}, None, "lora.r: Input should be a valid integer"),
        (OFFICIAL_BFPO | {"other_data_config": "gone.yaml"}, None, r"recipe gone.yaml: .*No such file"),
    ],
)
def test_invalid_files_are_refused(content, kind, message):
    with pytest.raises(RecipeError, match=message):
        migrate(write_yaml(content), [], Path("recipe.yaml"), kind=kind)
    assert not Path("recipe.yaml").exists()


def test_an_existing_recipe_is_not_overwritten():
    Path("recipe.yaml").write_text("mine")
    with pytest.raises(RecipeError, match=r"--out 'recipe\.yaml' exists"):
        migrate(write_yaml(TRL_DPO), [], Path("recipe.yaml"), kind="train")
    assert Path("recipe.yaml").read_text() == "mine"


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name, (_, kind) in FILES.items() if name != "TRL SFT"])
def test_the_kind_is_detected_from_the_keys(name, kind):
    content = FILES[name][0]
    if name == "TRL DPO":
        content = content | {"beta": 0.1}
    assert detect_kind(content, detect_stack(content, "here"), "here") == kind


@pytest.mark.filterwarnings("ignore")  # of importing trl
@pytest.mark.parametrize(("config", "kind"), [("DPOConfig", "train"), ("SFTConfig", "sft")])
def test_every_option_of_trl_has_an_outcome(config, kind):
    trl = pytest.importorskip("trl")
    shared = {field.name for field in fields(TrainingArguments)}
    classes = (getattr(trl, config), trl.ModelConfig, trl.ScriptArguments)
    options = {
        field.name: field.default if field.default is not MISSING else field.default_factory()
        for cls in classes
        for field in fields(cls)
        if field.name not in shared
    }
    content = options | {"model_name_or_path": "a/b", "dataset_name": "c/d"}
    draft = convert(content, "TRL", kind, name="old")
    assert [outcome.key for outcome in draft.outcomes if "not known" in outcome.reason] == []
    # At their defaults, only these options are not supported.
    unsupported = {outcome.key for outcome in draft.outcomes if outcome.outcome == "unsupported"}
    assert unsupported <= {"dataset_text_field", "assistant_only_loss"}
