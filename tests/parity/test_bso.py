"""Parity with the authors' code of BSO, re-typed from what a public port says of its `loss/h_function.py`."""

import pytest
import torch

from bfpo.losses.baselines import BSO
from bfpo.losses.inputs import PairLogps


def official_log_r(policy_w, policy_l, ref_w, ref_l, unsafe_w, unsafe_l, beta, c):
    return beta * ((policy_l - ref_l) - (policy_w - ref_w)) - c * (unsafe_w - unsafe_l)


def official_sba(log_r, lam, s):
    # The additive constant is dropped there.
    return torch.exp((lam + 1) * log_r) / (s * (lam + 1)) - torch.exp(-lam * log_r) / (s * lam)


@pytest.mark.parametrize(("lam", "s", "c"), [(0.2, 4.0, 30.0), (0.3, 4.0, 30.0), (0.2, 4.0, 5.0), (1.5, 1.0, 10.0)])
def test_gradients_are_those_of_the_official_code(lam, s, c):
    generator = torch.Generator().manual_seed(0)
    logps = [torch.randn(64, dtype=torch.float64, generator=generator) * 20 - 200 for _ in range(4)]
    # Their pairs are ordered before, safe answers first, and those of two unsafe answers are dropped.
    unsafe_l = torch.randint(0, 2, (64,), generator=generator).double()
    gradients = []
    for loss in ("official", "ours"):
        chosen = logps[0].clone().requires_grad_()
        if loss == "official":
            log_r = official_log_r(chosen, *logps[1:], torch.zeros(64), unsafe_l, 0.1, c)
            losses = official_sba(log_r.clamp(-30, 30), lam, s)
        else:
            pairs = PairLogps(chosen, *logps[1:], torch.ones(64), 1 - unsafe_l)
            losses = BSO(beta=0.1, penalty=c, power=lam, scale=s, limit=30)(pairs)
        losses.sum().backward()
        gradients.append(chosen.grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-10, atol=1e-10)
    assert gradients[0].count_nonzero() > 20
