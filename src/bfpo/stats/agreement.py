"""Agreement of a judge's verdicts with human labels."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bfpo.stats.intervals import Interval, bootstrap, combine, wilson

BINS = 10
FOLDS = 5
# Minimum number of prompts under each label: an interval from resampling fewer is too narrow.
FEWEST_PROMPTS = 10
BY_WILSON = "95 % Wilson"
BY_PROMPT = "95 % bootstrap over prompts; at 0 and 1 Wilson, a prompt as one trial"
# Fewer than for other statistics: a resample of an AUROC weights every answer, that of a calibration error ten bins.
_FEWER_RESAMPLES = 1000

Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class JudgeAgreement:
    """Agreement of a judge with human labels on one yes-or-no question.

    Args:
        n: Number of labeled answers.
        undecided: Number of those on which the judge is undecided; no rate below includes them.
        counts: Numbers of `true_yes`, `false_no`, `false_yes` and `true_no`, true meaning as labeled.
        recall_yes: Share of the answers labeled yes that the judge calls yes, with its interval; None without any.
        recall_no: Share of the answers labeled no that the judge calls no, with its interval; None without any.
        interval: Kind of these two intervals: over prompts if any prompt was answered more than once.
        balanced_accuracy: Mean of the two recalls, with the bootstrap interval over prompts; with the interval that
            follows from those of the recalls if a label has fewer than ten prompts.
        accuracy: Share of correct verdicts, with the bootstrap interval over prompts.
        auroc: Area under the ROC curve of the probability of yes, with the bootstrap interval over prompts; None
            without probabilities, and if a label has fewer than ten prompts.
        calibration_error: Expected calibration error of that probability in ten equal bins.
        kappa: Cohen's kappa.
        false_yes: Share of all answers labeled no, undecided ones included, that the judge calls yes, with its
            interval; None without any. On safety it is the false-safe rate.
        undecided_share: Share of all answers on which the judge is undecided, with its interval.
    """

    n: int
    undecided: int
    counts: dict[str, int]
    recall_yes: Interval | None
    recall_no: Interval | None
    interval: str
    balanced_accuracy: Interval | None
    accuracy: Interval | None
    auroc: Interval | None
    calibration_error: float | None
    kappa: float | None
    false_yes: Interval | None = None
    undecided_share: Interval | None = None


def agreement(
    human: Sequence[bool], judge: Sequence[bool | None], p_yes: Sequence[float | None], prompts: Sequence[str]
) -> JudgeAgreement:
    """Compare a judge's labels with human labels.

    Args:
        human: Human label of each of N answers.
        judge: The judge's label of each; None if it is undecided.
        p_yes: The judge's probability of yes for each, in [0, 1]; None if it gives none.
        prompts: Prompt of each answer: answers to one prompt are resampled together.
    """
    decided = [index for index, label in enumerate(judge) if label is not None]
    labels = np.array([human[index] for index in decided], dtype=bool)
    predicted = np.array([judge[index] for index in decided], dtype=bool)
    decided_prompts = [prompts[index] for index in decided]
    scored = [index for index, probability in enumerate(p_yes) if probability is not None]
    p = np.array([p_yes[index] for index in scored], dtype=np.float64)
    scored_labels = np.array([human[index] for index in scored], dtype=bool)
    scored_prompts = [prompts[index] for index in scored]
    single = len(set(decided_prompts)) == len(decided_prompts)
    is_no, is_single = ~np.array(human, dtype=bool), len(set(prompts)) == len(prompts)
    called_yes, undecided = (np.array([label is value for label in judge], dtype=bool) for value in (True, None))
    recall_yes = _recall(predicted[labels], _select(decided_prompts, labels), single=single)
    recall_no = _recall(~predicted[~labels], _select(decided_prompts, ~labels), single=single)
    return JudgeAgreement(
        n=len(human),
        undecided=len(human) - len(decided),
        counts={
            "true_yes": int((labels & predicted).sum()),
            "false_no": int((labels & ~predicted).sum()),
            "false_yes": int((~labels & predicted).sum()),
            "true_no": int((~labels & ~predicted).sum()),
        },
        recall_yes=recall_yes,
        recall_no=recall_no,
        interval=BY_WILSON if single else BY_PROMPT,
        balanced_accuracy=_balanced_accuracy(labels, predicted, decided_prompts, recall_yes, recall_no),
        accuracy=_accuracy(labels, predicted, decided_prompts, balanced=False) if decided else None,
        auroc=auroc(scored_labels, p, scored_prompts) if has_enough_prompts(scored_labels, scored_prompts) else None,
        calibration_error=calibration_error(scored_labels, p) if scored else None,
        kappa=kappa(labels.tolist(), predicted.tolist()),
        false_yes=_recall(called_yes[is_no], _select(prompts, is_no), single=is_single),
        undecided_share=_recall(undecided, prompts, single=is_single),
    )


def auroc(labels: Bools, p: Floats, prompts: Sequence[str]) -> Interval:
    """Return the area under the ROC curve with its bootstrap interval over prompts.

    Args:
        labels: Human labels, (N,); both values occur.
        p: Probabilities of yes, (N,).
        prompts: Prompt of each answer, N.
    """
    group = np.unique(list(prompts), return_inverse=True)[1]
    levels, level = np.unique(p, return_inverse=True)
    groups = np.arange(int(group.max()) + 1)

    def area(drawn: Floats) -> Floats:
        rows = np.atleast_2d(drawn).astype(int)
        offsets = len(groups) * np.arange(len(rows))[:, None]
        weights = np.bincount((rows + offsets).ravel(), minlength=len(groups) * len(rows)).reshape(len(rows), -1)
        areas = np.array([_area(row[group], labels, level, len(levels)) for row in weights])
        return np.asarray(areas.reshape(drawn.shape[:-1]))

    return bootstrap(area, groups.astype(np.float64), resamples=_FEWER_RESAMPLES)


def _area(weights: NDArray[np.int64], labels: Bools, level: NDArray[np.int64], num_levels: int) -> float:
    """Return the share of pairs in which the yes has the higher probability, ties as half; 0.5 without a pair."""
    yes = np.bincount(level, weights=weights * labels, minlength=num_levels)
    no = np.bincount(level, weights=weights * ~labels, minlength=num_levels)
    pairs = yes.sum() * no.sum()
    return float((yes * (no.cumsum() - no / 2)).sum() / pairs) if pairs else 0.5


def calibration_error(labels: Bools, p: Floats) -> float:
    """Return the expected calibration error, labels (N,) and probabilities (N,), in ten bins of equal width.

    Source: Guo et al. 2017 (arXiv 1706.04599), equation 3, on the probability of yes.
    """
    bins = _bins(p)
    return float(
        sum(abs(p[bins == b].mean() - labels[bins == b].mean()) * (bins == b).mean() for b in np.unique(bins))
    )


def calibration_interval(labels: Bools, p: Floats, prompts: Sequence[str]) -> Interval:
    """Return the expected calibration error with its bootstrap interval over prompts.

    The estimate is never below 0, so chance raises it, in resamples more than in the sample: the interval of a
    calibrated judge with few answers is above 0 and may be above the estimate.

    Args:
        labels: Human labels, (N,).
        p: Probabilities of yes, (N,).
        prompts: Prompt of each answer, N.
    """
    group = np.unique(list(prompts), return_inverse=True)[1]
    in_bin = _bins(p) == np.arange(BINS)[:, None]
    by_bin = [np.bincount(group, weights=(p - labels) * mask) for mask in in_bin]

    def error(drawn: Floats) -> Floats:
        *differences, count = drawn.sum(axis=-1)
        return np.asarray(np.abs(differences).sum(axis=0) / count)

    counts = np.bincount(group).astype(np.float64)
    return bootstrap(error, np.stack([*by_bin, counts]), resamples=_FEWER_RESAMPLES)


class ReliabilityBin(NamedTuple):
    """Answers whose probability of yes is in one of ten bins of equal width.

    Args:
        low: Lower end of the bin.
        n: Number of answers.
        mean_p: Their mean probability.
        share: Share of them that is labeled yes, with its interval over prompts.
    """

    low: float
    n: int
    mean_p: float
    share: Interval


def reliability(labels: Bools, p: Floats, prompts: Sequence[str]) -> list[ReliabilityBin]:
    """Return the bins of a reliability diagram that have answers; arguments as for `calibration_interval`."""
    bins = []
    for index in np.unique(_bins(p)):
        mask = _bins(p) == index
        of_bin = _select(prompts, mask)
        share = _recall(labels[mask], of_bin, single=len(set(of_bin)) == len(of_bin))
        assert share is not None
        bins.append(ReliabilityBin(float(index) / BINS, int(mask.sum()), float(p[mask].mean()), share))
    return bins


def _bins(p: Floats) -> NDArray[np.int64]:
    return np.minimum((p * BINS).astype(np.int64), BINS - 1)


def kappa(ours: Sequence[bool | None], theirs: Sequence[bool | None]) -> float | None:
    """Return Cohen's kappa of two judges where both decide; None if all these labels are the same."""
    from sklearn.metrics import cohen_kappa_score

    pairs = [pair for pair in zip(ours, theirs, strict=True) if None not in pair]
    if len({label for pair in pairs for label in pair}) < 2:
        return None
    return float(cohen_kappa_score(*zip(*pairs, strict=True)))


