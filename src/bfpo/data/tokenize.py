"""Conversations to token ids, with the chat template of the tokenizer.

The template renders the whole conversation including the answer, and the ids are split where they begin to differ
from those of the prompt for generation. Every completion ends with exactly one end-of-sequence token, except for an
answer that was cut when it was sampled: it ends with its last token. If all answers of a chat are imitated, each one
is scored from the end of its prompt to its end-of-sequence token. Texts that are too long are truncated or dropped,
and counted by source and cell.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np
from jinja2.exceptions import TemplateSyntaxError

from bfpo.config.recipes import TextSection
from bfpo.core.conversation import Conversation, Message, answer_turns
from bfpo.core.pairs import NO_INPUTS, CutAnswers, Demonstration, PreferencePair
from bfpo.core.template_errors import TEMPLATE_ERRORS
from bfpo.data.chat_format import ChatFormat
from bfpo.data.load import NOT_A_PREFIX, Reason, SourceReport
from bfpo.data.table import Example, Ids
from bfpo.data.template import chat_template, fixed_clock
from bfpo.data.token_cache import MIN_CACHED, Encoding, cache_file, read_encodings, write_encodings
from bfpo.errors import BfpoError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHUNK = 512
EOS_INSIDE = "end-of-sequence token inside an answer"

# Notes on pairs with reasoning, by what becomes of it.
_REASONING = {
    "score": "reasoning in the loss (text.thinking: score)",
    "context": "reasoning read, not scored (text.thinking: context)",
    "drop": "reasoning left out (text.thinking: drop)",
}
_EARLIER_REASONING = "reasoning of earlier turns left out by the chat template"

Record = TypeVar("Record", PreferencePair, Demonstration)


class _Rendered(NamedTuple):
    """Texts of a record with one of its answers.

    Args:
        prompts: Prompt for generation before each turn that is imitated.
        text: The whole conversation.
        unscored: Ranges of characters of reasoning that is read and not scored.
        notes: Remarks.
    """

    prompts: tuple[str, ...]
    text: str
    unscored: tuple[tuple[int, int], ...]
    notes: tuple[str, ...] = ()


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

    @cached_property
    def format(self) -> ChatFormat:
        """How the chat template is used."""
        return ChatFormat(self.tokenizer, self._template, self.text.thinking)

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

    def entry_folder(self, content: object) -> Path | None:
        """Return the folder in the cache for content that isn't held; None without a cache.

        Args:
            content: What the records follow from, in a form that JSON can represent.
        """
        if self.cache is None:
            return None
        template = self._template or self.tokenizer.chat_template
        file = cache_file(self.cache, self.tokenizer, template, self.text, content, clock=self.clock)
        return file and file.with_suffix("")

    def _encode_all(self, records: Sequence[Record], advance: Callable[[int], None]) -> list[Encoding]:
        file = None
        if self.cache is not None and len(records) >= MIN_CACHED:
            texts = [_content(record) for record in records]
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

    def _encode_chunk(self, records: Sequence[PreferencePair | Demonstration]) -> Iterator[Encoding]:
        with nullcontext() if self.clock is None else fixed_clock(self.clock):
            rendered: list[list[_Rendered] | str] = [self._render(record) for record in records]
        texts: list[str] = []
        for answers in rendered:
            if not isinstance(answers, str):
                texts += (text for answer in answers for text in (*answer.prompts, answer.text))
        ids = self._tokenize(texts)
        for record, answers in zip(records, rendered, strict=True):
            if isinstance(answers, str):
                yield Encoding(None, answers)
                continue
            prompts = [[ids[text] for text in answer.prompts] for answer in answers]
            conversations = [self._mark_unscored(ids[answer.text], answer) for answer in answers]
            if any(len(answer.prompts) > 1 for answer in answers):
                encoding = self._split_turns(prompts, conversations)
            else:
                encoding = self._split(prompts[0][0], conversations)
            if isinstance(record, PreferencePair) and any(record.cut):
                encoding = self._without_ends(encoding, record.cut)
            notes = [note for answer in answers for note in answer.notes]
            yield encoding._replace(notes=(*encoding.notes, *dict.fromkeys(notes)))

    def _tokenize(self, texts: Sequence[str]) -> dict[str, list[int]]:
        unique = list(dict.fromkeys(texts))
        all_ids = self.tokenizer(unique, add_special_tokens=False)["input_ids"] if unique else []
        return dict(zip(unique, all_ids, strict=True))

    def _mark_unscored(self, ids: list[int], answer: _Rendered) -> list[int]:
        """Mark the tokens of reasoning that is read and not scored."""
        if not answer.unscored:
            return ids
        if not self.tokenizer.is_fast:
            raise ModelError(
                f"{self.tokenizer.name_or_path} is a slow tokenizer; `text.thinking: context` needs a fast one"
            )
        offsets = self.tokenizer(answer.text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        return [
            ~token if any(first <= start and end <= last for first, last in answer.unscored) else token
            for token, (start, end) in zip(ids, offsets, strict=True)
        ]

    def _render(self, record: PreferencePair | Demonstration) -> list[_Rendered] | str:
        """Return the texts of a record, for each of its answers; or the reason of a failure."""
        if _number_of_turns(record) > 1 and any(self._has_eos(message) for message in record.prompt):
            return EOS_INSIDE
        rendered = []
        try:
            first = None
            for answer in record.answers:
                conversation = (*record.prompt, *answer_turns(answer))
                imitated = _imitated_turns(record, conversation)
                text, unscored = self.format.render_answer(conversation, record.inputs, imitated)
                omission = self.format.find_omission(text, conversation, len(record.prompt), record.inputs)
                if omission is not None:
                    return omission
                read = self.format.without_dropped_reasoning(conversation, imitated)
                if first is None:
                    first = self._render_prompt(read[: len(record.prompt)], record)
                prompts = (
                    first if turn == len(record.prompt) else self._render_prompt(read[:turn], record)
                    for turn in imitated
                )
                unread = self.format.find_unread(text, conversation, record.inputs)
                notes = (*self._reasoning_notes(text, conversation, imitated), *unread)
                rendered.append(_Rendered(tuple(prompts), text, unscored, notes))
        except TemplateSyntaxError as error:
            raise ModelError(f"chat template: line {error.lineno}: {error.message}") from None
        except BfpoError:
            raise
        except TEMPLATE_ERRORS as error:
            return f"the chat template refuses the conversation ({error})"
        return rendered

    def _reasoning_notes(self, text: str, conversation: Conversation, imitated: Sequence[int]) -> tuple[str, ...]:
        has_reasoning = any(conversation[turn].reasoning is not None for turn in imitated)
        notes = [_REASONING[self.format.reasoning_use]] if has_reasoning else []
        read = self.format.without_dropped_reasoning(conversation[:-1], imitated)
        if any(message.reasoning is not None and message.reasoning not in text for message in read):
            notes.append(_EARLIER_REASONING)
        return tuple(notes)

    def _render_prompt(self, prompt: Conversation, record: PreferencePair | Demonstration) -> str:
        return self.format.render_prompt(prompt, record.inputs)

    def _has_eos(self, message: Message) -> bool:
        return message.role == "assistant" and str(self.tokenizer.eos_token) in message.content

    @cached_property
    def _end_ids(self) -> set[int | None]:
        """Ids of the tokens that end a turn: the end of a sequence, and what the template writes after an answer."""
        after: list[int] = self.tokenizer(self.format.end_of_answer, add_special_tokens=False)["input_ids"]
        special = {*self.tokenizer.all_special_ids, *self.tokenizer.added_tokens_decoder}
        return {self.tokenizer.eos_token_id, next((token for token in after if token in special), None)}

    def _split(self, prompt: list[int], conversations: list[list[int]]) -> Encoding:
        prompt_length = min(_common_prefix(prompt, _unmarked(conversation)) for conversation in conversations)
        if prompt_length == 0:
            return Encoding(None, "the chat template renders prompt and conversation differently from the start")
        notes = [NOT_A_PREFIX] if prompt_length < len(prompt) else []
        completions = []
        for conversation in conversations:
            completion = self._with_one_eos(conversation[prompt_length:])
            if completion is None:
                return Encoding(None, EOS_INSIDE)
            completions.append(completion)
        if len(completions) > 1 and all(completion == completions[0] for completion in completions):
            return Encoding(None, "identical answers after the chat template")
        return self._fit(prompt[:prompt_length], completions, notes)

    def _split_turns(self, prompts: list[list[list[int]]], conversations: list[list[int]]) -> Encoding:
        """Encode answers of several turns, each one completion from its first turn on, with marks on other tokens.

        Args:
            prompts: Token ids of the prompt before each imitated turn, for each answer.
            conversations: Token ids of the conversation with each answer.
        """
        is_chat = len(conversations) == 1
        starts = [
            [self._start_of_turn(prompt, _unmarked(conversation)) for prompt in before]
            for before, conversation in zip(prompts, conversations, strict=True)
        ]
        first = min(turns[0] for turns in starts)
        completions = [
            self._mark_turns([first, *turns[1:]], conversation)
            for turns, conversation in zip(starts, conversations, strict=True)
        ]
        if first == 0 or not all(completions):
            if is_chat:
                return self._only_last_answer(prompts[0][-1], conversations[0])
            return Encoding(None, "the chat template renders earlier turns of an answer differently")
        longest = max(len(completion) for completion in completions if completion)
        if is_chat and self.text.truncation == "keep_end" and first + longest > self.text.max_length:
            return self._only_last_answer(prompts[0][-1], conversations[0])
        is_prefix = starts == [[len(prompt) for prompt in before] for before in prompts]
        notes = [] if is_prefix else [NOT_A_PREFIX]
        return self._fit(conversations[0][:first], [completion for completion in completions if completion], notes)

    def _start_of_turn(self, prompt: list[int], conversation: list[int]) -> int:
        """Return the index of an answer's first token: after its prompt, or after the next header if that differs."""
        start = _common_prefix(prompt, conversation)
        header = self._header_ids
        if start == len(prompt) or not header:
            return start
        ends = range(start + len(header), len(conversation))
        return next((end for end in ends if conversation[end - len(header) : end] == header), start)

    @cached_property
    def _header_ids(self) -> list[int]:
        ids: list[int] = self.tokenizer(self.format.header, add_special_tokens=False)["input_ids"]
        return ids

    def _mark_turns(self, starts: list[int], conversation: list[int]) -> list[int] | None:
        """Return an answer with marks on the tokens between its turns; None if a turn's end couldn't be learned."""
        last = self._with_one_eos(conversation[starts[-1] :])
        if last is None:
            return None
        completion: list[int] = []
        for start, following in pairwise(starts):
            turn = conversation[start:following]
            end = next((index for index, token in enumerate(turn, start=1) if token in self._end_ids), None)
            if end is None:
                # Or the template renders this turn differently when others follow.
                return None
            completion += [*turn[:end], *(_marked(token) for token in turn[end:])]
        return completion + last

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

    def _without_ends(self, encoding: Encoding, cut: CutAnswers) -> Encoding:
        """Remove the end-of-sequence token, and what the template writes before it, from answers that were cut."""
        if encoding.example is None:
            return encoding
        completions = [
            self._without_end(completion) if is_cut else completion
            for completion, is_cut in zip(encoding.example.completions, cut, strict=True)
        ]
        if not all(map(len, completions)):
            return Encoding(None, "cut answer without a token")
        if np.array_equal(completions[0], completions[1]):
            return Encoding(None, "identical answers without their ends")
        example = encoding.example._replace(completions=tuple(completions))
        return encoding._replace(example=example, notes=(*encoding.notes, "cut answer, its end not scored"))

    def _without_end(self, completion: Ids) -> Ids:
        end = len(completion)
        while end and (
            completion[end - 1] in self._end_ids or not str(self.tokenizer.decode(completion[end - 1])).strip()
        ):
            end -= 1
        return completion[:end]

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


