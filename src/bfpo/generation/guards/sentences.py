"""The guard `first_safe` by sentence: each is drawn again until a judge calls the answer up to its end safe."""

import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

from bfpo.core.guarding import GuardCounts
from bfpo.core.samples import Completion, Judge, Key, Prompt
from bfpo.generation.guards.first_safe import ATTEMPT, PendingAnswer, Redrawing, gather, own_key, refuse
from bfpo.generation.guards.screen import Screen, Screening
from bfpo.generation.in_process import TokenAnswer, TransformersEngine

_ENDS_SENTENCE = re.compile(r"(?:[.!?\u2026][\"'\u201d\u2019)\]*]*|\n)\s*\Z")
# Chinese and Japanese have no blanks between sentences.
_ENDS_WIDE_SENTENCE = re.compile(r"[\u3002\uff01\uff1f][\u201d\u2019\u300d\u300f\uff09]*\Z")


@dataclass(slots=True)
class _GrowingAnswer(PendingAnswer):
    """Answer of which some sentences have passed.

    Args:
        token_ids: Tokens of the sentences that passed.
        passed: The same as a completion; None before the first.
        draws: Number of samples so far.
        tries: Samples of the next sentence that were rejected.
        ended: Numbers of tokens at which sentences of the sample in progress have ended that aren't judged yet.
        screened: Screenings of its sentences that were judged while it was drawn, by the hash of the text.
    """

    token_ids: tuple[int, ...] = ()
    passed: Completion | None = None
    draws: int = 0
    tries: int = 0
    ended: list[int] = field(default_factory=list)
    screened: dict[str, Screening] = field(default_factory=dict)


