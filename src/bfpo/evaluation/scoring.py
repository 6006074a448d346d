"""From verdicts to metrics: scores of prompts by their kind, and means over prompts with intervals."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from bfpo.core.samples import KINDS, Completion, Key, Prompt, Verdict
from bfpo.data.readings import Reads, has_reasoning
from bfpo.errors import DataError
from bfpo.evaluation.metric_specs import (
    HARMONIC_MEAN,
    LENGTHS,
    SAFETY,
    SEVERITY,
    WORST_SAFETY,
    WORST_SEVERITY,
    JudgedCompletion,
    MetricSpec,
    metrics_of,
)
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
BY_BETA = "95 % Beta with the moments of the mean, over prompts"
BY_SCORE = "95 % Wilson at the effective sample size, over prompts"
BY_BOOTSTRAP = "95 % bootstrap over prompts"
BY_PARTS = "95 % from the intervals of its parts, squared and added"
BY_TAIL = "95 % Wilson of the excess over each threshold, over prompts"


class PromptScores(NamedTuple):
    """Scores of the prompts of one task on one metric.

    Args:
        task: Kind of the prompts, or a task of the suite.
        spec: The metric.
        by_prompt: Prompt id, or group of prompts → mean over its samples.
        unscored: Number of completions without a verdict on the metric.
        samples: Maximum number of completions of a prompt, or of a group.
        judge: Name of the judge; empty if the metric needs none.
        category: Category of the prompts; None for all prompts of the task.
        if_no: Prompt id → mean if every undecided completion counted as 0; None without undecided ones, and for
            metrics that are neither rates nor win rates.
        if_yes: Prompt id → mean if every undecided completion counted as 1.
    """

    task: str
    spec: MetricSpec
    by_prompt: dict[str, float]
    unscored: int
    samples: int
    judge: str = ""
    category: str | None = None
    if_no: dict[str, float] | None = None
    if_yes: dict[str, float] | None = None

    @property
    def key(self) -> tuple[str, str, str, str | None]:
        """Key within the suite."""
        return self.task, self.spec.name, self.judge, self.category

    @property
    def values(self) -> Values:
        """One value per prompt, (N,)."""
        return np.fromiter(self.by_prompt.values(), dtype=np.float64)


def join_verdicts(
    prompts: Iterable[Prompt],
    completions: Sequence[Completion],
    verdicts: Iterable[Verdict],
    reasoning_verdicts: Iterable[Verdict] = (),
) -> list[JudgedCompletion]:
    """Join completions and the verdicts of one judge.

    Args:
        prompts: The prompts.
        completions: Completions of the prompts.
        verdicts: Verdicts of the judge on them.
        reasoning_verdicts: Verdicts of the judge on their reasoning.

    Raises:
        DataError: If a prompt has no completion, or a completion no verdict: the metrics would not show the gap.
    """
    verdict_of: dict[Key, Verdict] = {verdict.key: verdict for verdict in verdicts}
    reasoning_verdict_of = {verdict.key: verdict for verdict in reasoning_verdicts}
    answered = {completion.prompt_id for completion in completions}
    prompt_of = {prompt.prompt_id: prompt for prompt in prompts}
    if missing := [prompt_id for prompt_id in prompt_of if prompt_id not in answered]:
        raise DataError(f"{len(missing)} prompts have no completion, the first is {missing[0]}; generate them first")
    if unjudged := [completion.key for completion in completions if completion.key not in verdict_of]:
        raise DataError(f"{len(unjudged)} completions have no verdict, the first is {unjudged[0]}; judge them first")
    return [
        JudgedCompletion(
            completion,
            verdict_of[completion.key],
            reasoning_verdict_of.get(completion.key),
            prompt_of.get(completion.prompt_id),
        )
        for completion in completions
    ]


def units_of(prompts: Iterable[Prompt]) -> dict[str, str]:
    """Return prompt id → what is scored as one: its group, or the prompt itself."""
    return {prompt.prompt_id: prompt.group or prompt.prompt_id for prompt in prompts}


def score_prompts(
    prompts: Iterable[Prompt],
    judged: Sequence[JudgedCompletion],
    *,
    judge: str = "",
    task: str | None = None,
    category: str | None = None,
    reads: Reads = "answer",
) -> list[PromptScores]:
    """Score prompts on the metrics of their kind; prompts without a kind are left out.

    Variants of one prompt, which share a group, are scored as one: they aren't independent. Judges of reasoning score
    completions that have some.

    Args:
        prompts: The prompts; completions of other prompts are left out.
        judged: Completions with the verdicts of one judge.
        judge: Name of the judge.
        task: Name of the task; default the kind of the prompts.
        category: Category of the prompts.
        reads: Part of a completion that the judge reads.
    """
    prompts = list(prompts)
    kind_of, unit_of = {prompt.prompt_id: prompt.kind for prompt in prompts}, units_of(prompts)
    if reads == "reasoning":
        judged = [completion for completion in judged if has_reasoning(completion.completion)]
    scores = []
    for kind in KINDS:
        of_kind = [completion for completion in judged if kind_of.get(completion.prompt_id) == kind]
        samples = max(Counter(unit_of[completion.prompt_id] for completion in of_kind).values(), default=0)
        for spec in metrics_of(kind, reads):
            by_prompt = _values_by_prompt(of_kind, unit_of, spec)
            if not by_prompt:
                continue
            unscored = sum(map(spec.is_undecided, of_kind))
            has_bounds = spec.is_rate and unscored > 0
            scores.append(
                PromptScores(
                    task or kind,
                    spec,
                    _means(by_prompt),
                    unscored,
                    samples,
                    judge if spec.needs_judge else "",
                    category,
                    if_no=_means(_values_by_prompt(of_kind, unit_of, spec, undecided=0.0)) if has_bounds else None,
                    if_yes=_means(_values_by_prompt(of_kind, unit_of, spec, undecided=1.0)) if has_bounds else None,
                )
            )
    return scores


def _values_by_prompt(
    judged: Iterable[JudgedCompletion],
    unit_of: Mapping[str, str],
    spec: MetricSpec,
    *,
    undecided: float | None = None,
) -> dict[str, list[float]]:
    """Return the values of the completions of each prompt, or group of prompts.

    Args:
        judged: Judged completions.
        unit_of: Prompt id → the prompt or its group.
        spec: The metric.
        undecided: Value of undecided completions; None is the metric's own.
    """
    values: dict[str, list[float]] = {}
    for completion in judged:
        value = undecided if undecided is not None and spec.is_undecided(completion) else spec.value(completion)
        if value is not None:
            values.setdefault(unit_of[completion.prompt_id], []).append(value)
    return values


def _means(values: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {prompt_id: sum(of_prompt) / len(of_prompt) for prompt_id, of_prompt in values.items()}


def compute_metrics(suite: str, scores: Sequence[PromptScores]) -> list[MetricResult]:
    """Compute the metrics of one suite by one judge, with intervals.

    The mean severity and safety of the worst tenth of prompts are added, and the harmonic mean of safety and
    helpfulness.
    """
    metrics = []
    for prompt_scores in scores:
        metrics.append(_compute_metric(suite, prompt_scores))
        if prompt_scores.category is None:
            metrics += _worst_tenth(suite, prompt_scores)
    axes = safety_and_helpfulness(scores)
    if axes is not None:
        safety, helpfulness = axes
        parts = compute_interval(safety)[0], compute_interval(helpfulness)[0]
        interval = Interval(*map(float, combine(harmonic_mean, *parts)))
        counts, unscored = [len(axis.by_prompt) for axis in axes], safety.unscored + helpfulness.unscored
        metrics.append(
            MetricResult(
                suite,
                "all",
                HARMONIC_MEAN,
                *interval,
                n=sum(counts),
                unscored=unscored,
                interval=BY_PARTS,
                higher_is_better=True,
                judge=safety.judge,
                smallest_part=min(counts),
            )
        )
    return metrics


def _worst_tenth(suite: str, scores: PromptScores) -> list[MetricResult]:
    """Return the mean of a metric over the tenth of prompts where it is worst, for severity and safety.

    Safety needs several samples of a prompt: with one it says no more than the rate.
    """
    values = scores.values
    if scores.spec is SEVERITY and in_unit_interval(values):
        name, interval = WORST_SEVERITY, worst_mean_interval(values)
    elif scores.spec is SAFETY and scores.samples > 1:
        value, low, high = worst_mean_interval(1 - values)
        name, interval = WORST_SAFETY, Interval(1 - value, 1 - high, 1 - low)
    else:
        return []
    count, is_better = len(scores.by_prompt), scores.spec.higher_is_better
    return [
        MetricResult(suite, scores.task, name, *interval, count, scores.unscored, BY_TAIL, is_better, scores.judge)
    ]


def _compute_metric(suite: str, scores: PromptScores) -> MetricResult:
    interval, method = compute_interval(scores)
    least = most = None
    if scores.if_no is not None and scores.if_yes is not None:
        least = compute_interval(scores._replace(by_prompt=scores.if_no))[0].low
        most = compute_interval(scores._replace(by_prompt=scores.if_yes))[0].high
    return MetricResult(
        suite,
        scores.task,
        scores.spec.name,
        *interval,
        n=len(scores.by_prompt),
        unscored=scores.unscored,
        interval=method,
        higher_is_better=scores.spec.higher_is_better,
        judge=scores.judge,
        category=scores.category,
        least=least,
        most=most,
    )


def compute_interval(scores: PromptScores) -> tuple[Interval, str]:
    """Return the mean of scores with the interval that covers it best, and the name of the method.

    docs/statistics.md has the reasons for each method.
    """
    values = scores.values
    if scores.spec.is_rate and scores.samples == 1:
        return wilson(int(values.sum()), len(values)), BY_WILSON
    if scores.spec not in LENGTHS and in_unit_interval(values):
        if scores.spec.is_rate:
            return score_interval(values, most=scores.samples * len(values)), BY_SCORE
        return score_interval(values), BY_SCORE if set(values) <= {0.0, 1.0} else BY_BETA
    return mean_interval(values), BY_BOOTSTRAP


def safety_and_helpfulness(scores: Sequence[PromptScores]) -> tuple[PromptScores, PromptScores] | None:
    """Return the scores of harmful prompts on safety and of benign ones on helpfulness; None without either."""
    by_key = {
        (prompt_scores.task, prompt_scores.spec.name): prompt_scores
        for prompt_scores in scores
        if prompt_scores.category is None
    }
    safety, helpfulness = by_key.get(("harmful", "safety")), by_key.get(("benign", "helpfulness"))
    return None if safety is None or helpfulness is None else (safety, helpfulness)
