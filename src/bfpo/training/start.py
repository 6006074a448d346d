"""The model and tokenizer that a run starts from: existing ones, or new ones."""

from collections.abc import Callable, Iterable

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled, unset_hf_deepspeed_config

from bfpo.config.recipes import ModelSection, NewModel, TextSection
from bfpo.core.conversation import user_says
from bfpo.core.pairs import Demonstration
from bfpo.core.terminal import timed
from bfpo.data.chat_format import ChatFormat
from bfpo.data.demonstrations import load_demonstrations
from bfpo.data.table import TokenTable
from bfpo.data.template import chat_template
from bfpo.model.load import load_config, load_model, load_tokenizer
from bfpo.model.lora import CausalLM, is_adapter
from bfpo.model.new import new_model, new_tokenizer
from bfpo.model.templates import limit_template
from bfpo.model.vocabulary import check_token_ids


def load_start_tokenizer(
    section: ModelSection, text: TextSection, texts: Callable[[], Iterable[str]]
) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a run, with the recipe's chat template if there is one.

    Args:
        section: Recipe section of the model, with `path` or `new`.
        text: Recipe section with the chat template.
        texts: Function that returns the texts to train a new tokenizer on, unless `section.new.texts` names some.

    Raises:
        ModelError: If the tokenizer can't be loaded, or the chat template is broken.
    """
    if section.new is None:
        tokenizer = load_tokenizer(section)
    else:
        tokenizer = new_tokenizer(_texts_of(section.new) or texts(), section.new.vocab_size)
    # The template is saved with the model, which must later be prompted as it was trained.
    template = chat_template(text)
    tokenizer.chat_template = template or tokenizer.chat_template
    if template is not None or section.new is not None:
        limit_template(tokenizer)
    return tokenizer


def load_start_model(section: ModelSection, tokenizer: PreTrainedTokenizerBase) -> CausalLM:
    """Return the model that a run starts from.

    Args:
        section: Recipe section of the model, with `path` or `new`.
        tokenizer: Tokenizer of the run.

    Raises:
        ModelError: If the model can't be loaded.
    """
    if is_deepspeed_zero3_enabled():
        # ZeRO-3 would partition the weights while they are loaded. The trainer's accelerator sets it again later.
        unset_hf_deepspeed_config()
    if section.new is not None:
        return new_model(section.new, tokenizer)
    with timed(f"loading {section.path}"):
        return load_model(section)


def check_vocabulary(
    section: ModelSection, tokenizer: PreTrainedTokenizerBase, tables: Iterable[TokenTable] = ()
) -> None:
    """Check that the model has an embedding for each token of a prompt and of the data; the weights aren't loaded.

    A new model gets as many as its tokenizer has. The embeddings of an adapter's base may be resized when it is
    loaded, so those are checked then, by `StreamTrainer`.

    Raises:
        ModelError: If a token has no embedding.
    """
    if section.path is not None and not is_adapter(section.path, section.revision):
        rows = [[table.largest_id] for table in tables]
        check_token_ids(load_config(section), [*rows, _prompt_ids(tokenizer)], section.path)


def _prompt_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the token ids of a short prompt: its chat template may write tokens that no training text contains."""
    if tokenizer.chat_template is None:
        return []
    try:
        text = ChatFormat(tokenizer).render_prompt(user_says("Hello"))
    except TemplateError:
        return []
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def demonstration_texts(demonstrations: Iterable[Demonstration]) -> Iterable[str]:
    """Return all texts of demonstrations."""
    for demonstration in demonstrations:
        yield from demonstration.texts()


def _texts_of(new: NewModel) -> list[str]:
    sources = [source.model_copy(update={"use": "both"}) for source in new.texts or []]
    return [text for source in sources for text in demonstration_texts(load_demonstrations(source)[1])]
