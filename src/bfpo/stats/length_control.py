"""Win rates against reference outputs, raw and length-controlled, each with its interval over prompts."""

import warnings
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bfpo.stats.intervals import Interval, Values, bootstrap, in_unit_interval, score_interval

# Maximum number of Newton steps.
STEPS = 50
# L2 penalty that keeps the fit finite when every preference is 0 or 1; far below the weight of one prompt.
RIDGE = 1e-3
MIN_LENGTH_RATIO = 0.9
"""Mean length of the outputs over that of the reference outputs from which `length_controlled_win_rate` is reported.
Below, the rate at equal lengths is an extrapolation that rewards short answers: for the four models of
`benchmarks/results/win_rates.json`, at a ratio of about 0.54, it is 2.5 to 7.7 points above the leaderboard's."""
# What AlpacaEval's regression is fitted with.
FOLDS, PENALTIES, GAMED_WEIGHT, SEED = 5, 10, 0.1, 123


class GamedAnswers(NamedTuple):
    """Annotated answers of the gamed baselines of AlpacaEval, which are in its regression of every model.

    A gamed baseline is the reference model asked to answer briefly or at length.

    Args:
        preferences: Preference for each of M answers, in [0, 1], (M,).
        differences: Length of the reference output minus that of the answer, standardized, (M,).
        difficulties: Difficulty of each answer's instruction, (M,).
    """

    preferences: Values
    differences: Values
    difficulties: Values


def win_rate(preferences: Values) -> Interval:
    """Return the mean preference, in [0, 1], with its interval.

    Args:
        preferences: One preference per prompt, in [0, 1], (n,): the mean over both orders where both were judged.

    Raises:
        ValueError: If there is no preference, or one is outside [0, 1].
    """
    return score_interval(_checked(preferences))


