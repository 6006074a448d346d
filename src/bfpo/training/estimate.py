"""Memory of a run, estimated before any weights are loaded."""

from typing import Literal, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from bfpo.config.recipes import LayoutSection, LoraSection, ModelSection, ReferenceKind
from bfpo.data.table import TokenTable
from bfpo.model.load import empty_model
from bfpo.model.logps import MAX_KEPT_LOGITS, chunk_size
from bfpo.model.lora import CausalLM, add_adapter, is_adapter, lora_config
from bfpo.model.reference_cache import prefers_cache
from bfpo.model.score_heads import add_score_heads
from bfpo.model.selective import Selection, select_parameters

_BYTES_PER_WEIGHT = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0}


class Estimate(NamedTuple):
    """Memory of one process in bytes, without sharding or offloading.

    Args:
        selection: Number of trained parameters.
        weights: All weights.
        training: Gradients and the two moments of Adam of the trained parameters.
        reference: Copies for the reference.
        activations: Rough estimate for one micro-batch without activation checkpointing.
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
    heads: int | None = None,
) -> Estimate | None:
    """Return an estimate that needs only the model's configuration; None if the model is an adapter.

    Args:
        section: Recipe section of the model.
        tokenizer: Tokenizer of the model.
        train_only: Patterns of the parameters to train.
        lora: New adapter to train instead.
        reference: Kind of reference of the recipe; None for supervised fine-tuning.
        micro_batch_tokens: Maximum number of tokens fed at a time, padding included.
        heads: Number of score heads in place of the language-model head; None for a language model.

    Raises:
        ModelError: If the configuration can't be loaded, or a pattern matches no parameter.
    """
    if section.path is not None and is_adapter(section.path, section.revision):
        return None
    model = empty_model(section, vocab_size=len(tokenizer))
    if heads is not None:
        model = add_score_heads(model, heads, pad_id=None, seed=0)
    config = model.config.get_text_config()
    weights = _weight_bytes(model, section)
    if lora is not None:
        with torch.device("meta"):
            task_type: Literal["CAUSAL_LM", "SEQ_CLS"] = "CAUSAL_LM" if heads is None else "SEQ_CLS"
            model = add_adapter(model, lora_config(lora, task_type=task_type), seed=0)
    selection = select_parameters(model, train_only)
    copies = reference == "shared" or (reference == "auto" and lora is None and not prefers_cache(model))
    per_weight = _BYTES_PER_WEIGHT[section.dtype]
    # peft keeps a new adapter in float32, whatever the type of the weights.
    per_trained = per_weight if lora is None else 4.0
    # Per token, layer and hidden unit about 34 bytes are kept for the backward pass at 16 bits (Korthikanti et al.,
    # arXiv 2205.05198), twice that at 32; the head keeps float32 logits and their gradient, all or a chunk.
    hidden_states = micro_batch_tokens * config.num_hidden_layers * config.hidden_size * 34 * per_weight / 2
    logits = (
        0
        if heads is not None
        else max(chunk_size(config.vocab_size, MAX_KEPT_LOGITS) * config.vocab_size, MAX_KEPT_LOGITS)
    )
    return Estimate(
        selection=selection,
        weights=weights + (selection.trained * per_trained if lora is not None else 0.0),
        training=selection.trained * 3 * per_trained,
        reference=selection.trained * per_trained if copies else 0.0,
        activations=hidden_states + 2 * 4 * logits,
    )


def _weight_bytes(model: CausalLM, section: ModelSection) -> float:
    """Return the memory of the weights; all but the linear layers of a quantized model are float32."""
    total = sum(parameter.numel() for parameter in model.parameters())
    if not section.load_in_4bit:
        return total * _BYTES_PER_WEIGHT[section.dtype]
    head = model.get_output_embeddings()
    layers = [module for module in model.modules() if isinstance(module, nn.Linear) and module is not head]
    quantized = sum(layer.weight.numel() for layer in layers)
    return quantized * 0.5 + (total - quantized) * 4.0


def max_micro_batch_tokens(table: TokenTable, examples: int, layout: LayoutSection) -> int:
    """Return the maximum number of tokens fed at a time.

    Args:
        table: Training data.
        examples: Number of examples in a micro-batch.
        layout: How tokens are fed.
    """
    if layout.kind == "padded":
        return examples * table.completions * table.longest
    return min(examples * table.longest_span, max(layout.max_tokens_per_pack, table.longest_span))
