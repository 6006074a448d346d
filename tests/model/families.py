"""A tiny random model of each family whose packed and padded rows are compared."""

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

SIZE = {
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

FAMILIES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZE)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZE, **WINDOW)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZE, **MIXED, use_sliding_window=True)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZE, **MIXED, use_sliding_window=True, head_dim=8)),
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(
            **SIZE,
            **MIXED,
            head_dim=8,
            query_pre_attn_scalar=16,
            attn_logit_softcapping=2.0,
            final_logit_softcapping=5.0,
            attn_implementation="eager",
        )
    ),
    "gemma3_text": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SIZE, **MIXED, head_dim=8, query_pre_attn_scalar=16)),
    "phi3": lambda: Phi3ForCausalLM(Phi3Config(**SIZE, **WINDOW)),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SIZE, **WINDOW, **EXPERTS, num_local_experts=4)),
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**SIZE, **EXPERTS, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
    ),
}


def family(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Return a new copy of the family's model."""
    torch.manual_seed(0)
    return FAMILIES[name]().to(dtype)
