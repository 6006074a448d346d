"""Differences between a run and a baseline, metric by metric, over the prompts that both have scores for."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from bfpo.evaluation.comparisons import verdict_on
from bfpo.evaluation.metric_specs import HARMONIC_MEAN
from bfpo.evaluation.results import MetricComparison, Results
from bfpo.evaluation.scoring import PromptScores, safety_and_helpfulness
from bfpo.stats.intervals import MIN_PROMPTS, Interval, Values, bootstrap, harmonic_mean
from bfpo.stats.paired import mcnemar_p_value, paired_means, paired_rates

BY_TANGO = "95 % Tango, paired over prompts"
BY_PAIRED_T = "95 % Student, paired over prompts"
BY_PAIRED_BOOTSTRAP = "95 % paired bootstrap over prompts"


class PairedDifference(NamedTuple):
    """Difference of two runs on one metric.

    Args:
        interval: Difference with its interval.
        p_value: P-value of the hypothesis that the difference is 0.
        n: Number of prompts with scores of both runs.
        method: Name of the method of the interval.
    """

    interval: Interval
    p_value: float
    n: int
    method: str


def paired_difference(scores: PromptScores, baseline: PromptScores) -> PairedDifference | None:
    """Return the paired difference of two runs on a metric; None without a shared prompt."""
    shared = [prompt_id for prompt_id in scores.by_prompt if prompt_id in baseline.by_prompt]
    if not shared:
        return None
    values = _select(scores, shared), _select(baseline, shared)
    is_rate = scores.spec.is_rate and baseline.spec.is_rate and bool(np.isin(values, (0, 1)).all())
    if is_rate and scores.samples == baseline.samples == 1:
        return PairedDifference(paired_rates(*values), mcnemar_p_value(*values), len(shared), BY_TANGO)
    return PairedDifference(*paired_means(*values), len(shared), BY_PAIRED_T)


def compare_scores(
    suite: str, scores: Sequence[PromptScores], baseline: Sequence[PromptScores], *, against: Results
) -> list[MetricComparison]:
    """Compare the scores of two runs by one judge, metric by metric.

    A rate of one sample per prompt is called better or worse only if McNemar's test is significant at 5 % too: by
    Tango's interval alone two models that differ on four prompts would be distinguishable, and its error rate is
    slightly above the nominal one.

    Args:
        suite: Name of the suite.
        scores: Scores of the run.
        baseline: Scores of the baseline.
        against: Results of the baseline.
    """
    baseline_scores = {prompt_scores.key: prompt_scores for prompt_scores in baseline}
    comparisons = []
    for prompt_scores in scores:
        of_baseline = baseline_scores.get(prompt_scores.key)
        difference = None if of_baseline is None else paired_difference(prompt_scores, of_baseline)
        if difference is None:
            continue
        verdict, higher_is_better = None, prompt_scores.spec.higher_is_better
        if higher_is_better is not None:
            verdict = verdict_on(difference.interval, higher_is_better=higher_is_better, p_value=difference.p_value)
        comparisons.append(
            MetricComparison(
                against.run,
                suite,
                prompt_scores.task,
                prompt_scores.spec.name,
                *difference.interval,
                n=difference.n,
                interval=difference.method,
                verdict=verdict,
                judge=prompt_scores.judge,
                category=prompt_scores.category,
                against_model=against.model,
                against_answers=against.answers,
                p_value=difference.p_value,
            )
        )
    harmonic = _compare_harmonic_means(suite, scores, baseline, against=against)
    return comparisons if harmonic is None else [*comparisons, harmonic]


def _compare_harmonic_means(
    suite: str, scores: Sequence[PromptScores], baseline: Sequence[PromptScores], *, against: Results
) -> MetricComparison | None:
    """Compare the harmonic means of safety and helpfulness; None if the runs share no prompts with both."""
    axes, baseline_axes = safety_and_helpfulness(scores), safety_and_helpfulness(baseline)
    if axes is None or baseline_axes is None:
        return None
    pairs = []
    for axis, baseline_axis in zip(axes, baseline_axes, strict=True):
        shared = [prompt_id for prompt_id in axis.by_prompt if prompt_id in baseline_axis.by_prompt]
        if not shared:
            return None
        pairs.append(np.stack([_select(axis, shared), _select(baseline_axis, shared)]))
    difference = bootstrap(_difference_of_harmonic_means, *pairs)
    # The bootstrap's intervals are too narrow for few prompts.
    has_verdict = min(pair.shape[1] for pair in pairs) >= MIN_PROMPTS
    return MetricComparison(
        against.run,
        suite,
        "all",
        HARMONIC_MEAN,
        *difference,
        n=sum(pair.shape[1] for pair in pairs),
        interval=BY_PAIRED_BOOTSTRAP,
        verdict=verdict_on(difference, higher_is_better=True) if has_verdict else "not distinguishable",
        judge=axes[0].judge,
        against_model=against.model,
        against_answers=against.answers,
    )


def _select(scores: PromptScores, prompt_ids: Sequence[str]) -> Values:
    return np.array([scores.by_prompt[prompt_id] for prompt_id in prompt_ids], dtype=np.float64)


def _difference_of_harmonic_means(safety: Values, helpfulness: Values) -> Values:
    """Compute the difference of arrays (2, ..., n), this run and the baseline."""
    ours, baseline = harmonic_mean(safety.mean(axis=-1), helpfulness.mean(axis=-1))
    result: Values = np.asarray(ours - baseline)
    return result
