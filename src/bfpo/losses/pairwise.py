"""Preference losses: pure functions of log-probabilities and labels, unreduced, `(B,)` in and `(B,)` out.

A loss is a frozen dataclass whose fields are its hyperparameters and whose call is its equation. The losses of other
papers are in `bfpo.losses.baselines`, and in `bfpo.losses.token_level` if they need the probabilities of all tokens.
To add one, write the class, a line in `LOSSES` (`bfpo.losses.build`) and a section in `bfpo.config.losses`. A custom
loss needs no change here: a recipe names it by its import path (`loss: {name: "my_package.losses:MyLoss"}`).

Notation: h is the margin, the log-ratio of chosen and rejected under the policy minus that under the reference, in
nats (sums over tokens).
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from bfpo.core.pairs import SafetyLabels
from bfpo.errors import RecipeError
from bfpo.losses.inputs import PairLogps
from bfpo.losses.label_errors import LabelErrors
from bfpo.losses.labeling import LabelingFunction


@dataclass(frozen=True)
class PairLoss(ABC):
    """Base class of preference losses. Subclasses define the equation.

    Args:
        beta: Strength of the pull towards the reference; above 0. The target margin of a squared loss on sums over
            tokens is label / beta nats.
        tail: Share of the pairs of a step that are trained on, those with the largest losses, in (0, 1]; 1 for all.
            A call returns the loss of each pair for any share.
        sft_weight: Weight of the negative log-likelihood in `total`, at least 0.

    Raises:
        RecipeError: If a number is out of its range: beta from 1e-9 to 1e9, beyond which targets overflow in float32.
    """

    beta: float = 0.1
    tail: float = field(default=1.0, kw_only=True)
    sft_weight: float = field(default=0.0, kw_only=True)

    # Optional columns of a pair file that the loss needs.
    needs: ClassVar[tuple[str, ...]] = ()
    # Share of the reference's probability in the divergence of a position; None if the loss needs no divergences.
    divergence_share: ClassVar[float | None] = None

    def __post_init__(self) -> None:
        check_range(self, "beta", 1e-9 <= self.beta <= 1e9, "a number above 0, from 1e-9 to 1e9")
        check_range(self, "tail", 0 < self.tail <= 1, "a share above 0, at most 1")
        check_range(self, "sft_weight", self.sft_weight >= 0, "a number from 0 to 1e9")

    def _add_needs(self, **columns: bool) -> None:
        """Add the columns that an option needs to those of the class, by whether it is used."""
        added = (name for name, is_needed in columns.items() if is_needed)
        object.__setattr__(self, "needs", (*type(self).needs, *added))

    @abstractmethod
    def __call__(self, pairs: PairLogps) -> Tensor:
        """Return the loss of each pair, unreduced, (B,)."""

    def total(self, pairs: PairLogps) -> Tensor:
        """Return the loss of each pair with the weighted negative log-likelihood of its preferred answer, (B,).

        The preferred answer is the one that the loss makes more probable than the other: the rejected one where the
        target is negative. Its log-likelihood is a mean over its tokens, times the probability that it is safe: an
        unsafe answer is never imitated.

        Source:
            RPO (Pang et al., arXiv 2404.19733), equation 2, for the safe answers.
        """
        losses = self(pairs)
        if self.sft_weight == 0:
            return losses
        prefers_chosen = self.direction(pairs) >= 0
        logps = torch.where(prefers_chosen, pairs.chosen_logps, pairs.rejected_logps)
        lengths = torch.where(prefers_chosen, pairs.require("chosen_lengths"), pairs.require("rejected_lengths"))
        safe = torch.where(prefers_chosen, pairs.chosen_safe, pairs.rejected_safe)
        return losses - self.sft_weight * safe * logps / lengths

    def target(self, pairs: PairLogps) -> Tensor | None:
        """Return the margin that minimizes each pair's loss, nats, (B,); None if there is none."""
        return None

    def direction(self, pairs: PairLogps) -> Tensor:
        """Return the sign of the margin that the loss favors, in {-1, 0, 1}, (B,)."""
        target = self.target(pairs)
        return torch.ones_like(pairs.margin) if target is None else target.sign()

    def keeps(self, labels: SafetyLabels) -> bool:
        """Return whether pairs with these labels are trained on; other pairs are dropped and counted."""
        return True


