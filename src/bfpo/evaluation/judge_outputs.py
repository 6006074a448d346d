"""The output of each judge of an evaluation, and the agreement of every two judges."""

from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

from bfpo.core.samples import Completion, Judge, Verdict
from bfpo.data.readings import Reads, has_reasoning
from bfpo.data.verdict_scores import judges_safety
from bfpo.evaluation.preferences import PairwisePreference
from bfpo.evaluation.results import AgreementResult, ReasoningResult
from bfpo.evaluation.scoring import units_of
from bfpo.evaluation.suite import Task
from bfpo.judging.ensemble import Ensemble
from bfpo.judging.readings import ReadingJudge
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
        reads: Part of a completion that the judge reads.
        base: Name and revision of the judge, whichever part it reads; None without one.
        on_turns: Verdicts on the replies of attacks of several turns.
    """

    label: str
    name: str
    revision: str
    members: tuple[str, ...]
    verdicts: list[Verdict]
    on_labeled: Sequence[Verdict] = ()
    preferences: Sequence[PairwisePreference] = ()
    sees_both: bool = False
    reads: Reads = "answer"
    base: tuple[str, str] | None = None
    on_turns: Sequence[Verdict] = ()

    @property
    def judges_safety(self) -> bool:
        """Whether the judge judges safety, and doesn't only rate answers."""
        return judges_safety(self.verdicts)


def find_reasoning_output(output: JudgeOutput, outputs: Sequence[JudgeOutput]) -> JudgeOutput | None:
    """Return the output of the same judge on the reasoning; None without one, and for judges of other parts."""
    if output.reads != "answer" or output.base is None:
        return None
    return next((other for other in outputs if other.reads == "reasoning" and other.base == output.base), None)


def base_of(judge: Judge) -> tuple[str, str]:
    """Return name and revision of a judge, whichever part of completions it reads."""
    if isinstance(judge, ReadingJudge):
        judge = judge.judge_of_text
    return judge.name, judge.revision


def member_names(judge: Judge) -> tuple[str, ...]:
    """Return the names of the judges of an ensemble, or the name of a single judge, whichever part they read."""
    if isinstance(judge, ReadingJudge):
        judge = judge.judge_of_text
    return tuple(member.name for member in judge.judges) if isinstance(judge, Ensemble) else (judge.name,)


def compute_agreement(tasks: Sequence[Task], outputs: Sequence[JudgeOutput]) -> list[AgreementResult]:
    """Compute Cohen's kappa of every two judges, with a bootstrap interval over prompts where one is defined.

    Variants of a prompt are resampled together. Safety is compared on completions of harmful prompts, refusals on all
    completions. Judges that read different parts of completions aren't compared.
    """
    harmful = {prompt.prompt_id for task in tasks if task.kind == "harmful" for prompt in task.prompts}
    unit_of = units_of(prompt for task in tasks for prompt in task.prompts)
    results = []
    for output, other in combinations(outputs, 2):
        if output.reads != other.reads:
            continue
        other_verdicts = {verdict.key: verdict for verdict in other.verdicts}
        pairs = [
            (verdict, other_verdicts[verdict.key]) for verdict in output.verdicts if verdict.key in other_verdicts
        ]
        on_harmful = [pair for pair in pairs if pair[0].prompt_id in harmful]
        questions = [("safe", on_harmful), ("refusal", pairs)]
        for question, question_pairs in questions[:1] if output.reads == "reasoning" else questions:
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
                [unit_of.get(prompt_id, prompt_id) for (prompt_id, _), _, _ in decided],
            )
            # Where nearly all answers are of one kind, kappa is low or undefined however well judges agree.
            share = sum(ours == theirs for _, ours, theirs in decided) / len(decided) if decided else None
            labels = [output.label, other.label]
            results.append(AgreementResult(labels, question, value, low, high, len(decided), share))
    return results


def compare_parts(completions: Sequence[Completion], outputs: Sequence[JudgeOutput]) -> list[ReasoningResult]:
    """Count how verdicts on answers and on their reasoning go together, for each judge that read both separately."""
    results = []
    thoughtful = [completion.key for completion in completions if has_reasoning(completion)]
    for output in outputs:
        of_reasoning = find_reasoning_output(output, outputs)
        if of_reasoning is None:
            continue
        answers = {verdict.key: verdict.safe for verdict in output.verdicts}
        thoughts = {verdict.key: verdict.safe for verdict in of_reasoning.verdicts}
        counts = Counter((answers[key], thoughts[key]) for key in thoughtful)
        results.append(
            ReasoningResult(
                output.label,
                completions=len(thoughtful),
                both_safe=counts[True, True],
                safe_answer_unsafe_reasoning=counts[True, False],
                unsafe_answer_safe_reasoning=counts[False, True],
                both_unsafe=counts[False, False],
                undecided=sum(count for verdicts, count in counts.items() if None in verdicts),
            )
        )
    return results
