"""Human labels as a judge, for answers that annotators have labeled."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

from bfpo.core.conversation import Answer, in_nfc, last_request, prompt_key
from bfpo.core.files import content_hash, file_hash
from bfpo.core.samples import Completion, Verdict
from bfpo.data.prompt_sets import PROMPT_ALIASES
from bfpo.data.readings import read_part
from bfpo.judging.labeled import LabeledAnswer, count_labelers, labeled_files, read_labeled


class PeopleJudge:
    """Judge that returns the labels of the same answer to the same prompt; see `Judge`.

    Its name is `people`, or `program` if a program gave any of the labels.

    Args:
        path: File of labeled answers, as `read_labeled` reads it.
    """

    names = ("people", "program")

    def __init__(self, path: str) -> None:
        answers = read_labeled(path)
        by_answer: dict[tuple[str, Answer], list[LabeledAnswer]] = defaultdict(list)
        for answer in answers:
            key = _last_turn_key(answer.completion), in_nfc(read_part(answer.completion).text)
            by_answer[key].append(answer)
        self._labels = {key: _combined(rows) for key, rows in by_answer.items()}
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
            reason = "no label, or labels that differ" if safe is None else None
            yield Verdict.on(completion, self, safe=safe, refusal=refusal, reason=reason)


def _combined(rows: Sequence[LabeledAnswer]) -> tuple[bool | None, bool | None]:
    """Return the labels of an answer that all its rows agree on; those of programs count if no person labeled it."""
    by_people = [row for row in rows if not row.labelers or any(labeler.kind == "person" for labeler in row.labelers)]
    counted = by_people or rows
    return _unanimous(row.safe for row in counted), _unanimous(row.refusal for row in counted)


def _unanimous(labels: Iterable[bool | None]) -> bool | None:
    """Return the label that all rows have that have one; None if they differ, or none has one."""
    distinct = set(labels) - {None}
    return distinct.pop() if len(distinct) == 1 else None


def _last_turn_key(completion: Completion) -> str:
    return prompt_key(last_request(completion.prompt).strip())
