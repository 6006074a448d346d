"""The vocabulary of a GGUF file, made from a tokenizer.

llama.cpp splits a text by a rule that the file names (`tokenizer.ggml.pre`), and then merges bytes or characters. A
wrong name is not an error there: the model gets other tokens than it was trained on. So a tokenizer is compared part
by part with what llama.cpp computes, and one that differs is refused.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from bfpo.errors import ModelError
from bfpo.generation.model_inputs import TemplateRefusal, render_chat

if TYPE_CHECKING:
    from gguf import GGUFWriter

_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
_DIGITS = {"type": "Digits", "individual_digits": True}


def _split_by(regex: str) -> tuple[dict[str, Any], ...]:
    split = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    return split, _BYTES | {"use_regex": False}


# Name of the rule → the pre-tokenizers that it does the work of, and whether a piece that is a token is never merged
# (`ignore_merges`). Source: llama.cpp, src/llama-vocab.cpp (`llm_tokenizer_bpe`, `llama_vocab::impl::load`).
_RULES: dict[str, tuple[Sequence[dict[str, Any]], bool]] = {
    "gpt-2": ((_BYTES,), False),
    "smollm": ((_DIGITS, _BYTES), False),
    "llama-bpe": (_split_by(_LLAMA3_SPLIT), True),
    "smaug-bpe": (_split_by(_LLAMA3_SPLIT), False),
    "qwen2": (_split_by(_QWEN2_SPLIT), False),
}
# What llama.cpp's `SPM` vocabulary does before it merges characters, as normalizers and pre-tokenizers.
_SPACE = "▁"
_PREPEND = (
    {"type": "Prepend", "prepend": _SPACE},
    {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE},
)

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_CONVERTER_HINT = "convert it with llama.cpp's convert_hf_to_gguf.py (--converter PATH)"


@dataclass(frozen=True)
class GgufVocabulary:
    """Tokens and rules of a GGUF file.

    Args:
        model: `gpt2` for byte-level BPE, `llama` for SentencePiece.
        pre: Name of the rule for splitting text; None for SentencePiece.
        tokens: Text of each token, in the order of ids.
        types: Type of each token, as numbered in llama.cpp.
        merges: Merges of byte-level BPE.
        scores: Score of each token of SentencePiece.
        adds_space: Whether SentencePiece puts a space before a text.
        adds_bos: Whether llama.cpp puts the first token before a text.
        adds_eos: Whether it puts the end token after a text.
        special_ids: Ids by the name that the file has for them: `bos`, `eos`, `eot`, `eom`, `unk`, `pad`.
        notes: What the file can't express.
    """

    model: str
    pre: str | None
    tokens: list[str]
    types: list[int]
    merges: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    adds_space: bool = False
    adds_bos: bool = False
    adds_eos: bool = False
    special_ids: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def write(self, writer: "GGUFWriter") -> None:
        """Add the vocabulary to a file."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre or "default")
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.model == "gpt2":
            writer.add_token_merges(self.merges)
        else:
            writer.add_token_scores(self.scores)
            writer.add_add_space_prefix(self.adds_space)
        writer.add_add_bos_token(self.adds_bos)
        writer.add_add_eos_token(self.adds_eos)
        for name, token in self.special_ids.items():
            getattr(writer, f"add_{name}_token_id")(token)


