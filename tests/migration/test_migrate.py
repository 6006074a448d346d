"""Files of four stacks become recipes. Keys and values of the inputs are those of the public files they cite."""

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
from bfpo.migration.stacks import kind_of, stack_of
from bfpo.training.arguments import training_arguments

ZEPHYR = {
    "bf16": True, "do_eval": True, "gradient_checkpointing": True,
    "gradient_checkpointing_kwargs": {"use_reentrant": False}, "log_level": "info", "lr_scheduler_type": "cosine",
    "num_train_epochs": 1, "save_strategy": "steps", "save_steps": 100, "save_total_limit": 1, "seed": 42,
    "warmup_ratio": 0.1, "push_to_hub": True,
}  # fmt: skip
# wx-zhang/bfpo recipes/zephyr-7b-beta/bfpo/selective.yaml @4560578
OFFICIAL_BFPO = ZEPHYR | {
    "model_name_or_path": "alignment-handbook/zephyr-7b-sft-full", "torch_dtype": None,
    "dataset_mixer": {"HuggingFaceH4/ultrafeedback_binarized": 1.0}, "dataset_splits": ["train_prefs", "test_prefs"],
    "preprocessing_num_workers": 8, "other_data_config": "None", "use_buffer": False,
    "buffer_dataset_splits": ["train_prefs", "test_prefs"],
    "buffer_dataset_mixer": {"HuggingFaceH4/ultrafeedback_binarized": 1.0}, "beta": 0.01,
    "evaluation_strategy": "steps", "eval_steps": 100, "gradient_accumulation_steps": 2,
    "hub_model_id": "zephyr-7b-dpo-full", "learning_rate": 5e-7, "logging_steps": 10, "max_length": 1024,
    "max_prompt_length": 512, "optim": "adamw_torch", "output_dir": "./models", "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 8, "hub_token": None, "report_to": ["wandb"], "use_selective": False,
    "selected_layers": ["down_proj"],
}  # fmt: skip
# The same, recipes/zephyr-7b-beta/data/balance_bfpo.yaml and mix_sft.yaml @4560578
BALANCE = {
    "dataset_mixer": {"PKU-Alignment/PKU-SafeRLHF": 0.2}, "dataset_splits": ["train_prefs", "test_prefs"],
    "preprocessing_num_workers": 8, "use_buffer": True,
    "buffer_dataset_mixer": {"HuggingFaceH4/ultrafeedback_binarized": 1.0},
    "buffer_dataset_splits": ["train_prefs", "test_prefs"],
}  # fmt: skip
MIX_SFT = {"dataset_mixer": {"HuggingFaceH4/ultrachat_200k": 1.0, "PKU-Alignment/PKU-SafeRLHF": 0.2}}
# The same, recipes/zephyr-7b-beta/sft/selective.yaml @4560578
OFFICIAL_SFT = ZEPHYR | {
    "model_name_or_path": "mistralai/Mistral-7B-v0.1", "model_revision": "main", "torch_dtype": "bfloat16",
    "use_flash_attention_2": True, "chat_template": "{% for message in messages %}\n{% endfor %}",
    "dataset_mixer": {"HuggingFaceH4/ultrachat_200k": 1.0}, "dataset_splits": ["train_sft", "test_sft"],
    "preprocessing_num_workers": 8, "evaluation_strategy": "epoch", "gradient_accumulation_steps": 16,
    "hub_model_id": "zephyr-7b-sft-selective", "hub_strategy": "every_save", "learning_rate": 1e-5,
    "logging_steps": 5, "logging_strategy": "steps", "max_seq_length": 2048, "max_steps": -1,
    "output_dir": "./models/", "overwrite_output_dir": True, "per_device_eval_batch_size": 8,
    "per_device_train_batch_size": 4, "push_to_hub": False, "remove_unused_columns": True,
    "report_to": ["tensorboard", "wandb"], "use_selective": True, "selected_layers": ["down_proj"],
}  # fmt: skip
# huggingface/alignment-handbook recipes/zephyr-7b-beta/dpo/config_qlora.yaml @4231254
HANDBOOK_QLORA = ZEPHYR | {
    "model_name_or_path": "alignment-handbook/zephyr-7b-sft-qlora", "torch_dtype": "float16", "use_peft": True,
    "load_in_4bit": True, "lora_r": 16, "lora_alpha": 16, "lora_dropout": 0.05,
    "lora_target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "dataset_mixer": {"HuggingFaceH4/ultrafeedback_binarized": 1.0}, "dataset_splits": ["train_prefs", "test_prefs"],
    "preprocessing_num_workers": 12, "beta": 0.01, "evaluation_strategy": "steps", "eval_steps": 100,
    "gradient_accumulation_steps": 1, "hub_model_id": "zephyr-7b-dpo-qlora", "learning_rate": 5e-6,
    "logging_steps": 10, "max_length": 1024, "max_prompt_length": 512, "optim": "paged_adamw_32bit",
    "output_dir": "data/zephyr-7b-dpo-qlora", "per_device_train_batch_size": 4, "per_device_eval_batch_size": 8,
}  # fmt: skip
# The same repository, recipes/zephyr-7b-beta/sft/config_full.yaml @19f0345
HANDBOOK_SFT = ZEPHYR | {
    "model_name_or_path": "mistralai/Mistral-7B-v0.1", "model_revision": "main", "torch_dtype": "bfloat16",
    "attn_implementation": "flash_attention_2", "chat_template": "{% for message in messages %}\n{% endfor %}",
    "dataset_mixture": {
        "datasets": [
            {"id": "HuggingFaceH4/ultrachat_200k", "config": "default", "split": "train_sft", "columns": ["messages"],
             "weight": 1.0},
            {"id": "HuggingFaceH4/ultrachat_200k", "config": "default", "split": "test_sft", "columns": ["messages"],
             "weight": 1.0},
        ],
        "test_split_size": 1000,
        "seed": 0,
    },
    "dataset_num_proc": 12, "eval_strategy": "epoch", "gradient_accumulation_steps": 1,
    "hub_model_id": "zephyr-7b-sft-full", "hub_strategy": "every_save", "learning_rate": 2e-5, "logging_steps": 5,
    "logging_strategy": "steps", "max_seq_length": 2048, "max_steps": -1, "output_dir": "data/zephyr-7b-sft-full",
    "overwrite_output_dir": True, "per_device_eval_batch_size": 8, "per_device_train_batch_size": 16,
    "remove_unused_columns": True, "report_to": ["wandb"],
}  # fmt: skip
# The same repository, recipes/smollm3/dpo/apo.yaml @19f0345
HANDBOOK_APO = {
    "model_name_or_path": "HuggingFaceTB/SmolLM3-3B-checkpoints", "model_revision": "it-SFT",
    "torch_dtype": "bfloat16", "attn_implementation": "flash_attention_2", "trust_remote_code": True,
    "dataset_mixture": {
        "datasets": [
            {"id": "HuggingFaceTB/smoltalk2", "config": "Preference",
             "split": "llama_3.1_tulu_3_8b_preference_mixture_no_think",
             "columns": ["chosen", "rejected", "prompt", "chat_template_kwargs"], "weight": 0.5},
            {"id": "HuggingFaceTB/smoltalk2", "config": "Preference",
             "split": "tulu_3_8b_pref_mix_Qwen3_32B_Qwen3_0.6B_think",
             "columns": ["chosen", "rejected", "prompt", "chat_template_kwargs"], "weight": 0.25},
        ],
    },
    "dataset_num_proc": 12, "bf16": True, "do_eval": False, "eval_strategy": "no", "gradient_accumulation_steps": 2,
    "gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True},
    "output_dir": "data/SmolLM3-DPO", "run_name": "SmolLM3-DPO", "hub_strategy": "every_save", "learning_rate": 1e-6,
    "log_level": "info", "logging_steps": 1, "logging_strategy": "steps", "lr_scheduler_type": "cosine_with_min_lr",
    "lr_scheduler_kwargs": {"min_lr_rate": 0.1}, "max_grad_norm": 0.2, "beta": 0.05, "loss_type": "apo_zero",
    "max_length": 24576, "num_train_epochs": 1, "overwrite_output_dir": True, "per_device_train_batch_size": 1,
    "push_to_hub": True, "padding_free": True, "report_to": ["wandb"], "save_strategy": "steps", "save_steps": 0.5,
    "save_total_limit": 1, "seed": 42, "use_liger_kernel": True, "warmup_ratio": 0.1,
}  # fmt: skip
# huggingface/trl examples/cli_configs/example_config.yaml @2e736f5; the DPO example of docs/source/clis.md @432af24
TRL_SFT = {
    "model_name_or_path": "Qwen/Qwen2.5-0.5B", "dataset_name": "stanfordnlp/imdb", "report_to": "none",
    "learning_rate": 0.0001, "lr_scheduler_type": "cosine",
}  # fmt: skip
TRL_DPO = {"model_name_or_path": "Qwen/Qwen2.5-0.5B", "dataset_name": "anthropic/hh-rlhf"}
_FACTORY = {
    "model_name_or_path": "meta-llama/Meta-Llama-3-8B-Instruct", "do_train": True, "template": "llama3",
    "cutoff_len": 2048, "max_samples": 1000, "overwrite_cache": True, "preprocessing_num_workers": 16,
    "logging_steps": 10, "save_steps": 500, "plot_loss": True, "overwrite_output_dir": True,
    "per_device_train_batch_size": 1, "num_train_epochs": 3.0, "lr_scheduler_type": "cosine", "warmup_ratio": 0.1,
    "bf16": True, "ddp_timeout": 180000000,
}  # fmt: skip
# hiyouga/LLaMA-Factory examples/train_lora/llama3_lora_dpo.yaml @01fa59b
FACTORY_DPO = _FACTORY | {
    "trust_remote_code": True, "stage": "dpo", "finetuning_type": "lora", "lora_rank": 8, "lora_target": "all",
    "pref_beta": 0.1, "pref_loss": "sigmoid", "dataset": "dpo_en_demo", "output_dir": "saves/llama3-8b/lora/dpo",
    "gradient_accumulation_steps": 8, "learning_rate": 5e-6,
}  # fmt: skip
# The same repository, examples/train_full/llama3_full_sft.yaml @03da9a7
FACTORY_FULL = _FACTORY | {
    "trust_remote_code": True, "stage": "sft", "finetuning_type": "full",
    "deepspeed": "examples/deepspeed/ds_z3_config.json", "dataset": "identity,alpaca_en_demo",
    "output_dir": "saves/llama3-8b/full/sft", "gradient_accumulation_steps": 2, "learning_rate": 1e-5,
}  # fmt: skip
# The same repository, examples/train_qlora/llama3_lora_sft_otfq.yaml @24073f5
FACTORY_QLORA = _FACTORY | {
    "quantization_bit": 4, "quantization_method": "bitsandbytes", "stage": "sft", "finetuning_type": "lora",
    "lora_target": "all", "dataset": "identity,alpaca_en_demo", "output_dir": "saves/llama3-8b/lora/sft",
    "gradient_accumulation_steps": 8, "learning_rate": 1e-4, "val_size": 0.1, "per_device_eval_batch_size": 1,
    "eval_strategy": "steps", "eval_steps": 500,
}  # fmt: skip
FILES = {
    "official BFPO": (OFFICIAL_BFPO, "train"),
    "official SFT": (OFFICIAL_SFT, "sft"),
    "handbook QLoRA": (HANDBOOK_QLORA, "train"),
    "handbook SFT": (HANDBOOK_SFT, "sft"),
    "handbook APO": (HANDBOOK_APO, "train"),
    "TRL SFT": (TRL_SFT, "sft"),
    "TRL DPO": (TRL_DPO, "train"),
    "factory DPO": (FACTORY_DPO, "train"),
    "factory full": (FACTORY_FULL, "sft"),
    "factory QLoRA": (FACTORY_QLORA, "sft"),
}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def written(content, name="old.yaml"):
    Path(name).write_text(yaml.safe_dump(content))
    return Path(name)


