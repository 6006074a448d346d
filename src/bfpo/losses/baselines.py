"""Losses of other papers, in the form of `bfpo.losses.pairwise`."""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from bfpo.core.pairs import SafetyLabels
from bfpo.errors import RecipeError
from bfpo.losses.inputs import PairLogps
from bfpo.losses.pairwise import PairLoss, check_range


@dataclass(frozen=True)
class IPO(PairLoss):
    """Identity preference optimization on token sums: `(h - 1/(2·beta))²`; ignores safety.

    Args:
        beta: Strength of the pull towards the reference; above 0.
        graded: As in BFPO.

    Source:
        Azar et al., arXiv 2310.12036, eq. 17; the summed form is that of TRL 0.7.7 and of the official BFPO code.
    """

    beta: float = 0.01
    graded: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._add_needs(degree_difference=self.graded)

    def target(self, pairs: PairLogps) -> Tensor:
        """Return 1/(2·beta), for two versions of one answer times the difference of their degrees."""
        target = torch.full_like(pairs.margin, 1 / (2 * self.beta))
        return target * pairs.require("degree_difference").nan_to_num(nan=1.0) if self.graded else target

    def __call__(self, pairs: PairLogps) -> Tensor:
        """Return `(h - 1/(2·beta))²`."""
        return (pairs.margin - self.target(pairs)) ** 2


@dataclass(frozen=True)
class IPOAvg(PairLoss):
    """Identity preference optimization on per-token means: `(h_avg - 1/(2·beta))²`; ignores safety.

    h_avg divides each answer's log-ratio by its length, so beta is not comparable with that of `ipo`.

    Source:
        TRL 1.16 `trainer/dpo_trainer.py`, loss type `ipo`.
    """

    def __call__(self, pairs: PairLogps) -> Tensor:
        """Return `(h_avg - 1/(2·beta))²`."""
        chosen = (pairs.chosen_logps - pairs.ref_chosen_logps) / pairs.require("chosen_lengths")
        rejected = (pairs.rejected_logps - pairs.ref_rejected_logps) / pairs.require("rejected_lengths")
        return (chosen - rejected - 1 / (2 * self.beta)) ** 2


@dataclass(frozen=True)
class DPO(PairLoss):
    """Direct preference optimization: `-log σ(beta·h)`; ignores safety.

    Args:
        beta: Inverse temperature of the implicit reward; above 0.
        label_smoothing: Assumed share of flipped preferences, in [0, 0.5) (conservative DPO).
        graded: Whether beta·h of two versions of one answer must exceed the difference of their degrees.

    Source:
        Rafailov et al., arXiv 2305.18290, eq. 7; smoothing as in `eric-mitchell/direct-preference-optimization`
        `trainers.py` @f8b8c0f.
    """

    label_smoothing: float = 0.0
    graded: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._add_needs(degree_difference=self.graded)
        check_range(self, "label_smoothing", 0 <= self.label_smoothing < 0.5, "a number from 0 to below 0.5")

    def __call__(self, pairs: PairLogps) -> Tensor:
        """Return `-(1-ε)·log σ(z) - ε·log σ(-z)`; z is beta·h, less the difference of degrees if graded."""
        z = self.beta * pairs.margin
        if self.graded:
            z = z - pairs.require("degree_difference").nan_to_num(nan=0.0)
        return -(1 - self.label_smoothing) * logsigmoid(z) - self.label_smoothing * logsigmoid(-z)


