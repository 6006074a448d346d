"""Engine with scripted answers, for tests and for running a pipeline without a model."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from bfpo.core.files import content_hash
from bfpo.core.samples import Completion, Prompt


class ScriptedEngine:
    """Engine that answers with the result of a function; tokens are counted as words.

    Args:
        answer: Function of the prompt and the sample number that returns the text.
        name: Name of the model in completions; a different function should have a different name.
        batch: Number of completions yielded at a time.
    """

    def __init__(self, answer: Callable[[Prompt, int], str], *, name: str = "script", batch: int = 8) -> None:
        self._answer, self._name, self._batch = answer, name, batch

    @property
    def faults(self) -> Counter[str]:
        """Always empty: nothing is retried."""
        return Counter()

    @property
    def settings_hash(self) -> str:
        """Hash of the name."""
        return content_hash("scripted", self._name)

    def generate(self, requests: Sequence[tuple[Prompt, int]]) -> Iterator[list[Completion]]:
        """Answer prompts in their order; see `Engine`."""
        for start in range(0, len(requests), self._batch):
            yield [self._completion(prompt, sample) for prompt, sample in requests[start : start + self._batch]]

    def _completion(self, prompt: Prompt, sample: int) -> Completion:
        text = self._answer(prompt, sample)
        return Completion.on(
            prompt,
            sample,
            text=text,
            finish_reason="stop",
            prompt_tokens=sum(len(message.content.split()) for message in prompt.prompt),
            completion_tokens=len(text.split()),
            model=self._name,
            engine="scripted",
            settings_hash=self.settings_hash,
        )
