"""The guard `first_safe`: the first of n samples that a judge calls safe, or a fixed refusal."""

import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Generic, TypeVar

from bfpo.core.files import content_hash
from bfpo.core.guarding import GuardCounts
from bfpo.core.samples import Completion, Engine, Judge, Key, Prompt
from bfpo.errors import Unanswered
from bfpo.generation.guards.screen import Screen

# Attempt k of sample s has the noise of sample s + k of these, which no run without a guard draws. The first attempt
# is the sample itself: an answer that passes at once is the one that the model gives without the guard.
ATTEMPT = 1 << 32
# A killed run loses the finished answers that weren't judged yet.
_JUDGED_TOGETHER = 16

Item = TypeVar("Item")


@dataclass(slots=True)
class PendingAnswer:
    """Answer that hasn't passed yet.

    Args:
        prompt: Prompt that is answered.
        sample: Number of the answer.
        counts: What it took so far.
        rejected: Hashes of the rejected texts.
    """

    prompt: Prompt
    sample: int
    counts: GuardCounts = field(default_factory=GuardCounts)
    rejected: set[str] = field(default_factory=set)

    def finish(self, completion: Completion, settings_hash: str) -> Completion:
        """Return a sample as this answer."""
        counts = replace(self.counts, seconds=round(self.counts.seconds, 6))
        return replace(completion, sample=self.sample, settings_hash=settings_hash, guard=counts)


Pending = TypeVar("Pending", bound=PendingAnswer)


class Redrawing(ABC, Generic[Pending]):
    """Engine that draws answers from another one until a judge lets them pass; see `Engine`.

    Args:
        engine: Engine that samples.
        judge: Judge of safety, or a screen that several engines share.
        samples: Maximum number of samples of what the judge reads at once.
        refusal: Text in place of an answer of which nothing passes.
    """

    kind: ClassVar[str]

    def __init__(self, engine: Engine, judge: Judge | Screen, *, samples: int, refusal: str) -> None:
        self._engine, self._samples, self._refusal = engine, samples, refusal
        self._screen = judge if isinstance(judge, Screen) else Screen(judge)

    @property
    def faults(self) -> Counter[str]:
        """Faults of the engine; failures of the judge are counted with the answers."""
        return self._engine.faults

    @property
    def settings_hash(self) -> str:
        """Hash of the engine's settings, the judge with its revision, and the guard's settings."""
        judge = self._screen.judge
        settings = (judge.name, judge.revision, self._samples, self._refusal)
        return content_hash(self.kind, self._engine.settings_hash, *settings)

    def generate(self, requests: Sequence[tuple[Prompt, int]]) -> Iterator[list[Completion]]:
        """Answer prompts, each as soon as all of it has passed; see `Engine`.

        Raises:
            Unanswered: At the end, if the engine gave no answer to some.
        """
        pending = {(prompt.prompt_id, sample): self._pend(prompt, sample) for prompt, sample in requests}
        failed: dict[Key, str] = {}
        refused: set[Key] = set()
        while pending:
            try:
                yield from self._draw(pending)
            except Unanswered as error:
                failed |= {own_key(key): reason for key, reason in error.failed.items()}
                refused |= {own_key(key) for key in error.refused}
                for key in failed:
                    pending.pop(key, None)
        if failed:
            raise Unanswered(failed, len(requests), refused=refused)

    @abstractmethod
    def _pend(self, prompt: Prompt, sample: int) -> Pending:
        """Return an answer that isn't drawn yet."""

    @abstractmethod
    def _draw(self, pending: dict[Key, Pending]) -> Iterator[list[Completion]]:
        """Draw a sample of each answer; remove those that are finished, and yield them."""


class FirstSafe(Redrawing[PendingAnswer]):
    """Engine whose answers are the first samples of another engine that a judge calls safe; see `Redrawing`.

    The samples of a prompt are drawn one after another, those of all prompts together. An answer depends on its
    prompt and sample number only, as far as that is true of the engine and the judge.
    """

    kind = "first_safe"

    def _pend(self, prompt: Prompt, sample: int) -> PendingAnswer:
        return PendingAnswer(prompt, sample)

    def _draw(self, pending: dict[Key, PendingAnswer]) -> Iterator[list[Completion]]:
        requests = [(answer.prompt, answer.sample + answer.counts.samples * ATTEMPT) for answer in pending.values()]
        started = time.monotonic()
        for batch in gather(self._engine.generate(requests)):
            of_batch = [pending[own_key(completion.key)] for completion in batch]
            fresh = [
                completion
                for completion, answer in zip(batch, of_batch, strict=True)
                if completion.text_hash not in answer.rejected
            ]
            screenings = {
                completion.key: screening
                for completion, screening in zip(fresh, self._screen.screen(fresh), strict=True)
            }
            share = (time.monotonic() - started) / len(batch)
            finished = []
            for completion, answer in zip(batch, of_batch, strict=True):
                screening = screenings.get(completion.key)
                answer.counts += GuardCounts(samples=1, tokens=completion.completion_tokens, seconds=share)
                answer.counts += GuardCounts(repeats=1) if screening is None else screening.counts
                passes = screening is not None and screening.passes
                answer.rejected.add(completion.text_hash)
                if passes or answer.counts.samples == self._samples:
                    own = answer.finish(completion, self.settings_hash)
                    finished.append(own if passes else refuse(own, self._refusal))
                    del pending[own.key]
            if finished:
                yield finished
            started = time.monotonic()


def gather(batches: Iterable[list[Item]]) -> Iterator[list[Item]]:
    """Yield batches that a judge reads at once: an engine yields answers as they end, often each alone.

    Raises:
        Unanswered: After all batches, if the engine raised it.
    """
    gathered: list[Item] = []
    unanswered = None
    try:
        for batch in batches:
            gathered += batch
            if len(gathered) >= _JUDGED_TOGETHER:
                yield gathered
                gathered = []
    except Unanswered as error:
        unanswered = error
    if gathered:
        yield gathered
    if unanswered is not None:
        raise unanswered


def refuse(completion: Completion, refusal: str) -> Completion:
    """Return a completion with a guard's refusal in place of the answer, none of whose tokens remain."""
    return replace(
        completion, text=refusal, finish_reason="guarded", completion_tokens=0, reasoning=None, tool_calls=()
    )


def own_key(key: Key) -> Key:
    """Return the identity of the answer that a sample is of."""
    prompt_id, sample = key
    return prompt_id, sample % ATTEMPT
