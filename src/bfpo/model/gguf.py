"""Models in GGUF files: finding, checking and loading them.

A GGUF file contains weights, configuration, tokenizer and chat template. Its weights are usually quantized; they are
dequantized when they are loaded, and the model is then an ordinary one of transformers.
"""

import json
import mmap
import struct
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.hub import cached_file

from bfpo.config.recipes import is_gguf
from bfpo.core.files import file_hash
from bfpo.core.terminal import say
from bfpo.errors import MissingExtra, ModelError
from bfpo.model.whole import check_whole_model

_FLOATS = ("F32", "F16", "BF16", "F64")
# Names of GGUF architectures for which transformers has another one.
_ALIASES = {"qwen2moe": "qwen2_moe", "qwen3moe": "qwen3_moe", "gpt-oss": "gpt_oss", "minimax-m2": "minimax_m2"}
# A file's tokenizer names its rule for splitting text before the merges. transformers applies GPT-2's rule where it
# doesn't know the name; models of this one split off single digits first.
_DIGITS_FIRST = {"smollm"}
# Rules by which a piece of text that is a token isn't merged from characters, which transformers doesn't read.
_IGNORE_MERGES = {"llama3", "llama-v3", "llama-bpe"}
# Types of values in a header that have a fixed size; the others are text (8) and array (9).
_TEXT, _ARRAY = 8, 9
_NUMBERS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}


class GgufSummary(NamedTuple):
    """Content of a GGUF file's header.

    Args:
        architecture: Name of the architecture.
        types: Number of weights that are stored in each type, most frequent first.
        bits: Bits per weight of each type.
        has_rope_factors: Whether the file has factors of the rotary embeddings, which transformers ignores.
        splitting: Name of the tokenizer's rule for splitting text; None if the file names none.
        num_tokens: Number of tokens of the tokenizer; 0 if the file has none.
    """

    architecture: str
    types: dict[str, int]
    bits: dict[str, float]
    has_rope_factors: bool
    splitting: str | None
    num_tokens: int

    @property
    def quantized_share(self) -> float:
        """Share of the weights that are stored in a quantized type."""
        floats = sum(self.types.get(name, 0) for name in _FLOATS)
        return 1 - floats / max(sum(self.types.values()), 1)


def find_gguf(path: str, revision: str | None = None) -> Path:
    """Return the local file that a path names; a file on the hub is downloaded.

    Args:
        path: File, or `org/name/file.gguf` on the hub.
        revision: Hub revision.

    Raises:
        ModelError: If there is no such file.
    """
    file = Path(path)
    if file.is_file():
        return file.resolve()
    others = sorted(other.name for other in file.parent.glob("*.gguf")) if file.parent.is_dir() else []
    contents = f"; {file.parent} contains {', '.join(others[:5])}" if others else ""
    org, _, rest = path.partition("/")
    name, _, inner = rest.partition("/")
    if others or not inner or path.startswith((".", "/", "~")):
        raise ModelError(f"model '{path}': no such file{contents}")
    try:
        downloaded = cached_file(f"{org}/{name}", inner, revision=revision)
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ModelError(
            f"model '{path}': no such file, and none of the hub repository {org}/{name}: {reason}"
        ) from None
    return Path(str(downloaded)).resolve()


def read_summary(file: Path) -> GgufSummary:
    """Read and check a file's header.

    Raises:
        MissingExtra: If the package `gguf` isn't installed.
        ModelError: If it isn't a GGUF file, is cut or split, or has an architecture that transformers can't read.
    """
    if find_spec("gguf") is None:
        raise MissingExtra(f"model '{file}'", "gguf", "gguf")
    with file.open("rb") as opened:
        if opened.read(4) != b"GGUF":
            raise ModelError(f"{file}: not a GGUF file (it doesn't begin with the bytes 'GGUF')")
        with mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
            try:
                header = _Header(content)
            except struct.error:
                raise ModelError(f"{file}: cut: it ends within its header") from None
            except (ValueError, TypeError, OverflowError, MemoryError, RecursionError) as error:
                raise ModelError(f"{file}: damaged, or of a version that isn't known: {error}") from None
    if (size := file.stat().st_size) < header.size:
        raise ModelError(f"{file}: cut: it has {size:,} bytes, and its header announces {header.size:,}")
    parts = header.metadata.get("split.count")
    if isinstance(parts, int) and parts > 1:
        raise ModelError(f"{file}: one of {parts} parts of a model; join them with `gguf-split --merge`")
    architecture, known = header.metadata.get("general.architecture"), _known_architectures()
    if _ALIASES.get(str(architecture), architecture) not in known:
        raise ModelError(
            f"{file}: transformers can't read GGUF files of the architecture '{architecture}'; known: "
            f"{', '.join(sorted(known))}"
        )
    return GgufSummary(
        str(architecture),
        dict(header.types.most_common()),
        header.bits,
        any(name.startswith("rope_freqs") for name in header.names),
        header.metadata.get("tokenizer.ggml.pre"),
        header.metadata.get("tokenizer.ggml.tokens", 0),
    )