def migrated(content, *overrides, kind="train"):
    """Return the checked recipe that a file becomes."""
    Path("recipe.yaml").unlink(missing_ok=True)
    migrate(written(content), list(overrides), Path("recipe.yaml"), kind=kind)
    return load_recipe("recipe.yaml", TrainRecipe if kind == "train" else SftRecipe)


def lines(content, kind="train"):
    """Return what became of each key: key → fate."""
    draft = convert(content, stack_of(content, "here"), kind, name="old")
    found = [line.key for line in draft.lines if line.key and "." not in line.key]
    assert len(found) == len(set(found)), "a key is told twice"
    return {line.key: line.fate for line in draft.lines if line.key}


@pytest.mark.parametrize("name", FILES)
def test_the_file_becomes_a_recipe_that_builds_and_every_key_is_told(name, monkeypatch):
    content, kind = FILES[name]
    recipe = migrated(content, kind=kind)
    told = lines({key: value for key, value in content.items() if key != "other_data_config"}, kind)
    assert content.keys() - told.keys() <= {"other_data_config"}
    trainer = {key: value for key, value in recipe.trainer.items() if key not in ("report_to", "optim")}
    training_arguments(trainer | {"use_cpu": True})
    if kind == "train":
        make_loss(recipe.loss.model_dump())
    learned = content.get("learning_rate")
    assert recipe.trainer.get("learning_rate") == learned


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
def test_what_is_not_carried_over_is_exactly_this(name, unsupported, capsys):
    content, kind = FILES[name]
    migrated(content, kind=kind)
    told = lines({key: value for key, value in content.items() if key != "other_data_config"}, kind)
    assert {key for key, fate in told.items() if fate == "unsupported"} == unsupported
    shown, file = capsys.readouterr().out, Path("recipe.yaml").read_text()
    for key in unsupported:
        assert key.split(".")[-1][:12] in shown
        assert f"# Not carried over: {key}:" in file


