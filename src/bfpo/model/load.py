"""Loading of models and tokenizers, with errors that say what to do.

A folder may come from anywhere: libraries raise errors of every class for malformed files, and all become a
`ModelError` here that names the model and, if it is known, the file.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.hub import cached_file
from transformers.utils.logging import disable_progress_bar

from bfpo.config.recipes import ModelSection, is_gguf
from bfpo.core.chain import SHARED
from bfpo.errors import BfpoError, ModelError
from bfpo.model.adapter_vocabulary import resize_to_adapter
from bfpo.model.gguf import load_gguf_config, load_gguf_model, load_gguf_tokenizer
from bfpo.model.lora import (
    CausalLM,
    activate,
    is_adapter,
    prepare_for_adapter,
    quantization_config,
    without_checkpointing_warning,
)
from bfpo.model.new import new_config
from bfpo.model.shared_adapter import RECORD, SharedAdapter, check_beside, find_shared
from bfpo.model.templates import limit_template
from bfpo.model.whole import check_whole_adapter, check_whole_model, whole_adapter

JSON_FILES = (
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    RECORD,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "model.safetensors.index.json",
)


def load_model(section: ModelSection) -> CausalLM:
    """Load the causal language model at `section.path`, a folder, a hub id or a GGUF file.

    For an adapter this is its base model with the adapter on it, ready to be trained further. `section.revision` is
    then the adapter's, and the revision of the base is the one in the adapter's configuration. If tokens were added
    for the adapter, the base's embeddings are resized to the adapter's. A model that doesn't support the attention
    implementation `sdpa` gets `eager`.

    Args:
        section: Section with a `path`.

    Raises:
        ModelError: If it can't be loaded.
    """
    path, revision, dtype = str(section.path), section.revision, getattr(torch, section.dtype)
    options: dict[str, Any] = {"quantization_config": quantization_config(dtype)} if section.load_in_4bit else {}
    with _model_errors(path, f"model '{path}'"):
        config = _adapter_config(path, revision)
        base = path if config is None else str(config.base_model_name_or_path)
        base_revision = revision if config is None else config.revision
        # With None transformers chooses sdpa if the model supports it, otherwise eager.
        attention = None if section.attn_implementation == "sdpa" else section.attn_implementation
        if is_gguf(base):
            model = load_gguf_model(base, base_revision, dtype=dtype, attn_implementation=attention)
        else:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                base,
                revision=base_revision or "main",
                dtype=dtype,
                attn_implementation=attention,
                trust_remote_code=section.trust_remote_code,
                output_loading_info=True,
                **options,
            )
            model, info = loaded
            check_whole_model(model, info, f"model '{base}'")
        if config is not None:
            has_token_rows = getattr(config, "trainable_token_indices", None) is not None
            num_tokens = len(load_tokenizer(section)) if has_token_rows else None
            resize_to_adapter(model, path, revision, num_tokens=num_tokens)
            with without_checkpointing_warning(), whole_adapter(path):
                return PeftModel.from_pretrained(
                    prepare_for_adapter(model), path, is_trainable=True, revision=revision
                )
    assert isinstance(model, PreTrainedModel)
    return model


def add_experts(model: CausalLM, adapters: Mapping[str, str]) -> PeftModel:
    """Load several adapters onto a base model, none of which is trained.

    Args:
        model: Base model.
        adapters: Name → folder or hub id of an adapter of this base; at least one. `shared` is active beside others.

    Raises:
        ModelError: If one can't be loaded, was trained beside another shared adapter, or the model has an adapter
            already.
    """
    if isinstance(model, PeftModel):
        raise ModelError(
            "steps: the model has an adapter already; path must be the base model of the steps' adapters"
        )
    adapted, shared = None, None
    if SHARED in adapters:
        with _model_errors(adapters[SHARED], f"shared adapter '{adapters[SHARED]}'"):
            shared = find_shared(adapters[SHARED])
    for name, path in adapters.items():
        with _model_errors(path, f"adapter '{path}' of the step '{name}'"), without_checkpointing_warning():
            if not is_adapter(path):
                raise ModelError(f"'{path}', the adapter of the step '{name}', has no adapter_config.json")
            if name != SHARED:
                check_beside(path, shared)
            if adapted is None:
                with whole_adapter(path):
                    adapted = PeftModel.from_pretrained(model, path, adapter_name=name)
            else:
                check_whole_adapter(path, adapted.load_adapter(path, name).missing_keys)
    assert adapted is not None
    return adapted


def add_shared(model: PeftModel, shared: SharedAdapter) -> None:
    """Load a shared adapter beside a model's own, which stays the only one that is trained and saved.

    Args:
        model: Model with one adapter, changed in place. What it saves records the shared adapter.
        shared: Adapter of the same base model.

    Raises:
        ModelError: If it can't be loaded.
    """
    path, own = shared.path, model.active_adapter
    with _model_errors(path, f"shared_adapter '{path}'"), torch.random.fork_rng(), without_checkpointing_warning():
        check_whole_adapter(path, model.load_adapter(path, SHARED).missing_keys)
    # Its own first: transformers resumes the first of the active adapters.
    activate(model, [own, SHARED])
    model.set_requires_grad(own)
    save = model.save_pretrained

    def save_own(folder: str, **options: Any) -> None:
        save(folder, selected_adapters=[own], **options)
        if options.get("is_main_process", True):
            shared.write_record(Path(folder))

    model.save_pretrained = save_own  # type: ignore[assignment]


def load_config(section: ModelSection) -> PreTrainedConfig:
    """Load the configuration of the model at `section.path`; for an adapter, that of its base model.

    Raises:
        ModelError: If it can't be loaded.
    """
    path, revision = str(section.path), section.revision
    with _model_errors(path, f"model.path '{path}'"):
        adapter_config = _adapter_config(path, revision)
        config: PreTrainedConfig = read_config(
            path if adapter_config is None else str(adapter_config.base_model_name_or_path),
            revision if adapter_config is None else adapter_config.revision,
            trust_remote_code=section.trust_remote_code,
        )
    return config


def empty_model(section: ModelSection, *, vocab_size: int | None = None) -> CausalLM:
    """Return a model of the same shape without weights (on the meta device), made from its configuration.

    Args:
        section: Section with a `path` or `new`.
        vocab_size: Size of the vocabulary of a new model; by default the one in the recipe.

    Raises:
        ModelError: If the configuration can't be loaded.
    """
    if section.new is not None:
        with torch.device("meta"):
            return LlamaForCausalLM(new_config(section.new, vocab_size or section.new.vocab_size))
    path, revision = str(section.path), section.revision
    config = load_config(section)
    with _model_errors(path, f"model.path '{path}'"):
        adapter_config = _adapter_config(path, revision)
        # `init_empty_weights` of accelerate would untie tied weights.
        with torch.device("meta"), without_checkpointing_warning():
            model: CausalLM = AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, trust_remote_code=section.trust_remote_code
            )
            if adapter_config is not None:
                # Saved configurations are for inference, in which nothing is trained.
                adapter_config.inference_mode = False
                model = get_peft_model(model, adapter_config)
    return model


def read_config(path: str, revision: str | None, *, trust_remote_code: bool = False) -> Any:
    """Return the configuration of a whole model, without turning errors into `ModelError`.

    Args:
        path: Folder, hub id or GGUF file.
        revision: Hub revision.
        trust_remote_code: Whether to run code that comes with the model.
    """
    if is_gguf(path):
        return load_gguf_config(path, revision)
    return AutoConfig.from_pretrained(path, revision=revision or "main", trust_remote_code=trust_remote_code)


def load_tokenizer(section: ModelSection) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model; an adapter without one uses its base model's.

    Its chat template is checked and limited; see `limit_template`.

    Args:
        section: Section with a `path`.

    Raises:
        ModelError: If it can't be loaded, or its chat template is broken.
    """
    path, revision = str(section.path), section.revision
    with _model_errors(path, f"tokenizer of model '{path}'"):
        if is_adapter(path, revision) and not _has_tokenizer(path, revision):
            config = PeftConfig.from_pretrained(path, revision=revision)
            path, revision = str(config.base_model_name_or_path), config.revision
        if is_gguf(path):
            tokenizer = load_gguf_tokenizer(path, revision)
        else:
            tokenizer = AutoTokenizer.from_pretrained(
                path, revision=revision or "main", trust_remote_code=section.trust_remote_code
            )
        # Settings of wrong types, such as a length that is an object, raise only when the tokenizer is used.
        tokenizer("a", add_special_tokens=False)
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    limit_template(tokenizer)
    return tokenizer


