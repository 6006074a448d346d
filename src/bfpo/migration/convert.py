"""Conversion of the keys of an old file to a recipe."""

import re
from dataclasses import fields
from typing import Any

from transformers import TrainingArguments

from bfpo.migration.draft import Draft, KeyOutcome, Outcome
from bfpo.migration.rules import DEFAULTS, LOSSES, NOT_NEEDED, RENAMED, UNSUPPORTED
from bfpo.migration.sources import put_sources
from bfpo.migration.stacks import RecipeKind, Stack
from bfpo.training.arguments import DECIDED

# Options that are a secret; they are not part of a recipe.
_SECRET = re.compile(r"(^|hub_)token$|api_key$|secret$|password$|webhook_url$")
HOLDOUT = 0.01
_STACK_DEFAULT = "the default of that stack"


def convert(content: dict[str, Any], stack: Stack, kind: RecipeKind, *, name: str) -> Draft:
    """Convert the keys of an old file to a recipe.

    Args:
        content: Keys and values of the old file, overrides applied.
        stack: Stack that the file is written for.
        kind: Kind of recipe.
        name: Name of the old file; part of the output folder if the file has none.

    Returns:
        The recipe, and the outcome of every key of the old file.
    """
    draft = Draft(content)
    _mask_secrets(draft)
    _put_adapter(draft, stack)
    _put_model(draft)
    put_sources(draft, stack, kind)
    _put_trained_layers(draft)
    if kind == "sft":
        _note_sft_loss(draft)
    elif stack == "official BFPO":
        _put_official_loss(draft)
    else:
        _put_loss(draft, stack)
    _put_defaults(draft, stack, kind)
    _apply_rules(draft)
    _put_trainer(draft, name)
    _put_holdout(draft)
    return draft


def _mask_secrets(draft: Draft) -> None:
    for key in list(draft.remaining):
        draft.remaining[key] = _masked(draft.remaining[key])
        if _is_secret(key):
            draft.remaining[key] = "not shown" if draft.remaining[key] else None
            reason = "recipes contain no secrets; set the environment variable HF_TOKEN"
            draft.note("not needed", key, reason)


def _is_secret(key: object) -> bool:
    # A key of YAML may be a number.
    return isinstance(key, str) and bool(_SECRET.search(key))


def _masked(value: Any) -> Any:
    """Return a value without the secrets in its sections."""
    if isinstance(value, dict):
        return {key: "not shown" if _is_secret(key) and inner else _masked(inner) for key, inner in value.items()}
    return [_masked(inner) for inner in value] if isinstance(value, list) else value


def _put_adapter(draft: Draft, stack: Stack) -> None:
    remaining = draft.remaining
    is_factory = stack == "LLaMA-Factory"
    is_lora = remaining.get("finetuning_type", "lora") == "lora" if is_factory else bool(remaining.get("use_peft"))
    if is_factory and remaining.get("finetuning_type", "lora") not in ("lora", "full"):
        reason = "the recipe trains all weights; name the trained ones in train_only, e.g. [layers.30., layers.31.]"
        draft.note("unsupported", "finetuning_type", reason, recipe_key="train_only")
    for key in ("finetuning_type", "use_peft", "stage"):
        if key in remaining:
            recipe_key = "lora" if is_lora and key != "stage" else ""
            draft.note("computed", key, "determines what is trained", recipe_key=recipe_key)
    adapter = remaining.get("adapter_name_or_path")
    if adapter:
        draft.note("computed", "model_name_or_path", "the adapter names its base model")
        reason = "the adapter is trained further, and is the reference"
        draft.compute("adapter_name_or_path", "model.path", adapter, reason)
    rank_key, alpha_key, target_key = (
        ("lora_rank", "lora_alpha", "lora_target") if is_factory else ("lora_r", "lora_alpha", "lora_target_modules")
    )
    if adapter or not is_lora:
        for key in (rank_key, alpha_key, target_key, "lora_dropout"):
            if key in remaining:
                draft.note("not needed", key, "no new adapter is created")
        return
    # LLaMA-Factory: rank 8, alpha twice the rank (hparams/finetuning_args.py). TRL 1.16.0: 16, 32, and the target
    # modules that peft chooses.
    rank = remaining.get(rank_key) or (8 if is_factory else 16)
    alpha = remaining.get(alpha_key) or (2 * rank if is_factory else 32)
    draft.compute(rank_key, "lora.r", rank, "" if rank_key in remaining else _STACK_DEFAULT)
    draft.compute(alpha_key, "lora.alpha", alpha, "" if alpha_key in remaining else _STACK_DEFAULT)
    modules = remaining.get(target_key)
    if isinstance(modules, str):
        modules = [part.strip() for part in modules.split(",")]
    reason = ""
    if modules in (["all"], ["all-linear"]) or (modules is None and is_factory):
        modules, reason = "all-linear", "every linear layer except the head"
    elif modules is None:
        modules, reason = ["q_proj", "v_proj"], "peft's choice for Llama and Mistral models"
    draft.compute(target_key, "lora.target_modules", modules, reason)