def test_the_official_launch_gives_the_official_recipe():
    """The second command of bfpo.sh @d165663, less its dashes."""
    written(BALANCE, "balance.yaml")
    recipe = migrated(
        OFFICIAL_BFPO,
        "per_device_train_batch_size=2",
        "gradient_accumulation_steps=4",
        "model_name_or_path=./models/sft-selective",
        "other_data_config=balance.yaml",
        "use_selective=True",
    )
    ours = load_recipe(Path(__file__).parents[2] / "recipes" / "paper" / "bfpo-mistral-7b.yaml", TrainRecipe)
    assert recipe.model.path == "./models/sft-selective"
    assert (recipe.loss, recipe.train_only, recipe.data, recipe.eval) == (
        ours.loss,
        ours.train_only,
        ours.data,
        ours.eval,
    )
    assert recipe.buffer == ours.buffer
    assert recipe.text.max_length == ours.text.max_length
    same = set(ours.trainer) - {"output_dir"}
    assert {key: recipe.trainer[key] for key in same} == {key: ours.trainer[key] for key in same}


def test_the_official_fine_tuning_gives_the_official_recipe():
    """The first command of bfpo.sh @d165663, less its dashes."""
    written(MIX_SFT, "mix.yaml")
    recipe = migrated(
        OFFICIAL_SFT, "gradient_accumulation_steps=2", "learning_rate=5e-7", "other_data_config=mix.yaml", kind="sft"
    )
    ours = load_recipe(Path(__file__).parents[2] / "recipes" / "paper" / "sft-mistral-7b.yaml", SftRecipe)
    assert (recipe.data, recipe.train_only, recipe.holdout) == (ours.data, ours.train_only, ours.holdout)
    assert recipe.model.dtype == "float32"
    same = set(ours.trainer) - {"output_dir", "optim"}
    assert {key: recipe.trainer[key] for key in same} == {key: ours.trainer[key] for key in same}