def check_special_tokens(examples: Sequence[Example], tokenizer: "PreTrainedTokenizerBase") -> None:
    """Check that prompts don't begin with two beginning-of-sequence tokens, the most common mistake.

    Raises:
        ModelError: If one of the first examples does.
    """
    bos = tokenizer.bos_token_id
    for example in examples[:3]:
        if bos is not None and list(example.prompt_ids[:2]) == [bos, bos]:
            raise ModelError("prompts begin with two beginning-of-sequence tokens; remove one from the chat template")


def _without_unscored_end(marked: list[int]) -> list[int]:
    """Return a truncated completion without the unscored tokens at its end, which don't affect the loss."""
    scored = [index for index, token in enumerate(marked) if token >= 0]
    return marked[: scored[-1] + 1] if scored else []


def _imitated_turns(record: PreferencePair | Demonstration, conversation: Conversation) -> list[int]:
    """Return the indices of the turns that are scored: those of the answer, and perhaps those before it."""
    first = 1 if isinstance(record, Demonstration) and record.every_turn else len(record.prompt)
    return [index for index, turn in enumerate(conversation) if index >= first and turn.role == "assistant"]


def _number_of_turns(record: PreferencePair | Demonstration) -> int:
    return max(len(_imitated_turns(record, (*record.prompt, *answer_turns(answer)))) for answer in record.answers)


def _content(record: PreferencePair | Demonstration) -> tuple[object, ...]:
    """Return what the token ids of a record depend on."""
    content: tuple[object, ...] = (record.prompt, record.answers, _number_of_turns(record))
    # Caches of earlier versions have no inputs, and no cut answers.
    if record.inputs != NO_INPUTS:
        content = (*content, record.inputs)
    return (*content, record.cut) if isinstance(record, PreferencePair) and any(record.cut) else content


def _marked(token: int) -> int:
    return token if token < 0 else ~token


def _unmarked(marked: list[int]) -> list[int]:
    if min(marked, default=0) >= 0:  # the usual case, for which this is much faster
        return marked
    return [token if token >= 0 else ~token for token in marked]


def _common_prefix(first: list[int], second: list[int]) -> int:
    length = min(len(first), len(second))
    if first[:length] == second[:length]:  # the usual case, for which this is much faster
        return length
    return next((index for index in range(length) if first[index] != second[index]), length)