def _put_model(draft: Draft) -> None:
    remaining = draft.remaining
    bits = remaining.get("quantization_bit")
    if bits == 4:
        draft.compute("quantization_bit", "model.load_in_4bit", True)
    elif "quantization_bit" in remaining:
        draft.note("unsupported" if bits else "not needed", "quantization_bit", "only 4 bits are supported")
    dtype_key = next((key for key in ("torch_dtype", "dtype") if key in remaining), None)
    if dtype_key is not None:
        _put_dtype(draft, dtype_key)
    attention = remaining.get("attn_implementation")
    if attention in ("sdpa", "eager", "flex_attention"):
        draft.rename("attn_implementation", "model.attn_implementation")
    elif "attn_implementation" in remaining:
        draft.note("not needed", "attn_implementation", "packed rows use their own attention")


def _put_dtype(draft: Draft, key: str) -> None:
    dtype, has_adapter = draft.remaining[key], "lora" in draft.recipe
    if dtype in ("float32", "bfloat16", "float16") and (has_adapter or dtype == "float32"):
        draft.rename(key, "model.dtype")
    elif has_adapter and dtype == "auto":
        draft.compute(key, "model.dtype", "bfloat16", "frozen weights can be rounded")
    elif dtype is None:
        draft.compute(key, "model.dtype", "float32", "the meaning of null in transformers 4")
    else:
        reason = f"updates of {dtype} weights would be lost to rounding; DeepSpeed keeps a float32 copy"
        draft.compute(key, "model.dtype", "float32", reason)
        if dtype == "bfloat16" and "bf16" not in draft.remaining:
            draft.compute("bf16", "trainer.bf16", True, "computes in bfloat16")


def _put_trained_layers(draft: Draft) -> None:
    remaining = draft.remaining
    if not {"use_selective", "selected_layers"} & remaining.keys():
        return
    is_selective = remaining.get("use_selective") in (True, "True", "true")
    layers = remaining.get("selected_layers")
    if is_selective and layers and "lora" not in draft.recipe:
        reason = "patterns that match parameter names"
        draft.compute("selected_layers", "train_only", list(layers), reason)
        draft.note("computed", "use_selective", recipe_key="train_only")
        return
    reason = "an adapter is trained" if is_selective else "use_selective is off: all layers are trained"
    for key in ("selected_layers", "use_selective"):
        if key in remaining:
            draft.note("not needed", key, reason)


def _note_sft_loss(draft: Draft) -> None:
    for key in ("loss_type", "beta"):
        if key in draft.remaining:
            is_default = draft.remaining[key] == "nll"
            reason = "fine-tuning has one loss, the negative log-likelihood"
            draft.note("not needed" if is_default else "unsupported", key, reason)


def _put_official_loss(draft: Draft) -> None:
    draft.put("loss.name", "bfpo")
    # Defaults of BFPOConfig, src/alignment/configs.py @4560578.
    for key, default in (("beta", 0.1), ("b1", 3.0), ("alpha", 0.5)):
        reason = "" if key in draft.remaining else _STACK_DEFAULT
        draft.compute(key, f"loss.{key}", float(draft.remaining.get(key, default)), reason)