def _adapter_config(path: str, revision: str | None) -> Any:
    """Return the configuration of an adapter to use alone; None if there is a whole model at the path."""
    if not is_adapter(path, revision):
        return None
    check_beside(path, None, revision)
    return PeftConfig.from_pretrained(path, revision=revision)


def _has_tokenizer(path: str, revision: str | None) -> bool:
    file = cached_file(path, "tokenizer_config.json", revision=revision, _raise_exceptions_for_missing_entries=False)
    return file is not None


@contextmanager
def _model_errors(path: str, name: str) -> Iterator[None]:
    """Turn any error of loading into a `ModelError`.

    Args:
        path: Folder or hub id.
        name: Name of what is loaded, for the message.
    """
    # transformers' bars for loading weights would break the lines of a command.
    disable_progress_bar()
    folder = Path(path)
    _check_path(path)
    _check_json_files(folder)
    try:
        yield
    except (BfpoError, torch.OutOfMemoryError):
        raise
    # Not narrower: malformed files make the libraries raise errors of every class, tokenizers a plain Exception.
    except Exception as error:
        raise ModelError(f"{name}: {_reason(error, folder)}") from error


def _check_path(path: str) -> None:
    """Check that a path is a folder or looks like a hub id; the hub's own message would only speak of ids."""
    if is_gguf(path):
        return
    if Path(path).is_file():
        raise ModelError(f"model '{path}' is a file; name its folder")
    if not Path(path).is_dir() and (path.count("/") > 1 or path.startswith((".", "/", "~"))):
        raise ModelError(f"model '{path}': no such folder, and not a hub id (org/name)")


