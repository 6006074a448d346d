"""Writing a GGUF file of a model from its safetensors files, one tensor after another."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from transformers import PreTrainedConfig, PreTrainedTokenizerBase
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from bfpo.config.recipes import ModelSection
from bfpo.core.terminal import progress
from bfpo.deployment.gguf_vocabulary import read_vocabulary
from bfpo.errors import ModelError
from bfpo.model.load import empty_model

QUANTIZATIONS = ("f16", "q8_0")
_MAX_FLOAT16 = 65504.0
_Q8_0_BLOCK = 32


class _Architecture(NamedTuple):
    """How llama.cpp stores the models of a class.

    Args:
        name: Name in `gguf.MODEL_ARCH`.
        interleaves: Whether rotary embeddings turn neighboring rows of the query and key weights, not the two halves.
    """

    name: str
    interleaves: bool


# Classes whose weights llama.cpp takes as they are, up to the order of rows.
# Source: llama.cpp, conversion/llama.py and conversion/qwen.py.
ARCHITECTURES = {
    "LlamaForCausalLM": _Architecture("LLAMA", True),
    "MistralForCausalLM": _Architecture("LLAMA", True),
    "Qwen2ForCausalLM": _Architecture("QWEN2", False),
    "Qwen3ForCausalLM": _Architecture("QWEN3", False),
}


class WrittenFile(NamedTuple):
    """What a GGUF file contains.

    Args:
        types: Number of weights of each type.
        lost: What the file can't express, or rounds.
    """

    types: dict[str, int]
    lost: list[str]


def check_architecture(config: PreTrainedConfig, name: str) -> None:
    """Check that llama.cpp computes what a model computes.

    Args:
        config: Configuration of the model.
        name: Name of the model, for errors.

    Raises:
        ModelError: If its class is another than those of `ARCHITECTURES`, or it has parts that a GGUF file can't say.
    """
    settings = config.to_dict()
    kind = next(iter(settings.get("architectures") or [type(config).__name__]))
    hint = "convert it with llama.cpp's convert_hf_to_gguf.py (--converter PATH)"
    if kind not in ARCHITECTURES:
        raise ModelError(
            f"{name}: no GGUF file is written of {kind}; known: {', '.join(ARCHITECTURES)}. For others {hint}"
        )
    if settings.get("quantization_config"):
        raise ModelError(f"{name}: its weights are stored quantized; expected float32, bfloat16 or float16")
    window = settings.get("sliding_window")
    slides = (
        window is not None
        and window < settings["max_position_embeddings"]
        and settings.get("use_sliding_window", True)
    )
    rope = str((settings.get("rope_parameters") or {}).get("rope_type", "default"))
    for part, is_other in {
        f"hidden_act is {settings.get('hidden_act')}": settings.get("hidden_act") != "silu",
        f"sliding_window is {window}": slides,
        f"rope_type is {rope}": rope not in ("default", "linear", "llama3"),
        "attention_bias is true": bool(settings.get("attention_bias")),
        "mlp_bias is true": bool(settings.get("mlp_bias")),
    }.items():
        if is_other:
            raise ModelError(f"{name}: {part}, which isn't written to GGUF files here; {hint}")


def write_gguf(
    folder: Path,
    path: Path,
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    quantization: str,
    end_ids: Sequence[int],
    title: str,
    name: str,
) -> WrittenFile:
    """Write a GGUF file; see `check_architecture` for the models that it can be written of.

    Matrices are stored in the type, and vectors (norms, biases) in float32, as llama.cpp's converter does. A matrix
    whose rows aren't a multiple of 32 long is stored in float16 instead of `q8_0`.

    Args:
        folder: Folder with the model's safetensors.
        path: File to write.
        config: Configuration of the model.
        tokenizer: Tokenizer of the model.
        quantization: Type of the matrices, one of `QUANTIZATIONS`.
        end_ids: Tokens that end an answer.
        title: Name of the model in the file.
        name: Name of the model, for errors.

    Raises:
        ModelError: If the tokenizer can't be expressed, weights are missing, or a weight is too large for float16.
    """
    import gguf

    architecture = ARCHITECTURES[next(iter(config.architectures or []))]
    arch = gguf.MODEL_ARCH[architecture.name]
    vocabulary = read_vocabulary(tokenizer, int(config.vocab_size), end_ids, name)
    tensors = _list_tensors(folder, config, arch, interleaves=architecture.interleaves, name=name)
    factors = _rope_factors(config)
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch])
    kinds = {tensor.target: _kind(tensor.shape, quantization) for tensor in tensors}
    _add_settings(writer, config, quantization, title)
    vocabulary.write(writer)
    if tokenizer.chat_template is not None:
        writer.add_chat_template(_template(tokenizer, name))
    if factors is not None:
        writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
    for tensor in tensors:
        kind = kinds[tensor.target]
        block, size = gguf.GGML_QUANT_SIZES[kind]
        num_bytes = int(np.prod(tensor.shape)) // block * size
        writer.add_tensor_info(tensor.target, tensor.shape, np.dtype(np.float32), num_bytes, raw_dtype=kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if factors is not None:
            writer.write_tensor_data(factors)
        stored = set()
        with progress("writing GGUF, weights in thousands", sum(tensor.thousands for tensor in tensors)) as advance:
            for tensor in tensors:
                weights, dtype = tensor.read()
                stored.add(dtype)
                _check_range(weights, kinds[tensor.target].name, tensor.source, name)
                writer.write_tensor_data(gguf.quants.quantize(weights, kinds[tensor.target]))
                advance(tensor.thousands)
    finally:
        writer.close()
    types: dict[str, int] = {}
    for tensor in tensors:
        kind_name = kinds[tensor.target].name
        types[kind_name] = types.get(kind_name, 0) + int(np.prod(tensor.shape))
    rounded = sorted(stored - {"float16"}) if quantization == "f16" else sorted(stored)
    lost = [f"matrices rounded from {', '.join(rounded)} to {quantization}"] if rounded else []
    return WrittenFile(types, [*lost, *vocabulary.notes])


class _Tensor(NamedTuple):
    """A tensor of a model, and its place in a GGUF file.

    Args:
        source: Name in the model.
        target: Name in the file.
        file: Safetensors file that contains it.
        shape: Its shape.
        num_heads: Number of heads whose rows change their order; None if none do.
    """

    source: str
    target: str
    file: Path
    shape: tuple[int, ...]
    num_heads: int | None

    @property
    def thousands(self) -> int:
        """Size for the display of progress, in thousands of weights."""
        return max(int(np.prod(self.shape)) // 1_000, 1)

    def read(self) -> tuple[NDArray[np.float32], str]:
        """Return the weights in the order of the file, and the type that they are stored in."""
        with safe_open(self.file, framework="pt") as tensors:
            tensor = tensors.get_tensor(self.source)
        if self.num_heads is not None:
            halves = tensor.reshape(self.num_heads, 2, -1, *tensor.shape[1:])
            tensor = halves.transpose(1, 2).reshape(tensor.shape)
        return tensor.to(torch.float32).contiguous().numpy(), str(tensor.dtype).removeprefix("torch.")


def _list_tensors(
    folder: Path, config: PreTrainedConfig, arch: Any, *, interleaves: bool, name: str
) -> list[_Tensor]:
    """Return the tensors of a model, in the order of its layers."""
    import gguf

    names = gguf.get_tensor_name_map(arch, int(config.num_hidden_layers))
    files = _find_tensors(folder, name)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads} if interleaves else {}
    tensors, missing = [], []
    for source, parameter in empty_model(ModelSection(path=str(folder))).state_dict().items():
        if source == "lm_head.weight" and config.tie_word_embeddings:
            continue
        stem, _, suffix = source.rpartition(".")
        target = names.get_name(stem)
        if source not in files or target is None:
            missing.append(source)
            continue
        num_heads = heads.get(stem.rpartition(".")[2])
        tensors.append(_Tensor(source, f"{target}.{suffix}", files[source], tuple(parameter.shape), num_heads))
    if missing:
        raise ModelError(
            f"{name}: {len(missing)} weights aren't in its safetensors files, such as {missing[0]}; expected those "
            "of the class in config.json"
        )
    return tensors


def _find_tensors(folder: Path, name: str) -> dict[str, Path]:
    """Return the file of each tensor in a folder."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        places: Mapping[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {tensor: folder / file for tensor, file in places.items()}
    if not single.is_file():
        raise ModelError(
            f"{name} has no model.safetensors; save its weights as safetensors (bfpo export --to merged)"
        )
    with safe_open(single, framework="pt") as tensors:
        return dict.fromkeys(tensors.keys(), single)