def length_controlled_win_rate(
    preferences: Values, lengths: Values, reference_lengths: Values, *, seed: int = 0, resamples: int = 1000
) -> Interval:
    """Return the win rate, in [0, 1], that a logistic regression predicts at equal lengths: an approximation.

    The preference is regressed on a model term and tanh of the length difference over its standard deviation; the
    estimate is the prediction at difference 0. Without the other terms of `alpaca_eval_win_rate` it rewards answers
    that are much shorter than the reference outputs; see `MIN_LENGTH_RATIO` and docs/statistics.md.

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
    interval = bootstrap(_rate_at_equal_length, np.stack([preferences, control]), seed=seed, resamples=resamples)
    return _widened(interval, preferences)


def alpaca_eval_win_rate(
    preferences: Values,
    lengths: Values,
    reference_lengths: Values,
    difficulties: Values,
    gamed: GamedAnswers,
    *,
    seed: int = 0,
    resamples: int = 400,
) -> Interval:
    """Return the length-controlled win rate of AlpacaEval 2, in [0, 1] (Dubois et al. 2024, arXiv 2404.04475).

    The preference is regressed without intercept on tanh of the standardized length difference, the instruction's
    difficulty and a term of the model, together with the gamed baselines, which have no term of the model and a
    weight of 0.2 divided by their number, 2. The L1 penalty is chosen from ten by cross-validation in five folds. The
    estimate is the mean prediction at difference 0 over all instructions.

    The value equals that of the package alpaca_eval 0.6.6 (`length_controlled_v1`). The interval is ours: a bootstrap
    over instructions at the chosen penalty, with the gamed baselines unchanged.

    Args:
        preferences: One preference per instruction, in [0, 1], (n,); NaN where the annotator is undecided.
        lengths: Lengths of the model's outputs, in characters, (n,).
        reference_lengths: Lengths of the reference outputs, in characters, (n,).
        difficulties: Difficulty of each instruction, (n,).
        gamed: Annotated answers of the gamed baselines.
        seed: Seed of the bootstrap over instructions.
        resamples: Number of resamples.

    Raises:
        ValueError: If fewer than five instructions have a preference, the arguments differ in length, or a preference
            is outside [0, 1].
    """
    preferences = np.asarray(preferences, dtype=np.float64)
    is_decided = ~np.isnan(preferences)
    _checked(preferences[is_decided])
    if is_decided.sum() < FOLDS:
        raise ValueError(f"{is_decided.sum()} preferences; AlpacaEval's regression needs at least {FOLDS}")
    if not preferences.shape == lengths.shape == reference_lengths.shape == difficulties.shape:
        raise ValueError("expected a preference, two lengths and a difficulty of each instruction")
    difference = np.asarray(reference_lengths, dtype=np.float64) - lengths
    spread = difference.std(ddof=1)
    control = np.tanh(difference / spread) if spread > 0 else np.zeros_like(difference)
    ours = np.stack([control, difficulties, np.ones_like(control)], axis=1)
    theirs = np.stack([np.tanh(gamed.differences), gamed.difficulties, np.zeros_like(gamed.differences)], axis=1)

    def data(drawn: NDArray[np.intp]) -> tuple[Values, Values, Values]:
        """Return features, preferences and weights of the gamed answers and the drawn instructions, in this order."""
        index = drawn[is_decided[drawn]]
        features = np.concatenate([theirs, ours[index]])
        weights = np.concatenate([np.full(len(theirs), GAMED_WEIGHT), np.ones(len(index))])
        return features, np.concatenate([gamed.preferences, preferences[index]]), weights

    every = np.arange(len(preferences))
    penalty = _best_penalty(*data(every))

    def rate(drawn: Values) -> Values:
        rows = np.atleast_2d(drawn).astype(int)
        rates = [_mean_at_equal_length(_fit(*data(row), penalty), difficulties[row]) for row in rows]
        return np.array(rates).reshape(drawn.shape[:-1])

    interval = bootstrap(rate, every.astype(np.float64), seed=seed, resamples=resamples)
    return _widened(interval, preferences[is_decided])


def _widened(interval: Interval, preferences: Values) -> Interval:
    """Return an interval with that of the plain win rate in it where all preferences are equal.

    No resample differs from the sample then, and the bootstrap's interval has no width.
    """
    if np.ptp(preferences) > 0:
        return interval
    plain = score_interval(preferences)
    return Interval(interval.value, min(interval.low, plain.low), max(interval.high, plain.high))


def _best_penalty(features: Values, preferences: Values, weights: Values) -> float:
    """Return the inverse penalty with the lowest log loss over the folds; the strongest penalty of equal ones."""
    from scipy.special import xlog1py, xlogy
    from sklearn.model_selection import GroupKFold

    # The folds depend on the order of the rows; this is AlpacaEval's: first all wins, then all losses.
    count = len(preferences)
    groups = np.tile(np.arange(count), 2)
    penalties = np.logspace(-4, 4, PENALTIES)
    losses = np.zeros(PENALTIES)
    for train, test in GroupKFold(FOLDS).split(groups, groups=groups):
        train, test = train[train < count], test[test < count]
        # As in scikit-learn's LogisticRegressionCV, the ten fits of a fold draw from one generator.
        random = np.random.RandomState(SEED)
        for place, penalty in enumerate(penalties):
            p = _predict(_fit(features[train], preferences[train], weights[train], penalty, random), features[test])
            p = p.clip(1e-15, 1 - 1e-15)
            loss = xlogy(preferences[test], p) + xlog1py(1 - preferences[test], -p)
            losses[place] -= (weights[test] * loss).mean() / FOLDS
    return float(penalties[losses.argmin()])


def _fit(
    features: Values,
    preferences: Values,
    weights: Values,
    penalty: float,
    random: int | np.random.RandomState = SEED,
) -> Values:
    """Return the coefficients of the logistic regression with an L1 penalty, without an intercept, (k,)."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    # scikit-learn 1.8 replaced `penalty="l1"` with `l1_ratio=1`.
    l1 = {"penalty": "l1"} if LogisticRegression().penalty == "l2" else {"l1_ratio": 1}
    # liblinear takes labels only: each row counts as a win and as a loss, weighted by the preference.
    labels = np.repeat([1, 0], len(preferences))
    both = np.concatenate([preferences * weights, (1 - preferences) * weights])
    model = LogisticRegression(C=penalty, solver="liblinear", fit_intercept=False, random_state=random, **l1)
    with warnings.catch_warnings():
        # AlpacaEval's number is that after 100 iterations.
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(np.tile(features, (2, 1)), labels, sample_weight=both)
    coefficients: Values = model.coef_[0]
    return coefficients


def _predict(coefficients: Values, features: Values) -> Values:
    from scipy.special import expit

    p: Values = expit(features @ coefficients)
    return p


def _mean_at_equal_length(coefficients: Values, difficulties: Values) -> float:
    features = np.stack([np.zeros_like(difficulties), difficulties, np.ones_like(difficulties)], axis=1)
    return float(_predict(coefficients, features).mean())


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
