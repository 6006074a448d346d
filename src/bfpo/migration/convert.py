"""From the keys of an old file to a recipe."""

from dataclasses import fields
from typing import Any

from transformers import TrainingArguments

from bfpo.migration.draft import Draft, DraftLine, Fate
from bfpo.migration.rules import LOSSES, NOT_NEEDED, PLACES, UNSUPPORTED
from bfpo.migration.sources import put_sources
from bfpo.migration.stacks import Kind, Stack
from bfpo.training.arguments import DECIDED

# Names of transformers that are not part of a recipe, or a secret.
SECRETS = ("hub_token", "push_to_hub_token")
HOLDOUT = 0.01


def convert(content: dict[str, Any], stack: Stack, kind: Kind, *, name: str) -> Draft:
    """Turn the keys of an old file into a recipe.

    Args:
        content: The old file, overrides applied.
        stack: What it is written for.
        kind: What it does.
        name: Of the old file, for an output folder where it has none.

    Returns:
        The recipe's content, and a line for every key of the old file.
    """
    draft = Draft(content)
    _put_secrets_aside(draft)
    _put_adapter(draft, stack)
    _put_model(draft)
    put_sources(draft, stack, kind)
    _put_trained_layers(draft)
    if kind == "train":
        _put_loss(draft, stack)
    else:
        for key in ("loss_type", "beta"):
            if key in draft.left:
                fate: Fate = "not needed" if draft.left[key] == "nll" else "unsupported"
                draft.told(fate, key, "", "fine-tuning has one loss, the negative log-probability")
    _put_tables(draft)
    _put_trainer(draft, name)
    _put_holdout(draft)
    return draft


def _put_secrets_aside(draft: Draft) -> None:
    for key in SECRETS:
        if key in draft.left:
            draft.left[key] = "not shown" if draft.left[key] else None
            draft.told(
                "not needed", key, "", "secrets don't belong in recipes; set the environment variable HF_TOKEN"
            )


def _put_adapter(draft: Draft, stack: Stack) -> None:
    left = draft.left
    factory = stack == "LLaMA-Factory"
    wanted = left.get("finetuning_type", "lora") == "lora" if factory else bool(left.get("use_peft"))
    for key in ("finetuning_type", "use_peft", "stage"):
        if key in left:
            draft.told("computed", key, "lora" if wanted and key != "stage" else "", "says what is trained")
    adapter = left.get("adapter_name_or_path")
    if adapter:
        draft.told("computed", "model_name_or_path", "", "the adapter names its base")
        draft.compute(
            "adapter_name_or_path", "model.path", adapter, "an adapter is trained further, and is the reference"
        )
        wanted = False
    rank, alpha, target = (
        ("lora_rank", "lora_alpha", "lora_target") if factory else ("lora_r", "lora_alpha", "lora_target_modules")
    )
    if not wanted:
        for key in (rank, alpha, target, "lora_dropout"):
            if key in left:
                draft.told("not needed", key, "", "no new adapter is made")
        return
    # LLaMA-Factory: rank 8, alpha twice that (hparams/finetuning_args.py). TRL 1.16.0: 16, 32, and peft's choice of
    # layers.
    r = left.get(rank) or (8 if factory else 16)
    draft.compute(rank, "lora.r", r, "" if rank in left else "the default there")
    draft.compute(
        alpha,
        "lora.alpha",
        left.get(alpha) or (2 * r if factory else 32),
        "" if alpha in left else "the default there",
    )
    modules = left.get(target)
    if isinstance(modules, str):
        modules = [part.strip() for part in modules.split(",")]
    if modules in (["all"], ["all-linear"]) or (modules is None and factory):
        draft.compute(target, "lora.target_modules", "all-linear", "every linear layer but the head")
    elif modules is None:
        draft.compute(
            target, "lora.target_modules", ["q_proj", "v_proj"], "peft's choice for Llama and Mistral models"
        )
    else:
        draft.compute(target, "lora.target_modules", modules, "")


def _put_model(draft: Draft) -> None:
    left = draft.left
    bits = left.get("quantization_bit")
    if bits == 4:
        draft.compute("quantization_bit", "model.load_in_4bit", True, "")
    elif "quantization_bit" in left:
        draft.told("unsupported" if bits else "not needed", "quantization_bit", "", "4 bits or none")
    key = next((name for name in ("torch_dtype", "dtype") if name in left), None)
    if key is not None:
        _put_dtype(draft, key)
    attention = left.get("attn_implementation")
    if attention in ("sdpa", "eager", "flex_attention"):
        draft.rename("attn_implementation", "model.attn_implementation")
    elif "attn_implementation" in left:
        draft.told("not needed", "attn_implementation", "", "packed rows bring their own attention")


def _put_dtype(draft: Draft, key: str) -> None:
    asked, adapted = draft.left[key], "lora" in draft.recipe
    if asked in ("float32", "bfloat16", "float16") and (adapted or asked == "float32"):
        draft.rename(key, "model.dtype")
    elif adapted and asked == "auto":
        draft.compute(key, "model.dtype", "bfloat16", "frozen weights may be rounded")
    elif asked is None:
        draft.compute(key, "model.dtype", "float32", "what null meant to transformers 4")
    else:
        why = f"updates of {asked} weights would be lost to rounding; DeepSpeed kept float32 ones beside them"
        draft.compute(key, "model.dtype", "float32", why)
        if asked == "bfloat16" and "bf16" not in draft.left:
            draft.compute("bf16", "trainer.bf16", True, "computes in bfloat16")


