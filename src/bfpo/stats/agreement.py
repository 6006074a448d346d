"""How often a judge is right: its verdicts against labels that people gave."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import cohen_kappa_score
from sklearn.model_selection import GroupKFold

from bfpo.stats.intervals import Interval, bootstrap, combined, wilson

BINS = 10
FOLDS = 5
# Of either label; resampling fewer says more than anybody knows.
FEWEST_PROMPTS = 10
BY_WILSON = "95 % Wilson"
BY_PROMPT = "95 % bootstrap over prompts; at 0 and 1 Wilson, a prompt as one trial"
# Each resample of an AUROC weighs every answer.
_AUROC_RESAMPLES = 1000

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class JudgeAgreement:
    """A judge against people on one yes-or-no question.

    Args:
        n: Answers that people labeled.
        undecided: Of those, left open by the judge; they are in no rate below.
        counts: `true_yes`, `false_no`, `false_yes`, `true_no`; false means that people say otherwise.
        recall_yes: Share of people's yes that the judge finds, with its interval; None without any.
        recall_no: The same of people's no.
        interval: How those two intervals were made: where prompts were answered more than once, over prompts.
        balanced_accuracy: Mean of the two, with the bootstrap interval over prompts; where a label stands under fewer
            than ten prompts, the interval that follows from those of the two recalls.
        accuracy: Share of right answers, bootstrapped over prompts.
        auroc: Of the probability of yes, bootstrapped the same way; None without probabilities, and where a label
            stands under fewer than ten prompts.
        calibration_error: Expected calibration error of that probability in ten equal bins.
        kappa: Cohen's kappa.
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


def agreement(
    people: Sequence[bool], judge: Sequence[bool | None], p_yes: Sequence[float | None], prompts: Sequence[str]
) -> JudgeAgreement:
    """Compare a judge with people.

    Args:
        people: Their label of each of N answers.
        judge: The judge's; None when undecided.
        p_yes: Its probabilities of yes in [0, 1]; None where it gives none.
        prompts: What each answers: answers to one prompt are resampled together.
    """
    kept = [index for index, one in enumerate(judge) if one is not None]
    y = np.array([people[index] for index in kept], dtype=bool)
    said = np.array([judge[index] for index in kept], dtype=bool)
    asked = [prompts[index] for index in kept]
    known = [index for index, one in enumerate(p_yes) if one is not None]
    p = np.array([p_yes[index] for index in known], dtype=np.float64)
    labels = np.array([people[index] for index in known], dtype=bool)
    about = [prompts[index] for index in known]
    hit, miss, alarm = int((y & said).sum()), int((y & ~said).sum()), int((~y & said).sum())
    rest = int((~y & ~said).sum())
    once = len(set(asked)) == len(asked)
    recall_yes = _recall(said[y], _where(asked, y), once=once)
    recall_no = _recall(~said[~y], _where(asked, ~y), once=once)
    return JudgeAgreement(
        n=len(people),
        undecided=len(people) - len(kept),
        counts={"true_yes": hit, "false_no": miss, "false_yes": alarm, "true_no": rest},
        recall_yes=recall_yes,
        recall_no=recall_no,
        interval=BY_WILSON if once else BY_PROMPT,
        balanced_accuracy=_balanced(y, said, asked, recall_yes, recall_no),
        accuracy=_by_prompt(y, said, asked, balanced=False) if kept else None,
        auroc=auroc(labels, p, about) if _enough(labels, about) else None,
        calibration_error=calibration_error(labels, p) if known else None,
        kappa=kappa(y.tolist(), said.tolist()),
    )


def auroc(labels: NDArray[np.bool_], p: Floats, prompts: Sequence[str]) -> Interval:
    """Return the area under the ROC curve with its bootstrap interval over prompts.

    Args:
        labels: People's, (N,); both values stand in it.
        p: Probability of yes, (N,).
        prompts: What each answers, N.
    """
    group = np.unique(list(prompts), return_inverse=True)[1]
    ordered, first = np.unique(p, return_inverse=True)
    side = np.arange(int(group.max()) + 1)

    def area(drawn: NDArray[np.int64]) -> Floats:
        rows = np.atleast_2d(drawn).astype(int)
        offsets = len(side) * np.arange(len(rows))[:, None]
        times = np.bincount((rows + offsets).ravel(), minlength=len(side) * len(rows)).reshape(len(rows), -1)
        found = np.array([_area(one[group], labels, first, len(ordered)) for one in times])
        return np.asarray(found.reshape(drawn.shape[:-1]))

    return bootstrap(area, side.astype(np.float64), resamples=_AUROC_RESAMPLES)


def _area(weights: NDArray[np.int64], labels: NDArray[np.bool_], level: NDArray[np.int64], levels: int) -> float:
    """Return the share of pairs in which the yes has the higher probability, ties as half; 0.5 without a pair."""
    yes = np.bincount(level, weights=weights * labels, minlength=levels)
    no = np.bincount(level, weights=weights * ~labels, minlength=levels)
    pairs = yes.sum() * no.sum()
    return float((yes * (no.cumsum() - no / 2)).sum() / pairs) if pairs else 0.5


def calibration_error(labels: NDArray[np.bool_], p: NDArray[np.float64]) -> float:
    """Return the expected calibration error, labels (N,) and probabilities (N,), in ten bins of equal width.

    Source: Guo et al. 2017 (arXiv 1706.04599), equation 3, on the probability of yes.
    """
    bins = np.minimum((p * BINS).astype(int), BINS - 1)
    return float(
        sum(abs(p[bins == b].mean() - labels[bins == b].mean()) * (bins == b).mean() for b in np.unique(bins))
    )


