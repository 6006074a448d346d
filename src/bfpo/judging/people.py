"""Human labels as a judge, for answers that annotators have labeled."""

from collections.abc import Iterator, Sequence

from bfpo.core.conversation import in_nfc, last_request, prompt_key
from bfpo.core.files import content_hash, file_hash
from bfpo.core.samples import Completion, Verdict
from bfpo.data.prompt_sets import PROMPT_ALIASES
from bfpo.data.readings import read_part
from bfpo.judging.labeled import count_labelers, labeled_files, read_labeled


class PeopleJudge:
    """Judge that returns the labels of the same answer to the same prompt; see `Judge`.

    Its name is `people`, or `program` if a program gave any of the labels.

    Args:
        path: File of labeled answers, as `read_labeled` reads it.
    """

    names = ("people", "program")

    def __init__(self, path: str) -> None:
        answers = read_labeled(path)
        self._labels = {
            (_last_turn_key(answer.completion), in_nfc(read_part(answer.completion).text)): (
                answer.safe,
                answer.refusal,
            )
            for answer in answers
        }
        is_programs = any(labeler.kind == "program" for labeler in count_labelers(answers))
        self.name = "program" if is_programs else "people"
        hashes = [file_hash(file) for file in labeled_files(path)]
        self.revision = hashes[0][:8] if len(hashes) == 1 else content_hash(hashes)[:8]

    def judge(self, completions: Sequence[Completion]) -> Iterator[Verdict]:
        """Return one verdict for each completion, undecided for an answer without a label."""
        for completion in completions:
            key, text = _last_turn_key(completion), in_nfc(completion.text)
            unlabeled = self._labels.get((PROMPT_ALIASES.get(key, ""), text), (None, None))
            safe, refusal = self._labels.get((key, text), unlabeled)
            reason = "no annotator labeled this answer as safe or unsafe" if safe is None else None
            yield Verdict.on(completion, self, safe=safe, refusal=refusal, reason=reason)


def _last_turn_key(completion: Completion) -> str:
    return prompt_key(last_request(completion.prompt).strip())
