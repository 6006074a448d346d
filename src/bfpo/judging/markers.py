"""Markers in an answer that a judge would mistake for markup of its own prompt."""

from collections.abc import Iterable
from typing import Any

# Note in the verdict on an answer in which `escape_markers` changed something.
MARKERS_ESCAPED = "the answer contained the judge's own markers, escaped"
# Markup of the judges' prompts; the special tokens of the tokenizer are added to these.
MARKERS = (
    "[INST]",
    "[/INST]",
    "<<SYS>>",
    "<</SYS>>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<|im_start|>",
    "<|im_end|>",
)


def escape_markers(text: str, special: Iterable[str] = ()) -> tuple[str, bool]:
    """Return a text whose markers are broken up by a space, and whether it contained any.

    Args:
        text: An answer, or a turn of its prompt.
        special: Markers of this judge, in addition to `MARKERS`.
    """
    # A space can't break up a marker of whitespace.
    markers = [marker for marker in (*MARKERS, *special) if len(marker.strip()) > 1]
    result = text
    while hits := [marker for marker in markers if marker in result]:
        for marker in hits:
            result = result.replace(marker, f"{marker[0]} {marker[1:]}")
    return result, result != text


def special_tokens(tokenizer: Any) -> tuple[str, ...]:
    """Return the strings that a tokenizer encodes as one special token wherever they occur in a text.

    `all_special_tokens` is incomplete: the headers of Llama 3, for example, are special only among the added tokens.
    """
    added = (token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
    return tuple(dict.fromkeys([*tokenizer.all_special_tokens, *added]))