def _kind(shape: Sequence[int], quantization: str) -> Any:
    from gguf import GGMLQuantizationType

    if len(shape) == 1:
        return GGMLQuantizationType.F32
    if quantization == "q8_0" and shape[-1] % _Q8_0_BLOCK == 0:
        return GGMLQuantizationType.Q8_0
    return GGMLQuantizationType.F16


def _check_range(weights: NDArray[np.float32], kind: str, tensor: str, name: str) -> None:
    # Not `> _MAX_FLOAT16`, which is False for NaN. The scales of Q8_0 are float16 too, of a 127th of the size.
    limit = {"F16": _MAX_FLOAT16, "Q8_0": 127 * _MAX_FLOAT16}.get(kind, float(np.finfo(np.float32).max))
    if not (largest := float(np.abs(weights).max())) <= limit:
        raise ModelError(f"{name}: the largest weight of {tensor} is {largest:g}; {kind} ends at {limit:g}")


def _rope_factors(config: PreTrainedConfig) -> NDArray[np.float32] | None:
    """Return by what llama.cpp divides the frequencies of Llama 3's rotary embeddings; None for other models."""
    rope: Mapping[str, Any] = config.rope_parameters
    if rope.get("rope_type") != "llama3":
        return None
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    exponents = torch.arange(0, _head_size(config), 2, dtype=torch.float32) / _head_size(config)
    factors: NDArray[np.float32] = (rope["rope_theta"] ** -exponents / frequencies).numpy()
    return factors


