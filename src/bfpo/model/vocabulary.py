"""Token ids without an embedding: a tokenizer that has more tokens than its model."""

from collections.abc import Iterable, Sequence
from typing import Any

from bfpo.errors import ModelError


def check_token_ids(config: Any, rows: Iterable[Sequence[int]], path: str) -> None:
    """Check that the model has an embedding for each token id that it reads.

    Only ids in use count: tokenizers have tokens that no text contains, and some have tokens that their text models
    don't read.

    Args:
        config: Configuration of the model.
        rows: Token ids that it reads.
        path: Name of the model, for the error.

    Raises:
        ModelError: If an id has no embedding.
    """
    num_embeddings = getattr(config.get_text_config(), "vocab_size", None)
    largest = max((max(row, default=0) for row in rows), default=0)
    if num_embeddings is not None and largest >= num_embeddings:
        raise ModelError(
            f"{path}: the tokenizer gives token {largest}, but the model has only {num_embeddings} embeddings; do "
            "they belong together?"
        )
