"""Examples as text with special tokens, as the model sees them."""

from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from bfpo.data.table import Example, Ids, token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def decoded_sample(example: Example, tokenizer: "PreTrainedTokenizerBase") -> dict[str, str]:
    """Return the text of an example with special tokens, as the model sees it."""
    names: tuple[Literal["chosen", "rejected", "completion"], ...]
    names = ("chosen", "rejected") if len(example.completions) == 2 else ("completion",)
    texts: dict[str, Any] = {"prompt": tokenizer.decode(example.prompt_ids)}
    texts |= {name: _decode_completion(ids, tokenizer) for name, ids in zip(names, example.completions, strict=True)}
    return {name: str(text) for name, text in texts.items()}


def shown_tokens(example: Example, tokenizer: "PreTrainedTokenizerBase") -> dict[str, str]:
    """Return the tokens of each completion of an example, separated by bars, with unscored ones in brackets."""
    names = ("chosen", "rejected") if len(example.completions) == 2 else ("completion",)
    shown = {}
    for name, marked in zip(names, example.completions, strict=True):
        tokens = [repr(str(tokenizer.decode([token])))[1:-1] for token in token_ids(marked).tolist()]
        pieces = [f"[{token}]" if mark < 0 else token for token, mark in zip(tokens, marked.tolist(), strict=True)]
        shown[name] = f"{(marked >= 0).sum()} of {len(marked)} scored: {'|'.join(pieces)}"
    return shown


def _decode_completion(marked: Ids, tokenizer: "PreTrainedTokenizerBase") -> str:
    """Return a completion as text, with unscored tokens in brackets."""
    turns = np.split(marked, np.flatnonzero(np.diff(marked < 0)) + 1)
    texts = ((str(tokenizer.decode(token_ids(ids))), ids[0] < 0) for ids in turns)
    return "".join(f"[not scored: {text}]" if unscored else text for text, unscored in texts)
