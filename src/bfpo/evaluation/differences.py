"""One run against another: metric by metric over the prompts that both have values for."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from bfpo.evaluation.comparisons import verdict_on
from bfpo.evaluation.results import MetricComparison, Results
from bfpo.evaluation.scoring import HARMONIC_MEAN, PromptScores, safety_and_helpfulness
from bfpo.stats.intervals import Interval, Values, bootstrap, harmonic_mean
from bfpo.stats.paired import mcnemar_p_value, paired_means, paired_rates

BY_TANGO = "95 % Tango, paired over prompts"
BY_PAIRED_T = "95 % Student, paired over prompts"
BY_PAIRED_BOOTSTRAP = "95 % paired bootstrap over prompts"


class PairedDifference(NamedTuple):
    """A measure of one run minus the other's.

    Args:
        interval: Over the prompts that both have values for.
        p_value: That it is 0.
        n: Prompts.
        how: The interval was made.
    """

    interval: Interval
    p_value: float
    n: int
    how: str


def difference_of(ours: PromptScores, theirs: PromptScores) -> PairedDifference | None:
    """Return the paired difference of a measure; None where no prompt has a value of both."""
    shared = [key for key in ours.by_prompt if key in theirs.by_prompt]
    if not shared:
        return None
    values = _at(ours, shared), _at(theirs, shared)
    if ours.measure.is_rate and ours.samples == theirs.samples == 1:
        return PairedDifference(paired_rates(*values), mcnemar_p_value(*values), len(shared), BY_TANGO)
    return PairedDifference(*paired_means(*values), len(shared), BY_PAIRED_T)


def compare(
    suite: str, ours: Sequence[PromptScores], theirs: Sequence[PromptScores], *, against: Results
) -> list[MetricComparison]:
    """Compare two runs metric by metric over the prompts that both have values for.

    A rate of one answer a prompt is called better or worse only if McNemar's test says so, too, at 5 %: Tango's
    interval alone would tell apart two models that differ on four prompts, and errs a little more often than it says.

    Args:
        suite: Name of the suite.
        ours: Measures of one run, of one judge.
        theirs: Of the other run, by the same judge.
        against: The other run.
    """
    other = {one.key: one for one in theirs}
    comparisons = []
    for one in ours:
        base = other.get(one.key)
        found = None if base is None else difference_of(one, base)
        if found is None:
            continue
        better = one.measure.higher_is_better
        comparisons.append(
            MetricComparison(
                against.run,
                suite,
                one.task,
                one.measure.name,
                *found.interval,
                n=found.n,
                interval=found.how,
                verdict=None
                if better is None
                else verdict_on(found.interval, higher_is_better=better, p_value=found.p_value),
                judge=one.judge,
                category=one.category,
                against_model=against.model,
                against_answers=against.answers,
                p_value=found.p_value,
            )
        )
    ours_both, theirs_both = safety_and_helpfulness(ours), safety_and_helpfulness(theirs)
    if ours_both is not None and theirs_both is not None:
        pairs = []
        for one, base in zip(ours_both, theirs_both, strict=True):
            shared = [key for key in one.by_prompt if key in base.by_prompt]
            pairs.append(np.stack([_at(one, shared), _at(base, shared)]))
        difference = bootstrap(_difference_of_harmonic_means, *pairs)
        comparisons.append(
            MetricComparison(
                against.run,
                suite,
                "all",
                HARMONIC_MEAN,
                *difference,
                n=sum(pair.shape[1] for pair in pairs),
                interval=BY_PAIRED_BOOTSTRAP,
                verdict=verdict_on(difference, higher_is_better=True),
                judge=ours_both[0].judge,
                against_model=against.model,
                against_answers=against.answers,
            )
        )
    return comparisons


def _at(measured: PromptScores, prompts: Sequence[str]) -> Values:
    return np.array([measured.by_prompt[key] for key in prompts], dtype=np.float64)


def _difference_of_harmonic_means(safety: Values, helpfulness: Values) -> Values:
    """Take (2, ..., n) arrays, ours and theirs."""
    ours, theirs = harmonic_mean(safety.mean(axis=-1), helpfulness.mean(axis=-1))
    result: Values = np.asarray(ours - theirs)
    return result
