"""Where a run starts from: a model that exists, or a new one."""

from collections.abc import Callable, Iterable

from transformers import PreTrainedTokenizerBase
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled, unset_hf_deepspeed_config

from bfpo.config.recipes import ModelSection, NewModel, TextSection
from bfpo.core.pairs import Demonstration
from bfpo.data.demonstrations import load_demonstrations
from bfpo.data.tokenize import chat_template
from bfpo.errors import ModelError
from bfpo.model.load import load_model, load_tokenizer
from bfpo.model.lora import CausalLM
from bfpo.model.new import new_model, new_tokenizer


def start_tokenizer(
    section: ModelSection, text: TextSection, texts: Callable[[], Iterable[str]]
) -> PreTrainedTokenizerBase:
    """Return the tokenizer that training starts with, and saves: with the recipe's chat template, if it has one.

    Args:
        section: With a `path` or `new`.
        text: With the chat template.
        texts: Gives the texts a new tokenizer is trained on, unless the section names some.

    Raises:
        ModelError: If it can't be loaded.
    """
    if section.new is None:
        tokenizer = load_tokenizer(section)
    else:
        tokenizer = new_tokenizer(_named_texts(section.new) or texts(), section.new.vocab_size)
    # Whoever talks to the model later must use the template that it was trained with.
    tokenizer.chat_template = chat_template(text) or tokenizer.chat_template
    return tokenizer


def start_model(section: ModelSection, tokenizer: PreTrainedTokenizerBase) -> CausalLM:
    """Return the model that training starts with.

    Raises:
        ModelError: If it can't be loaded, or has no embedding for some token.
    """
    if is_deepspeed_zero3_enabled():
        # It would cut the weights up while loading; the trainer's accelerator sets it again, and then does.
        unset_hf_deepspeed_config()
    if section.new is not None:
        return new_model(section.new, tokenizer)
    model = load_model(section)
    rows = model.config.get_text_config().vocab_size
    if len(tokenizer) > rows:
        raise ModelError(
            f"{section.path}: the tokenizer has {len(tokenizer)} tokens, the model embeddings for {rows}"
        )
    return model


def demonstration_texts(demonstrations: Iterable[Demonstration]) -> Iterable[str]:
    """Return all texts of demonstrations."""
    for item in demonstrations:
        yield from (message.content for message in item.prompt)
        yield item.completion


def _named_texts(new: NewModel) -> list[str]:
    sources = [source.model_copy(update={"use": "both"}) for source in new.texts or []]
    return [text for source in sources for text in demonstration_texts(load_demonstrations(source)[1])]
