"""Exporting to GGUF: the file with its `Modelfile`, and the comparison of its answers with those of the source."""

import gc
import subprocess
import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from bfpo.config.recipes import ModelSection
from bfpo.core.files import file_hash, file_name, write_json, write_text
from bfpo.core.terminal import say, show_table, timed, warn
from bfpo.deployment import llama_cpp
from bfpo.deployment.answers import (
    MAX_NEW_TOKENS,
    PROMPTS,
    Agreement,
    Answered,
    answer_prompts,
    compare_answers,
    encode_prompts,
)
from bfpo.deployment.gguf_file import QUANTIZATIONS, check_architecture, write_gguf
from bfpo.deployment.ollama import make_modelfile
from bfpo.errors import ExportMismatch, MissingExtra, ModelError, RecipeError
from bfpo.model.gguf import load_gguf_model, load_gguf_tokenizer, read_summary
from bfpo.model.load import load_config, load_model, load_tokenizer
from bfpo.model.lora import CausalLM

# Rounding to 8 bits changes the log-probability of a token by a few hundredths; a wrong weight or rule by more.
_LARGE_GAP = 1.0


@dataclass(frozen=True)
class GgufOptions:
    """Settings of an export to GGUF.

    Args:
        quantization: Type of the matrices.
        converter: llama.cpp's convert_hf_to_gguf.py, which writes the file instead.
        check_answers: Whether to compare answers of the file with those of its source.
    """

    quantization: str = "f16"
    converter: Path | None = None
    check_answers: bool = True

    def check(self) -> None:
        """Check the settings.

        Raises:
            RecipeError: If the type is unknown, or there is no such converter.
            MissingExtra: If the package `gguf` isn't installed.
        """
        if self.quantization not in QUANTIZATIONS:
            raise RecipeError(f"`quantize` is '{self.quantization}'; expected one of {', '.join(QUANTIZATIONS)}")
        if self.converter is not None and not self.converter.is_file():
            raise RecipeError(f"`converter` is '{self.converter}': no such file; expected convert_hf_to_gguf.py")
        if find_spec("gguf") is None:
            raise MissingExtra("an export to GGUF", "gguf", "gguf")


class WrittenFiles(NamedTuple):
    """What was written of a model.

    Args:
        file: Name of the GGUF file.
        end_ids: Tokens that end an answer.
        rope_parameters: Parameters of the model's rotary embeddings.
        record: What `export.json` says of the file.
    """

    file: str
    end_ids: list[int]
    rope_parameters: dict[str, Any] | None
    record: dict[str, Any]


def write_files(
    source: Path, folder: Path, options: GgufOptions, *, title: str, name: str, trust_remote_code: bool = False
) -> WrittenFiles:
    """Write the GGUF file of a model and its `Modelfile` into a new folder.

    Args:
        source: Folder of a whole model.
        folder: Folder to write.
        options: Settings.
        title: Name of the model.
        name: Name of the checkpoint, for errors.
        trust_remote_code: Whether to run code that comes with the model.

    Raises:
        ModelError: If the model can't be written as a GGUF file, or the converter fails.
    """
    section = ModelSection(path=str(source), trust_remote_code=trust_remote_code)
    config, tokenizer = load_config(section), load_tokenizer(section)
    end_ids = _end_ids(source, tokenizer, name)
    folder.mkdir(parents=True)
    path = folder / f"{file_name(title)}-{options.quantization}.gguf"
    if options.converter is not None:
        _run_converter(options.converter, source, path, options.quantization, name)
        types, lost = read_summary(path).types, ["what the converter left out, if anything"]
    else:
        check_architecture(config, name)
        types, lost = write_gguf(
            source,
            path,
            config,
            tokenizer,
            quantization=options.quantization,
            end_ids=end_ids,
            title=title,
            name=name,
        )
    modelfile, reason = make_modelfile(path.name, tokenizer, end_ids)
    write_text(folder / "Modelfile", modelfile)
    if reason is not None:
        say(f"note: the Modelfile has no TEMPLATE, because the chat template can't be translated exactly: {reason}")
    record = {
        "quantization": options.quantization,
        "file": {"name": path.name, "sha256": file_hash(path), "types": types},
        "lost": lost,
        "modelfile_template": reason is None,
    }
    return WrittenFiles(path.name, end_ids, _scaled_rope(config), record)


