"""People's labels as a judge: for answers that somebody has already read."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from bfpo.core.files import file_hash
from bfpo.core.samples import Completion, Verdict
from bfpo.judging.labeled import read_labeled


class PeopleJudge:
    """Says what people said of the same answer to the same prompt; see `Judge`.

    Args:
        path: File of labeled answers, as `read_labeled` takes it.
    """

    name = "people"

    def __init__(self, path: str) -> None:
        self._said = {
            (one.completion.prompt[-1].content.strip(), one.completion.text): (one.safe, one.refusal)
            for one in read_labeled(path)
        }
        self.revision = file_hash(Path(path))[:8]

    def judge(self, completions: Sequence[Completion]) -> Iterator[Verdict]:
        """Return one verdict for each completion; undecided where nobody labeled it."""
        for completion in completions:
            safe, refusal = self._said.get((completion.prompt[-1].content.strip(), completion.text), (None, None))
            reason = "nobody labeled this answer as safe or unsafe" if safe is None else None
            yield Verdict.on(completion, self, safe=safe, refusal=refusal, reason=reason)