def _put_trained_layers(draft: Draft) -> None:
    left = draft.left
    if not {"use_selective", "selected_layers"} & left.keys():
        return
    asked = left.get("use_selective") in (True, "True", "true")
    layers = left.get("selected_layers")
    if asked and layers and "lora" not in draft.recipe:
        draft.compute("selected_layers", "train_only", list(layers), "patterns searched in the parameters' names")
        draft.told("computed", "use_selective", "train_only", "")
        return
    for key in ("selected_layers", "use_selective"):
        if key in left:
            draft.told(
                "not needed",
                key,
                "",
                "use_selective is off: everything is trained" if not asked else "an adapter is trained",
            )


def _put_loss(draft: Draft, stack: Stack) -> None:
    left = draft.left
    if stack == "official BFPO":
        draft.put("loss.name", "bfpo")
        # Defaults of BFPOConfig, src/alignment/configs.py @4560578.
        for key, default in (("beta", 0.1), ("b1", 3.0), ("alpha", 0.5)):
            draft.compute(
                key, f"loss.{key}", float(left.get(key, default)), "" if key in left else "the default there"
            )
        return
    if left.get("precompute_ref_log_probs"):
        draft.compute("precompute_ref_log_probs", "reference", "cache", "kept on disk, and shared between runs")
    elif "precompute_ref_log_probs" in left:
        draft.told("not needed", "precompute_ref_log_probs", "", "reference: auto decides")
    prefix = "pref_" if stack == "LLaMA-Factory" else ""
    kind, beta = (f"{prefix}loss", f"{prefix}beta") if prefix else ("loss_type", "beta")
    asked = left.get(kind, "sigmoid")
    if isinstance(asked, list) and len(asked) == 1:
        asked = asked[0]
    if isinstance(asked, str) and asked in LOSSES:
        why = (
            "averaged over tokens, as TRL does today; `ipo` takes sums"
            if asked == "ipo"
            else ""
            if kind in left
            else "the default there"
        )
        draft.compute(kind, "loss.name", LOSSES[asked], why)
    else:
        draft.told(
            "unsupported",
            kind,
            "",
            f"no loss here is '{asked}'; dpo is written instead, choose one of docs/method.md",
        )
        draft.put("loss.name", "dpo")
    draft.compute(beta, "loss.beta", left.get(beta, 0.1), "" if beta in left else "the default there")
    smoothing = f"{'dpo_' if prefix else ''}label_smoothing"
    if left.get(smoothing) and draft.recipe["loss"]["name"] == "dpo":
        draft.rename(smoothing, "loss.label_smoothing")
    elif smoothing in left:
        draft.told("unsupported" if left[smoothing] else "not needed", smoothing, "", "only dpo has label smoothing")
    for key in ("b1", "alpha"):
        if key in left:
            draft.told("unsupported", key, "", "belongs to the loss bfpo")


def _put_tables(draft: Draft) -> None:
    for key in list(draft.left):
        value = draft.left[key]
        if key in PLACES and value is not None:
            draft.rename(key, PLACES[key])
        elif key in NOT_NEEDED:
            draft.told("not needed", key, "", NOT_NEEDED[key])
        elif key in UNSUPPORTED:
            harmless, why = UNSUPPORTED[key]
            nothing = value is None or value == harmless
            draft.told(
                "not needed" if nothing else "unsupported",
                key,
                "",
                "it happens anyway" if nothing and value is not None else why,
            )
        elif value is None:
            draft.told("not needed", key, "", "empty")


def _put_trainer(draft: Draft, name: str) -> None:
    left = draft.left
    if "gradient_checkpointing_kwargs" in left:
        draft.told("not needed", "gradient_checkpointing_kwargs", "", "checkpointing is always non-reentrant")
    if "warmup_ratio" in left:
        if left.get("warmup_steps"):
            draft.told("not needed", "warmup_ratio", "", "warmup_steps goes first, in transformers too")
        else:
            draft.take("warmup_steps")
            draft.compute(
                "warmup_ratio", "trainer.warmup_steps", left["warmup_ratio"], "below 1 it is a share of all steps"
            )
    if not left.get("output_dir"):
        draft.compute("output_dir", "trainer.output_dir", f"runs/{name}", "a run needs a folder")
    known = {field.name for field in fields(TrainingArguments) if field.init}
    for key in list(left):
        if key in DECIDED:
            draft.told("unsupported", key, "", DECIDED[key])
        elif key in known:
            draft.rename(key, f"trainer.{key}")
        else:
            draft.told("unsupported", key, "", "not known to bfpo, nor to transformers 5")


def _put_holdout(draft: Draft) -> None:
    """Give a recipe that evaluates something to evaluate on."""
    evaluates = draft.recipe["trainer"].get("eval_strategy", "no") != "no"
    if evaluates and not (draft.recipe.get("eval") or draft.recipe.get("holdout")):
        draft.put("holdout", HOLDOUT)
        why = "the recipe evaluates: a share of the prompts is held out"
        draft.lines.append(DraftLine("computed", "", HOLDOUT, "holdout", why))
