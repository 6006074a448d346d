"""New models with random weights and their own tokenizer, for tests and for machines without access to the hub."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from bfpo.config.recipes import NewModel


class Shape(NamedTuple):
    """Size of a Llama model."""

    hidden: int
    layers: int
    heads: int
    feed_forward: int


SHAPES: dict[str, Shape] = {
    "nano": Shape(hidden=64, layers=2, heads=4, feed_forward=192),
    "tiny": Shape(hidden=128, layers=2, heads=4, feed_forward=384),
    "small": Shape(hidden=256, layers=4, heads=4, feed_forward=768),
    "base": Shape(hidden=512, layers=8, heads=8, feed_forward=1536),
}

MAX_POSITIONS = 4096

TURN_START, TURN_END, PADDING = "<|im_start|>", "<|im_end|>", "<|pad|>"

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def new_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer with a ChatML template on texts.

    Args:
        texts: Texts to learn merges from.
        vocab_size: Maximum size of the vocabulary, special tokens included; at least 300 (256 bytes and 3 special
            tokens must fit).

    Returns:
        A tokenizer that can be saved and loaded with `AutoTokenizer`. The end-of-turn token ends a sequence.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[TURN_START, TURN_END, PADDING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=TURN_END,
        pad_token=PADDING,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def new_model(options: NewModel, tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    """Create a Llama model with random weights.

    The usual initial scale of 0.02 suits wide models; narrow ones barely learn from it. The scale here is
    0.64 / sqrt(hidden), that is 0.08 at a width of 64, which learned in experiments.

    Args:
        options: Shape and seed.
        tokenizer: Tokenizer; the size of its vocabulary is that of the embedding.

    Returns:
        The model in float32, with sampling turned on in its generation config.
    """
    config = new_config(
        options, len(tokenizer), eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=0.7,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model


def new_config(options: NewModel, vocab_size: int, **token_ids: Any) -> LlamaConfig:
    """Return the configuration of a new model.

    Args:
        options: Shape of the model.
        vocab_size: Size of the vocabulary.
        token_ids: Ids of special tokens, as in `transformers.LlamaConfig`.
    """
    shape = SHAPES[options.shape]
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        intermediate_size=shape.feed_forward,
        max_position_embeddings=MAX_POSITIONS,
        initializer_range=0.64 / shape.hidden**0.5,
        tie_word_embeddings=False,
        bos_token_id=None,
        **token_ids,
    )
