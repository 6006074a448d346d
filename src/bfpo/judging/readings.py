"""A judge that reads another part of completions than the answer."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from bfpo.core.files import content_hash
from bfpo.core.samples import Completion, Judge, Verdict
from bfpo.data.readings import Reads, name_with_part


@dataclass(frozen=True, slots=True)
class ReadingJudge:
    """Judge that is given the reasoning of completions, or reasoning and answer together.

    Args:
        judge_of_text: Judge of any text.
        reads: Part of a completion that is its text.
    """

    judge_of_text: Judge
    reads: Reads

    @property
    def name(self) -> str:
        """Name of the judge with the part, so that its verdicts aren't mixed with those on answers."""
        return name_with_part(self.judge_of_text.name, self.reads)

    @property
    def revision(self) -> str:
        """Hash of the judge's revision and the part."""
        return content_hash(self.judge_of_text.revision, self.reads)[:12]

    def judge(self, completions: Sequence[Completion]) -> Iterable[Verdict]:
        """Return one verdict for each completion; see `Judge`."""
        for verdict in self.judge_of_text.judge(completions):
            yield replace(verdict, judge=self.name, revision=self.revision)