def test_selective_training_that_is_off_trains_everything():
    recipe = migrated(OFFICIAL_BFPO)
    assert recipe.train_only is None
    assert recipe.buffer == []
    assert recipe.loss == BFPOSection(beta=0.01, b1=3.0, alpha=0.5)


def test_lora_of_trl_and_of_llama_factory():
    handbook = migrated(HANDBOOK_QLORA)
    assert (handbook.lora.r, handbook.lora.alpha, len(handbook.lora.target_modules)) == (16, 16, 7)
    assert (handbook.model.load_in_4bit, handbook.model.dtype) == (True, "float16")
    factory = migrated(FACTORY_DPO)
    # hparams/finetuning_args.py: alpha is twice the rank unless it is given.
    assert (factory.lora.r, factory.lora.alpha, factory.lora.target_modules) == (8, 16, "all-linear")
    assert migrated(HANDBOOK_QLORA, "use_peft=false", "load_in_4bit=false").lora is None
    assert migrated(FACTORY_QLORA, kind="sft").model.load_in_4bit is True
    further = migrated(FACTORY_DPO, "adapter_name_or_path=saves/sft")
    assert (further.model.path, further.lora) == ("saves/sft", None)


def test_losses_keep_their_meaning():
    assert migrated(FACTORY_DPO).loss == DPOSection(beta=0.1)
    assert migrated(TRL_DPO | {"loss_type": ["ipo"], "beta": 0.2}).loss == IPOAvgSection(beta=0.2)
    smoothed = migrated(TRL_DPO | {"label_smoothing": 0.1})
    assert smoothed.loss == DPOSection(beta=0.1, label_smoothing=0.1)


