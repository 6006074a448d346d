"""Win rates against reference outputs, raw and length-controlled, each with its interval over prompts."""

import numpy as np

from bfpo.stats.intervals import Interval, Values, bootstrap, in_unit_interval, score_interval

# Maximum number of Newton steps.
STEPS = 50
# L2 penalty that keeps the fit finite when every preference is 0 or 1; far below the weight of one prompt.
RIDGE = 1e-3


def win_rate(preferences: Values) -> Interval:
    """Return the mean preference, in [0, 1], with Wilson's interval at the effective sample size.

    Args:
        preferences: One preference per prompt, in [0, 1], (n,): the mean over both orders where both were judged.

    Raises:
        ValueError: If there is no preference, or one is outside [0, 1].
    """
    return score_interval(_checked(preferences))


def length_controlled_win_rate(
    preferences: Values, lengths: Values, reference_lengths: Values, *, seed: int = 0, resamples: int = 1000
) -> Interval:
    """Return the win rate, in [0, 1], that a logistic regression predicts at equal lengths.

    The preference is regressed on a model term and tanh of the length difference over its standard deviation; the
    estimate is the prediction at difference 0. AlpacaEval 2 (Dubois et al. 2024, arXiv 2404.04475) has a third term,
    the instruction's difficulty, from a table fitted on its own leaderboard, an L1 penalty, and synthetic models of
    other lengths that shrink its length term: its numbers differ from these. See docs/statistics.md.

    Args:
        preferences: One preference per prompt, in [0, 1], (n,).
        lengths: Lengths of the model's outputs, in characters, (n,).
        reference_lengths: Lengths of the reference outputs, in characters, (n,).
        seed: Seed of the bootstrap over prompts.
        resamples: Number of resamples.

    Raises:
        ValueError: If there is no prompt, the three differ in length, or a preference is outside [0, 1].
    """
    preferences = _checked(preferences)
    if not preferences.shape == lengths.shape == reference_lengths.shape:
        raise ValueError(
            f"{len(preferences)} preferences, {len(lengths)} lengths and {len(reference_lengths)} reference lengths; "
            "expected one of each per prompt"
        )
    difference = np.asarray(lengths, dtype=np.float64) - reference_lengths
    spread = difference.std()
    control = np.tanh(difference / spread) if spread > 0 else np.zeros_like(difference)
    return bootstrap(_rate_at_equal_length, np.stack([preferences, control]), seed=seed, resamples=resamples)


def _checked(preferences: Values) -> Values:
    values = np.asarray(preferences, dtype=np.float64)
    if not len(values) or not in_unit_interval(values):
        raise ValueError("expected at least one preference, each in [0, 1]")
    return values


def _rate_at_equal_length(sample: Values) -> Values:
    """Fit by Newton's method on preferences and length control, (2, ..., n); return the rate at control 0, (...)."""
    from scipy.special import expit

    y, x = sample
    intercept, slope = np.zeros(y.shape[:-1]), np.zeros(y.shape[:-1])
    for _ in range(STEPS):
        p = expit(intercept[..., None] + slope[..., None] * x)
        weight = p * (1 - p)
        g0, g1 = (y - p).sum(-1) - RIDGE * intercept, ((y - p) * x).sum(-1) - RIDGE * slope
        a, b, c = weight.sum(-1) + RIDGE, (weight * x).sum(-1), (weight * x * x).sum(-1) + RIDGE
        determinant = a * c - b * b
        d0, d1 = (c * g0 - b * g1) / determinant, (a * g1 - b * g0) / determinant
        intercept, slope = intercept + np.clip(d0, -2, 2), slope + np.clip(d1, -2, 2)
        if max(np.abs(d0).max(), np.abs(d1).max()) < 1e-8:
            break
    rate: Values = np.asarray(expit(intercept))
    return rate
