"""Keys and values of public files of four training stacks, retyped, with their commits."""

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
