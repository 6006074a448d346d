"""The work of `bfpo export`: from a checkpoint to files that other programs run."""

import os
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from bfpo.config.recipes import ModelSection, is_gguf
from bfpo.core.environment import installed_version, versions
from bfpo.core.files import write_json
from bfpo.core.terminal import say, timed
from bfpo.deployment.gguf_export import GgufOptions, check_gguf, write_files
from bfpo.deployment.lora_adapter import export_adapter, say_how_to_serve
from bfpo.errors import ModelError, RecipeError, did_you_mean
from bfpo.generation.in_process import checkpoint_identity
from bfpo.model.load import load_config, load_model, load_tokenizer
from bfpo.model.lora import is_adapter
from bfpo.model.merge import DTYPES, check_adapter, merge_checkpoint
from bfpo.model.save import check_out, save_checkpoint

FORMS = ("merged", "adapter", "gguf")
RECORD = "export.json"


def export_checkpoint(
    checkpoint: Path,
    out: Path,
    *,
    to: str,
    dtype: str | None = None,
    gguf: GgufOptions | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Export a model or a LoRA adapter; `export.json` in the folder says from what, with what and what was lost.

    The folder is written under a temporary name and renamed, so that `out` is never incomplete.

    Args:
        checkpoint: Folder of a model or a LoRA adapter.
        out: Output folder; must be empty or not exist yet.
        to: One of `FORMS`: `merged` for a model in safetensors, `adapter` for a LoRA adapter that vLLM loads beside
            its base model, `gguf` for a file for llama.cpp and Ollama.
        dtype: Type of the weights, one of `DTYPES`; by default float32 for a merged adapter, and else their own.
        gguf: Settings of `gguf`.
        trust_remote_code: Whether to run code that comes with the model.

    Raises:
        RecipeError: If an argument isn't allowed, or doesn't belong to `to`.
        ModelError: If the checkpoint can't be exported to this form, or `out` isn't empty.
        MissingExtra: If the package `gguf` is needed and isn't installed.
        ExportMismatch: If a GGUF file was written that encodes prompts as other tokens.
    """
    if to not in FORMS:
        raise RecipeError(f"`to` is '{to}'; {did_you_mean(to, list(FORMS))}")
    if dtype is not None and to == "gguf":
        raise RecipeError("`dtype` is for merged and adapter; the type of a GGUF file is `quantize`")
    if gguf is not None and to != "gguf":
        raise RecipeError(f"`quantize` and `converter` are for gguf, and `to` is '{to}'")
    if dtype is not None and dtype not in DTYPES:
        raise RecipeError(f"`dtype` is '{dtype}'; expected one of {', '.join(DTYPES)}")
    check_out(out)
    _check_folder(checkpoint)
    with_adapter = is_adapter(str(checkpoint))
    if to == "adapter" and not with_adapter:
        raise ModelError(
            f"'{checkpoint}' contains a whole model, as a training of all weights or with train_only saves it; "
            "export it to merged or gguf"
        )
    if to == "adapter":
        with _temporary(out) as temporary:
            lost = export_adapter(checkpoint, temporary / "files", dtype=dtype)
            write_json(temporary / "files" / RECORD, _record(checkpoint, to) | {"lost": lost})
            (temporary / "files").replace(out.resolve())
        say_how_to_serve(out)
        return
    if with_adapter:
        check_adapter(checkpoint, trust_remote_code=trust_remote_code)
    if to == "gguf":
        _export_gguf(checkpoint, out, gguf or GgufOptions(), trust_remote_code=trust_remote_code)
    elif with_adapter:
        dtype = dtype or "float32"
        lost = [] if dtype == "float32" else [f"weights rounded from float32 to {dtype}"]
        records = {RECORD: _record(checkpoint, to) | {"lost": lost}}
        merge_checkpoint(checkpoint, out, dtype=dtype, trust_remote_code=trust_remote_code, records=records)
    else:
        _copy_model(checkpoint, out, dtype, trust_remote_code=trust_remote_code)


def _record(checkpoint: Path, to: str) -> dict[str, Any]:
    """Return what `export.json` says of every export."""
    try:
        identity = checkpoint_identity(str(checkpoint))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"'{checkpoint}': its base model can't be read: {next(iter(str(error).splitlines()), '')}"
        ) from None
    return {
        "to": to,
        "source": {"path": str(checkpoint), "identity": identity},
        "versions": versions() | {package: installed_version(package) for package in ("peft", "gguf", "xllamacpp")},
    }


def _export_gguf(checkpoint: Path, out: Path, options: GgufOptions, *, trust_remote_code: bool) -> None:
    options.check()
    title = out.resolve().name
    with _temporary(out) as temporary:
        source = checkpoint
        if is_adapter(str(checkpoint)):
            source = temporary / "merged"
            merge_checkpoint(checkpoint, source, trust_remote_code=trust_remote_code)
        with timed("writing the GGUF file"):
            written = write_files(
                source,
                temporary / "files",
                options,
                title=title,
                name=f"'{checkpoint}'",
                trust_remote_code=trust_remote_code,
            )
        record = _record(checkpoint, "gguf") | written.record
        write_json(temporary / "files" / RECORD, record)
        (temporary / "files").replace(out.resolve())
    say(f"wrote {out / written.file} ({options.quantization}) and {out / 'Modelfile'}")
    for loss in written.record["lost"]:
        say(f"note: {loss}")
    run = shlex.join(["llama-cli", "-m", str(out / written.file)])
    create = shlex.join(["ollama", "create", title, "-f", str(out / "Modelfile")])
    say(f"llama.cpp: {run}; Ollama: {create}")
    if options.check_answers:
        # After the renaming: the comparison may take long, and an interrupted one must not lose the file.
        check_gguf(checkpoint, out, written, record, out / RECORD, trust_remote_code=trust_remote_code)


def _check_folder(checkpoint: Path) -> None:
    if is_gguf(str(checkpoint)):
        raise ModelError(f"'{checkpoint}' is a GGUF file already; bfpo model import makes a folder of it")
    if not checkpoint.is_dir():
        raise ModelError(f"'{checkpoint}': no such folder; expected a run's output folder or a checkpoint in it")
    if not is_adapter(str(checkpoint)) and not (checkpoint / "config.json").is_file():
        raise ModelError(
            f"'{checkpoint}' contains no model; expected a folder with config.json or adapter_config.json"
        )


def _copy_model(checkpoint: Path, out: Path, dtype: str | None, *, trust_remote_code: bool) -> None:
    """Save a whole model as safetensors in a type."""
    section = ModelSection(path=str(checkpoint), trust_remote_code=trust_remote_code)
    config = load_config(section)
    if getattr(config, "quantization_config", None):
        raise ModelError(f"'{checkpoint}': its weights are stored quantized; expected {', '.join(DTYPES)}")
    kind = next(iter(config.architectures or []), type(config).__name__)
    if "ForCausalLM" not in kind and "ForConditionalGeneration" not in kind:
        raise ModelError(f"'{checkpoint}' contains a {kind}; expected a causal language model, which answers prompts")
    own = str(config.dtype or torch.float32).removeprefix("torch.")
    if (dtype or own) not in DTYPES:
        raise ModelError(
            f"'{checkpoint}': its weights are {own}; name the type to save ({', '.join(DTYPES)}) as `dtype`"
        )
    model = load_model(section.model_copy(update={"dtype": dtype or own}))
    assert isinstance(model, PreTrainedModel)
    lost = [] if dtype in (None, own, "float32") else [f"weights rounded from {own} to {dtype}"]
    save_checkpoint(model, load_tokenizer(section), out, {RECORD: _record(checkpoint, "merged") | {"lost": lost}})
    say(f"copied into {out} ({dtype or own})")


@contextmanager
def _temporary(out: Path) -> Iterator[Path]:
    """Yield a new folder beside an output folder, and remove what is left of it."""
    target = out.resolve()
    folder = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
