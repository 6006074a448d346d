"""Loading models and tokenizers with errors that a person can act on."""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from bfpo.errors import ModelError
from bfpo.recipe import SftModel


def load_model(section: SftModel) -> PreTrainedModel:
    """Load the causal language model of `section.path`, a folder or a hub id.

    Raises:
        ModelError: If it can't be loaded.
    """
    try:
        model = AutoModelForCausalLM.from_pretrained(
            str(section.path),
            revision=section.revision or "main",
            dtype=getattr(torch, section.dtype),
            attn_implementation=section.attn_implementation,
            trust_remote_code=section.trust_remote_code,
        )
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(f"model.path '{section.path}': {_first_line(error)}") from None
    assert isinstance(model, PreTrainedModel)
    return model


def load_tokenizer(section: SftModel) -> PreTrainedTokenizerBase:
    """Load the tokenizer that comes with a model.

    Raises:
        ModelError: If it can't be loaded.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(section.path), revision=section.revision or "main", trust_remote_code=section.trust_remote_code
        )
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(f"tokenizer of model.path '{section.path}': {_first_line(error)}") from None
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return tokenizer


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
