"""Markers in an answer that a judge would mistake for markup of its own prompt."""

from collections.abc import Iterable
from typing import Any

from bfpo.core.markers import MARKERS

# Note in the verdict on an answer in which `escape_markers` changed something.
MARKERS_ESCAPED = "the answer contained the judge's own markers, escaped"


def escape_markers(text: str, special: Iterable[str] = ()) -> tuple[str, bool]:
    """Return a text whose markers are broken up by a space, and whether it contained any.

    Args:
        text: An answer, or a turn of its prompt.
        special: Markers of this judge, in addition to those of all families of models.
    """
    broken = {marker: _break(marker) for marker in (*MARKERS, *special) if len(marker.strip()) > 1}
    result = text
    # Breaking up one marker can complete another. This ends: the space is between two characters of the marker that
    # aren't spaces, and a gap that is longer than in any marker is in no match.
    while hits := [marker for marker in broken if marker in result]:
        for marker in hits:
            result = result.replace(marker, broken[marker])
    return result, result != text


def _break(marker: str) -> str:
    """Return a marker with a space after its first character that isn't whitespace."""
    first = len(marker) - len(marker.lstrip()) + 1
    return f"{marker[:first]} {marker[first:]}"


def special_tokens(tokenizer: Any) -> tuple[str, ...]:
    """Return the strings that a tokenizer encodes as one special token wherever they occur in a text.

    `all_special_tokens` is incomplete: the headers of Llama 3, for example, are special only among the added tokens.
    """
    added = (token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
    return tuple(dict.fromkeys([*tokenizer.all_special_tokens, *added]))
