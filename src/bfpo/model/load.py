"""Loading of models and tokenizers, with errors that say what to do."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from peft import PeftConfig, PeftModel
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.hub import cached_file

from bfpo.config.recipes import ModelSection
from bfpo.errors import ModelError
from bfpo.model.lora import CausalLM, is_adapter, prepare_for_adapter, quantization_config

_FAULTS = (
    OSError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ImportError,
    RuntimeError,
    StrictDataclassError,
    SafetensorError,
    UnpicklingError,
)


def load_model(section: ModelSection) -> CausalLM:
    """Load the causal language model at `section.path`, a folder or a hub id.

    For an adapter this is its base model with the adapter on it, ready to be trained further. `section.revision` is
    then the adapter's, and the revision of the base is the one in the adapter's configuration.

    Args:
        section: Section with a `path`.

    Raises:
        ModelError: If it can't be loaded.
    """
    _check_path(str(section.path))
    path, revision, dtype = str(section.path), section.revision, getattr(torch, section.dtype)
    adapter = path if is_adapter(path, revision) else None
    options: dict[str, Any] = {"quantization_config": quantization_config(dtype)} if section.load_in_4bit else {}
    with _naming_faults(f"model '{section.path}'"):
        if adapter is not None:
            config = PeftConfig.from_pretrained(adapter, revision=section.revision)
            path, revision = str(config.base_model_name_or_path), config.revision
        model = AutoModelForCausalLM.from_pretrained(
            path,
            revision=revision or "main",
            dtype=dtype,
            attn_implementation=section.attn_implementation,
            trust_remote_code=section.trust_remote_code,
            **options,
        )
        if adapter is not None:
            return PeftModel.from_pretrained(
                prepare_for_adapter(model), adapter, is_trainable=True, revision=section.revision
            )
    assert isinstance(model, PreTrainedModel)
    return model


def load_tokenizer(section: ModelSection) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model; an adapter without one uses its base model's.

    Args:
        section: Section with a `path`.

    Raises:
        ModelError: If it can't be loaded.
    """
    _check_path(str(section.path))
    path, revision = str(section.path), section.revision
    with _naming_faults(f"tokenizer of model '{section.path}'"):
        if is_adapter(path, revision) and not _has_tokenizer(path, revision):
            config = PeftConfig.from_pretrained(path, revision=revision)
            path, revision = str(config.base_model_name_or_path), config.revision
        tokenizer = AutoTokenizer.from_pretrained(
            path, revision=revision or "main", trust_remote_code=section.trust_remote_code
        )
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return tokenizer


@contextmanager
def _naming_faults(what: str) -> Iterator[None]:
    """Turn the errors of libraries that read a damaged or hostile folder into a ModelError."""
    try:
        yield
    except _FAULTS as error:
        raise ModelError(f"{what}: {_first_line(error)}") from None
    except Exception as error:
        # tokenizers raises the base class itself.
        if type(error) is not Exception:
            raise
        raise ModelError(f"{what}: {_first_line(error)}") from None


def _has_tokenizer(path: str, revision: str | None) -> bool:
    file = cached_file(path, "tokenizer_config.json", revision=revision, _raise_exceptions_for_missing_entries=False)
    return file is not None


def _check_path(path: str) -> None:
    """Check that a path is a folder or looks like a hub id; the hub's own message would only speak of ids."""
    if not Path(path).is_dir() and (path.count("/") > 1 or path.startswith((".", "/", "~"))):
        raise ModelError(f"model '{path}': no such folder, and not a hub id (org/name)")


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
