"""From conversations to token ids, by the tokenizer's chat template.

The template renders the whole conversation, answer included, and the ids are split where they stop being those of
the prompt as generation will see it. Every completion ends with exactly one end-of-sequence token. Where every
answer of a chat is imitated, each counts from where its own prompt ends to its own end-of-sequence token. What
doesn't fit is cut or dropped, and counted by source and cell.
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
from bfpo.data.load import SourceReport, Why
from bfpo.data.table import Example, Ids, token_ids
from bfpo.data.token_cache import FEWEST, Encoding, cache_file, read_encodings, write_encodings
from bfpo.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHUNK = 512
EOS_INSIDE = "end-of-sequence token inside an answer"
NOT_A_PREFIX = "prompt is not a prefix of the conversation"

Item = TypeVar("Item", PreferencePair, Demonstration)


@dataclass(frozen=True)
class Encoder:
    """Turns pairs and demonstrations into token ids.

    Args:
        tokenizer: With an end-of-sequence token and a chat template.
        text: Length, truncation and template.
        cache: Folder where the encodings of many items are kept, and looked for; None for none.
        clock: Time that a template with a clock sees; None for the current time.

    Raises:
        ModelError: If the tokenizer lacks an end-of-sequence token or there is no chat template.
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
                "with one (for a chat model, the one on its model card)"
            )

    @cached_property
    def _template(self) -> str | None:
        return chat_template(self.text)

    def encode(
        self, items: Sequence[Item], report: SourceReport, advance: Callable[[int], None] = lambda count: None
    ) -> tuple[list[Item], list[Example]]:
        """Tokenize the items of one source; what is dropped or cut is counted in the report.

        Args:
            items: Pairs or demonstrations.
            report: Where to count.
            advance: Told how many items are done after each chunk.

        Returns:
            The items that are kept, and their token ids.
        """
        kept: list[Item] = []
        examples: list[Example] = []
        for item, encoding in zip(items, self._encodings(items, advance), strict=True):
            cell = item.cell if isinstance(item, PreferencePair) else None
            if encoding.example is None:
                report.dropped[Why(str(encoding.fault), cell)] += 1
                continue
            report.noted.update(Why(note, cell) for note in encoding.notes)
            kept.append(item)
            examples.append(encoding.example)
        return kept, examples

    def _encodings(self, items: Sequence[Item], advance: Callable[[int], None]) -> list[Encoding]:
        file = None
        if self.cache is not None and len(items) >= FEWEST:
            texts = [(item.prompt, _answers(item), len(_prompts(item))) for item in items]
            template = self._template or self.tokenizer.chat_template
            file = cache_file(self.cache, self.tokenizer, template, self.text, texts, clock=self.clock)
        if file is not None and (found := read_encodings(file)) is not None:
            advance(len(items))
            return found
        encodings: list[Encoding] = []
        for start in range(0, len(items), _CHUNK):
            chunk = items[start : start + _CHUNK]
            encodings += self._encode_chunk(chunk)
            advance(len(chunk))
        if file is not None and any(encoding.example for encoding in encodings):
            write_encodings(file, encodings)
        return encodings

    def _encode_chunk(self, items: Sequence[Item]) -> Iterator[Encoding]:
        with nullcontext() if self.clock is None else _template_clock(self.clock):
            rendered = [self._render(item) for item in items]
        texts = [text for texts in rendered if isinstance(texts, list) for text in texts]
        all_ids = iter(self.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else [])
        for item, texts_of_item in zip(items, rendered, strict=True):
            if isinstance(texts_of_item, str):
                yield Encoding(None, texts_of_item)
                continue
            ids, prompts = [next(all_ids) for _ in texts_of_item], len(_prompts(item))
            if prompts > 1:
                yield self._split_turns(ids[:-1], ids[-1])
            else:
                yield self._split(ids[0], ids[1:])

    def _render(self, item: PreferencePair | Demonstration) -> list[str] | str:
        """Return each prompt as generation sees it, then the conversation with each answer; or why it can't be."""
        prompts = _prompts(item)
        if len(prompts) > 1 and any(self._ends(message) for message in item.prompt):
            return EOS_INSIDE
        try:
            return [
                *(self._apply(prompt, generate=True) for prompt in prompts),
                *(self._apply((*item.prompt, Message("assistant", text)), generate=False) for text in _answers(item)),
            ]
        except TemplateSyntaxError as error:
            raise ModelError(f"chat template: line {error.lineno}: {error.message}") from None
        except TemplateError as error:
            return f"the chat template refuses the conversation ({error})"

    def _ends(self, message: Message) -> bool:
        return message.role == "assistant" and str(self.tokenizer.eos_token) in message.content

    def _apply(self, conversation: tuple[Message, ...], *, generate: bool) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                [message._asdict() for message in conversation],
                chat_template=self._template,
                tokenize=False,
                add_generation_prompt=generate,
            )
        )

    def _split(self, prompt: list[int], conversations: list[list[int]]) -> Encoding:
        cut = min(_common_prefix(prompt, conversation) for conversation in conversations)
        if cut == 0:
            return Encoding(None, "the chat template renders prompt and conversation differently from the start")
        notes = [NOT_A_PREFIX] if cut < len(prompt) else []
        completions = []
        for conversation in conversations:
            completion = self._ended_once(conversation[cut:])
            if completion is None:
                return Encoding(None, EOS_INSIDE)
            completions.append(completion)
        return self._fitted(prompt[:cut], completions, notes)

    def _split_turns(self, prompts: list[list[int]], conversation: list[int]) -> Encoding:
        """Make one completion of a chat from its first answer on; what stands between the answers is marked."""
        starts = [_common_prefix(prompt, conversation) for prompt in prompts]
        last = self._ended_once(conversation[starts[-1] :])
        if starts[0] == 0 or last is None:
            return self._split(prompts[-1], [conversation])
        completion: list[int] = []
        for start, following in pairwise(starts):
            answer, eos = conversation[start:following], self.tokenizer.eos_token_id
            if eos not in answer:
                # Nothing would teach the end of this answer; or the template writes it anew in later turns.
                return self._only_last(prompts[-1], conversation)
            end = answer.index(eos) + 1
            completion += [*answer[:end], *(~token for token in answer[end:])]
        completion += last
        if self.text.truncation == "keep_end" and starts[0] + len(completion) > self.text.max_length:
            return self._only_last(prompts[-1], conversation)
        notes = [NOT_A_PREFIX] if any(start < len(ids) for start, ids in zip(starts, prompts, strict=True)) else []
        return self._fitted(conversation[: starts[0]], [completion], notes)

    def _only_last(self, prompt: list[int], conversation: list[int]) -> Encoding:
        encoding = self._split(prompt, [conversation])
        return encoding._replace(notes=(*encoding.notes, "only the last answer of a chat is imitated"))

    def _ended_once(self, ids: list[int]) -> list[int] | None:
        """Return the completion with one end-of-sequence token at its end; None if one stands inside."""
        eos = self.tokenizer.eos_token_id
        if eos not in ids:
            return [*ids, eos]
        end = ids.index(eos)
        # Templates such as ChatML put a line break behind the end of the turn; generation stops before it.
        rest = [token for token in ids[end + 1 :] if token != eos]
        if rest and str(self.tokenizer.decode(rest)).strip():
            return None
        return ids[: end + 1]

    def _fitted(self, prompt: list[int], completions: list[list[int]], notes: list[str]) -> Encoding:
        room = self.text.max_length
        longest = max(map(len, completions))
        if self.text.truncation == "keep_end" and len(prompt) + longest > room:
            if longest >= room:
                return Encoding(None, "no room for the prompt")
            prompt, notes = prompt[longest - room :], [*notes, "prompt truncated"]
        if len(prompt) >= room:
            return Encoding(None, "no room for the answers")
        if len(prompt) + longest > room:
            notes = [*notes, "completion truncated"]
            completions = [_scored_to_the_end(completion[: room - len(prompt)]) for completion in completions]
            if not all(completions):
                return Encoding(None, "no room for the answers")
            if len(completions) > 1 and all(completion == completions[0] for completion in completions):
                return Encoding(None, "identical answers after truncation")
        as_array = [np.array(ids, dtype=np.int32) for ids in (prompt, *completions)]
        return Encoding(Example(as_array[0], tuple(as_array[1:])), notes=tuple(notes))


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
    """Return the recipe's chat template, read from its file if it names one; None for the tokenizer's own."""
    template = text.chat_template
    if template is None or "{" in template:
        return template
    try:
        return Path(template).read_text(encoding="utf-8")
    except OSError as error:
        raise ModelError(f"text.chat_template: {template}: {error.strerror}; expected a template or a file") from None


