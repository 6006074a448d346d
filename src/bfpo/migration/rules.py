"""Tables of the keys of other stacks whose outcome is fixed: the recipe key, or the reason why there is none.

Keys are those of wx-zhang/bfpo `src/alignment/configs.py` @4560578, huggingface/alignment-handbook
`recipes/zephyr-7b-beta` @4231254 and @19f0345, TRL 1.16.0 (`DPOConfig`, `SFTConfig`, `ModelConfig`,
`ScriptArguments`) and hiyouga/LLaMA-Factory `examples/train_lora/llama3_lora_dpo.yaml` @01fa59b.
"""

from typing import Any

from bfpo.migration.stacks import RecipeKind, Stack

# Keys whose value is copied to a recipe key.
RENAMED = {
    "model_name_or_path": "model.path",
    "model_revision": "model.revision",
    "trust_remote_code": "model.trust_remote_code",
    "load_in_4bit": "model.load_in_4bit",
    "max_length": "text.max_length",
    "max_seq_length": "text.max_length",
    "cutoff_len": "text.max_length",
    "truncation_mode": "text.truncation",
    "chat_template": "text.chat_template",
    "evaluation_strategy": "trainer.eval_strategy",
    "gradient_checkpointing": "trainer.activation_checkpointing",
    "no_cuda": "trainer.use_cpu",
    "router_aux_loss_coef": "router_aux_loss_coef",
}
_PACKED = "rows are always packed (layout)"
_WORKERS = "rows are tokenized in one process and cached for the next run"
_CACHE = "the packed layout determines the batch size"
_COMMAND = "the command determines this"
# Keys that a recipe does not need, with any value.
NOT_NEEDED = {
    "bnb_4bit_quant_storage": "only needed for QLoRA under FSDP, which is not supported",
    "dataset_num_proc": _WORKERS,
    "ddp_timeout": "the default of transformers is used",
    "do_eval": _COMMAND,
    "do_predict": _COMMAND,
    "do_train": _COMMAND,
    "eval_packing": _PACKED,
    "flash_attn": _PACKED,
    "gradient_checkpointing_use_reentrant": "checkpointing is always non-reentrant",
    "group_by_length": "the stream plan determines the order",
    "ignore_bias_buffers": "no current model needs it",
    "logging_dir": "metrics.jsonl is written into trainer.output_dir",
    "lora_task_type": "always CAUSAL_LM",
    "overwrite_cache": "cache files are named by their content",
    "overwrite_output_dir": "an earlier run is moved aside, never deleted",
    "packing": _PACKED,
    "packing_strategy": _PACKED,
    "pad_to_multiple_of": _PACKED,
    "padding_free": _PACKED,
    "plot_loss": "metrics.jsonl contains every logged step",
    "precompute_ref_batch_size": _CACHE,
    "preprocessing_num_workers": _WORKERS,
    "push_to_hub": "bfpo push uploads the finished run with its card",
    "remove_unused_columns": "bfpo builds its own batches",
    "save_safetensors": "weights are always safetensors",
    "shuffle_dataset": "the stream plan shuffles with the seed",
    "use_bnb_nested_quant": "nested quantization is always on",
    "use_fast_tokenizer": "a fast tokenizer is always used if there is one",
    "use_flash_attention_2": _PACKED,
    "use_liger_kernel": "log-probabilities over the vocabulary are always computed in chunks",
}
_ADAPTER = "only plain LoRA is supported"
_LAUNCH = "use accelerate launch --config_file recipes/accelerate/zero3.yaml (or zero2, fsdp2, ddp)"
_LOSS = "no loss of bfpo has this option"
_REFERENCE = "the reference is always the initial model"
_TOKENIZER = "the model's tokenizer is used unchanged"
# Key → (value that needs no support, reason for any other value).
UNSUPPORTED: dict[str, tuple[Any, str]] = {
    "activation_offloading": (False, "activations can be checkpointed but not offloaded"),
    "additional_target": (None, _ADAPTER),
    "assistant_only_loss": (True, "the loss covers assistant turns only"),
    "bnb_4bit_quant_type": ("nf4", "4-bit weights are always nf4"),
    "chat_template_path": (None, "set text.chat_template to the template file"),
    "completion_only_loss": (True, "the loss covers completions only"),
    "create_new_adapter": (False, "merge the adapter first (bfpo export --to merged)"),
    "dataset_kwargs": (None, "name your columns in columns"),
    "dataset_streaming": (False, "data sets are loaded completely"),
    "dataset_text_field": (None, "training on plain text is not supported, only on completions of prompts"),
    "deepspeed": (None, _LAUNCH),
    "disable_dropout": (True, "dropout is always off: policy and reference must see the same network"),
    "discopop_tau": (0.05, _LOSS),
    "eos_token": (None, _TOKENIZER),
    "f_alpha_divergence_coef": (0.5, _LOSS),
    "f_divergence_type": ("reverse_kl", _LOSS),
    "fsdp": (None, _LAUNCH),
    "fsdp_config": (None, _LAUNCH),
    "ld_alpha": (None, _LOSS),
    "load_in_8bit": (False, "only 4-bit quantization is supported"),
    "lora_dropout": (0, "dropout is always off: policy and reference must see the same network"),
    "lora_modules_to_save": (None, _ADAPTER),
    "lora_target_parameters": (None, _ADAPTER),
    "loss_weights": (None, _LOSS),
    "mix_strategy": ("concat", "sources are concatenated and shuffled"),
    "model_init_kwargs": (None, "set the model's options in the section model"),
    "pad_token": (None, _TOKENIZER),
    "pref_bco_weight": (0, _LOSS),
    "pref_ftx": (0, _LOSS),
    "quantization_method": ("bitsandbytes", "weights are quantized with bitsandbytes"),
    "ref_model_mixup_alpha": (0.6, _REFERENCE),
    "ref_model_name_or_path": (None, _REFERENCE),
    "ref_model": (None, _REFERENCE),
    "ref_model_sync_steps": (512, _REFERENCE),
    "reference_free": (False, _LOSS),
    "rpo_alpha": (None, _LOSS),
    "smart_label": (False, "the official code does not read it either"),
    "streaming": (False, "data sets are loaded completely"),
    "sync_ref_model": (False, _REFERENCE),
    "tokenizer_name_or_path": (None, _TOKENIZER),
    "train_on_prompt": (False, "the loss covers completions only"),
    "truncation_side": (None, "text.truncation sets which end is cut"),
    "use_dora": (False, _ADAPTER),
    "use_llama_pro": (False, "name the trained layers in train_only"),
    "freeze_trainable_layers": (None, "name the trained layers in train_only, e.g. [layers.30., layers.31.]"),
    "freeze_trainable_modules": (None, "name the trained layers in train_only, e.g. [mlp, self_attn]"),
    "use_rslora": (False, _ADAPTER),
    "use_weighting": (False, _LOSS),
}
_LENGTH = "only prompt and completion together have a limit (text.max_length); text.truncation sets which end is cut"
UNSUPPORTED |= dict.fromkeys(("max_prompt_length", "max_completion_length", "max_target_length"), (None, _LENGTH))

