"""Detection of a server that doesn't sample: identical samples make no pairs, and misleading metrics."""

from collections import Counter
from collections.abc import Sequence

from bfpo.core.samples import Completion, Prompt, Sampling
from bfpo.core.terminal import say
from bfpo.errors import ModelError

# Number of prompts with identical samples that stops a run; fewer may be chance, and only give a warning.
_MAX_PROMPTS = 4


class IdenticalSamples:
    """Counts the prompts whose samples are all identical, as completions arrive.

    Args:
        sampling: Sampling of the completions; at temperature 0 identical samples are expected.
        requests: Prompts and sample numbers; only prompts with several samples are counted.
    """

    def __init__(self, sampling: Sampling, requests: Sequence[tuple[Prompt, int]]) -> None:
        counts = Counter(prompt.prompt_id for prompt, _ in requests) if sampling.temperature > 0 else Counter[str]()
        self._num_samples = {name: count for name, count in counts.items() if count > 1}
        self._texts: dict[str, list[str]] = {}
        self._num_identical = 0

    def add(self, batch: Sequence[Completion]) -> None:
        """Count further completions.

        Raises:
            ModelError: If all samples are identical for enough prompts.
        """
        for completion in batch:
            if completion.is_blocked or (completion.lacks_answer and not completion.reasoning):
                # A filter's empty texts, and reasoning that isn't shown, are equal however the server samples.
                self._num_samples.pop(completion.prompt_id, None)
            if completion.prompt_id not in self._num_samples:
                continue
            texts = self._texts.setdefault(completion.prompt_id, [])
            # Without the ids of tool calls, which servers draw at random.
            calls = [(call.name, call.arguments.text) for call in completion.tool_calls]
            texts.append(repr((completion.text, completion.reasoning, calls)))
            if len(set(texts)) > 1:
                # The server samples, so nothing needs to be counted any more.
                self._num_samples, self._texts, self._num_identical = {}, {}, 0
                return
            self._num_identical += len(texts) == self._num_samples[completion.prompt_id]
        if self._num_identical >= _MAX_PROMPTS:
            raise ModelError(f"{self._describe()}; set that, or request one sample")

    def warn(self) -> None:
        """Print a warning if there are identical samples, of too few prompts to stop the run."""
        if self._num_identical:
            say(f"warning: {self._describe()}. With fewer than {_MAX_PROMPTS} prompts it may be chance; continuing")

    def _describe(self) -> str:
        num_samples = max(map(len, self._texts.values()))
        return (
            f"the server returned {num_samples} identical samples for each of {self._num_identical} prompts, so it "
            "ignores the temperature. `transformers serve` samples only if the checkpoint's generation_config.json "
            'has "do_sample": true'
        )