@dataclass(frozen=True)
class SafeFirstLoss(PairLoss):
    """Base class of losses of `ρ = offset·[only one is safe] - beta·h̃`, h̃ the margin with the safe answer first.

    A pair is swapped if only its rejected answer is safe. Pairs of two unsafe answers are dropped before training,
    and their loss is NaN. Labels must be 0 or 1.
    """

    def keeps(self, labels: SafetyLabels) -> bool:
        """Drop pairs in which both answers are unsafe."""
        return labels.chosen or labels.rejected

    def direction(self, pairs: PairLogps) -> Tensor:
        """Return -1 for swapped pairs, 1 for the others."""
        swapped = (pairs.chosen_safe < 0.5) & (pairs.rejected_safe >= 0.5)
        return torch.where(swapped, -1.0, 1.0).to(pairs.margin)

    def log_ratio(self, pairs: PairLogps, offset: float) -> Tensor:
        """Return ρ, (B,): the log-odds of the policy for the wrong order, raised by the offset for mixed pairs."""
        mixed = (pairs.chosen_safe - pairs.rejected_safe).abs()
        both_unsafe = (pairs.chosen_safe < 0.5) & (pairs.rejected_safe < 0.5)
        ratio = offset * mixed - self.beta * self.direction(pairs) * pairs.margin
        return torch.where(both_unsafe, torch.nan, ratio)


@dataclass(frozen=True)
class SafeDPO(SafeFirstLoss):
    """SafeDPO: DPO on pairs reordered by safety, with an offset between safe and unsafe answers.

    Args:
        beta: As in DPO.
        delta: Offset if the preferred answer is safe and the other is not; at least 0.

    Source:
        Kim et al., arXiv 2505.20065 (their flag is 1 = unsafe; ours is 1 = safe).
    """

    delta: float = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "delta", self.delta >= 0, "a finite number of at least 0")

    def __call__(self, pairs: PairLogps) -> Tensor:
        """Return `-log σ(beta·h̃ - delta·[only one is safe])` with h̃ the margin of the reordered pair."""
        return -logsigmoid(-self.log_ratio(pairs, self.delta))


@dataclass(frozen=True)
class BSO(SafeFirstLoss):
    """Bregman safety optimization: a Bregman divergence between the density ratios of policy and data.

    With R = exp(ρ), a convex generator f gives the loss f'(R)·R - f(R) - f'(1/R). Here f is the scaled Basu generator
    (R^(1+power) - R) / (scale·power·(1+power)). Its loss at power 0 is that of KLIEP, at 1 that of LSIF, and at -1/2
    the exponential one, up to scale and a constant. The logistic generator gives SafeDPO with delta = penalty.

    Args:
        beta: As in DPO.
        penalty: C, the offset if only one answer is safe; at least 0.
        power: λ of the generator; above -1.
        scale: s of the generator; above 0.
        limit: Largest |ρ|, above 0; a pair beyond it has no gradient.

    Source:
        Nguyen et al., arXiv 2605.12339, eq. 12, 14 and 23, as other code cites them (docs/method.md).
    """

    penalty: float = 30.0
    power: float = 0.2
    scale: float = 4.0
    limit: float = 40.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "penalty", self.penalty >= 0, "a finite number of at least 0")
        check_range(self, "power", self.power > -1, "a finite number above -1")
        check_range(self, "scale", self.scale >= 1e-9, "a number above 0, from 1e-9 to 1e9")
        check_range(self, "limit", self.limit >= 1e-9, "a number above 0, from 1e-9 to 1e9")

    def __call__(self, pairs: PairLogps) -> Tensor:
        """Return `(R^(1+power)/(1+power) - R^(-power)/power) / scale`, less its value at R = 1."""
        ratio = self.log_ratio(pairs, self.penalty).clamp(-self.limit, self.limit)
        rising = torch.expm1((1 + self.power) * ratio) / (1 + self.power)
        # The limit of -expm1(-power·ratio) / power.
        falling = ratio if abs(self.power) < 1e-9 else -torch.expm1(-self.power * ratio) / self.power
        return (rising + falling) / self.scale


