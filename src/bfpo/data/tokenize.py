"""Conversations to token ids, with the chat template of the tokenizer.

The template renders the whole conversation including the answer, and the ids are split where they begin to differ
from those of the prompt for generation. Every completion ends with exactly one end-of-sequence token. If all answers
of a chat are imitated, each one is scored from the end of its prompt to its end-of-sequence token. Texts that are too
long are truncated or dropped, and counted by source and cell.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import datetime, tzinfo
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar

import numpy as np
from jinja2.exceptions import TemplateError, TemplateSyntaxError

from bfpo.config.recipes import TextSection
from bfpo.core.pairs import Conversation, Demonstration, Message, PreferencePair
from bfpo.data.load import Reason, SourceReport
from bfpo.data.table import Example, Ids, token_ids
from bfpo.data.token_cache import MIN_CACHED, Encoding, cache_file, read_encodings, write_encodings
from bfpo.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHUNK = 512
EOS_INSIDE = "end-of-sequence token inside an answer"
NOT_A_PREFIX = "prompt is not a prefix of the conversation"

Record = TypeVar("Record", PreferencePair, Demonstration)


@dataclass(frozen=True)
class Encoder:
    """Encoder of pairs and demonstrations.

    Args:
        tokenizer: Tokenizer with an end-of-sequence token.
        text: Length, truncation and template.
        cache: Folder of the cache of encodings; None for no cache.
        clock: Time that a template with a clock gets; None for the current time.

    Raises:
        ModelError: If the tokenizer has no end-of-sequence token, or there is no chat template.
    """

    tokenizer: "PreTrainedTokenizerBase"
    text: TextSection
    cache: Path | None = None
    clock: datetime | None = None

    def __post_init__(self) -> None:
        name = self.tokenizer.name_or_path or "the tokenizer"
        if self.tokenizer.eos_token_id is None:
            raise ModelError(f"{name} has no end-of-sequence token; set tokenizer.eos_token and save it again")
        if self.tokenizer.chat_template is None and self.text.chat_template is None:
            raise ModelError(
                f"{name} has no chat template; set text.chat_template in the recipe to a Jinja template or to a file "
                "with one (for a chat model, that of its model card)"
            )

    @cached_property
    def _template(self) -> str | None:
        return chat_template(self.text)

    def encode(
        self, records: Sequence[Record], report: SourceReport, advance: Callable[[int], None] = lambda count: None
    ) -> tuple[list[Record], list[Example]]:
        """Encode the records of a source, and count in the report what is dropped or truncated.

        Args:
            records: Pairs or demonstrations.
            report: Report on the source.
            advance: Function that is called after each chunk with the number of its records.

        Returns:
            The records that could be encoded, and their token ids.
        """
        encoded: list[Record] = []
        examples: list[Example] = []
        for record, encoding in zip(records, self._encode_all(records, advance), strict=True):
            cell = record.cell if isinstance(record, PreferencePair) else None
            if encoding.example is None:
                report.dropped[Reason(str(encoding.fault), cell)] += 1
                continue
            report.noted.update(Reason(note, cell) for note in encoding.notes)
            encoded.append(record)
            examples.append(encoding.example)
        return encoded, examples

    def _encode_all(self, records: Sequence[Record], advance: Callable[[int], None]) -> list[Encoding]:
        file = None
        if self.cache is not None and len(records) >= MIN_CACHED:
            texts = [(record.prompt, _answers(record), len(_prompts(record))) for record in records]
            template = self._template or self.tokenizer.chat_template
            file = cache_file(self.cache, self.tokenizer, template, self.text, texts, clock=self.clock)
        if file is not None and (cached := read_encodings(file)) is not None:
            advance(len(records))
            return cached
        encodings: list[Encoding] = []
        for start in range(0, len(records), _CHUNK):
            chunk = records[start : start + _CHUNK]
            encodings += self._encode_chunk(chunk)
            advance(len(chunk))
        if file is not None and any(encoding.example for encoding in encodings):
            write_encodings(file, encodings)
        return encodings

    def _encode_chunk(self, records: Sequence[Record]) -> Iterator[Encoding]:
        with nullcontext() if self.clock is None else _template_clock(self.clock):
            rendered = [self._render(record) for record in records]
        texts = [text for texts in rendered if isinstance(texts, list) for text in texts]
        all_ids = iter(self.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else [])
        for record, texts_or_fault in zip(records, rendered, strict=True):
            if isinstance(texts_or_fault, str):
                yield Encoding(None, texts_or_fault)
                continue
            ids = [next(all_ids) for _ in texts_or_fault]
            if len(_prompts(record)) > 1:
                yield self._split_turns(ids[:-1], ids[-1])
            else:
                yield self._split(ids[0], ids[1:])

    def _render(self, record: PreferencePair | Demonstration) -> list[str] | str:
        """Return each prompt for generation, then the conversation with each answer; or the reason of a failure."""
        prompts = _prompts(record)
        if len(prompts) > 1 and any(self._has_eos(message) for message in record.prompt):
            return EOS_INSIDE
        conversations = [(*record.prompt, Message("assistant", answer)) for answer in _answers(record)]
        try:
            return [
                *(self._apply_template(prompt, for_generation=True) for prompt in prompts),
                *(self._apply_template(conversation, for_generation=False) for conversation in conversations),
            ]
        except TemplateSyntaxError as error:
            raise ModelError(f"chat template: line {error.lineno}: {error.message}") from None
        except TemplateError as error:
            return f"the chat template refuses the conversation ({error})"

    def _has_eos(self, message: Message) -> bool:
        return message.role == "assistant" and str(self.tokenizer.eos_token) in message.content

    def _apply_template(self, conversation: Conversation, *, for_generation: bool) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                [message._asdict() for message in conversation],
                chat_template=self._template,
                tokenize=False,
                add_generation_prompt=for_generation,
            )
        )

    def _split(self, prompt: list[int], conversations: list[list[int]]) -> Encoding:
        prompt_length = min(_common_prefix(prompt, conversation) for conversation in conversations)
        if prompt_length == 0:
            return Encoding(None, "the chat template renders prompt and conversation differently from the start")
        notes = [NOT_A_PREFIX] if prompt_length < len(prompt) else []
        completions = []
        for conversation in conversations:
            completion = self._with_one_eos(conversation[prompt_length:])
            if completion is None:
                return Encoding(None, EOS_INSIDE)
            completions.append(completion)
        return self._fit(prompt[:prompt_length], completions, notes)

    def _split_turns(self, prompts: list[list[int]], conversation: list[int]) -> Encoding:
        """Encode a chat as one completion from its first answer on, with marks on the tokens between the answers."""
        starts = [_common_prefix(prompt, conversation) for prompt in prompts]
        last = self._with_one_eos(conversation[starts[-1] :])
        if starts[0] == 0 or last is None:
            return self._split(prompts[-1], [conversation])
        completion: list[int] = []
        for start, following in pairwise(starts):
            answer, eos = conversation[start:following], self.tokenizer.eos_token_id
            if eos not in answer:
                # The end of this answer couldn't be learned; or the template renders it differently in later turns.
                return self._only_last_answer(prompts[-1], conversation)
            end = answer.index(eos) + 1
            completion += [*answer[:end], *(~token for token in answer[end:])]
        completion += last
        if self.text.truncation == "keep_end" and starts[0] + len(completion) > self.text.max_length:
            return self._only_last_answer(prompts[-1], conversation)
        notes = [NOT_A_PREFIX] if any(start < len(ids) for start, ids in zip(starts, prompts, strict=True)) else []
        return self._fit(conversation[: starts[0]], [completion], notes)

    def _only_last_answer(self, prompt: list[int], conversation: list[int]) -> Encoding:
        encoding = self._split(prompt, [conversation])
        return encoding._replace(notes=(*encoding.notes, "only the last answer of a chat is imitated"))

    def _with_one_eos(self, ids: list[int]) -> list[int] | None:
        """Return a completion with one end-of-sequence token, at its end; None if there is one inside the text."""
        eos = self.tokenizer.eos_token_id
        if eos not in ids:
            return [*ids, eos]
        end = ids.index(eos)
        # Templates such as ChatML add a line break after the end of the turn; generation stops before it.
        rest = [token for token in ids[end + 1 :] if token != eos]
        if rest and str(self.tokenizer.decode(rest)).strip():
            return None
        return ids[: end + 1]

    def _fit(self, prompt: list[int], completions: list[list[int]], notes: list[str]) -> Encoding:
        """Truncate prompt or completions to the maximum length."""
        max_length = self.text.max_length
        longest = max(map(len, completions))
        if self.text.truncation == "keep_end" and len(prompt) + longest > max_length:
            if longest >= max_length:
                return Encoding(None, "no room for the prompt")
            prompt, notes = prompt[longest - max_length :], [*notes, "prompt truncated"]
        if len(prompt) >= max_length:
            return Encoding(None, "no room for the answers")
        if len(prompt) + longest > max_length:
            notes = [*notes, "completion truncated"]
            room = max_length - len(prompt)
            completions = [_without_unscored_end(completion[:room]) for completion in completions]
            if not all(completions):
                return Encoding(None, "no room for the answers")
            if len(completions) > 1 and all(completion == completions[0] for completion in completions):
                return Encoding(None, "identical answers after truncation")
        prompt_ids, *completion_ids = (np.array(ids, dtype=np.int32) for ids in (prompt, *completions))
        return Encoding(Example(prompt_ids, tuple(completion_ids)), notes=tuple(notes))


@contextmanager
def _template_clock(clock: datetime) -> Iterator[None]:
    """Let `strftime_now` in chat templates see a fixed time.

    `datetime` in that module of transformers is a semi-private name; tests check that the clock is used. It can't be
    passed to the template, because transformers turns all values into text.
    """
    from transformers.utils import chat_template_utils as module

    class Clock(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> Self:
            return cls.fromisoformat(clock.isoformat())

    name = "datetime"
    original = getattr(module, name)
    setattr(module, name, Clock)
    try:
        yield
    finally:
        setattr(module, name, original)


def chat_template(text: TextSection) -> str | None:
    """Return the chat template of a recipe, which may be in a file; None for the tokenizer's template.

    Raises:
        ModelError: If the file can't be read.
    """
    template = text.chat_template
    if template is None or "{" in template:
        return template
    try:
        return Path(template).read_text(encoding="utf-8")
    except OSError as error:
        raise ModelError(f"text.chat_template: {template}: {error.strerror}; expected a template or a file") from None


def check_special_tokens(examples: Sequence[Example], tokenizer: "PreTrainedTokenizerBase") -> None:
    """Check that prompts don't begin with two beginning-of-sequence tokens, the most common mistake.

    Raises:
        ModelError: If one of the first examples does.
    """
    bos = tokenizer.bos_token_id
    for example in examples[:3]:
        if bos is not None and list(example.prompt_ids[:2]) == [bos, bos]:
            raise ModelError("prompts begin with two beginning-of-sequence tokens; remove one from the chat template")


def decoded_sample(example: Example, tokenizer: "PreTrainedTokenizerBase") -> dict[str, str]:
    """Return the text of an example with special tokens, as the model sees it."""
    names: tuple[Literal["chosen", "rejected", "completion"], ...]
    names = ("chosen", "rejected") if len(example.completions) == 2 else ("completion",)
    texts: dict[str, Any] = {"prompt": tokenizer.decode(example.prompt_ids)}
    texts |= {name: _decode_completion(ids, tokenizer) for name, ids in zip(names, example.completions, strict=True)}
    return {name: str(text) for name, text in texts.items()}


def _decode_completion(marked: Ids, tokenizer: "PreTrainedTokenizerBase") -> str:
    """Return a completion as text, with unscored tokens in brackets."""
    turns = np.split(marked, np.flatnonzero(np.diff(marked < 0)) + 1)
    texts = ((str(tokenizer.decode(token_ids(ids))), ids[0] < 0) for ids in turns)
    return "".join(f"[not imitated: {text}]" if unscored else text for text, unscored in texts)


def _without_unscored_end(marked: list[int]) -> list[int]:
    """Return a truncated completion without the unscored tokens at its end, which don't affect the loss."""
    scored = [index for index, token in enumerate(marked) if token >= 0]
    return marked[: scored[-1] + 1] if scored else []


def _prompts(record: PreferencePair | Demonstration) -> list[Conversation]:
    """Return the conversation before each imitated answer, the longest last."""
    history = record.prompt if isinstance(record, Demonstration) and record.every_turn else ()
    answers = [index for index, message in enumerate(history) if message.role == "assistant" and index > 0]
    return [*(record.prompt[:index] for index in answers), record.prompt]


def _answers(record: PreferencePair | Demonstration) -> tuple[str, ...]:
    return (record.chosen, record.rejected) if isinstance(record, PreferencePair) else (record.completion,)


def _common_prefix(first: list[int], second: list[int]) -> int:
    length = min(len(first), len(second))
    if first[:length] == second[:length]:  # the usual case, for which this is much faster
        return length
    return next((index for index in range(length) if first[index] != second[index]), length)
