"""Token-level DPO: golden numbers by hand. Gradients and permutations of all losses are in test_pairwise.py."""

import math

import pytest
import torch

from bfpo.losses.baselines import DPO, SoftLabels
from bfpo.losses.token_level import TDPO

from .test_pairwise import batch


def test_token_level_dpo_by_hand():
    pairs = batch([0.5, 0.5], [(1, 1), (1, 0)], chosen_divergence=[1.0, 0.0], rejected_divergence=[3.0, 0.0])
    # z = 0.5·(0.5 - 0.25·(3 - 1)) = 0, and 0.5·0.5
    expected = [math.log(2), math.log1p(math.exp(-0.25))]
    assert TDPO(beta=0.5, alpha=0.25)(pairs).tolist() == pytest.approx(expected)
    assert torch.equal(TDPO(beta=0.5, alpha=0)(pairs), DPO(beta=0.5)(pairs))
    assert (TDPO(token_tail=0.3).divergence_share, DPO().divergence_share) == (0.3, None)
    assert SoftLabels(0.1, TDPO()).divergence_share == 1.0


def test_the_divergence_of_the_chosen_answer_has_no_gradient():
    pairs = batch([0.5], [(1, 1)], chosen_divergence=[1.0], rejected_divergence=[3.0])
    chosen, rejected = (getattr(pairs, f"{side}_divergence").requires_grad_() for side in ("chosen", "rejected"))
    TDPO(beta=0.5, alpha=0.25)(pairs).sum().backward()
    # A larger divergence of the rejected answer raises the loss: beta·alpha·σ(0) = 1/16
    assert chosen.grad is None
    assert rejected.grad.item() == pytest.approx(1 / 16)