def _check_json_files(folder: Path) -> None:
    for file in (folder / name for name in JSON_FILES if (folder / name).is_file()):
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ModelError(f"{file}: not JSON ({_first_line(error)})") from None
        if not isinstance(content, dict):
            raise ModelError(f"{file}: {type(content).__name__}; expected a JSON object")


def _reason(error: Exception, folder: Path) -> str:
    """Return the first line of an error, with the file and the error's class where it doesn't name them."""
    reason = _first_line(error)
    if "trust_remote_code" in str(error):
        # transformers names its own argument.
        return f"{reason}; to run that code, if you trust it: `trust_remote_code`"
    if isinstance(error, UnpicklingError):
        files = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
        return (
            f"{', '.join(files) or 'its weights'}: a pickle that isn't only weights, so it could run code and is not "
            "loaded; save the weights as safetensors"
        )
    if not isinstance(error, OSError | ValueError | ImportError):
        reason = f"{type(error).__name__}: {reason}"
    if "tokenizer.json" not in reason and _is_damaged(folder / "tokenizer.json"):
        reason = f"tokenizer.json: {reason}"
    return reason


def _is_damaged(tokenizer_file: Path) -> bool:
    if not tokenizer_file.is_file():
        return False
    try:
        Tokenizer.from_file(str(tokenizer_file))
    # The only class that tokenizers has.
    except Exception:
        return True
    return False


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
