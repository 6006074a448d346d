"""What a run will need, estimated before any weight is loaded."""

from typing import NamedTuple

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase

from bfpo.config.recipes import LayoutSection, LoraSection, ModelSection, ReferenceKind
from bfpo.data.table import TokenTable
from bfpo.errors import ModelError, RecipeError
from bfpo.model.logps import CHUNK, KEPT
from bfpo.model.lora import ADAPTED, CausalLM, add_adapter, is_adapter, lora_config
from bfpo.model.new import new_model
from bfpo.model.reference_cache import wants_cache
from bfpo.model.selective import Selection, select_parameters

_BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0}


class Estimate(NamedTuple):
    """Memory of one process, in bytes, without what shards or offloads it.

    Args:
        selection: How many parameters are trained.
        weights: All weights.
        training: Gradients and the two moments of Adam, for what is trained.
        reference: The reference's copies.
        activations: A rough figure for one micro-batch, without activation checkpointing.
    """

    selection: Selection
    weights: float
    training: float
    reference: float
    activations: float

    def __str__(self) -> str:
        parts = " + ".join(
            f"{name} {value / 2**30:.2f}" for name, value in self._asdict().items() if name != "selection"
        )
        total = (self.weights + self.training + self.reference + self.activations) / 2**30
        return f"trains {self.selection}; memory of one process about {total:.2f} GiB ({parts})"


def estimate(
    section: ModelSection,
    tokenizer: PreTrainedTokenizerBase,
    *,
    train_only: list[str] | None,
    lora: LoraSection | None,
    reference: ReferenceKind | None,
    micro_batch_tokens: int,
) -> Estimate | None:
    """Return an estimate from the model's configuration alone; None when only an adapter is at hand.

    Args:
        section: The model.
        tokenizer: Its tokenizer.
        train_only: Patterns of the parameters to train.
        lora: Adapter to train instead.
        reference: What the recipe asks for; None without one (supervised fine-tuning).
        micro_batch_tokens: Tokens fed at a time, at most, padding included.

    Raises:
        ModelError: If the configuration can't be loaded, a pattern matches nothing, or a second adapter is asked for.
        RecipeError: If quantized weights would have to be trained.
    """
    if section.path is not None and is_adapter(section.path, section.revision):
        if lora is not None:
            raise ModelError(f"lora: {ADAPTED}")
        return None
    if section.load_in_4bit and lora is None:
        raise RecipeError(
            "model.load_in_4bit needs lora, or a path to an adapter: quantized weights can't be trained"
        )
    model = _empty_model(section, tokenizer)
    config = model.config.get_text_config()
    weights = _weight_bytes(model, section)
    if lora is not None:
        with init_empty_weights():
            model = add_adapter(model, lora_config(lora), seed=0)
    selection = select_parameters(model, train_only)
    copies = reference == "shared" or (reference == "auto" and lora is None and not wants_cache(model))
    per_weight = _BYTES[section.dtype]
    # peft keeps a new adapter in float32, whatever the weights are.
    per_trained = per_weight if lora is None else 4.0
    # Per token and layer about 34 bytes a hidden unit are kept for the backward pass at 16 bits (Korthikanti et al.,
    # arXiv 2205.05198), twice that at 32; the head keeps float32 logits and their gradient, all or a chunk.
    kept = micro_batch_tokens * config.num_hidden_layers * config.hidden_size * 34 * per_weight / 2
    return Estimate(
        selection=selection,
        weights=weights + (selection.trained * per_trained if lora is not None else 0.0),
        training=selection.trained * 3 * per_trained,
        reference=selection.trained * per_trained if copies else 0.0,
        activations=kept + 2 * 4 * max(CHUNK * config.vocab_size, KEPT),
    )


def _weight_bytes(model: CausalLM, section: ModelSection) -> float:
    """Return what the weights take; of a quantized model, all but its linear layers are made float32."""
    total = sum(parameter.numel() for parameter in model.parameters())
    if not section.load_in_4bit:
        return total * _BYTES[section.dtype]
    head = model.get_output_embeddings()
    layers = [module for module in model.modules() if isinstance(module, nn.Linear) and module is not head]
    quantized = sum(layer.weight.numel() for layer in layers)
    return quantized * 0.5 + (total - quantized) * 4.0


def most_tokens(table: TokenTable, examples: int, layout: LayoutSection) -> int:
    """Return how many tokens are fed at a time, at most.

    Args:
        table: What is trained on.
        examples: In a micro-batch.
        layout: How they are fed.
    """
    if layout.kind == "padded":
        return examples * table.completions * table.longest
    return min(examples * table.longest_span, max(layout.max_tokens_per_pack, table.longest_span))


def _empty_model(section: ModelSection, tokenizer: PreTrainedTokenizerBase) -> CausalLM:
    if section.new is not None:
        return new_model(section.new, tokenizer)
    try:
        config = AutoConfig.from_pretrained(
            str(section.path), revision=section.revision or "main", trust_remote_code=section.trust_remote_code
        )
        with init_empty_weights():
            model: CausalLM = AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, trust_remote_code=section.trust_remote_code
            )
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(f"model.path '{section.path}': {str(error).splitlines()[0]}") from None
    return model