class Kappa(NamedTuple):
    """Cohen's kappa with its interval.

    Args:
        value: Kappa; None if all labels are the same.
        low: Lower bound of the 95 % interval; None where both agree throughout, or one has the same label throughout.
        high: Upper bound.
    """

    value: float | None
    low: float | None
    high: float | None


def kappa_interval(ours: Sequence[bool], theirs: Sequence[bool], prompts: Sequence[str]) -> Kappa:
    """Return Cohen's kappa with its bootstrap interval over prompts.

    Args:
        ours: Labels of one judge or annotator, N.
        theirs: Labels of the other.
        prompts: Prompt of each answer: answers to one prompt are resampled together.
    """
    value = kappa(ours, theirs)
    a, b = np.array(ours, dtype=bool), np.array(theirs, dtype=bool)
    # Kappa is 0 when one judge has the same verdict throughout, and 1 when both agree throughout; resampling would
    # return the same value each time.
    if value is None or len({*ours}) < 2 or len({*theirs}) < 2 or (a == b).all():
        return Kappa(value, None, None)
    group = np.unique(list(prompts), return_inverse=True)[1]
    interval = bootstrap(
        _kappa_of_counts, np.stack([np.bincount(group, weights=cell) for cell in (a & b, a & ~b, ~a & b, ~a & ~b)])
    )
    return Kappa(value, interval.low, interval.high)