@dataclass(frozen=True)
class CatDPO(PairLoss):
    """Cat-DPO: `-log σ(beta·h - λ)`, λ a margin of the pair's harm category that training adapts.

    The margins start at 0. After each step, that of a category k of the step's pairs becomes max(0, λ_k + rate·(V -
    tolerance)), with V the mean `violation` of these pairs: it grows while the category lags behind, and is the
    multiplier of the constraint V ≤ tolerance. A pair of several categories has the mean of their margins, and one
    without a category has none.

    Args:
        beta: As in DPO.
        rate: η, step size of the margins; at least 0.
        tolerance: ε, allowed mean violation of a category, from 0 to below 1.

    Source:
        Yang et al., arXiv 2604.17299; loss and update as in the README of RaymondY/Cat-DPO. The defaults of rate and
        tolerance, the mean over a step and the treatment of several categories are ours.
    """

    rate: float = 0.05
    tolerance: float = 0.1
    needs = ("categories",)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "rate", self.rate >= 0, "a finite number of at least 0")
        check_range(self, "tolerance", 0 <= self.tolerance < 1, "a number from 0 to below 1")

    def __call__(self, pairs: PairLogps) -> Tensor:
        """Return `-log σ(beta·h - λ)`."""
        return -logsigmoid(self.beta * pairs.margin - pairs.require("category_margin"))

    def violation(self, pairs: PairLogps) -> Tensor:
        """Return `1 - σ(beta·h)`, the policy's probability of the wrong order, (B,)."""
        return torch.sigmoid(-self.beta * pairs.margin)


@dataclass(frozen=True)
class MODPO(PairLoss):
    """Multi-objective DPO: `-log σ((beta·h - (1-weight)·m)/weight)`, m the other objective's reward margin.

    Args:
        beta: As in DPO.
        weight: Weight of the order of the pair (helpfulness), in (0, 1]; the weight of the other reward is 1 -
            weight.

    Source:
        Zhou et al., arXiv 2310.03708; official `src/trainer/modpo_trainer.py`.
    """

    weight: float = 0.5
    needs = ("reward_margin",)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "weight", 0 < self.weight <= 1, "a number above 0, at most 1")

    def __call__(self, pairs: PairLogps) -> Tensor:
        """Return `-log σ((beta·h - (1-weight)·m)/weight)`."""
        other = (1 - self.weight) * pairs.require("reward_margin")
        return -logsigmoid((self.beta * pairs.margin - other) / self.weight)


@dataclass(frozen=True)
class SoftLabels(PairLoss):
    """A loss on preferences that follow from scores, without drawing them.

    With m the difference of the scores of chosen and rejected, a loss without targets is averaged over both orders of
    the pair, weighted by σ(m) and σ(-m): the expectation over labels that are drawn from the Bradley-Terry model. A
    squared loss regresses the margin onto m/beta. For DPO and all squared losses on token sums, the tabular minimizer
    is π_ref·exp(score / beta), the optimum of the constrained problem that the scores come from.

    Args:
        beta: Beta of the loss.
        loss: The loss.

    Source:
        Bradley-Terry labels of reward + λ·safety: Huang et al., One-Shot Safety Alignment (MoCAN), arXiv 2405.19544.
    """

    loss: PairLoss = field(default_factory=DPO)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beta != self.loss.beta:
            raise RecipeError(f"SoftLabels.beta is {self.beta}; expected that of its loss, {self.loss.beta}")
        if isinstance(self.loss, CatDPO):
            raise RecipeError("soft labels have no order for CatDPO's violations; use another `draw`")
        object.__setattr__(self, "needs", ("score_margin", *self.loss.needs))
        object.__setattr__(self, "tail", self.loss.tail)
        object.__setattr__(self, "divergence_share", self.loss.divergence_share)

    def keeps(self, labels: SafetyLabels) -> bool:
        """Keep the pairs that the loss keeps."""
        return self.loss.keeps(labels)

    def target(self, pairs: PairLogps) -> Tensor | None:
        """Return m/beta for a squared loss."""
        if self.loss.target(pairs) is None:
            return None
        return pairs.require("score_margin") / self.beta

    def direction(self, pairs: PairLogps) -> Tensor:
        """Return the sign of m."""
        return pairs.require("score_margin").sign()

    def __call__(self, pairs: PairLogps) -> Tensor:
        """Return `(h - m/beta)²`, or σ(m)·loss of the pair + σ(-m)·loss of the swapped pair."""
        target = self.target(pairs)
        if target is not None:
            return (pairs.margin - target) ** 2
        p_chosen = torch.sigmoid(pairs.require("score_margin"))
        return p_chosen * self.loss(pairs) + (1 - p_chosen) * self.loss(pairs.swapped())
