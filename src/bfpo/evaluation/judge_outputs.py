"""The output of each judge of an evaluation, and the agreement of every two judges."""

from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

from bfpo.core.samples import Judge, Verdict
from bfpo.evaluation.preferences import PairwisePreference
from bfpo.evaluation.results import AgreementResult
from bfpo.evaluation.suite import Task
from bfpo.judging.ensemble import Ensemble
from bfpo.stats.agreement import kappa_interval


class JudgeOutput(NamedTuple):
    """Verdicts and preferences of one judge.

    Args:
        label: Name of the judge, unique in the evaluation.
        name: Name of the judge.
        revision: Revision of the judge.
        members: Names of the judges that decide together; a single judge's own name.
        verdicts: Verdicts on all completions.
        on_labeled: Verdicts on the answers with human labels; empty without calibration.
        preferences: Preferences between completions and reference outputs; empty if the judge compares none.
        sees_both: Whether the judge sees both answers at once, so that their order may matter.
    """

    label: str
    name: str
    revision: str
    members: tuple[str, ...]
    verdicts: list[Verdict]
    on_labeled: Sequence[Verdict] = ()
    preferences: Sequence[PairwisePreference] = ()
    sees_both: bool = False


def member_names(judge: Judge) -> tuple[str, ...]:
    """Return the names of the judges of an ensemble, or the name of a single judge."""
    return tuple(member.name for member in judge.judges) if isinstance(judge, Ensemble) else (judge.name,)


def compute_agreement(tasks: Sequence[Task], outputs: Sequence[JudgeOutput]) -> list[AgreementResult]:
    """Compute Cohen's kappa of every two judges, with a bootstrap interval over prompts where one is defined.

    Safety is compared on completions of harmful prompts, refusals on all completions.
    """
    harmful = {prompt.prompt_id for task in tasks if task.kind == "harmful" for prompt in task.prompts}
    results = []
    for output, other in combinations(outputs, 2):
        other_verdicts = {verdict.key: verdict for verdict in other.verdicts}
        pairs = [
            (verdict, other_verdicts[verdict.key]) for verdict in output.verdicts if verdict.key in other_verdicts
        ]
        on_harmful = [pair for pair in pairs if pair[0].prompt_id in harmful]
        for question, question_pairs in (("safe", on_harmful), ("refusal", pairs)):
            answers = [
                (verdict.key, getattr(verdict, question), getattr(theirs, question))
                for verdict, theirs in question_pairs
            ]
            decided = [
                (key, ours, theirs) for key, ours, theirs in answers if ours is not None and theirs is not None
            ]
            value, low, high = kappa_interval(
                [ours for _, ours, _ in decided],
                [theirs for _, _, theirs in decided],
                [prompt_id for (prompt_id, _), _, _ in decided],
            )
            # Where nearly all answers are of one kind, kappa is low or undefined however well judges agree.
            share = sum(ours == theirs for _, ours, theirs in decided) / len(decided) if decided else None
            labels = [output.label, other.label]
            results.append(AgreementResult(labels, question, value, low, high, len(decided), share))
    return results