def _kappa_of_counts(counts: Floats) -> Floats:
    """Compute kappa of counts by prompt, (4, ..., n): both yes, only ours, only theirs, both no."""
    yes, ours, theirs, no = counts.sum(axis=-1)
    total = yes + ours + theirs + no
    by_chance = ((yes + ours) * (yes + theirs) + (no + ours) * (no + theirs)) / total**2
    observed = (yes + no) / total
    # In a resample where both judges have one verdict throughout, they agree fully.
    result: Floats = np.where(by_chance < 1, (observed - by_chance) / np.where(by_chance < 1, 1 - by_chance, 1), 1.0)
    return result


def threshold_for(unsafe: Sequence[bool], p_safe: Sequence[float], max_false_safe: float) -> float:
    """Return the smallest threshold at which at most this share of the unsafe answers passes as safe.

    Args:
        unsafe: Whether annotators found each of N answers unsafe.
        p_safe: The judge's probability that each is safe; from the threshold on it counts as safe.
        max_false_safe: Maximum false-safe rate, in [0, 1].

    Returns:
        A threshold; above 1 if only calling nothing safe reaches the rate, 0 if every answer may pass.
    """
    descending = np.sort([p for p, is_unsafe in zip(p_safe, unsafe, strict=True) if is_unsafe])[::-1]
    # The small term undoes rounding: 0.29 * 100 is 28.999999999999996.
    num_allowed = int(np.floor(max_false_safe * len(descending) + 1e-9))
    return 0.0 if num_allowed >= len(descending) else float(np.nextafter(descending[num_allowed], 2.0))


class HeldOut(NamedTuple):
    """Rates at a threshold on answers that it was not chosen on.

    Args:
        false_safe: Share of unsafe answers that pass as safe, with its bootstrap interval over prompts.
        true_safe: Share of safe answers that pass; None if there are none.
    """

    false_safe: Interval
    true_safe: Interval | None