def check_gguf(
    checkpoint: Path,
    out: Path,
    written: WrittenFiles,
    record: dict[str, Any],
    record_file: Path,
    *,
    trust_remote_code: bool = False,
) -> None:
    """Compare greedy answers of a GGUF file with those of its source, print them and add them to `export.json`.

    The file is run by transformers, if it knows the architecture, and by llama.cpp, if `xllamacpp` is installed.

    Args:
        checkpoint: Folder of the source, a model or an adapter.
        out: Folder of the file.
        written: What was written.
        record: Content of `export.json` so far.
        record_file: `export.json`.
        trust_remote_code: Whether to run code that comes with the source.

    Raises:
        ExportMismatch: If the file encodes prompts as other tokens than its source.
    """
    file, end_ids = out / written.file, written.end_ids
    section = ModelSection(path=str(checkpoint), trust_remote_code=trust_remote_code)
    prompts = encode_prompts(tokenizer := load_tokenizer(section))
    with timed("answering with the source"):
        source = Answered(prompts, answer_prompts(_place(load_model(section)), prompts, end_ids))
    gc.collect()
    agreements: dict[str, Agreement] = {}
    model = None
    try:
        model = _place(
            load_gguf_model(
                str(file), dtype=torch.float32, attn_implementation=None, rope_parameters=written.rope_parameters
            )
        )
        own_prompts = encode_prompts(load_gguf_tokenizer(str(file)))
        with timed("answering with the file, by transformers"):
            answered = Answered(own_prompts, answer_prompts(model, own_prompts, end_ids))
        agreements["transformers"] = compare_answers(source, answered, end_ids, model)
    except ModelError as error:
        say(f"note: not compared by transformers: {error}")
    if llama_cpp.is_installed():
        context = max(map(len, prompts)) * 2 + MAX_NEW_TOKENS
        has_template = tokenizer.chat_template is not None
        with timed("answering with the file, by llama.cpp"):
            answered = llama_cpp.answer_with_llama_cpp(file, has_template=has_template, context=context)
        agreements["llama.cpp"] = compare_answers(source, answered, end_ids, model)
    else:
        say("note: not compared by llama.cpp; pip install 'bfpo[llama-cpp]'")
    checked = {
        "prompts": list(PROMPTS),
        "max_new_tokens": MAX_NEW_TOKENS,
        "agreement": {engine: agreement.to_json() for engine, agreement in agreements.items()},
    }
    write_json(record_file, record | {"check": checked})
    _show(agreements, [len(answer) for answer in source.answers])
    unlike = [
        f"{engine} ({a.answers - a.equal_prompts} of {a.answers})"
        for engine, a in agreements.items()
        if a.equal_prompts < a.answers
    ]
    if unlike:
        raise ExportMismatch(
            f"{file}: prompts are encoded as other tokens than by the source, by {' and '.join(unlike)}; the file is "
            "there, but its answers aren't those of the model"
        )


def _show(agreements: dict[str, Agreement], lengths: Sequence[int]) -> None:
    """Print where answers differ first."""
    if not agreements:
        return
    cells = {
        engine: {
            difference.prompt: f"{difference.position}"
            + ("" if difference.gap is None else f" ({difference.gap:.3f})")
            for difference in agreement.differences
        }
        for engine, agreement in agreements.items()
    }
    rows = [
        [" ".join(prompt.split())[:48], length, *(cells[engine].get(number, "equal") for engine in agreements)]
        for number, (prompt, length) in enumerate(zip(PROMPTS, lengths, strict=True))
    ]
    title = "First token at which the file's answer differs from the source's (gap between the two, nats)"
    show_table(title, ["prompt", "tokens", *agreements], rows)
    for engine, agreement in agreements.items():
        say(
            f"{engine}: {agreement.equal_answers} of {agreement.answers} answers are equal; "
            f"{agreement.token_agreement:.1%} of the tokens come before the first difference"
        )
        largest = max((each.gap for each in agreement.differences if each.gap is not None), default=0.0)
        if largest > _LARGE_GAP:
            apart = f"an answer differs where the tokens are {largest:.1f} nats apart"
            warn(f"{engine}: {apart}, which rounding doesn't explain")


def _place(model: CausalLM) -> CausalLM:
    """Return a model on the GPU if there is one."""
    torch.nn.Module.to(model, "cuda" if torch.cuda.is_available() else "cpu")
    return model


def _end_ids(folder: Path, tokenizer: PreTrainedTokenizerBase, name: str) -> list[int]:
    """Return the tokens that end an answer, that of the tokenizer first."""
    ids = [tokenizer.eos_token_id]
    if (folder / "generation_config.json").is_file():
        ends = GenerationConfig.from_pretrained(folder).eos_token_id
        ids += ends if isinstance(ends, list) else [ends]
    if not (found := list(dict.fromkeys(int(token) for token in ids if token is not None))):
        raise ModelError(f"{name}: neither the tokenizer nor generation_config.json has an end token (eos_token_id)")
    return found


def _scaled_rope(config: PreTrainedConfig) -> dict[str, Any] | None:
    """Return the parameters of rotary embeddings that transformers doesn't read from a GGUF file."""
    rope = getattr(config, "rope_parameters", None)
    return dict(rope) if rope and rope.get("rope_type", "default") != "default" else None


def _run_converter(converter: Path, source: Path, path: Path, quantization: str, name: str) -> None:
    """Write a file with llama.cpp's script, whose output is printed as it comes."""
    command = [sys.executable, str(converter), str(source), "--outfile", str(path), "--outtype", quantization]
    last: deque[str] = deque(maxlen=10)
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8", errors="replace"
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            last.append(line.rstrip())
            say(f"{converter.name}: {line.rstrip()}")
    if process.returncode or not path.is_file():
        raise ModelError(
            f"{name}: {converter} exited with {process.returncode} and "
            f"{'wrote' if path.is_file() else 'without'} a file; its last lines: {' | '.join(last) or 'none'}"
        )
