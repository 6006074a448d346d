"""What a model in this process reads: chat templates that refuse a conversation, and ids without an embedding."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError
from transformers import PreTrainedTokenizerBase

from bfpo.errors import ModelError

# A template is a program: apart from the errors that it raises itself, it may add text to None, say.
_TEMPLATE_ERRORS = (TemplateError, TypeError, ValueError, LookupError, ArithmeticError, RecursionError)


class TemplateRefusal(Exception):
    """A chat template refuses a conversation, such as one with a system message."""


def render_chat(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
    """Return a conversation as the tokenizer's chat template renders it.

    Args:
        tokenizer: Tokenizer with a chat template.
        messages: Messages with `role` and `content`.
        options: Options of the template.

    Raises:
        TemplateRefusal: If the template refuses the conversation.
        ModelError: If the template can't be parsed.
    """
    try:
        return str(tokenizer.apply_chat_template([*map(dict, messages)], tokenize=False, **options))
    except TemplateSyntaxError as error:
        raise ModelError(f"{tokenizer.name_or_path}: chat template, line {error.lineno}: {error.message}") from None
    except _TEMPLATE_ERRORS as error:
        message = str(error).partition("\n")[0] or type(error).__name__
        raise TemplateRefusal(f"the chat template refuses the conversation: {message}") from None


def check_token_ids(model: Any, rows: Iterable[Sequence[int]], path: str) -> None:
    """Check that the model has an embedding for each token id.

    Training refuses a tokenizer that is larger than the model. Here only ids in use count: some tokenizers have
    tokens that their text models don't read.

    Args:
        model: Model.
        rows: Token ids that it reads.
        path: Name of the model, for the error.

    Raises:
        ModelError: If an id has no embedding.
    """
    num_embeddings = getattr(model.config.get_text_config(), "vocab_size", None)
    largest = max((max(row, default=0) for row in rows), default=0)
    if num_embeddings is not None and largest >= num_embeddings:
        raise ModelError(
            f"{path}: the tokenizer gives token {largest}, but the model has only {num_embeddings} embeddings; do "
            "they belong together?"
        )