def check_special_tokens(examples: Sequence[Example], tokenizer: "PreTrainedTokenizerBase") -> None:
    """Check what goes wrong most often: a doubled beginning-of-sequence token.

    Raises:
        ModelError: If the first examples begin with two.
    """
    bos = tokenizer.bos_token_id
    for example in examples[:3]:
        if bos is not None and list(example.prompt_ids[:2]) == [bos, bos]:
            raise ModelError("prompts begin with two beginning-of-sequence tokens; take one out of the chat template")


def decoded_sample(example: Example, tokenizer: "PreTrainedTokenizerBase") -> dict[str, str]:
    """Return what the model sees of an example, special tokens included, for a person to read."""
    names: tuple[Literal["chosen", "rejected", "completion"], ...]
    names = ("chosen", "rejected") if len(example.completions) == 2 else ("completion",)
    texts: dict[str, Any] = {"prompt": tokenizer.decode(example.prompt_ids)}
    texts |= {name: _decoded(ids, tokenizer) for name, ids in zip(names, example.completions, strict=True)}
    return {name: str(text) for name, text in texts.items()}


def _decoded(marked: Ids, tokenizer: "PreTrainedTokenizerBase") -> str:
    """Return a completion as text, with what is read and not scored in brackets."""
    turns = np.split(marked, np.flatnonzero(np.diff(marked < 0)) + 1)
    texts = ((str(tokenizer.decode(token_ids(ids))), ids[0] < 0) for ids in turns)
    return "".join(f"[not imitated: {text}]" if unscored else text for text, unscored in texts)


def _scored_to_the_end(marked: list[int]) -> list[int]:
    """Return a completion that was cut without the unscored tokens at its end, from which nothing is learned."""
    scored = [index for index, token in enumerate(marked) if token >= 0]
    return marked[: scored[-1] + 1] if scored else []


def _prompts(item: PreferencePair | Demonstration) -> list[Conversation]:
    """Return what stands before each answer that is imitated, the longest last."""
    earlier = item.prompt if isinstance(item, Demonstration) and item.every_turn else ()
    turns = [number for number, message in enumerate(earlier) if message.role == "assistant" and number > 0]
    return [*(item.prompt[:number] for number in turns), item.prompt]


def _answers(item: PreferencePair | Demonstration) -> tuple[str, ...]:
    return (item.chosen, item.rejected) if isinstance(item, PreferencePair) else (item.completion,)


def _common_prefix(first: list[int], second: list[int]) -> int:
    length = min(len(first), len(second))
    if first[:length] == second[:length]:  # the usual case, and much the fastest way to see it
        return length
    return next((index for index in range(length) if first[index] != second[index]), length)