def read_vocabulary(
    tokenizer: PreTrainedTokenizerBase, vocab_size: int, end_ids: Sequence[int], name: str
) -> GgufVocabulary:
    """Return the vocabulary of a tokenizer.

    Args:
        tokenizer: Tokenizer of the model.
        vocab_size: Number of rows of the model's embedding.
        end_ids: Tokens that end an answer.
        name: Name of the model, for errors.

    Raises:
        ModelError: If llama.cpp would split texts into other tokens than the tokenizer, as far as this can be known.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ModelError(f"{name}: its tokenizer isn't one of the tokenizers library; {_CONVERTER_HINT}")
    content = json.loads(backend.to_str())
    if (kind := content["model"]["type"]) != "BPE":
        raise ModelError(f"{name}: its tokenizer is of the type {kind}; expected BPE, or {_CONVERTER_HINT}")
    tokens, types = _tokens(tokenizer, content, vocab_size, name)
    special_ids, notes = _special_ids(tokenizer, end_ids)
    adds_bos, adds_eos, bos_notes = _added_ends(tokenizer, name)
    vocabulary = GgufVocabulary(
        "gpt2", None, tokens, types, adds_bos=adds_bos, adds_eos=adds_eos, special_ids=special_ids
    )
    notes += bos_notes
    model = content["model"]
    if model.get("byte_fallback"):
        scores = _scores(model, tokens)
        adds_space = _adds_space(content, name)
        if adds_space and content["pre_tokenizer"] is not None:
            notes.append("llama.cpp puts a space before a text that begins with one too, and the tokenizer doesn't")
        return replace(vocabulary, model="llama", scores=scores, adds_space=adds_space, notes=tuple(notes))
    if content["normalizer"] is not None:
        notes.append("llama.cpp doesn't compose letters and accents (NFC) as the tokenizer does")
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return replace(vocabulary, pre=_rule(content, name), merges=merges, notes=tuple(notes))


def _tokens(
    tokenizer: PreTrainedTokenizerBase, content: Mapping[str, Any], vocab_size: int, name: str
) -> tuple[list[str], list[int]]:
    """Return text and type of each token; rows of the embedding without a token are unused."""
    texts = {token_id: text for text, token_id in content["model"]["vocab"].items()}
    added = {token["id"]: token for token in content["added_tokens"]}
    texts |= {token_id: token["content"] for token_id, token in added.items()}
    if (largest := max(texts, default=-1)) >= vocab_size:
        raise ModelError(
            f"{name}: the tokenizer has a token {largest}, and the model has {vocab_size} embeddings; do they belong "
            "together?"
        )
    for token in added.values():
        if token["lstrip"] or token["rstrip"] or token["single_word"]:
            raise ModelError(
                f"{name}: the token '{token['content']}' takes spaces beside it, or is only found as a word of its "
                f"own, which a GGUF file can't say; {_CONVERTER_HINT}"
            )
    is_spm = bool(content["model"].get("byte_fallback"))
    tokens, types = [], []
    for token_id in range(vocab_size):
        text = texts.get(token_id)
        if text is None:
            tokens.append(f"[PAD{token_id}]")
            types.append(_UNUSED)
            continue
        kind = _NORMAL
        if token_id in added:
            kind = _CONTROL if added[token_id]["special"] else _USER_DEFINED
        if is_spm and token_id == tokenizer.unk_token_id:
            kind = _UNKNOWN
        elif is_spm and _is_byte(text):
            kind = _BYTE
        # llama.cpp compares tokens that users defined with texts before it replaces spaces.
        tokens.append(text.replace(_SPACE, " ") if is_spm and kind == _USER_DEFINED else text)
        types.append(kind)
    if duplicate := next((text for text, count in _counts(tokens).items() if count > 1), None):
        raise ModelError(f"{name}: two tokens have the text '{duplicate}'; expected different ones")
    return tokens, types


def _counts(texts: Sequence[str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for text in texts:
        counts[text] = counts.get(text, 0) + 1
    return counts


def _is_byte(text: str) -> bool:
    return len(text) == 6 and text.startswith("<0x") and text.endswith(">")


def _rule(content: Mapping[str, Any], name: str) -> str:
    """Return the name of the rule that splits text as a byte-level tokenizer does."""
    model, normalizer = content["model"], content["normalizer"]
    pre = content["pre_tokenizer"] or {"type": "none"}
    parts = pre["pretokenizers"] if pre["type"] == "Sequence" else [pre]
    # Offsets, which this setting changes, don't change tokens.
    parts = [{key: value for key, value in part.items() if key != "trim_offsets"} for part in parts]
    ignores_merges = bool(model.get("ignore_merges"))
    is_plain = not any(model.get(key) for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"))
    for rule, (known, ignores) in _RULES.items():
        normalizers: tuple[Any, ...] = (None, {"type": "NFC"}) if rule == "qwen2" else (None,)
        if is_plain and parts == list(known) and ignores_merges == ignores and normalizer in normalizers:
            return rule
    raise ModelError(
        f"{name}: no rule of llama.cpp that is known here splits texts as its tokenizer does (pre-tokenizer "
        f"{json.dumps(parts, ensure_ascii=False)[:300]}, normalizer {json.dumps(normalizer)[:100]}, ignore_merges "
        f"{ignores_merges}); a wrong one would give the model other tokens. Known: {', '.join(_RULES)}. "
        f"{_CONVERTER_HINT.capitalize()}"
    )


def _adds_space(content: Mapping[str, Any], name: str) -> bool:
    """Return whether a SentencePiece tokenizer puts a space before each text between special tokens."""
    normalizer, pre = content["normalizer"], content["pre_tokenizer"]
    if pre is None and normalizer is not None and normalizer["type"] == "Sequence":
        parts = normalizer["normalizers"]
        if parts == list(_PREPEND):
            return True
        if parts == [_PREPEND[1]]:
            return False
    if pre is not None and normalizer is None and pre["type"] == "Metaspace":
        scheme = pre.get("prepend_scheme")
        if pre["replacement"] == _SPACE and not pre.get("split", True) and scheme in ("always", "never"):
            return bool(scheme == "always")
    parts = [json.dumps(part, ensure_ascii=False)[:200] for part in (normalizer, pre)]
    raise ModelError(
        f"{name}: llama.cpp puts spaces elsewhere than its SentencePiece tokenizer (normalizer {parts[0]}, "
        f"pre-tokenizer {parts[1]}); {_CONVERTER_HINT}"
    )


def _scores(model: Mapping[str, Any], tokens: Sequence[str]) -> list[float]:
    """Return scores by which SentencePiece merges in the order of a tokenizer's merges.

    SentencePiece merges the neighbors that form the token with the highest score; BPE those with the first merge.
    Tokens that no merge forms get the lowest scores, which nothing reads.
    """
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(model["merges"]):
        first, second = merge.split(" ") if isinstance(merge, str) else merge
        ranks.setdefault(first + second, rank)
    return [-float(ranks.get(token, len(model["merges"]))) for token in tokens]


def _special_ids(tokenizer: PreTrainedTokenizerBase, end_ids: Sequence[int]) -> tuple[dict[str, int], list[str]]:
    """Return the ids of special tokens by the file's names, and notes on those that it has no name for."""
    eos = tokenizer.eos_token_id
    ends = [*([] if eos is None else [int(eos)]), *(token for token in end_ids if token != eos)]
    ids = dict(zip(("eos", "eot", "eom"), ends, strict=False))
    # llama.cpp looks for an end-of-turn token by its text if the file names none, and may find another.
    ids.setdefault("eot", ends[0])
    others = {"bos": tokenizer.bos_token_id, "unk": tokenizer.unk_token_id, "pad": tokenizer.pad_token_id}
    ids |= {name: int(token) for name, token in others.items() if token is not None}
    texts = ", ".join(str(tokenizer.convert_ids_to_tokens(token)) for token in ends[3:])
    return ids, [f"a GGUF file names three tokens that end an answer; {texts} are left out"] if ends[3:] else []


def _added_ends(tokenizer: PreTrainedTokenizerBase, name: str) -> tuple[bool, bool, list[str]]:
    """Return whether the tokenizer puts its first and its end token around a text, and notes."""
    plain, full = (tokenizer("a", add_special_tokens=added)["input_ids"] for added in (False, True))
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    before, after = next(
        ((before, after) for before in (0, 1) for after in (0, 1) if [bos] * before + plain + [eos] * after == full),
        (None, None),
    )
    if before is None or after is None:
        raise ModelError(
            f"{name}: its tokenizer puts other tokens around a text than the first and the end token, which a GGUF "
            f"file can't say; {_CONVERTER_HINT}"
        )
    if before and tokenizer.chat_template is not None:
        try:
            chat = render_chat(tokenizer, [{"role": "user", "content": "a"}])
        except TemplateRefusal as refusal:
            raise ModelError(f"{name}: {refusal}") from None
        if not chat.startswith(str(tokenizer.bos_token)):
            note = f"texts without the chat template get no {tokenizer.bos_token} first, because chats have none"
            return False, bool(after), [note]
    return bool(before), bool(after), []
