"""A tiny random model of each family whose packed and padded rows are compared."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

SIZE: dict[str, Any] = {
    "vocab_size": 250,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    # Large enough for attention to matter: at the usual 0.02 a wrong mask would hardly change the numbers.
    "initializer_range": 0.3,
}
WINDOW = {"sliding_window": 4}
MIXED = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], **WINDOW}
# The grouped matrix products of experts don't support float64.
EXPERTS = {"experts_implementation": "eager"}


def _head_dim(size: dict[str, Any]) -> int:
    return int(size["hidden_size"] // size["num_attention_heads"])


FAMILIES: dict[str, Callable[[dict[str, Any]], PreTrainedModel]] = {
    "llama": lambda size: LlamaForCausalLM(LlamaConfig(**size)),
    "mistral": lambda size: MistralForCausalLM(MistralConfig(**size, **WINDOW)),
    "qwen2": lambda size: Qwen2ForCausalLM(Qwen2Config(**size, **MIXED, use_sliding_window=True)),
    "qwen3": lambda size: Qwen3ForCausalLM(
        Qwen3Config(**size, **MIXED, use_sliding_window=True, head_dim=_head_dim(size))
    ),
    "gemma2": lambda size: Gemma2ForCausalLM(
        Gemma2Config(
            **size,
            **MIXED,
            head_dim=_head_dim(size),
            query_pre_attn_scalar=16,
            attn_logit_softcapping=2.0,
            final_logit_softcapping=5.0,
            attn_implementation="eager",
        )
    ),
    "gemma3_text": lambda size: Gemma3ForCausalLM(
        Gemma3TextConfig(**size, **MIXED, head_dim=_head_dim(size), query_pre_attn_scalar=16)
    ),
    "phi3": lambda size: Phi3ForCausalLM(Phi3Config(**size, **WINDOW)),
    "mixtral": lambda size: MixtralForCausalLM(MixtralConfig(**size, **WINDOW, **EXPERTS, num_local_experts=4)),
    "qwen3_moe": lambda size: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            **size,
            **EXPERTS,
            head_dim=_head_dim(size),
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
        )
    ),
}


def family(name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    """Return a new copy of the family's model; changes are those of `SIZE`."""
    torch.manual_seed(0)
    return FAMILIES[name](SIZE | changes).to(dtype)