def _head_size(config: PreTrainedConfig) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _add_settings(writer: Any, config: PreTrainedConfig, quantization: str, title: str) -> None:
    """Add the sizes of the model."""
    import gguf

    add: dict[Callable[[Any], None], Any] = {
        writer.add_name: title,
        writer.add_type: "model",
        writer.add_file_type: gguf.LlamaFileType[f"MOSTLY_{quantization.upper()}"],
        writer.add_quantization_version: gguf.GGML_QUANT_VERSION,
        writer.add_context_length: config.max_position_embeddings,
        writer.add_block_count: config.num_hidden_layers,
        writer.add_embedding_length: config.hidden_size,
        writer.add_feed_forward_length: config.intermediate_size,
        writer.add_head_count: config.num_attention_heads,
        writer.add_head_count_kv: config.num_key_value_heads,
        writer.add_key_length: _head_size(config),
        writer.add_value_length: _head_size(config),
        writer.add_layer_norm_rms_eps: config.rms_norm_eps,
        writer.add_rope_dimension_count: _head_size(config),
        writer.add_rope_freq_base: config.rope_parameters["rope_theta"],
        writer.add_vocab_size: config.vocab_size,
    }
    for function, value in add.items():
        function(value)
    if config.rope_parameters.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope_parameters["factor"])


def _template(tokenizer: PreTrainedTokenizerBase, name: str) -> str:
    template: Any = tokenizer.chat_template
    if not isinstance(template, str):
        raise ModelError(f"{name}: it has several chat templates ({', '.join(template)}); keep the one to export")
    if "bos_token" in template and tokenizer.bos_token is None:
        raise ModelError(f"{name}: its chat template uses bos_token, and its tokenizer has none")
    return template
