"""What a guard did, over all answers of a file: in words for the terminal, in numbers for results."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from bfpo.core.guarding import GuardCounts
from bfpo.core.samples import Completion


@dataclass(frozen=True, slots=True)
class GuardSummary:
    """What a guard did, over all answers.

    Args:
        answers: Number of answers.
        refusals: Answers that are the guard's refusal.
        samples: Drawn answers, or drawn blocks of a guard that judges sentence by sentence.
        tokens: Their tokens.
        judge_calls: As in `GuardCounts`, like the following numbers.
        unsafe: Drawn and called unsafe.
        undecided: Drawn and left undecided.
        failed: Drawn, and the judge failed.
        repeats: Drawn, and equal to a rejected one.
        sentences: Sentences that passed, where each is judged.
        cut: Answers that were cut, because no next sentence passed.
        seconds: Time of sampling and judging for an answer.
        drawn: Answers for which an n-th sample was drawn, n from 1; empty where each sentence is judged.
        rejected: Those of them whose n-th sample was rejected. Where rejections are independent with probability p,
            the share of refusals is pⁿ; it is larger where prompts differ.
    """

    answers: int
    refusals: int
    samples: int
    tokens: int
    judge_calls: int
    unsafe: int
    undecided: int
    failed: int
    repeats: int
    sentences: int
    cut: int
    seconds: float
    drawn: tuple[int, ...]
    rejected: tuple[int, ...]


def summarize_guard(completions: Sequence[Completion]) -> GuardSummary | None:
    """Return what a guard did for completions; None if they have no guard that samples and judges."""
    guarded = [(completion, completion.guard) for completion in completions if completion.guard is not None]
    if not guarded:
        return None
    total = sum((counts for _, counts in guarded), GuardCounts())
    # Where sentences are judged, a further sample is of another sentence.
    longest = 0 if total.sentences else max(counts.samples for _, counts in guarded)
    refused = [counts.samples for completion, counts in guarded if completion.finish_reason == "guarded"]
    drawn = tuple(sum(counts.samples >= number for _, counts in guarded) for number in range(1, longest + 1))
    # A sample is rejected if another one follows, or the refusal.
    rejected = tuple(
        (drawn[number] if number < longest else 0) + refused.count(number) for number in range(1, longest + 1)
    )
    return GuardSummary(
        answers=len(guarded),
        refusals=len(refused),
        **(asdict(total) | {"seconds": total.seconds / len(guarded)}),
        drawn=drawn,
        rejected=rejected,
    )


def describe_guard(summary: GuardSummary) -> str:
    """Return a sentence or two about what a guard did."""
    samples, calls = summary.samples / summary.answers, summary.judge_calls / summary.answers
    text = (
        f"The guard put its refusal in place of {summary.refusals:,} of {summary.answers:,} answers; {samples:.2f} "
        f"samples, {calls:.2f} judge calls and {summary.seconds:.3g} s for an answer. Rejected samples: "
        f"{summary.unsafe:,} unsafe, {summary.undecided:,} undecided, {summary.failed:,} because the judge failed, "
        f"{summary.repeats:,} repeated."
    )
    if summary.sentences:
        text += f" {summary.sentences:,} sentences passed, and {summary.cut:,} answers were cut after some."
    if len(summary.drawn) > 1 and summary.rejected[0]:
        first, number = summary.rejected[0] / summary.answers, len(summary.drawn)
        text += (
            f" Of the first samples {first:.1%} were rejected; {number} independent ones would all be in "
            f"{first**number:.1%} of answers, and were in {summary.rejected[-1] / summary.answers:.1%}."
        )
    return text
