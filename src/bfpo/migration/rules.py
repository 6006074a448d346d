"""What becomes of the keys of other stacks that need no thought: tables from a key to its place, or to a reason.

Keys are those of wx-zhang/bfpo `src/alignment/configs.py` @4560578, huggingface/alignment-handbook
`recipes/zephyr-7b-beta` @4231254 and @19f0345, TRL 1.16.0 (`DPOConfig`, `SFTConfig`, `ModelConfig`,
`ScriptArguments`) and hiyouga/LLaMA-Factory `examples/train_lora/llama3_lora_dpo.yaml` @01fa59b.
"""

from typing import Any

# Another name or place, the same value.
PLACES = {
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
}
_PACKED = "rows are packed already (layout)"
_WORKERS = "token ids are made in one process and kept for the next run"
_CACHE = "packs decide how many are fed at a time (layout)"
_COMMAND = "the command says what is done"
# Nothing has to be said for it any more, whatever the value.
NOT_NEEDED = {
    "bnb_4bit_quant_storage": "only needed for QLoRA under FSDP, which isn't supported",
    "dataset_num_proc": _WORKERS,
    "ddp_timeout": "transformers' own default is kept",
    "do_eval": _COMMAND,
    "do_predict": _COMMAND,
    "do_train": _COMMAND,
    "eval_packing": _PACKED,
    "flash_attn": _PACKED,
    "gradient_checkpointing_use_reentrant": "checkpointing is always non-reentrant",
    "group_by_length": "the stream plan decides the order",
    "ignore_bias_buffers": "no model of today needs it",
    "logging_dir": "metrics.jsonl is written into trainer.output_dir",
    "lora_task_type": "always CAUSAL_LM",
    "overwrite_cache": "the cache is named by content",
    "overwrite_output_dir": "an earlier run is moved aside, never deleted",
    "packing": _PACKED,
    "packing_strategy": _PACKED,
    "pad_to_multiple_of": _PACKED,
    "padding_free": _PACKED,
    "plot_loss": "metrics.jsonl has every step",
    "precompute_ref_batch_size": _CACHE,
    "preprocessing_num_workers": _WORKERS,
    "remove_unused_columns": "bfpo makes its own batches",
    "save_safetensors": "weights are always safetensors",
    "shuffle_dataset": "the stream plan shuffles, by the seed",
    "use_bnb_nested_quant": "4-bit constants are always quantized too",
    "use_fast_tokenizer": "always, where there is one",
    "use_flash_attention_2": _PACKED,
    "use_liger_kernel": "log-probabilities over the vocabulary are computed in chunks already",
}
_ADAPTER = "only plain LoRA is made"
_LAUNCH = "the launcher decides: accelerate launch --config_file recipes/accelerate/zero3.yaml (or zero2, fsdp2, ddp)"
_LOSS = "the losses here don't have it"
_REFERENCE = "the reference stays the model that training started from"
_TOKENIZER = "the tokenizer is taken as it comes with the model"
# Key → (the value at which it asks for nothing, what is the matter otherwise).
UNSUPPORTED: dict[str, tuple[Any, str]] = {
    "activation_offloading": (False, "activations can be checkpointed, not offloaded"),
    "additional_target": (None, _ADAPTER),
    "assistant_only_loss": (True, "the loss is on assistant turns only"),
    "bnb_4bit_quant_type": ("nf4", "4-bit weights are always nf4"),
    "chat_template_path": (None, "write the template's file into text.chat_template"),
    "completion_only_loss": (True, "the loss is on completions only"),
    "create_new_adapter": (False, "merge the adapter first (bfpo merge)"),
    "dataset_kwargs": (None, "say in columns what your columns are called"),
    "dataset_streaming": (False, "data are read as a whole"),
    "dataset_text_field": (None, "plain text isn't trained on, only completions of prompts"),
    "deepspeed": (None, _LAUNCH),
    "disable_dropout": (True, "dropout is always off: policy and reference must see the same network"),
    "discopop_tau": (0.05, _LOSS),
    "eos_token": (None, _TOKENIZER),
    "f_alpha_divergence_coef": (0.5, _LOSS),
    "f_divergence_type": ("reverse_kl", _LOSS),
    "fsdp": (None, _LAUNCH),
    "fsdp_config": (None, _LAUNCH),
    "ld_alpha": (None, _LOSS),
    "load_in_8bit": (False, "weights are quantized to 4 bits or not at all"),
    "lora_dropout": (0, "dropout is always off: policy and reference must see the same network"),
    "lora_modules_to_save": (None, _ADAPTER),
    "lora_target_parameters": (None, _ADAPTER),
    "loss_weights": (None, _LOSS),
    "mix_strategy": ("concat", "sources are put one after the other and shuffled"),
    "model_init_kwargs": (None, "name the model's options in the section model"),
    "pad_token": (None, _TOKENIZER),
    "pref_bco_weight": (0, _LOSS),
    "pref_ftx": (0, _LOSS),
    "quantization_method": ("bitsandbytes", "weights are quantized by bitsandbytes"),
    "ref_model_mixup_alpha": (0.6, _REFERENCE),
    "ref_model_name_or_path": (None, _REFERENCE),
    "ref_model": (None, _REFERENCE),
    "ref_model_sync_steps": (512, _REFERENCE),
    "reference_free": (False, _LOSS),
    "router_aux_loss_coef": (None, _LOSS),
    "rpo_alpha": (None, _LOSS),
    "smart_label": (False, "nothing in the official code reads it either"),
    "streaming": (False, "data are read as a whole"),
    "sync_ref_model": (False, _REFERENCE),
    "tokenizer_name_or_path": (None, _TOKENIZER),
    "train_on_prompt": (False, "the loss is on completions only"),
    "truncation_side": (None, "text.truncation says which end is cut"),
    "use_dora": (False, _ADAPTER),
    "use_llama_pro": (False, "say in train_only which layers are trained"),
    "freeze_trainable_layers": (None, "say in train_only which layers are trained, e.g. [layers.30., layers.31.]"),
    "freeze_trainable_modules": (None, "say in train_only which layers are trained, e.g. [mlp, self_attn]"),
    "use_rslora": (False, _ADAPTER),
    "use_weighting": (False, _LOSS),
}
PROMPT_CUT = (
    "only prompt and completion together have a limit (text.max_length); text.truncation says which end is cut"
)
UNSUPPORTED |= dict.fromkeys(("max_prompt_length", "max_completion_length", "max_target_length"), (None, PROMPT_CUT))

# TRL's name of a loss → ours. TRL and LLaMA-Factory average `ipo` over tokens (TRL 1.16.0 `_compute_loss`).
LOSSES = {"sigmoid": "dpo", "ipo": "ipo_avg"}
# Data sets whose rows need more than the general adapter.
ADAPTERS = {
    "train": {
        "PKU-Alignment/PKU-SafeRLHF": "pku_saferlhf",
        "HuggingFaceH4/ultrafeedback_binarized": "ultrafeedback",
        "Anthropic/hh-rlhf": "hh_rlhf",
        "data/zephyr-7b-beta_beaver_redteaming.json": "bfpo_redteam",
    },
    "sft": {"PKU-Alignment/PKU-SafeRLHF": "pku_safer"},
}
# The official code's own names of splits, and the revision it pins (src/alignment/data.py @7f7d002).
OFFICIAL_SPLITS = {
    "PKU-Alignment/PKU-SafeRLHF": {
        "train_sft": "train",
        "test_sft": "test",
        "train_prefs": "train",
        "test_prefs": "test",
    },
}
OFFICIAL_REVISIONS = {"PKU-Alignment/PKU-SafeRLHF": "ff7ba91063016c78a225b0f74e1c0860bb18230f"}
