"""Which training stack a file is written for, and whether it fine-tunes or trains on preferences."""

from typing import Any, Literal

from bfpo.errors import RecipeError

Stack = Literal["official BFPO", "alignment-handbook", "LLaMA-Factory", "TRL"]
RecipeKind = Literal["train", "sft"]

# Keys that identify a stack; the first stack with a match is taken.
MARKER_KEYS: dict[Stack, set[str]] = {
    "official BFPO": {"use_selective", "selected_layers", "use_buffer", "buffer_dataset_mixer", "other_data_config"},
    "LLaMA-Factory": {"stage", "finetuning_type", "cutoff_len", "pref_beta", "lora_rank"},
    "alignment-handbook": {"dataset_mixer", "dataset_mixture"},
    "TRL": {"model_name_or_path", "dataset_name", "datasets"},
}
PREFERENCE_KEYS = {
    "beta", "b1", "alpha", "loss_type", "max_prompt_length", "precompute_ref_log_probs", "ref_model_name_or_path",
    "label_smoothing", "use_buffer", "buffer_dataset_mixer",
}  # fmt: skip
DEMONSTRATION_KEYS = {
    "max_seq_length", "packing", "dataset_text_field", "completion_only_loss", "assistant_only_loss",
    "chat_template_path",
}  # fmt: skip


def detect_stack(content: dict[str, Any], file: str) -> Stack:
    """Return the stack that a file is written for.

    Args:
        content: Keys and values of the file.
        file: Name of the file, for errors.

    Raises:
        RecipeError: If no key identifies a stack, or the file is for axolotl.
    """
    if content.keys() >= {"base_model", "datasets"}:
        raise RecipeError(f"{file}: axolotl isn't read; write a recipe from docs/recipes.md instead")
    for stack, keys in MARKER_KEYS.items():
        if keys & content.keys():
            return stack
    raise RecipeError(
        f"{file}: neither of official BFPO, alignment-handbook, TRL nor LLaMA-Factory; its keys are "
        f"{', '.join(map(str, content)) or 'none'}, and model_name_or_path is not among them"
    )


def detect_kind(content: dict[str, Any], stack: Stack, file: str) -> RecipeKind | None:
    """Return whether a file trains on preferences or fine-tunes; None if its keys do not decide.

    Args:
        content: Keys and values of the file.
        stack: Stack that the file is written for.
        file: Name of the file, for errors.

    Raises:
        RecipeError: If the file is for another stage of LLaMA-Factory.
    """
    if stack == "LLaMA-Factory":
        stages: dict[object, RecipeKind] = {"dpo": "train", "sft": "sft"}
        stage = content.get("stage")
        if not isinstance(stage, str) or stage not in stages:
            raise RecipeError(f"{file}: stage is {stage!r}; only dpo and sft have a counterpart")
        return stages[stage]
    if stack == "official BFPO" and "max_seq_length" in content:
        return "sft"
    splits = str([content.get(key) for key in ("dataset_splits", "dataset_mixture", "dataset_train_split")])
    is_preference = bool(PREFERENCE_KEYS & content.keys()) or "pref" in splits or "chosen" in splits
    is_demonstration = bool(DEMONSTRATION_KEYS & content.keys()) or "sft" in splits
    if is_preference == is_demonstration:
        return None
    return "train" if is_preference else "sft"