def check_range(loss: PairLoss, name: str, in_range: bool, allowed: str) -> None:
    """Check a hyperparameter.

    Args:
        loss: The loss.
        name: Name of the hyperparameter.
        in_range: Whether its value is in its range.
        allowed: The range, in words.

    Raises:
        RecipeError: If it isn't, or isn't a finite number of at most 1e9.
    """
    value = getattr(loss, name)
    if not (math.isfinite(value) and abs(value) <= 1e9 and in_range):
        raise RecipeError(f"{type(loss).__name__}.{name} is {value}; expected {allowed}")


@dataclass(frozen=True)
class BFPO(PairLoss):
    """Bi-factorial preference optimization: `(h - label / beta)²`, label = b3·(b1·s_c - s_r + b2) - alpha.

    Args:
        beta: The paper's tau; above 0. At 0.01 targets are ±50 and ±100 nats.
        b1: Weight of the chosen answer's safety; above 1. b3 = 1/(b1-1).
        b2: Constant in the bracket of the labeling function.
        alpha: Shift of all labels; 0.5 makes them antisymmetric in safety.
        table: The four labels, instead of b1, b2 and alpha; a recipe can also name one of
            `bfpo.losses.labeling.TABLES`.
        safety_weight: λ, at least 0: λ·(s_c - s_r) is added to every label. It is the multiplier of a constraint on
            P(unsafe), and multiplies the optimal policy by exp(λ·safe / beta).
        graded: Whether the label of two versions of one answer is multiplied by the difference of their degrees.
        label_errors: Errors of the judge that labeled the pairs; None for labels without errors. The labels of pairs
            with `judged` are corrected, so that on average the gradient is that of the true labels.

    Raises:
        RecipeError: If a number is out of its range, or both the table and b1, b2 or alpha are set.

    Source:
        Paper, supervised loss; official `src/alignment/trainer/bfpo.py` @a1febab (which has b2 = 0).

    Examples:
        >>> import torch
        >>> logps, safe, unsafe = torch.zeros(1), torch.ones(1), torch.zeros(1)
        >>> BFPO(beta=0.1)(PairLogps(logps, logps, logps, logps, chosen_safe=safe, rejected_safe=unsafe))
        tensor([100.])
    """

    beta: float = 0.01
    b1: float = 3.0
    b2: float = 0.0
    alpha: float = 0.5
    table: LabelingFunction | None = None
    safety_weight: float = 0.0
    label_errors: LabelErrors | None = None
    graded: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._add_needs(judged=self.label_errors is not None, degree_difference=self.graded)
        check_range(self, "safety_weight", self.safety_weight >= 0, "a number from 0 to 1e9")
        if self.table is not None and (self.b1, self.b2, self.alpha) != (3.0, 0.0, 0.5):
            raise RecipeError("loss: 'table' replaces b1, b2 and alpha; give either the table or these")
        self.labeling  # noqa: B018 - an invalid b1 is refused here, not at the first step

    @property
    def labeling(self) -> LabelingFunction:
        """The labeling function in use, with the safety weight."""
        table = self.table or LabelingFunction.from_parameters(self.b1, self.b2, self.alpha)
        return table.with_safety_weight(self.safety_weight)

    def target(self, pairs: PairLogps) -> Tensor:
        """Return label / beta, with the corrected label for pairs that a judge labeled."""
        label: Tensor = self.labeling(pairs.chosen_safe, pairs.rejected_safe)
        if self.label_errors is not None:
            corrected = self.labeling.corrected(self.label_errors)(pairs.chosen_safe, pairs.rejected_safe)
            label = torch.where(pairs.require("judged") > 0, corrected, label)
        if self.graded:
            label = label * pairs.require("degree_difference").nan_to_num(nan=1.0)
        return label / self.beta

    def __call__(self, pairs: PairLogps) -> Tensor:
        """Return `(h - label / beta)²`."""
        return (pairs.margin - self.target(pairs)) ** 2


