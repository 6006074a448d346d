"""Tiny models of the classes that are written to GGUF, and tokenizers of the kinds."""

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

ROPE = {
    "llama3": {
        **{"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0},
        **{"high_freq_factor": 4.0, "original_max_position_embeddings": 64},
    },
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
}


def sizes(tokenizer, **changes):
    return {
        **{"vocab_size": len(tokenizer) + 3, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
        **{"num_key_value_heads": 2, "intermediate_size": 96, "max_position_embeddings": 512},
        **{"eos_token_id": tokenizer.eos_token_id, "bos_token_id": None, "pad_token_id": tokenizer.pad_token_id},
        **{"initializer_range": 0.1, "rms_norm_eps": 1e-5},
        **changes,
    }


FAMILIES = {
    "llama": lambda t: LlamaForCausalLM(LlamaConfig(**sizes(t))),
    "tied": lambda t: LlamaForCausalLM(LlamaConfig(**sizes(t, tie_word_embeddings=True))),
    "wide heads": lambda t: LlamaForCausalLM(LlamaConfig(**sizes(t, head_dim=32))),
    "llama3 rope": lambda t: LlamaForCausalLM(LlamaConfig(**sizes(t, rope_parameters=ROPE["llama3"]))),
    "linear rope": lambda t: LlamaForCausalLM(LlamaConfig(**sizes(t, rope_parameters=ROPE["linear"]))),
    "mistral": lambda t: MistralForCausalLM(MistralConfig(**sizes(t), sliding_window=None)),
    "qwen2": lambda t: Qwen2ForCausalLM(Qwen2Config(**sizes(t))),
    "qwen3": lambda t: Qwen3ForCausalLM(Qwen3Config(**sizes(t, head_dim=128))),
}


def make(name, tokenizer):
    torch.manual_seed(0)
    return FAMILIES[name](tokenizer)


SPLITS = {
    "gpt-2": (None, False),
    "smollm": ("digits", False),
    "llama-bpe": (r"\p{N}{1,3}", True),
    "smaug-bpe": (r"\p{N}{1,3}", False),
    "qwen2": (r"\p{N}", False),
}


def train(pre, *, ignores_merges=False, normalizer=None, **special):
    bpe = Tokenizer(models.BPE(ignore_merges=ignores_merges))
    bpe.pre_tokenizer, bpe.normalizer = pre, normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    names = list(special.values()) or ["<|end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=names, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(["a small red box near 1234 doors, don't", "café naïve\n\n x==y"] * 5, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, **(special or {"eos_token": "<|end|>"}))


def pre_tokenizer(kind):
    if kind is None:
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if kind == "digits":
        return pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    regex = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
        + kind
        + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    split = pre_tokenizers.Split(Regex(regex), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def sentencepiece(prepends=True, metaspace=None):
    """Return a tokenizer like Llama 2's, whose merges are those of its vocabulary."""
    words = [
        "▁a",
        "▁s",
        "▁sm",
        "▁sma",
        "▁smal",
        "▁small",
        "re",
        "red",
        "▁red",
        "▁r",
        "ed",
        "bo",
        "box",
        "▁box",
        "▁b",
        "ox",
    ]
    letters = sorted(set("".join(words)) | set("abcdefghijklmnopqrstuvwxyz.,"))
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words, *letters]
    vocab = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    merges = [(w[:i], w[i:]) for w in words for i in range(1, len(w)) if w[:i] in vocab and w[i:] in vocab]
    bpe = Tokenizer(models.BPE(vocab, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    parts = [normalizers.Prepend("▁")] if prepends else []
    bpe.normalizer = normalizers.Sequence([*parts, normalizers.Replace(" ", "▁")])
    if metaspace is not None:
        bpe.normalizer = None
        bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=metaspace, split=False)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