# Stack → kind of recipe → option that the file may leave out → recipe key, and the value that it then has, where
# ours is another one (TRL 1.16.0 `_BaseConfig` and `DPOConfig`; `DPOConfig` and `BFPOConfig` of the files above;
# LLaMA-Factory's hparams/data_args.py @072bfe2).
_TRL: dict[str, tuple[str, Any]] = {
    "bf16": ("trainer.bf16", True),
    "gradient_checkpointing": ("trainer.activation_checkpointing", True),
    "logging_steps": ("trainer.logging_steps", 10),
}
_RMSPROP: dict[str, tuple[str, Any]] = {"optim": ("trainer.optim", "rmsprop")}
_CUTOFF: dict[str, tuple[str, Any]] = {"cutoff_len": ("text.max_length", 2048)}
DEFAULTS: dict[Stack, dict[RecipeKind, dict[str, tuple[str, Any]]]] = {
    "TRL": {
        "train": {"learning_rate": ("trainer.learning_rate", 1e-6), **_TRL},
        "sft": {"learning_rate": ("trainer.learning_rate", 2e-5), **_TRL},
    },
    "official BFPO": {"train": _RMSPROP},
    # Only files with `dataset_mixer`: later versions of the handbook use TRL's configurations.
    "alignment-handbook": {"train": _RMSPROP},
    "LLaMA-Factory": {"train": _CUTOFF, "sft": _CUTOFF},
}
# Loss of TRL → loss of bfpo. TRL and LLaMA-Factory average `ipo` over tokens (TRL 1.16.0 `_compute_loss`).
LOSSES = {"sigmoid": "dpo", "ipo": "ipo_avg"}
# Data sets that need another adapter than the default one.
ADAPTERS = {
    "train": {
        "PKU-Alignment/PKU-SafeRLHF": "pku_saferlhf",
        "HuggingFaceH4/ultrafeedback_binarized": "ultrafeedback",
        "Anthropic/hh-rlhf": "hh_rlhf",
        "data/zephyr-7b-beta_beaver_redteaming.json": "bfpo_redteam",
    },
    "sft": {"PKU-Alignment/PKU-SafeRLHF": "pku_safer"},
}
# Split names that only the official code uses, and the revision that it pins (src/alignment/data.py @7f7d002).
OFFICIAL_SPLITS = {
    "PKU-Alignment/PKU-SafeRLHF": {
        "train_sft": "train",
        "test_sft": "test",
        "train_prefs": "train",
        "test_prefs": "test",
    },
}
OFFICIAL_REVISIONS = {"PKU-Alignment/PKU-SafeRLHF": "ff7ba91063016c78a225b0f74e1c0860bb18230f"}
