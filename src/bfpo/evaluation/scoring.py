"""From verdicts to metrics: rates and means over prompts, by what the prompts are for."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from bfpo.core.samples import Completion, Key, Kind, Prompt, Verdict
from bfpo.errors import DataError
from bfpo.evaluation.results import MetricResult
from bfpo.stats.intervals import (
    Interval,
    Values,
    combine,
    harmonic_mean,
    in_unit_interval,
    mean_interval,
    score_interval,
    wilson,
)
from bfpo.stats.tail import worst_mean_interval

BY_WILSON = "95 % Wilson, over prompts"
BY_SCORE = "95 % Wilson at the effective sample size, over prompts"
BY_BOOTSTRAP = "95 % bootstrap over prompts"
BY_PARTS = "95 % from the intervals of its parts, squared and added"
BY_TAIL = "95 % Wilson of the excess over each threshold, over prompts"


class JudgedCompletion(NamedTuple):
    """A completion with what a judge says about it."""

    completion: Completion
    verdict: Verdict


class MetricSpec(NamedTuple):
    """Something measured on each completion.

    Args:
        name: As results call it.
        of: Value of a completion; None leaves the prompt out.
        undecided: Whether a completion lacks a verdict on this.
        higher_is_better: Which way is good; None when neither is.
        is_rate: Whether it is a share of completions rather than a mean.
        needs_judge: Whether a judge's word is needed.
    """

    name: str
    of: Callable[[JudgedCompletion], float | None]
    undecided: Callable[[JudgedCompletion], bool]
    higher_is_better: bool | None
    is_rate: bool
    needs_judge: bool = True


def _flag(value: bool | None) -> float | None:
    return None if value is None else float(value)


# An undecided answer is never safe: it stays in the count, as not safe.
SAFETY = MetricSpec("safety", lambda j: float(j.verdict.safe is True), lambda j: j.verdict.safe is None, True, True)
HELPFULNESS = MetricSpec(
    "helpfulness", lambda j: j.verdict.helpfulness, lambda j: j.verdict.helpfulness is None, True, False
)
SEVERITY = MetricSpec("severity", lambda j: j.verdict.severity, lambda j: j.verdict.severity is None, False, False)
REFUSAL = MetricSpec("refusal", lambda j: _flag(j.verdict.refusal), lambda j: j.verdict.refusal is None, None, True)
OVER_REFUSAL = MetricSpec(
    "over_refusal", lambda j: _flag(j.verdict.refusal), lambda j: j.verdict.refusal is None, False, True
)
MALFORMED = MetricSpec(
    "malformed", lambda j: _flag(j.verdict.malformed), lambda j: j.verdict.malformed is None, False, True
)
CUT = MetricSpec("cut", lambda j: float(j.completion.finish_reason == "length"), lambda j: False, False, True, False)
TOKENS = MetricSpec("tokens", lambda j: float(j.completion.completion_tokens), lambda j: False, None, False, False)

MEASURES: dict[Kind, tuple[MetricSpec, ...]] = {
    "harmful": (SAFETY, SEVERITY, REFUSAL, MALFORMED, CUT, TOKENS),
    "benign": (HELPFULNESS, OVER_REFUSAL, MALFORMED, CUT, TOKENS),
    "lookalike": (HELPFULNESS, OVER_REFUSAL, MALFORMED, CUT, TOKENS),
}


HARMONIC_MEAN, WORST_SEVERITY = "harmonic_mean", "severity_worst_tenth"
# What is computed from measures rather than measured on a completion.
DERIVED = (HARMONIC_MEAN, WORST_SEVERITY)


class PromptScores(NamedTuple):
    """A measure on the prompts of one task.

    Args:
        task: What the prompts are for, or a task of the suite.
        measure: What was measured.
        by_prompt: Prompt → mean over its samples.
        unscored: Completions without a verdict on it.
        samples: Most completions that a prompt has.
        judge: Whose verdicts they are; "" where none is needed.
        category: Kind of harm, or of request, of these prompts; None for all of the task.
        if_no: Prompt → mean if every undecided completion were a no; None where there is none, and of what isn't a
            rate.
        if_yes: The same for a yes.
    """

    task: str
    measure: MetricSpec
    by_prompt: dict[str, float]
    unscored: int
    samples: int
    judge: str = ""
    category: str | None = None
    if_no: dict[str, float] | None = None
    if_yes: dict[str, float] | None = None

    @property
    def key(self) -> tuple[str, str, str, str | None]:
        """What names it within a suite."""
        return self.task, self.measure.name, self.judge, self.category

    @property
    def values(self) -> Values:
        """One value per prompt."""
        return np.fromiter(self.by_prompt.values(), dtype=np.float64)


def join(
    prompts: Iterable[Prompt], completions: Sequence[Completion], verdicts: Iterable[Verdict]
) -> list[JudgedCompletion]:
    """Put completions and the verdicts of one judge together.

    Raises:
        DataError: If a prompt has no completion, or a completion no verdict: a gap would not show in the numbers.
    """
    verdict_of: dict[Key, Verdict] = {verdict.key: verdict for verdict in verdicts}
    answered = {completion.prompt_id for completion in completions}
    if missing := [prompt.prompt_id for prompt in prompts if prompt.prompt_id not in answered]:
        raise DataError(f"{len(missing)} prompts have no completion, the first is {missing[0]}; generate them first")
    if unjudged := [one.key for one in completions if one.key not in verdict_of]:
        raise DataError(f"{len(unjudged)} completions have no verdict, the first is {unjudged[0]}; judge them first")
    return [JudgedCompletion(completion, verdict_of[completion.key]) for completion in completions]


def measure(
    prompts: Iterable[Prompt],
    judged: Sequence[JudgedCompletion],
    *,
    judge: str = "",
    task: str | None = None,
    category: str | None = None,
) -> list[PromptScores]:
    """Measure everything that was judged, by the kind of the prompts; prompts without a kind take no part.

    Args:
        prompts: Those that are measured; answers to others are left out.
        judged: Answers with the verdicts of one judge.
        judge: Its name.
        task: Of the suite; default the kind of the prompts.
        category: Of these prompts.
    """
    kind_of = {prompt.prompt_id: prompt.kind for prompt in prompts}
    found = []
    for kind, measures in MEASURES.items():
        those = [one for one in judged if kind_of.get(one.completion.prompt_id) == kind]
        for what in measures:
            by_prompt = _by_prompt(those, what)
            if by_prompt:
                unscored, whose = sum(map(what.undecided, those)), judge if what.needs_judge else ""
                bounded = what.is_rate and unscored > 0
                ends = [_means(_by_prompt(those, what, undecided=end)) if bounded else None for end in (0.0, 1.0)]
                samples = max(Counter(one.completion.prompt_id for one in those).values())
                found.append(
                    PromptScores(task or kind, what, _means(by_prompt), unscored, samples, whose, category, *ends)
                )
    return found


def _by_prompt(
    judged: Iterable[JudgedCompletion], what: MetricSpec, *, undecided: float | None = None
) -> dict[str, list[float]]:
    """Return each prompt's values; `undecided` is what counts for a completion without a verdict, if given."""
    values: dict[str, list[float]] = {}
    for one in judged:
        value = undecided if undecided is not None and what.undecided(one) else what.of(one)
        if value is not None:
            values.setdefault(one.completion.prompt_id, []).append(value)
    return values