class _Header:
    """Header of a GGUF file of version 2 or 3.

    Args:
        content: Content of the file.

    Attributes:
        metadata: Numbers and texts by key; of arrays their lengths.
        names: Names of the tensors.
        types: Number of weights of each type.
        bits: Bits per weight of each type.
        size: Size that the file must have, in bytes.

    Raises:
        struct.error: If the content ends within the header.
        ValueError: If the header is malformed.
    """

    def __init__(self, content: mmap.mmap) -> None:
        self._content, self._place = content, 4
        if (version := self._number("<I")) not in (2, 3):
            raise ValueError(f"version {version}")
        num_tensors, num_keys = self._number("<Q"), self._number("<Q")
        self.metadata = {self._text(): self._value(self._number("<I")) for _ in range(num_keys)}
        self.names: list[str] = []
        self.types: Counter[str] = Counter()
        self.bits: dict[str, float] = {}
        ends = [self._tensor() for _ in range(num_tensors)]
        alignment = self.metadata.get("general.alignment") or 32
        self.size = -(-self._place // alignment) * alignment + max(ends, default=0)

    def _tensor(self) -> int:
        """Read the description of a tensor; return its end in the part of the file after the header."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        self.names.append(self._text())
        count = prod(self._number("<Q") for _ in range(self._number("<I")))
        kind, offset = GGMLQuantizationType(self._number("<I")), self._number("<Q")
        block, num_bytes = GGML_QUANT_SIZES[kind]
        self.types[kind.name] += count
        self.bits[kind.name] = 8 * num_bytes / block
        return int(offset + count // block * num_bytes)

    def _number(self, kind: str) -> Any:
        (value,) = struct.unpack_from(kind, self._content, self._place)
        self._place += struct.calcsize(kind)
        return value

    def _text(self) -> str:
        size = self._number("<Q")
        text = self._content[self._place : self._place + size]
        if len(text) < size:
            raise struct.error
        self._place += size
        return text.decode("utf-8")

    def _value(self, kind: int) -> Any:
        if kind in _NUMBERS:
            return self._number(_NUMBERS[kind])
        if kind == _TEXT:
            return self._text()
        if kind != _ARRAY:
            raise ValueError(f"a value of the unknown type {kind}")
        kind, count = self._number("<I"), self._number("<Q")
        if kind in _NUMBERS:
            self._place += count * struct.calcsize(_NUMBERS[kind])
        else:
            for _ in range(count):
                self._value(kind)
        return count


def _known_architectures() -> set[str]:
    # Imported here: where transformers has them may change, which must not keep other models from loading.
    from transformers.integrations.gguf.gguf_config_mapping import GGUF_CONFIG_ARCHS
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    return {*GGUF_SUPPORTED_ARCHITECTURES, *GGUF_CONFIG_ARCHS} - {"general", "tokenizer"}


def describe_loss(file: Path, summary: GgufSummary, dtype: str) -> str | None:
    """Return a line about what the quantization of a file lost; None if its weights are not quantized."""
    if not summary.quantized_share:
        return None
    total = sum(summary.types.values())
    parts = [
        f"{count / total:.0%} {name} ({summary.bits[name]:.3g} bits per weight)"
        for name, count in summary.types.items()
        if count / total >= 0.005
    ]
    return (
        f"note: {file.name} contains quantized weights ({', '.join(parts)}); they are dequantized to {dtype}, which "
        "doesn't restore what the quantization rounded away"
    )


def gguf_metadata(path: str | None, revision: str | None = None) -> dict[str, Any]:
    """Return name, hash and types of a GGUF file, for the record of a run; empty for any other model."""
    if path is None or not is_gguf(path):
        return {}
    file = find_gguf(path, revision)
    return {"gguf": {"file": file.name, "sha256": file_hash(file), "types": read_summary(file).types}}


def load_gguf_config(path: str, revision: str | None = None) -> Any:
    """Return the configuration of the model in a GGUF file; see `find_gguf` and `read_summary` for errors."""
    file = find_gguf(path, revision)
    read_summary(file)
    with _link_in_empty_folder(file) as (folder, link):
        return AutoConfig.from_pretrained(folder, gguf_file=link)


def load_gguf_model(
    path: str,
    revision: str | None = None,
    *,
    dtype: torch.dtype,
    attn_implementation: str | None,
    rope_parameters: dict[str, Any] | None = None,
) -> PreTrainedModel:
    """Load the model in a GGUF file, with dequantized weights, and print what quantization lost.

    Args:
        path: File, or `org/name/file.gguf` on the hub.
        revision: Hub revision.
        dtype: Type of the loaded weights.
        attn_implementation: Attention implementation of transformers; None for its choice.
        rope_parameters: Parameters of the rotary embeddings, if they are known from elsewhere: transformers reads no
            scaling of them from GGUF files.

    Raises:
        ModelError: If the file can't be read, or lacks weights of its architecture.
    """
    file = find_gguf(path, revision)
    summary = read_summary(file)
    with _link_in_empty_folder(file) as (folder, link):
        config = AutoConfig.from_pretrained(folder, gguf_file=link)
        if rope_parameters is not None:
            config.rope_parameters = rope_parameters
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            gguf_file=link,
            config=config,
            quantization_config=GgufConfig(dequantize=True),
            dtype=dtype,
            attn_implementation=attn_implementation,
            output_loading_info=True,
        )
    model, info = loaded
    assert isinstance(model, PreTrainedModel)
    check_whole_model(model, info, str(file))
    _forget_quantization(model)
    # Adapters record this name as that of their base model. peft would look for a relative path on the hub.
    name = str(file) if Path(path).is_file() else path
    model.config._name_or_path = model.name_or_path = name
    if line := describe_loss(file, summary, str(dtype).removeprefix("torch.")):
        say(line)
    if summary.has_rope_factors and rope_parameters is None:
        say(
            f"warning: {file.name} scales the frequencies of its rotary embeddings (rope_freqs), which transformers "
            "doesn't read from GGUF files: long texts get worse"
        )
    return model


def load_gguf_tokenizer(path: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Return the tokenizer in a GGUF file; see `find_gguf` and `read_summary` for errors."""
    file = find_gguf(path, revision)
    summary = read_summary(file)
    if not summary.num_tokens:
        raise ModelError(f"{file}: it contains no tokenizer")
    with _link_in_empty_folder(file) as (folder, link):
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=link)
    tokenizer.name_or_path = path
    _remove_tokens(tokenizer, summary.num_tokens)
    if summary.splitting in _DIGITS_FIRST:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    if summary.splitting in _IGNORE_MERGES:
        tokenizer.backend_tokenizer.model.ignore_merges = True
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return tokenizer