def _put_loss(draft: Draft, stack: Stack) -> None:
    remaining = draft.remaining
    if remaining.get("precompute_ref_log_probs"):
        reason = "stored on disk, and shared between runs"
        draft.compute("precompute_ref_log_probs", "reference", "cache", reason)
    elif "precompute_ref_log_probs" in remaining:
        draft.note("not needed", "precompute_ref_log_probs", "the default is reference: auto")
    is_factory = stack == "LLaMA-Factory"
    loss_key, beta_key = ("pref_loss", "pref_beta") if is_factory else ("loss_type", "beta")
    loss = remaining.get(loss_key, "sigmoid")
    if isinstance(loss, list) and len(loss) == 1:
        loss = loss[0]
    if isinstance(loss, str) and loss in LOSSES:
        reason = "" if loss_key in remaining else _STACK_DEFAULT
        if loss == "ipo":
            reason = "averaged over tokens, as in TRL; the loss ipo of bfpo takes sums"
        draft.compute(loss_key, "loss.name", LOSSES[loss], reason)
    else:
        reason = f"bfpo has no loss '{loss}'; the recipe has dpo instead, choose a loss of docs/method.md"
        draft.note("unsupported", loss_key, reason)
        draft.put("loss.name", "dpo")
    beta_reason = "" if beta_key in remaining else _STACK_DEFAULT
    draft.compute(beta_key, "loss.beta", remaining.get(beta_key, 0.1), beta_reason)
    smoothing_key = "dpo_label_smoothing" if is_factory else "label_smoothing"
    if remaining.get(smoothing_key) and draft.recipe["loss"]["name"] == "dpo":
        draft.rename(smoothing_key, "loss.label_smoothing")
    elif smoothing_key in remaining:
        outcome: Outcome = "unsupported" if remaining[smoothing_key] else "not needed"
        draft.note(outcome, smoothing_key, "only dpo has label smoothing")
    for key in ("b1", "alpha"):
        if key in remaining:
            draft.note("unsupported", key, "an option of the loss bfpo")


def _put_defaults(draft: Draft, stack: Stack, kind: RecipeKind) -> None:
    """Write what the stack does where the file says nothing, and `bfpo` would do something else."""
    defaults = DEFAULTS.get(stack, {}).get(kind, {})
    if stack == "alignment-handbook" and "dataset_mixture" in draft.old:
        defaults = DEFAULTS["TRL"][kind]
    for key, (recipe_key, value) in defaults.items():
        is_given = key in draft.old or (key == "bf16" and draft.old.get("fp16"))
        if not is_given and not draft.has(recipe_key):
            draft.compute(key, recipe_key, value, _STACK_DEFAULT)


def _apply_rules(draft: Draft) -> None:
    for key in list(draft.remaining):
        value = draft.remaining[key]
        if key in RENAMED and value is not None:
            draft.rename(key, RENAMED[key])
        elif key in NOT_NEEDED:
            draft.note("not needed", key, NOT_NEEDED[key])
        elif key in UNSUPPORTED:
            supported_value, reason = UNSUPPORTED[key]
            if value is None:
                draft.note("not needed", key, reason)
            elif value == supported_value:
                draft.note("not needed", key, "bfpo always does this")
            else:
                draft.note("unsupported", key, reason)
        elif value is None:
            draft.note("not needed", key, "empty")


def _put_trainer(draft: Draft, name: str) -> None:
    remaining = draft.remaining
    if "gradient_checkpointing_kwargs" in remaining:
        draft.note("not needed", "gradient_checkpointing_kwargs", "checkpointing is always non-reentrant")
    if "warmup_ratio" in remaining:
        if remaining.get("warmup_steps"):
            draft.note("not needed", "warmup_ratio", "warmup_steps takes precedence, as in transformers")
        else:
            draft.take("warmup_steps")
            reason = "a value below 1 is a share of all steps"
            draft.compute("warmup_ratio", "trainer.warmup_steps", remaining["warmup_ratio"], reason)
    if not remaining.get("output_dir"):
        draft.compute("output_dir", "trainer.output_dir", f"runs/{name}", "a run needs an output folder")
    options = {field.name for field in fields(TrainingArguments) if field.init}
    for key in list(remaining):
        if key in DECIDED:
            draft.note("unsupported", key, DECIDED[key])
        elif key in options:
            draft.rename(key, f"trainer.{key}")
        else:
            draft.note("unsupported", key, "not known to bfpo or transformers 5")


def _put_holdout(draft: Draft) -> None:
    """Hold out prompts if the recipe evaluates but has no evaluation data."""
    evaluates = draft.recipe["trainer"].get("eval_strategy", "no") != "no"
    if evaluates and not (draft.recipe.get("eval") or draft.recipe.get("holdout")):
        draft.put("holdout", HOLDOUT)
        reason = "the recipe evaluates: a share of the prompts is held out"
        draft.outcomes.append(KeyOutcome("computed", "", HOLDOUT, "holdout", reason))
