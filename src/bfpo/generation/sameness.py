"""Notices a server that doesn't sample: k equal samples would make no pairs, and a wrong impression."""

from collections import Counter
from collections.abc import Sequence

from bfpo.core.samples import Completion, Prompt, Sampling
from bfpo.core.terminal import say
from bfpo.errors import ModelError

# So many prompts whose samples are all the same aren't chance; of fewer it is only said.
_SAME_PROMPTS = 4


class Sameness:
    """Watches the answers as they come; only prompts that are asked more than once now say anything.

    Args:
        sampling: How to sample; at temperature 0 answers are the same by right.
        wanted: What is asked.
    """

    def __init__(self, sampling: Sampling, wanted: Sequence[tuple[Prompt, int]]) -> None:
        times = Counter(prompt.prompt_id for prompt, _ in wanted) if sampling.temperature > 0 else Counter[str]()
        self._expected = {name: count for name, count in times.items() if count > 1}
        self._texts: dict[str, list[str]] = {}
        self._same = 0

    def advance(self, batch: Sequence[Completion]) -> None:
        """Look at further answers.

        Raises:
            ModelError: If of enough prompts all samples are the same.
        """
        for one in batch:
            if one.prompt_id not in self._expected:
                continue
            texts = self._texts.setdefault(one.prompt_id, [])
            texts.append(one.text)
            if len(set(texts)) > 1:
                # It samples: nothing more to watch for.
                self._expected, self._texts, self._same = {}, {}, 0
                return
            self._same += len(texts) == self._expected[one.prompt_id]
        if self._same >= _SAME_PROMPTS:
            raise ModelError(f"{self._found()}; set that, or ask for one sample")

    def end(self) -> None:
        """Say of few prompts what of more would have stopped the run."""
        if self._same:
            say(f"warning: {self._found()}. Of fewer than {_SAME_PROMPTS} prompts it may be chance: going on")

    def _found(self) -> str:
        k = max(map(len, self._texts.values()))
        return (
            f"the server gave {k} identical samples for each of {self._same} prompts: it ignores the temperature. "
            "`transformers serve` samples only if the checkpoint's generation_config.json has "
            '"do_sample": true'
        )
