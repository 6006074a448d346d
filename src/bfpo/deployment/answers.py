"""Greedy answers of a model and of the files made of it, compared token by token."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from bfpo.core.samples import Sampling
from bfpo.errors import ModelError
from bfpo.generation.decoding import DecodeRequest
from bfpo.generation.model_inputs import TemplateRefusal, render_chat
from bfpo.generation.sampler import Sampler
from bfpo.generation.whole_batches import WholeBatches
from bfpo.model.lora import CausalLM

MAX_NEW_TOKENS = 32
# Neutral, of different kinds, with digits, other scripts, marks and line breaks, so that tokenizers differ visibly.
PROMPTS = (
    "What is the capital of France?",
    "Name three fruits that are red.",
    "Explain in one sentence what a rainbow is.",
    "Write a haiku about rain.",
    "How many minutes are in 2.5 hours?",
    "What is 17 + 25?",
    "Translate 'good morning' into Spanish.",
    "List the days of the week, separated by commas.",
    "Which planet is closest to the sun?",
    "Write a Python function that returns the larger of two numbers.",
    "Give me a recipe for pancakes with 4 ingredients.",
    "What's the difference between a lake and a river?",
    "Summarize: The shop opens at 9:30 a.m. It closes at 18:00. It's closed on Sundays.",
    "Was ist der höchste Berg Österreichs?",
    "请用一句话介绍长城。",
    "Correct the spelling: Teh quik brown fox.",
    "Sort these numbers:\n12, 7, 105, 33",
    "Write one line about a friendly robot 🤖.",
    "Who wrote 'Pride and Prejudice'?",
    "Suggest a name for a gray cat, please!",
)


class Answered(NamedTuple):
    """What a model reads and answers for each of `PROMPTS`.

    Args:
        prompts: Token ids of each prompt, as the chat template renders it.
        answers: Token ids of each answer, the end token included.
    """

    prompts: list[list[int]]
    answers: list[list[int]]


@dataclass(frozen=True)
class Difference:
    """First token at which an answer differs.

    Args:
        prompt: Number of the prompt.
        position: Number of the token in the answer, from 0.
        gap: Difference of the log-probabilities of the two tokens by the file's model, in nats; rounding explains
            only a small one. None if it isn't known.
    """

    prompt: int
    position: int
    gap: float | None


@dataclass(frozen=True)
class Agreement:
    """How far two lists of answers agree.

    Args:
        equal_prompts: Number of prompts that both sides encode as the same tokens.
        equal_answers: Number of equal answers.
        answers: Number of answers.
        token_agreement: Share of the source's tokens before the first difference of their answers.
        differences: First difference of each answer that has one.
    """

    equal_prompts: int
    equal_answers: int
    answers: int
    token_agreement: float
    differences: list[Difference]

    def to_json(self) -> dict[str, Any]:
        """Return the fields for a JSON file."""
        return asdict(self)


def encode_prompts(tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Return the token ids of each of `PROMPTS`; without a chat template, those of the text alone.

    Raises:
        ModelError: If the chat template refuses a prompt.
    """
    if tokenizer.chat_template is None:
        return [list(tokenizer(prompt)["input_ids"]) for prompt in PROMPTS]
    try:
        chats = [
            render_chat(tokenizer, [{"role": "user", "content": prompt}], add_generation_prompt=True)
            for prompt in PROMPTS
        ]
    except TemplateRefusal as refusal:
        raise ModelError(f"{tokenizer.name_or_path}: {refusal}") from None
    return [list(tokenizer(chat, add_special_tokens=False)["input_ids"]) for chat in chats]


def answer_prompts(model: CausalLM, prompts: Sequence[Sequence[int]], end_ids: Sequence[int]) -> list[list[int]]:
    """Return a model's likeliest answers, of at most `MAX_NEW_TOKENS` tokens.

    Args:
        model: The model.
        prompts: Token ids of the prompts.
        end_ids: Tokens that end an answer.
    """
    sampler = Sampler(Sampling(temperature=0.0, max_new_tokens=MAX_NEW_TOKENS))
    decoder = WholeBatches(model.eval(), end_ids, sampler, pad_id=end_ids[0], max_tokens=16384)
    requests = [DecodeRequest(tuple(prompt), 0, MAX_NEW_TOKENS) for prompt in prompts]
    answers: list[list[int]] = [[] for _ in prompts]
    for batch in decoder.decode(requests):
        for answer in batch:
            answers[answer.number] = answer.token_ids
    return answers


def compare_answers(
    source: Answered, other: Answered, end_ids: Sequence[int], model: CausalLM | None = None
) -> Agreement:
    """Compare the answers of a file with those of its source.

    Args:
        source: Prompts and answers of the source.
        other: Those of the file.
        end_ids: Tokens that end an answer; all count as the same.
        model: Model of the file, which tells how close its choice was; None if transformers can't load it.
    """
    differences, agreeing = [], 0
    for number, (ours, theirs) in enumerate(zip(source.answers, other.answers, strict=True)):
        length = _common_length(ours, theirs, set(end_ids))
        agreeing += length
        if length < max(len(ours), len(theirs)):
            gap = None
            if model is not None and length < min(len(ours), len(theirs)):
                gap = _gap(model, [*source.prompts[number], *ours[:length]], ours[length], theirs[length])
            differences.append(Difference(number, length, gap))
    total = sum(map(len, source.answers))
    pairs = zip(source.prompts, other.prompts, strict=True)
    return Agreement(
        sum(ours == theirs for ours, theirs in pairs),
        len(source.answers) - len(differences),
        len(source.answers),
        agreeing / max(total, 1),
        differences,
    )


def _common_length(ours: Sequence[int], theirs: Sequence[int], ends: set[int]) -> int:
    length = 0
    for first, second in zip(ours, theirs, strict=False):
        if first != second and not (first in ends and second in ends):
            break
        length += 1
    return length


@torch.inference_mode()
def _gap(model: CausalLM, beginning: Sequence[int], source_token: int, chosen: int) -> float:
    """Return by how much the log-probabilities of two tokens after a text differ, in nats."""
    logits = model(input_ids=torch.tensor([beginning], device=model.device)).logits[0, -1].float()
    return float((logits[chosen] - logits[source_token]).abs())
