"""Training on the largest losses: weights that turn the mean of a step into that of its worst share."""

import numpy as np

from bfpo.losses.combiners import Array


def tail_factors(costs: Array, weights: Array, *, share: float) -> Array:
    """Return the factors of the weights with which the weighted mean becomes that of the worst share.

    Equal costs have equal factors, so that the order of the values doesn't matter. With the costs of examples under
    the current parameters, these factors give the gradient of the mean of the worst share.

    Args:
        costs: Costs, higher is worse, (n,).
        weights: Weights, at least 0, (n,).
        share: Share of the weight that counts as the worst, in (0, 1].

    Returns:
        Factors from 0 to 1 / share, (n,); the weights times the factors have the same sum as the weights.
    """
    _, group = np.unique(-costs, return_inverse=True)
    of_group = np.bincount(group, weights=weights)
    room = share * of_group.sum() - (np.cumsum(of_group) - of_group)
    factors = np.clip(np.divide(room, of_group, out=np.zeros_like(room), where=of_group > 0), 0, 1) / share
    return np.asarray(factors[group])
