"""Prompts of an online run: read, checked for what TRL can sample, and as the data set that it reads."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from bfpo.core.samples import Prompt
from bfpo.core.terminal import show_table
from bfpo.data.chat_format import ChatFormat
from bfpo.data.prompts import PromptSource, distinct_prompts, read_prompt_source
from bfpo.errors import DataError, ModelError
from bfpo.generation.model_inputs import TemplateRefusal, render_prompt


def read_online_prompts(sources: Sequence[PromptSource]) -> tuple[list[Prompt], list[dict[str, Any]]]:
    """Return the prompts of all sources without duplicates, and the metadata of the sources.

    Raises:
        DataError: If a prompt has tools, arguments of the chat template or turns with more than a text, which TRL
            doesn't put into the prompt, a prompt has two kinds, or two prompts share an id.
    """
    read = [read_prompt_source(source) for source in sources]
    prompts = distinct_prompts(part for part, _ in read)
    for prompt in prompts:
        if prompt.inputs.hashed or not all(message.is_plain for message in prompt.prompt):
            raise DataError(
                f"prompts: '{prompt.prompt_id}' has tools, reasoning or chat_template_kwargs, which can't be sampled "
                "online; leave such prompts out"
            )
    return prompts, [metadata for _, metadata in read]


def longest_prompt(prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase, *, max_tokens: int | None) -> int:
    """Return the length of the longest prompt in tokens.

    Args:
        prompts: Prompts.
        tokenizer: Tokenizer of the model.
        max_tokens: Maximum length; None for no limit.

    Raises:
        ModelError: If the tokenizer has no chat template.
        DataError: If the template refuses a prompt, or a prompt is too long.
    """
    if tokenizer.chat_template is None:
        raise ModelError("the tokenizer of the model has no chat template; sampling requires one")
    chat_format, longest = ChatFormat(tokenizer), 0
    for prompt in prompts:
        try:
            text = render_prompt(chat_format, prompt.prompt, prompt.inputs)
        except TemplateRefusal as refusal:
            raise DataError(f"prompts: '{prompt.prompt_id}': {refusal}; leave such prompts out") from None
        length = len(tokenizer(text, add_special_tokens=False)["input_ids"])
        if max_tokens is not None and length > max_tokens:
            raise DataError(
                f"prompts: '{prompt.prompt_id}' has {length:,} tokens; with trainer.max_completion_length the model "
                f"has room for {max_tokens:,}: leave such prompts out, or lower max_completion_length"
            )
        longest = max(longest, length)
    return longest


def show_prompts(prompts: Sequence[Prompt]) -> None:
    """Print the number of prompts by source and kind."""
    counts = Counter((prompt.source, prompt.kind or "unknown") for prompt in prompts)
    rows = [(source, kind, f"{count:,}") for (source, kind), count in sorted(counts.items())]
    show_table("Prompts", ("source", "kind", "prompts"), rows)


def prompt_table(prompts: Sequence[Prompt]) -> Dataset:
    """Return the data set that TRL reads: conversations, and the ids by which samples find their prompt."""
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": message.role, "content": message.content} for message in prompt.prompt],
                "prompt_id": prompt.prompt_id,
            }
            for prompt in prompts
        ]
    )
