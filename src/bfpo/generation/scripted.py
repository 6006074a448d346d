"""An engine that answers from a script: for tests, and to see a pipeline through without a model."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from bfpo.core.files import content_hash
from bfpo.core.samples import Completion, Prompt


class ScriptedEngine:
    """Answers with what a function says.

    Args:
        answer: Prompt and sample's number → text.
        name: What completions call the model; with other answers it should be another one.
        batch: Completions handed over at a time.
    """

    def __init__(self, answer: Callable[[Prompt, int], str], *, name: str = "script", batch: int = 8) -> None:
        self._answer, self._name, self._batch = answer, name, batch

    @property
    def faults(self) -> Counter[str]:
        """Nothing is asked twice."""
        return Counter()

    @property
    def settings_hash(self) -> str:
        """Hash of the name."""
        return content_hash("scripted", self._name)

    def generate(self, wanted: Sequence[tuple[Prompt, int]]) -> Iterator[list[Completion]]:
        """Answer prompts in their order; see `Engine`. Tokens are counted as words."""
        for start in range(0, len(wanted), self._batch):
            yield [self._completion(prompt, sample) for prompt, sample in wanted[start : start + self._batch]]

    def _completion(self, prompt: Prompt, sample: int) -> Completion:
        text = self._answer(prompt, sample)
        return Completion(
            prompt_id=prompt.prompt_id,
            sample=sample,
            prompt=prompt.prompt,
            text=text,
            finish_reason="stop",
            prompt_tokens=sum(len(message.content.split()) for message in prompt.prompt),
            completion_tokens=len(text.split()),
            model=self._name,
            engine="scripted",
            settings_hash=self.settings_hash,
        )