@contextmanager
def _link_in_empty_folder(file: Path) -> Iterator[tuple[str, str]]:
    """Yield a temporary folder and the link to a file in it: transformers reads files beside the file too.

    The link is a whole path, because transformers looks for a bare name where the program runs first.
    """
    with TemporaryDirectory() as folder:
        link = Path(folder) / file.name
        link.symlink_to(file)
        yield folder, str(link)


def _remove_tokens(tokenizer: Any, num_tokens: int) -> None:
    """Remove tokens that transformers adds to those of the file, and that the model has no embeddings for."""
    if len(tokenizer) > num_tokens:
        content = json.loads(tokenizer.backend_tokenizer.to_str())
        content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] < num_tokens]
        tokenizer._tokenizer = Tokenizer.from_str(json.dumps(content))


def _forget_quantization(model: PreTrainedModel) -> None:
    """Make a dequantized model one that can be trained and saved: transformers refuses both for quantized ones."""
    for owner, name in (
        (model, "hf_quantizer"),
        (model, "quantization_method"),
        (model.config, "quantization_config"),
        # The title of the model, which would be saved under the name of a path.
        (model.config, "_model_name_or_path"),
    ):
        if name in vars(owner):
            delattr(owner, name)
    model.is_quantized = False  # type: ignore[assignment]