def kappa(ours: Sequence[bool | None], theirs: Sequence[bool | None]) -> float | None:
    """Return Cohen's kappa of two judges where both decide; None where there is nothing to agree on by chance."""
    both = [(a, b) for a, b in zip(ours, theirs, strict=True) if a is not None and b is not None]
    if len({value for one in both for value in one}) < 2:
        return None
    return float(cohen_kappa_score(*zip(*both, strict=True)))


def threshold_for(unsafe: Sequence[bool], p_safe: Sequence[float], wanted: float) -> float:
    """Return the smallest threshold at which at most the wanted share of unsafe answers passes as safe.

    Args:
        unsafe: Whether people found each of N answers unsafe.
        p_safe: The judge's probability that it is safe; safe from the threshold on.
        wanted: Highest false-safe rate, in [0, 1].

    Returns:
        A threshold; above 1 when only calling nothing safe does it, 0 when everything may pass.
    """
    of_unsafe = np.sort([p for p, bad in zip(p_safe, unsafe, strict=True) if bad])[::-1]
    allowed = int(np.floor(wanted * len(of_unsafe) + 1e-9))
    return 0.0 if allowed >= len(of_unsafe) else float(np.nextafter(of_unsafe[allowed], 2.0))


class HeldOut(NamedTuple):
    """What a threshold does to answers that it wasn't chosen on.

    Args:
        false_safe: Share of unsafe answers that pass as safe, with its bootstrap interval over prompts.
        true_safe: Share of safe answers that pass; None if there are none.
    """

    false_safe: Interval
    true_safe: Interval | None


def held_out_threshold(
    unsafe: Sequence[bool], p_safe: Sequence[float], prompts: Sequence[str], wanted: float
) -> HeldOut | None:
    """Return what passes when the threshold of each fold of prompts is chosen on the four others.

    Args:
        unsafe: As in `threshold_for`.
        p_safe: As in `threshold_for`.
        prompts: What each answers.
        wanted: As in `threshold_for`.

    Returns:
        The rates; None if unsafe answers stand under fewer prompts than there are folds.
    """
    bad, p = np.array(unsafe, dtype=bool), np.array(p_safe, dtype=np.float64)
    if len(set(_where(prompts, bad))) < FOLDS:
        return None
    passes = np.zeros(len(p), dtype=bool)
    for others, fold in GroupKFold(FOLDS).split(p, groups=list(prompts)):
        passes[fold] = p[fold] >= threshold_for(bad[others].tolist(), p[others].tolist(), wanted)
    false_safe = _recall(passes[bad], _where(prompts, bad), once=False)
    assert false_safe is not None
    return HeldOut(false_safe, _recall(passes[~bad], _where(prompts, ~bad), once=False))


def _where(prompts: Sequence[str], kept: NDArray[np.bool_]) -> list[str]:
    return [prompt for prompt, one in zip(prompts, kept, strict=True) if one]


def _enough(labels: NDArray[np.bool_], prompts: Sequence[str]) -> bool:
    return all(len(set(_where(prompts, one))) >= FEWEST_PROMPTS for one in (labels, ~labels))


def _balanced(
    y: NDArray[np.bool_], said: NDArray[np.bool_], prompts: Sequence[str], yes: Interval | None, no: Interval | None
) -> Interval | None:
    """Return the mean of the recalls of yes and no with its interval; None if one of them has no answers."""
    if yes is None or no is None:
        return None
    if _enough(y, prompts):
        return _by_prompt(y, said, prompts, balanced=True)
    return Interval(*map(float, combined(lambda a, b: (a + b) / 2, yes, no)))


def _recall(found: NDArray[np.bool_], prompts: Sequence[str], *, once: bool) -> Interval | None:
    """Return the share of answers found; None if there are none."""
    if not len(found):
        return None
    if once:
        return wilson(int(found.sum()), len(found))
    return _by_prompt(np.ones(len(found), dtype=bool), found, prompts, balanced=False)


def _by_prompt(y: NDArray[np.bool_], said: NDArray[np.bool_], prompts: Sequence[str], *, balanced: bool) -> Interval:
    """Return accuracy with its interval over prompts: the answers to one prompt are resampled together.

    Resampling what never differs tells nothing of what wasn't seen: where all is right, or wrong, it is Wilson's
    interval with a prompt as one trial, which is cautious.
    """
    right = y == said
    if right.all() or not right.any():
        parts = [part for part in (y, ~y) if part.any()] if balanced else [np.ones(len(y), dtype=bool)]
        trials = min(len({one for one, there in zip(prompts, part, strict=True) if there}) for part in parts)
        return wilson(trials if right.all() else 0, trials)
    group = np.unique(list(prompts), return_inverse=True)[1]
    counts = np.stack(
        [np.bincount(group, weights=part, minlength=group.max() + 1) for part in (y & said, y, ~y & ~said, ~y)]
    )

    def rate(drawn: NDArray[np.float64]) -> NDArray[np.float64]:
        hit, yes, rest, no = drawn.sum(axis=-1)
        if not balanced:
            return np.asarray((hit + rest) / (yes + no))
        return np.asarray((hit / np.maximum(yes, 1) + rest / np.maximum(no, 1)) / 2)

    return bootstrap(rate, counts.astype(np.float64))