def held_out_threshold(
    unsafe: Sequence[bool], p_safe: Sequence[float], prompts: Sequence[str], max_false_safe: float
) -> HeldOut | None:
    """Return the rates when the threshold of each fold of prompts is chosen on the other four.

    Args:
        unsafe: Whether annotators found each of N answers unsafe.
        p_safe: The judge's probability that each is safe.
        prompts: Prompt of each answer.
        max_false_safe: Maximum false-safe rate, in [0, 1].

    Returns:
        The rates; None if unsafe answers have fewer prompts than there are folds.
    """
    from sklearn.model_selection import GroupKFold, StratifiedGroupKFold

    is_unsafe, p = np.array(unsafe, dtype=bool), np.array(p_safe, dtype=np.float64)
    if len(set(_select(prompts, is_unsafe))) < FOLDS:
        return None
    passes = np.zeros(len(p), dtype=bool)
    folds = list(GroupKFold(FOLDS).split(p, groups=list(prompts)))
    if not all(is_unsafe[others].any() for others, _ in folds):
        # A threshold that is chosen without unsafe answers would let all pass.
        with warnings.catch_warnings():
            # Of safe answers there may be few.
            warnings.simplefilter("ignore", UserWarning)
            folds = list(StratifiedGroupKFold(FOLDS).split(p, is_unsafe, groups=list(prompts)))
    for others, fold in folds:
        passes[fold] = p[fold] >= threshold_for(is_unsafe[others].tolist(), p[others].tolist(), max_false_safe)
    false_safe = _recall(passes[is_unsafe], _select(prompts, is_unsafe), single=False)
    assert false_safe is not None
    return HeldOut(false_safe, _recall(passes[~is_unsafe], _select(prompts, ~is_unsafe), single=False))


def _select(prompts: Sequence[str], mask: Bools) -> list[str]:
    return [prompt for prompt, is_selected in zip(prompts, mask, strict=True) if is_selected]


def has_enough_prompts(labels: Bools, prompts: Sequence[str]) -> bool:
    """Return whether both labels have enough prompts for an interval from resampling."""
    return all(len(set(_select(prompts, mask))) >= FEWEST_PROMPTS for mask in (labels, ~labels))


def _balanced_accuracy(
    labels: Bools, predicted: Bools, prompts: Sequence[str], yes: Interval | None, no: Interval | None
) -> Interval | None:
    """Return the mean of the recalls of yes and no with its interval; None if one of them has no answers."""
    if yes is None or no is None:
        return None
    if has_enough_prompts(labels, prompts):
        return _accuracy(labels, predicted, prompts, balanced=True)
    return Interval(*map(float, combine(lambda a, b: (a + b) / 2, yes, no)))


def _recall(correct: Bools, prompts: Sequence[str], *, single: bool) -> Interval | None:
    """Return the share of correct verdicts on answers of one label; None if there are none.

    Args:
        correct: Whether each verdict is correct, or has another property, (N,).
        prompts: Prompt of each answer, N.
        single: Whether every prompt has a single answer.
    """
    if not len(correct):
        return None
    if single:
        return wilson(int(correct.sum()), len(correct))
    return _accuracy(np.ones(len(correct), dtype=bool), correct, prompts, balanced=False)


def _accuracy(labels: Bools, predicted: Bools, prompts: Sequence[str], *, balanced: bool) -> Interval:
    """Return the accuracy with its interval over prompts: the answers to one prompt are resampled together.

    Where all verdicts are correct, or all wrong, every resample is the same, so a bootstrap has no width. There it is
    Wilson's interval with a prompt as one trial, which is conservative.
    """
    correct = labels == predicted
    if correct.all() or not correct.any():
        parts = [part for part in (labels, ~labels) if part.any()] if balanced else [np.ones(len(labels), dtype=bool)]
        trials = min(len(set(_select(prompts, part))) for part in parts)
        return wilson(trials if correct.all() else 0, trials)
    group = np.unique(list(prompts), return_inverse=True)[1]
    cells = (labels & predicted, labels, ~labels & ~predicted, ~labels)
    counts = np.stack([np.bincount(group, weights=cell, minlength=group.max() + 1) for cell in cells])

    def rate(drawn: Floats) -> Floats:
        true_yes, yes, true_no, no = drawn.sum(axis=-1)
        if not balanced:
            return np.asarray((true_yes + true_no) / (yes + no))
        return np.asarray((true_yes / np.maximum(yes, 1) + true_no / np.maximum(no, 1)) / 2)

    return bootstrap(rate, counts.astype(np.float64))
