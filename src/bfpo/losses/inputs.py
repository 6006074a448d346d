"""Inputs of losses."""

from dataclasses import dataclass, fields

from torch import Tensor

from bfpo.errors import DataError


@dataclass(frozen=True, slots=True, eq=False)
class PairLogps:
    """Inputs of a loss for a batch of B pairs. Every tensor has shape (B,).

    Args:
        chosen_logps: Policy log-probability of the chosen completion, summed over its tokens, in nats.
        rejected_logps: Same for the rejected completion.
        ref_chosen_logps: Reference log-probability of the chosen completion.
        ref_rejected_logps: Reference log-probability of the rejected completion.
        chosen_safe: 0 or 1, or the probability in [0, 1] that the chosen answer is safe.
        rejected_safe: Same for the rejected answer.
        chosen_lengths: Number of scored tokens of the chosen completion; None if unknown.
        rejected_lengths: Same for the rejected completion.
        expected_safety: E_s of the pair's prompt or data set, in [0, 1]; None if unknown.
        chosen_win_rate: Probability in [0, 1] of beating a random answer of the data policy; None if unknown.
        rejected_win_rate: Same for the rejected answer.
        reward_margin: Reward by another objective, chosen minus rejected; None if unknown.
        score_margin: Reward less multiplied cost, chosen minus rejected; None if unknown.
        category_margin: Margin of the pair's harm categories, at least 0 (Cat-DPO); None if unknown.
        degree_difference: Degree of the chosen version of an answer less that of the rejected one, in [-1, 1]; NaN
            for pairs of other answers, None if there are only those.
        chosen_divergence: Divergence of the policy from the reference over the vocabulary, summed over the positions
            of the chosen completion, nats; None if the loss doesn't use it.
        rejected_divergence: Same for the rejected completion.
        judged: 1 if the safety labels are those of a judge, which errs, 0 if they are assumed or a person's; None if
            unknown.

    Raises:
        ValueError: If shapes differ.
    """

    chosen_logps: Tensor
    rejected_logps: Tensor
    ref_chosen_logps: Tensor
    ref_rejected_logps: Tensor
    chosen_safe: Tensor
    rejected_safe: Tensor
    chosen_lengths: Tensor | None = None
    rejected_lengths: Tensor | None = None
    expected_safety: Tensor | None = None
    chosen_win_rate: Tensor | None = None
    rejected_win_rate: Tensor | None = None
    reward_margin: Tensor | None = None
    score_margin: Tensor | None = None
    category_margin: Tensor | None = None
    degree_difference: Tensor | None = None
    chosen_divergence: Tensor | None = None
    rejected_divergence: Tensor | None = None
    judged: Tensor | None = None

    def __post_init__(self) -> None:
        for column in fields(self):
            value = getattr(self, column.name)
            if value is not None and value.shape != self.chosen_logps.shape:
                raise ValueError(
                    f"Shape mismatch: chosen_logps is {tuple(self.chosen_logps.shape)}, "
                    f"{column.name} is {tuple(value.shape)}"
                )

    @property
    def margin(self) -> Tensor:
        """h: how much more than the reference the policy prefers the chosen answer, nats, (B,)."""
        return (self.chosen_logps - self.ref_chosen_logps) - (self.rejected_logps - self.ref_rejected_logps)

    def swapped(self) -> "PairLogps":
        """Return the pairs with their answers in the other order."""
        columns = {column.name: getattr(self, column.name) for column in fields(self)}
        for name in columns:
            if "chosen" in name:
                other = name.replace("chosen", "rejected")
                columns[name], columns[other] = columns[other], columns[name]
        for name in ("reward_margin", "score_margin", "degree_difference"):
            columns[name] = None if columns[name] is None else -columns[name]
        return PairLogps(**columns)

    def require(self, name: str) -> Tensor:
        """Return an optional input that the loss needs.

        Raises:
            DataError: If the data don't have it.
        """
        value = getattr(self, name)
        if value is None:
            raise DataError(f"this loss needs '{name}' for every pair, and the data don't have it")
        assert isinstance(value, Tensor)
        return value