@dataclass(frozen=True)
class BFPOSoft(PairLoss):
    """BFPO on known win rates: `(h - (g(chosen) - g(rejected))/beta)²`; an extension of the paper.

    g = (p_safe + E_s - 2·alpha)·(p_help + 1/(b1-1)) is the reward of the paper's RL objective. The margin is
    regressed onto its difference, so the minimizer is the optimum of that objective without the assumption that
    safety and helpfulness are uncorrelated (docs/method.md).

    Args:
        beta: As in BFPO.
        b1: Constant of the helpfulness offset A2 = 1/(b1-1); above 1.
        alpha: Constant of the safety offset A1 = E_s - 2·alpha; 0 is the paper's objective.
    """

    beta: float = 0.01
    b1: float = 3.0
    alpha: float = 0.0
    needs = ("chosen_win_rate", "rejected_win_rate")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "b1", self.b1 > 1, "a finite number above 1")
        check_range(self, "alpha", True, "a finite number")

    def target(self, pairs: PairLogps) -> Tensor:
        """Return (g(chosen) - g(rejected))/beta."""
        a1, a2 = pairs.require("expected_safety") - 2 * self.alpha, 1 / (self.b1 - 1)
        chosen = (pairs.chosen_safe + a1) * (pairs.require("chosen_win_rate") + a2)
        rejected = (pairs.rejected_safe + a1) * (pairs.require("rejected_win_rate") + a2)
        return (chosen - rejected) / self.beta

    def __call__(self, pairs: PairLogps) -> Tensor:
        """Return the squared distance from the target."""
        return (pairs.margin - self.target(pairs)) ** 2


@dataclass(frozen=True)
class Additive(PairLoss):
    """Squared loss with an additive label: `(h - (1/2 + weight·(s_c - s_r))/beta)²`.

    This is the control for the bilinear label: at weight 1 the labels are 1/2, 3/2, -1/2, 1/2, so three cells differ
    from BFPO.

    Args:
        beta: As in BFPO.
        weight: Weight of a difference in safety relative to one in helpfulness; finite.
    """

    beta: float = 0.01
    weight: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "weight", True, "a finite number")

    def target(self, pairs: PairLogps) -> Tensor:
        """Return (1/2 + weight·(s_c - s_r))/beta."""
        return (0.5 + self.weight * (pairs.chosen_safe - pairs.rejected_safe)) / self.beta

    def __call__(self, pairs: PairLogps) -> Tensor:
        """Return the squared distance from the target."""
        return (pairs.margin - self.target(pairs)) ** 2


def bfpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    is_chosen_safe: Tensor,
    is_rejected_safe: Tensor,
    *,
    beta: float = 0.01,
    b1: float = 3.0,
    alpha: float = 0.5,
    safety_weight: float = 0.0,
) -> Tensor:
    """Return the BFPO loss of each pair, unreduced, (B,).

    Args:
        chosen_logps: Policy log-probability of the chosen completion, token sum, nats, (B,).
        rejected_logps: Same for the rejected completion.
        ref_chosen_logps: Reference log-probability of the chosen completion.
        ref_rejected_logps: Reference log-probability of the rejected completion.
        is_chosen_safe: Safety of the chosen answer: bool, 0 or 1, or a probability, (B,).
        is_rejected_safe: Same for the rejected answer.
        beta: The paper's tau; above 0.
        b1: Weight of the chosen answer's safety; above 1.
        alpha: Shift of all labels.
        safety_weight: Weight of s_chosen - s_rejected that is added to every label; at least 0.

    Returns:
        `(h - (b3·(b1·s_chosen - s_rejected) - alpha + safety_weight·(s_chosen - s_rejected))/beta)²` with
        b3 = 1/(b1-1).

    Examples:
        >>> import torch
        >>> zero = torch.zeros(2)
        >>> bfpo_loss(zero, zero, zero, zero, torch.tensor([1.0, 1.0]), torch.tensor([0.0, 1.0]), beta=0.1)
        tensor([100.,  25.])
    """
    safe = is_chosen_safe.to(chosen_logps), is_rejected_safe.to(chosen_logps)
    pairs = PairLogps(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, *safe)
    return BFPO(beta=beta, b1=b1, alpha=alpha, safety_weight=safety_weight)(pairs)
