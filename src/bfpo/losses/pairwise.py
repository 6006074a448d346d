"""Preference losses: pure functions of log-probabilities and labels, unreduced, `(B,)` in and `(B,)` out.

A loss is a frozen dataclass whose fields are its hyperparameters and whose call is its equation. To add one, write
the class, a line in `LOSSES` and a section in `bfpo.config.losses`. A custom loss needs no change here: a recipe
names it by its import path (`loss: {name: "my_package.losses:MyLoss"}`).

Notation: h is the margin, the log-ratio of chosen and rejected under the policy minus that under the reference, in
nats (sums over tokens).
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, fields
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from bfpo.core.pairs import SafetyLabels
from bfpo.errors import DataError, RecipeError
from bfpo.losses.label_errors import LabelErrors
from bfpo.losses.labeling import LabelingFunction


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


@dataclass(frozen=True)
class PairLoss(ABC):
    """Base class of preference losses. Subclasses define the equation.

    Args:
        beta: Strength of the pull towards the reference; above 0. The target margin of a squared loss on sums over
            tokens is label / beta nats.
        tail: Share of the pairs of a step that are trained on, those with the largest losses, in (0, 1]; 1 for all.
            A call returns the loss of each pair for any share.

    Raises:
        RecipeError: If a number is out of its range: beta from 1e-9 to 1e9, beyond which targets overflow in float32.
    """

    beta: float = 0.1
    tail: float = field(default=1.0, kw_only=True)

    # Optional columns of a pair file that the loss needs.
    needs: ClassVar[tuple[str, ...]] = ()
    # Share of the reference's probability in the divergence of a position; None if the loss needs no divergences.
    divergence_share: ClassVar[float | None] = None

    def __post_init__(self) -> None:
        _check(self, "beta", 1e-9 <= self.beta <= 1e9, "a number above 0, from 1e-9 to 1e9")
        _check(self, "tail", 0 < self.tail <= 1, "a share above 0, at most 1")

    def _add_needs(self, **columns: bool) -> None:
        """Add the columns that an option needs to those of the class, by whether it is used."""
        added = (name for name, is_needed in columns.items() if is_needed)
        object.__setattr__(self, "needs", (*type(self).needs, *added))

    @abstractmethod
    def __call__(self, pairs: PairLogps) -> Tensor:
        """Return the loss of each pair, unreduced, (B,)."""

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

    Example:
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
        _check(self, "safety_weight", self.safety_weight >= 0, "a number from 0 to 1e9")
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
        _check(self, "label_smoothing", 0 <= self.label_smoothing < 0.5, "a number from 0 to below 0.5")

    def __call__(self, pairs: PairLogps) -> Tensor:
        """Return `-(1-ε)·log σ(z) - ε·log σ(-z)`; z is beta·h, less the difference of degrees if graded."""
        z = self.beta * pairs.margin
        if self.graded:
            z = z - pairs.require("degree_difference").nan_to_num(nan=0.0)
        return -(1 - self.label_smoothing) * logsigmoid(z) - self.label_smoothing * logsigmoid(-z)


@dataclass(frozen=True)
class TDPO(PairLoss):
    """Token-level DPO: `-log σ(beta·(h - alpha·(D_r - sg(D_c))))`; ignores safety.

    D is the sum over the positions of an answer of the mean of log π_ref/π under π_ref, over the tokens on which it
    is largest: their share of the probability is `token_tail`. sg stops the gradient. A share of 1 gives
    KL(π_ref ‖ π) and TDPO; below it is a risk-aware form of our own, in which D is a conditional value at risk.

    Args:
        beta: As in DPO.
        alpha: Weight of the divergences; at least 0. 0 is DPO.
        token_tail: Share of the reference's probability in the tail of a position, in (0, 1].

    Source:
        Zeng et al., arXiv 2404.11999, TDPO2; the idea of a risk measure per position is that of Ra-DPO, arXiv
        2505.20359, whose code takes quantiles of the vocabulary instead of the reference's distribution.
    """

    alpha: float = 0.5
    token_tail: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self, "alpha", self.alpha >= 0, "a number of at least 0")
        _check(self, "token_tail", 0 < self.token_tail <= 1, "a share above 0, at most 1")
        object.__setattr__(self, "divergence_share", self.token_tail)

    def __call__(self, pairs: PairLogps) -> Tensor:
        """Return `-log σ(beta·(h - alpha·(D_r - sg(D_c))))`."""
        chosen, rejected = pairs.require("chosen_divergence"), pairs.require("rejected_divergence")
        return -logsigmoid(self.beta * (pairs.margin - self.alpha * (rejected - chosen.detach())))


@dataclass(frozen=True)
class SafeDPO(PairLoss):
    """SafeDPO: DPO on pairs reordered by safety, with an offset between safe and unsafe answers.

    A pair is swapped if only its rejected answer is safe. Pairs of two unsafe answers are dropped before training,
    and their loss is NaN here. Labels must be 0 or 1.

    Args:
        beta: As in DPO.
        delta: Offset if the preferred answer is safe and the other is not; at least 0.

    Source:
        Kim et al., arXiv 2505.20065 (their flag is 1 = unsafe; ours is 1 = safe).
    """

    delta: float = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self, "delta", self.delta >= 0, "a finite number of at least 0")

    def keeps(self, labels: SafetyLabels) -> bool:
        """Drop pairs in which both answers are unsafe."""
        return labels.chosen or labels.rejected

    def direction(self, pairs: PairLogps) -> Tensor:
        """Return -1 for swapped pairs, 1 for the others."""
        swapped = (pairs.chosen_safe < 0.5) & (pairs.rejected_safe >= 0.5)
        return torch.where(swapped, -1.0, 1.0).to(pairs.margin)

    def __call__(self, pairs: PairLogps) -> Tensor:
        """Return `-log σ(beta·h̃ - delta·[only one is safe])` with h̃ the margin of the reordered pair."""
        mixed = (pairs.chosen_safe - pairs.rejected_safe).abs()
        loss = -logsigmoid(self.beta * self.direction(pairs) * pairs.margin - self.delta * mixed)
        both_unsafe = (pairs.chosen_safe < 0.5) & (pairs.rejected_safe < 0.5)
        return torch.where(both_unsafe, torch.nan, loss)


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
        _check(self, "weight", True, "a finite number")

    def target(self, pairs: PairLogps) -> Tensor:
        """Return (1/2 + weight·(s_c - s_r))/beta."""
        return (0.5 + self.weight * (pairs.chosen_safe - pairs.rejected_safe)) / self.beta

    def __call__(self, pairs: PairLogps) -> Tensor:
        """Return the squared distance from the target."""
        return (pairs.margin - self.target(pairs)) ** 2


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
        _check(self, "weight", 0 < self.weight <= 1, "a number above 0, at most 1")

    def __call__(self, pairs: PairLogps) -> Tensor:
        """Return `-log σ((beta·h - (1-weight)·m)/weight)`."""
        other = (1 - self.weight) * pairs.require("reward_margin")
        return -logsigmoid((self.beta * pairs.margin - other) / self.weight)


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
        _check(self, "b1", self.b1 > 1, "a finite number above 1")
        _check(self, "alpha", True, "a finite number")

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

    Example:
        >>> import torch
        >>> zero = torch.zeros(2)
        >>> bfpo_loss(zero, zero, zero, zero, torch.tensor([1.0, 1.0]), torch.tensor([0.0, 1.0]), beta=0.1)
        tensor([100.,  25.])
    """
    safe = is_chosen_safe.to(chosen_logps), is_rejected_safe.to(chosen_logps)
    pairs = PairLogps(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, *safe)
    return BFPO(beta=beta, b1=b1, alpha=alpha, safety_weight=safety_weight)(pairs)


def _check(loss: PairLoss, name: str, in_range: bool, allowed: str) -> None:
    value = getattr(loss, name)
    if not (math.isfinite(value) and abs(value) <= 1e9 and in_range):
        raise RecipeError(f"{type(loss).__name__}.{name} is {value}; expected {allowed}")


LOSSES: dict[str, type[PairLoss]] = {
    "bfpo": BFPO,
    "bfpo_soft": BFPOSoft,
    "ipo": IPO,
    "ipo_avg": IPOAvg,
    "dpo": DPO,
    "tdpo": TDPO,
    "safe_dpo": SafeDPO,
    "additive": Additive,
    "modpo": MODPO,
}
