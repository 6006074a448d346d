"""What a model in this process reads: conversations as chat templates render or refuse them."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from jinja2 import TemplateSyntaxError
from transformers import PreTrainedTokenizerBase

from bfpo.core.conversation import Conversation
from bfpo.core.pairs import TemplateInputs
from bfpo.core.template_errors import TEMPLATE_ERRORS
from bfpo.data.chat_format import ChatFormat
from bfpo.errors import BfpoError, ModelError


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
    with refusals_of_template(tokenizer):
        return str(tokenizer.apply_chat_template([*map(dict, messages)], tokenize=False, **options))


def render_prompt(chat_format: ChatFormat, prompt: Conversation, inputs: TemplateInputs) -> str:
    """Return a prompt for generation as the chat template renders it, with nothing left out.

    Args:
        chat_format: Chat template of the model.
        prompt: Conversation up to the turn that is answered.
        inputs: Tools, and arguments of the template.

    Raises:
        TemplateRefusal: If the template refuses the conversation, or leaves out a turn, a tool call or the tools.
        ModelError: If the template can't be parsed, or renders no text of user turns.
    """
    with refusals_of_template(chat_format.tokenizer):
        text = chat_format.render_prompt(prompt, inputs)
        if omission := chat_format.find_omission(text, prompt, len(prompt), inputs):
            raise TemplateRefusal(omission)
    return text


@contextmanager
def refusals_of_template(tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """Turn what a chat template raises into a `TemplateRefusal`, and what can't be parsed into a `ModelError`."""
    try:
        yield
    except TemplateSyntaxError as error:
        raise ModelError(f"{tokenizer.name_or_path}: chat template, line {error.lineno}: {error.message}") from None
    except BfpoError:
        raise
    except TEMPLATE_ERRORS as error:
        message = str(error).partition("\n")[0] or type(error).__name__
        raise TemplateRefusal(f"the chat template refuses the conversation: {message}") from None
