"""Losses that need the probabilities of all tokens, not only those of the tokens of the answers."""

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import logsigmoid

from bfpo.losses.inputs import PairLogps
from bfpo.losses.pairwise import PairLoss, check_range


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
        check_range(self, "alpha", self.alpha >= 0, "a number of at least 0")
        check_range(self, "token_tail", 0 < self.token_tail <= 1, "a share above 0, at most 1")
        object.__setattr__(self, "divergence_share", self.token_tail)

    def __call__(self, pairs: PairLogps) -> Tensor:
        """Return `-log σ(beta·(h - alpha·(D_r - sg(D_c))))`."""
        chosen, rejected = pairs.require("chosen_divergence"), pairs.require("rejected_divergence")
        return -logsigmoid(self.beta * (pairs.margin - self.alpha * (rejected - chosen.detach())))
