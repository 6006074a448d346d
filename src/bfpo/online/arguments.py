"""The `trainer:` section of an online recipe as `trl.RLOOConfig`."""

from typing import Any

from trl import RLOOConfig  # type: ignore[attr-defined]

from bfpo.errors import RecipeError
from bfpo.training.arguments import DECIDED, build_arguments, check_options, default_options

_STREAM_KEYS = {
    "dataloader_drop_last",
    "dataloader_pin_memory",
    "ignore_data_skip",
    "label_names",
    "liger_kernel_config",
    "train_sampling_strategy",
    "use_liger_kernel",
}
_SAMPLING = "the log-probabilities of the samples would be those of another distribution, and the gradient biased"
_REFERENCE = "the KL penalty is to the start model; a reference that moves is another objective"
_REUSE = "completions are sampled anew in every step: a checkpoint doesn't have them, and a resumed run would differ"
_LOADING = "model: says how the model is loaded"

REFUSED = {name: why for name, why in DECIDED.items() if name not in _STREAM_KEYS} | {
    "normalize_advantages": "dividing by a standard deviation of the batch changes the weight of the KL penalty, and "
    "so the objective, from step to step",
    "reward_clip_range": "it clips the combined value, which changes what the multiplier means",
    "reward_weights": "combine: says how reward and cost become one value",
    "mask_truncated_completions": "an answer that is cut would escape its cost",
    "sync_ref_model": _REFERENCE,
    "ref_model_mixup_alpha": _REFERENCE,
    "ref_model_sync_steps": _REFERENCE,
    "top_p": _SAMPLING,
    "top_k": _SAMPLING,
    "min_p": _SAMPLING,
    "repetition_penalty": _SAMPLING,
    "generation_kwargs": _SAMPLING,
    "num_iterations": _REUSE,
    "steps_per_generation": _REUSE,
    "generation_batch_size": _REUSE,
    "dataloader_drop_last": "a step has whole prompts",
    "ignore_data_skip": "a resumed run continues with the prompts of its step",
    "label_names": "there are no labels",
    "train_sampling_strategy": "every process gets samples of the same prompts",
    "eval_strategy": "there is no loss to evaluate; run bfpo eval on the model, and set watch: during training",
    "load_best_model_at_end": "there is no evaluation during training; set watch:",
    "scale_rewards": "it is GRPO's: a standard deviation of each prompt's samples changes λ from prompt to prompt",
    "disable_dropout": "dropout is always off",
    "model_init_kwargs": _LOADING,
    "trust_remote_code": _LOADING,
}
"""Arguments of `trl.RLOOConfig` that can't be set, with the reason; some of them are GRPO's."""

DEFAULTS: dict[str, Any] = {
    # TRL's own defaults are true, also on a CPU.
    "bf16": False,
    "activation_checkpointing": False,
    "logging_steps": 1,
}


def online_arguments(options: dict[str, Any], *, loading: dict[str, Any]) -> RLOOConfig:
    """Build TRL's arguments from a recipe's `trainer:` section.

    Args:
        options: Names and values of `trl.RLOOConfig`; `output_dir` is required.
        loading: How TRL loads the reference from the start model's path; empty without a reference of its own.

    Raises:
        RecipeError: If a name is unknown or in `REFUSED`, or a value is wrong; the message names the key.
    """
    values = default_options() | DEFAULTS | check_options(options, RLOOConfig, decided=REFUSED)
    if not values.get("beta", RLOOConfig.beta) > 0:
        raise RecipeError(
            f"trainer.beta is {values['beta']}; expected a number above 0, the weight of the KL penalty"
        )
    if not values.get("temperature", RLOOConfig.temperature) > 0:
        raise RecipeError(f"trainer.temperature is {values['temperature']}; expected a number above 0")
    if loading:
        values["model_init_kwargs"] = loading
    return build_arguments(RLOOConfig, values | {"disable_dropout": True})
