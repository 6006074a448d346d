"""What the backbone must be told so that every token of a layout attends to what it should."""

from typing import Any

from bfpo.model.layout import Layout


def attention_inputs(layout: Layout) -> dict[str, Any]:
    """Return the keyword arguments of the backbone's forward that go with a layout.

    Rows padded on the right need none: under a causal mask no real token sees the padding behind it, and
    positions count from the row's start. (With explicit `position_ids` and no mask, transformers would guess at
    packed sequences and be silently wrong.)
    """
    return {}