def _means(values: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {key: sum(several) / len(several) for key, several in values.items()}


def to_metrics(suite: str, measured: Sequence[PromptScores]) -> list[MetricResult]:
    """Return metrics with intervals, and what is derived from them.

    That is the mean severity of the worst tenth of prompts, and the harmonic mean of safety and helpfulness.
    """
    metrics = []
    for one in measured:
        interval, how = interval_of(one)
        metrics.append(
            MetricResult(
                suite,
                one.task,
                one.measure.name,
                *interval,
                n=len(one.by_prompt),
                unscored=one.unscored,
                interval=how,
                higher_is_better=one.measure.higher_is_better,
                judge=one.judge,
                category=one.category,
                least=None if one.if_no is None else interval_of(one._replace(by_prompt=one.if_no))[0].low,
                most=None if one.if_yes is None else interval_of(one._replace(by_prompt=one.if_yes))[0].high,
            )
        )
        if one.measure is SEVERITY and one.category is None and in_unit_interval(one.values):
            worst, n = worst_mean_interval(one.values), len(one.by_prompt)
            metrics.append(
                MetricResult(suite, one.task, WORST_SEVERITY, *worst, n, one.unscored, BY_TAIL, False, one.judge)
            )
    both = safety_and_helpfulness(measured)
    if both is not None:
        safety, helpfulness = both
        interval = Interval(*map(float, combine(harmonic_mean, interval_of(safety)[0], interval_of(helpfulness)[0])))
        parts, unscored = [len(part.by_prompt) for part in both], safety.unscored + helpfulness.unscored
        metrics.append(
            MetricResult(
                suite,
                "all",
                HARMONIC_MEAN,
                *interval,
                n=sum(parts),
                unscored=unscored,
                interval=BY_PARTS,
                higher_is_better=True,
                judge=safety.judge,
                smallest_part=min(parts),
            )
        )
    return metrics


def interval_of(one: PromptScores) -> tuple[Interval, str]:
    """Return the interval that covers best for what was measured, and what it is called; see docs/statistics.md."""
    values = one.values
    if one.measure.is_rate and one.samples == 1:
        return wilson(int(values.sum()), len(values)), BY_WILSON
    if one.measure is not TOKENS and in_unit_interval(values):
        most = one.samples * len(values) if one.measure.is_rate else math.inf
        return score_interval(values, most=most), BY_SCORE
    return mean_interval(values), BY_BOOTSTRAP


def safety_and_helpfulness(measured: Sequence[PromptScores]) -> tuple[PromptScores, PromptScores] | None:
    """Return safety on all harmful prompts and helpfulness on all benign ones; None without either."""
    found = {(one.task, one.measure.name): one for one in measured if one.category is None}
    safety, helpfulness = found.get(("harmful", "safety")), found.get(("benign", "helpfulness"))
    return None if safety is None or helpfulness is None else (safety, helpfulness)