class SafeSentences(Redrawing[_GrowingAnswer]):
    """Engine whose answers grow by sentences that a judge calls safe together with those before; see `Redrawing`.

    The model writes the whole rest of an answer, and the judge reads it up to the end of each sentence. From the
    first sentence that doesn't pass, the rest is drawn again. An answer that passes throughout is the one that the
    model gives without the guard.

    If no sample of a sentence passes, the answer is what has passed before, marked as cut; without any, the refusal.

    With `show`, each sentence is judged as soon as the next one begins, and drawing stops at one that doesn't pass.
    The answers are the same.

    Args:
        engine: Engine that samples.
        judge: Judge of safety, or a screen that several engines share.
        samples: Maximum number of samples of a sentence.
        refusal: Text in place of an answer of which no first sentence passes.
        show: Function that gets an answer up to the end of each sentence, once it has passed.
    """

    kind = "first_safe by sentence"
    _engine: TransformersEngine

    def __init__(
        self,
        engine: TransformersEngine,
        judge: Judge | Screen,
        *,
        samples: int,
        refusal: str,
        show: Callable[[Completion], None] | None = None,
    ) -> None:
        super().__init__(engine, judge, samples=samples, refusal=refusal)
        self._show = show

    def _pend(self, prompt: Prompt, sample: int) -> _GrowingAnswer:
        return _GrowingAnswer(prompt, sample, token_ids=self._engine.begin_answer(prompt, sample).token_ids)

    def _draw(self, pending: dict[Key, _GrowingAnswer]) -> Iterator[list[Completion]]:
        beginnings = [
            TokenAnswer(answer.prompt, answer.sample + answer.draws * ATTEMPT, answer.token_ids)
            for answer in pending.values()
        ]
        for answer in pending.values():
            answer.ended, answer.screened = [], {}
        goes_on = None if self._show is None else partial(self._judge_early, pending)
        started = time.monotonic()
        for batch in gather(self._engine.continue_answers(beginnings, goes_on)):
            finished: list[Completion] = []
            drawn = [(pending[own_key((tokens.prompt.prompt_id, tokens.sample))], tokens) for tokens in batch]
            for answer, tokens in drawn:
                answer.draws += 1
                answer.counts += GuardCounts(samples=1, tokens=len(tokens.token_ids) - len(answer.token_ids))
            last = self._judge_sentences(drawn)
            share = (time.monotonic() - started) / len(batch)
            for answer, tokens in drawn:
                answer.counts += GuardCounts(seconds=share)
                is_whole = answer.token_ids == tokens.token_ids
                if is_whole or answer.tries == self._samples:
                    finished.append(self._finish(answer, last[own_key(key_of(tokens))], is_whole=is_whole))
                    del pending[finished[-1].key]
            if finished:
                yield finished
            started = time.monotonic()

    def _judge_early(self, pending: dict[Key, _GrowingAnswer], tokens: TokenAnswer) -> bool:
        """Judge the sentences of a sample in progress that are known to have ended; return whether all pass."""
        answer = pending[own_key(key_of(tokens))]
        if tokens.prompt.tools is not None:
            return True
        end = len(tokens.token_ids) - 1
        if end > len(answer.token_ids) and _has_ended(
            self._decode(tokens.token_ids[:-1]), self._decode(tokens.token_ids)
        ):
            answer.ended.append(end)
        if not answer.ended:
            return True
        text = self._engine.completion_of(tokens).text.strip()
        while answer.ended:
            part = self._engine.completion_of(tokens._replace(token_ids=tokens.token_ids[: answer.ended[0]]))
            if not part.message.is_empty:
                # As in `_sentence_ends`: what follows may be the end of the turn.
                if part.text.strip() == text:
                    return True
                if part.text_hash in answer.rejected:
                    return False
                (answer.screened[part.text_hash],) = self._screen.screen([part])
                if not answer.screened[part.text_hash].passes:
                    return False
                self._show_passed(part)
            answer.ended.pop(0)
        return True

    def _show_passed(self, part: Completion) -> None:
        if self._show is not None:
            self._show(part)

    def _judge_sentences(self, drawn: Sequence[tuple[_GrowingAnswer, TokenAnswer]]) -> dict[Key, Completion]:
        """Judge each answer up to the end of each of its new sentences, until it doesn't pass.

        Returns:
            What was judged last of each answer.
        """
        ends = {key_of(tokens): self._sentence_ends(answer, tokens) for answer, tokens in drawn}
        last: dict[Key, Completion] = {}
        waiting = list(drawn)
        while waiting:
            parts = [
                self._engine.completion_of(tokens._replace(token_ids=tokens.token_ids[: ends[key_of(tokens)][0]]))
                for _, tokens in waiting
            ]
            fresh = [
                part
                for part, (answer, _) in zip(parts, waiting, strict=True)
                if part.text_hash not in answer.rejected and part.text_hash not in answer.screened
            ]
            screenings = dict(zip((part.key for part in fresh), self._screen.screen(fresh), strict=True))
            screenings |= {
                part.key: answer.screened[part.text_hash]
                for part, (answer, _) in zip(parts, waiting, strict=True)
                if part.text_hash in answer.screened
            }
            passing = []
            for part, (answer, tokens) in zip(parts, waiting, strict=True):
                screening = screenings.get(part.key)
                last[own_key(part.key)] = part
                answer.counts += GuardCounts(repeats=1) if screening is None else screening.counts
                if screening is None or not screening.passes:
                    answer.rejected.add(part.text_hash)
                    answer.tries += 1
                    continue
                answer.token_ids = tokens.token_ids[: ends[key_of(tokens)].pop(0)]
                answer.passed, answer.tries, answer.rejected = part, 0, set()
                if part.text_hash not in answer.screened:
                    self._show_passed(part)
                answer.counts += GuardCounts(sentences=1)
                if ends[key_of(tokens)]:
                    passing.append((answer, tokens))
            waiting = passing
        return last

    def _sentence_ends(self, answer: _GrowingAnswer, tokens: TokenAnswer) -> list[int]:
        """Return the numbers of tokens up to the end of each new sentence; the last is that of all tokens."""
        whole = len(tokens.token_ids)
        # A call of a tool has no sentences.
        if tokens.prompt.tools is not None:
            return [whole]
        text = self._engine.completion_of(tokens).text.strip()
        ends = []
        for end in sentence_ends(self._decode, tokens.token_ids):
            part = self._engine.completion_of(tokens._replace(token_ids=tokens.token_ids[:end]))
            # In a thought there is no answer to judge yet, and after the last sentence only the end of the turn.
            if end > len(answer.token_ids) and not part.message.is_empty and part.text.strip() != text:
                ends.append(end)
        return [*ends, whole]

    def _decode(self, token_ids: Sequence[int]) -> str:
        return str(self._engine.tokenizer.decode(list(token_ids)))

    def _finish(self, answer: _GrowingAnswer, last: Completion, *, is_whole: bool) -> Completion:
        if is_whole:
            return answer.finish(last, self.settings_hash)
        if answer.passed is None:
            return refuse(answer.finish(last, self.settings_hash), self._refusal)
        answer.counts += GuardCounts(cut=1)
        return answer.finish(answer.passed, self.settings_hash)


def sentence_ends(decode: Callable[[Sequence[int]], str], token_ids: Sequence[int]) -> list[int]:
    """Return the numbers of tokens after which a sentence has ended: where a blank follows its mark, or a line ends.

    Args:
        decode: Function from tokens to their text.
        token_ids: Tokens of a text.
    """
    ends = []
    text = ""
    for end in range(1, len(token_ids) + 1):
        before, text = text, decode(token_ids[:end])
        if _has_ended(before, text):
            ends.append(end - 1)
    return ends


def _has_ended(before: str, text: str) -> bool:
    """Return whether a text with one more token shows that a sentence ended before that token."""
    is_apart = before[-1:].isspace() or text[len(before) :][:1].isspace()
    return bool((_ENDS_SENTENCE.search(before) and is_apart) or _ENDS_WIDE_SENTENCE.search(before))


def key_of(tokens: TokenAnswer) -> Key:
    """Return the identity of an answer as tokens."""
    return tokens.prompt.prompt_id, tokens.sample
