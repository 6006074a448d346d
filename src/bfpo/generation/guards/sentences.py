"""The guard `first_safe` by sentence: each is drawn again until a judge calls the answer up to its end safe."""

import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from bfpo.core.guarding import GuardCounts
from bfpo.core.samples import Completion, Key, Prompt
from bfpo.generation.guards.first_safe import ATTEMPT, PendingAnswer, Redrawing, gather, own_key, refuse
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
    """

    token_ids: tuple[int, ...] = ()
    passed: Completion | None = None
    draws: int = 0
    tries: int = 0


class SafeSentences(Redrawing[_GrowingAnswer]):
    """Engine whose answers grow by sentences that a judge calls safe together with those before; see `Redrawing`.

    The model writes the whole rest of an answer, and the judge reads it up to the end of each sentence. From the
    first sentence that doesn't pass, the rest is drawn again. An answer that passes throughout is the one that the
    model gives without the guard.

    If no sample of a sentence passes, the answer is what has passed before, marked as cut; without any, the refusal.
    """

    kind = "first_safe by sentence"
    _engine: TransformersEngine

    def _pend(self, prompt: Prompt, sample: int) -> _GrowingAnswer:
        return _GrowingAnswer(prompt, sample, token_ids=self._engine.begin_answer(prompt, sample).token_ids)

    def _draw(self, pending: dict[Key, _GrowingAnswer]) -> Iterator[list[Completion]]:
        beginnings = [
            TokenAnswer(answer.prompt, answer.sample + answer.draws * ATTEMPT, answer.token_ids)
            for answer in pending.values()
        ]
        started = time.monotonic()
        for batch in gather(self._engine.continue_answers(beginnings)):
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
                if part.text_hash not in answer.rejected
            ]
            screenings = dict(zip((part.key for part in fresh), self._screen.screen(fresh), strict=True))
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
        has_ended = _ENDS_SENTENCE.search(before) and (before[-1:].isspace() or text[len(before) :][:1].isspace())
        if has_ended or _ENDS_WIDE_SENTENCE.search(before):
            ends.append(end - 1)
    return ends


def key_of(tokens: TokenAnswer) -> Key:
    """Return the identity of an answer as tokens."""
    return tokens.prompt.prompt_id, tokens.sample
