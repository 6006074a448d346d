"""Win rates against reference outputs: raw and length-controlled, each with its interval over prompts."""

import numpy as np
from scipy.special import expit

from bfpo.stats.intervals import Interval, Values, bootstrap, score_interval

STEPS = 50
# Keeps the fit finite when every preference is 0 or 1; far below what one prompt weighs.
RIDGE = 1e-3


def win_rate(preferences: Values) -> Interval:
    """Return the mean preference, in [0, 1], with Wilson's interval at the effective sample size.

    Args:
        preferences: One per prompt, in [0, 1]: the mean over both orders where both were judged.

    Raises:
        ValueError: If there are none, or one isn't in [0, 1].
    """
    return score_interval(_checked(preferences))


def length_controlled_win_rate(
    preferences: Values, lengths: Values, reference_lengths: Values, *, seed: int = 0, resamples: int = 1000
) -> Interval:
    """Return the win rate, in [0, 1], that a logistic regression predicts at equal lengths.

    The preference is regressed on a model term and tanh of the length difference over its standard deviation; the
    estimate is the prediction at difference 0. AlpacaEval 2 (Dubois et al. 2024, arXiv 2404.04475) has a third term,
    the instruction's difficulty, from a table fitted on its own leaderboard, an L1 penalty, and made-up models of
    other lengths that hold its length term back: its numbers are not these. See docs/statistics.md.

    Args:
        preferences: One per prompt, in [0, 1].
        lengths: Of the model's outputs, in characters, (n,).
        reference_lengths: Of the outputs they were compared with, (n,).
        seed: Of the resampling over prompts.
        resamples: How many.

    Raises:
        ValueError: If there are no prompts, the three aren't of one length, or a preference isn't in [0, 1].
    """
    preferences = _checked(preferences)
    if not preferences.shape == lengths.shape == reference_lengths.shape:
        raise ValueError(
            f"{len(preferences)} preferences, {len(lengths)} and {len(reference_lengths)} lengths; expected one each"
        )
    difference = np.asarray(lengths, dtype=np.float64) - reference_lengths
    spread = difference.std()
    control = np.tanh(difference / spread) if spread > 0 else np.zeros_like(difference)
    return bootstrap(_at_equal_length, np.stack([preferences, control]), seed=seed, resamples=resamples)


def _checked(preferences: Values) -> Values:
    values = np.asarray(preferences, dtype=np.float64)
    if not len(values) or not ((values >= 0) & (values <= 1)).all():
        raise ValueError("expected at least one preference, each in [0, 1]")
    return values


def _at_equal_length(sample: Values) -> Values:
    """Fit by Newton's method, the sample (2, ..., n): preferences and length control; return (...)."""
    y, x = sample
    level, slope = np.zeros(y.shape[:-1]), np.zeros(y.shape[:-1])
    for _ in range(STEPS):
        p = expit(level[..., None] + slope[..., None] * x)
        weight = p * (1 - p)
        g0, g1 = (y - p).sum(-1) - RIDGE * level, ((y - p) * x).sum(-1) - RIDGE * slope
        a, b, c = weight.sum(-1) + RIDGE, (weight * x).sum(-1), (weight * x * x).sum(-1) + RIDGE
        determinant = a * c - b * b
        d0, d1 = (c * g0 - b * g1) / determinant, (a * g1 - b * g0) / determinant
        level, slope = level + np.clip(d0, -2, 2), slope + np.clip(d1, -2, 2)
        if max(np.abs(d0).max(), np.abs(d1).max()) < 1e-8:
            break
    result: Values = np.asarray(expit(level))
    return result