def test_a_precomputed_reference_is_the_cache():
    assert migrated(TRL_DPO | {"precompute_ref_log_probs": True}).reference == "cache"
    assert migrated(TRL_DPO | {"precompute_ref_log_probs": False}).reference == "auto"


def test_sets_without_labels_can_be_trained_on_by_a_loss_that_reads_none():
    assert migrated(TRL_DPO).data[0].model_dump(exclude_defaults=True) == {
        "path": "anthropic/hh-rlhf",
        "adapter": "hh_rlhf",
        "split": "train",
        "assume_safe": True,
    }


def test_mixtures_of_trl_and_the_handbook():
    trl = {"model_name_or_path": "a/b", "beta": 0.1, "datasets": [{"path": "json", "data_files": "pairs.json"}]}
    assert migrated(trl).data[0].path == "pairs.json"
    apo = migrated(HANDBOOK_APO)
    assert [(source.name, source.fraction, source.seed) for source in apo.data] == [
        ("Preference", 0.5, 0),
        ("Preference", 0.25, 0),
    ]


def test_secrets_are_neither_written_nor_shown(capsys):
    migrated(OFFICIAL_BFPO | {"hub_token": "hf_secret"})
    assert "hf_secret" not in capsys.readouterr().out + Path("recipe.yaml").read_text()


@pytest.mark.parametrize(
    ("content", "kind", "message"),
    [
        ({"layers": 3}, None, "neither of official BFPO.*its keys are layers"),
        (FACTORY_DPO | {"stage": "ppo"}, None, "stage is 'ppo'; only dpo and sft have a counterpart"),
        (TRL_SFT, None, "add --kind sft or --kind train"),
        (TRL_SFT, "chat", "--kind is 'chat'; expected train or sft"),
        (HANDBOOK_SFT | {"dataset_mixture": {"datasets": [{"path": "a/b"}]}}, None, r"hasn't the shape .*KeyError"),
        (HANDBOOK_QLORA | {"dataset_mixer": ["a/b"]}, None, "hasn't the shape"),
        (HANDBOOK_QLORA | {"lora_r": 0.5}, None, "lora.r: Input should be a valid integer"),
        (OFFICIAL_BFPO | {"other_data_config": "gone.yaml"}, None, r"recipe gone.yaml: .*No such file"),
    ],
)
def test_what_cannot_be_migrated_is_refused(content, kind, message):
    with pytest.raises(RecipeError, match=message):
        migrate(written(content), [], Path("recipe.yaml"), kind=kind)
    assert not Path("recipe.yaml").exists()


def test_a_recipe_that_exists_is_kept():
    Path("recipe.yaml").write_text("mine")
    with pytest.raises(RecipeError, match=r"--out 'recipe\.yaml' exists"):
        migrate(written(TRL_DPO), [], Path("recipe.yaml"), kind="train")
    assert Path("recipe.yaml").read_text() == "mine"


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name, (_, kind) in FILES.items() if name != "TRL SFT"])
def test_the_kind_is_told_by_the_keys(name, kind):
    content = FILES[name][0]
    if name == "TRL DPO":
        content = content | {"beta": 0.1}
    assert kind_of(content, stack_of(content, "here"), "here") == kind


@pytest.mark.filterwarnings("ignore")  # of importing trl
@pytest.mark.parametrize(("config", "kind"), [("DPOConfig", "train"), ("SFTConfig", "sft")])
def test_every_option_of_trl_is_known(config, kind):
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
    assert [line.key for line in draft.lines if "not known" in line.why] == []
    # Left at their defaults, options ask for little that isn't done.
    asked = {line.key for line in draft.lines if line.fate == "unsupported"}
    assert asked <= {"dataset_text_field", "assistant_only_loss"}
