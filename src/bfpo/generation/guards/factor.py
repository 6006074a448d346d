"""The guard `factor`: each next token is less probable, the more probably its answer turns out unsafe."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from bfpo.core.files import content_hash
from bfpo.generation.sampler import Peek
from bfpo.model.cost_head import CostHead


@dataclass(frozen=True, slots=True)
class FactorGuard:
    """Multiplies the probability of each candidate for the next token by 1 - p (1 - exp(-kappa)).

    p is the probability, by the head, that the answer turns out unsafe if it goes on with the candidate. Where p is
    exact under the model's own sampling, the guarded answers y have the probabilities π(y) exp(-kappa c(y)) / Z with
    c = 1 for unsafe answers and 0 for others: of all policies with their share of unsafe answers, the closest to the
    model. Proof: with k = 1 - exp(-kappa) and V(prefix) = 1 - k p(prefix) = E exp(-kappa c), a token's probability is
    π(token) V(prefix + token) / V(prefix), and the product over an answer telescopes.

    Tokens other than the candidates aren't scored, so they are left out.

    Args:
        head: Head that gives the logit of p from hidden states.
        layers: Layers of the hidden states, as in `CostHead`.
        identity: Hash of the head.
        kappa: Strength, at least 0; at 0 nothing changes.
        top_k: Number of candidates, the likeliest tokens.
    """

    head: Callable[[Tensor], Tensor]
    layers: tuple[int, ...]
    identity: str
    kappa: float
    top_k: int

    @classmethod
    def by(cls, head: CostHead, *, kappa: float, top_k: int) -> "FactorGuard":
        """Return the guard by a head."""
        return cls(head, head.layers, head.identity, kappa, top_k)

    @property
    def settings_hash(self) -> str:
        """Hash of the head and the settings."""
        return content_hash("factor", self.identity, self.layers, self.kappa, self.top_k)

    def adjust(self, scores: Tensor, peek: Peek) -> Tensor:
        """Return log-probabilities of the next token, up to a constant, with the factor of each candidate.

        Args:
            scores: Log-probabilities up to a constant, (rows, vocabulary).
            peek: Function that returns the hidden states of candidates.
        """
        if self.kappa == 0:
            return scores
        kept, candidates = scores.topk(min(self.top_k, scores.shape[-1]), dim=-1)
        unsafe = self.head(peek(candidates, self.layers))
        # log(1 - p + p exp(-kappa)), finite also where p rounds to 1.
        factor = torch.logaddexp(logsigmoid(-unsafe), logsigmoid(unsafe) - self.kappa)
        return torch.full_like(scores, -torch.inf).scatter_(-1, candidates, kept + factor.to(kept.dtype))
