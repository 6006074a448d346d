"""Parity with the official formula, re-typed from src/alignment/trainer/bfpo.py @a1febab."""

import pytest
import torch

from bfpo.losses.inputs import PairLogps
from bfpo.losses.pairwise import BFPO


def official_bfpo(policy_w, policy_l, ref_w, ref_l, safe_w, safe_l, beta, b1, alpha):
    b3 = 1 / (b1 - 1)
    factor = b1 * b3 * safe_w - b3 * safe_l - alpha
    log_ratio_gap = (policy_w - policy_l) - (ref_w - ref_l)
    return (log_ratio_gap - factor / beta) ** 2


@pytest.mark.parametrize("beta", [0.01, 0.1, 1.0])
@pytest.mark.parametrize("b1", [2.0, 3.0, 5.0])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_loss_equals_the_official_formula(beta, b1, alpha):
    generator = torch.Generator().manual_seed(0)
    logps = [torch.randn(64, dtype=torch.float64, generator=generator) * 50 - 200 for _ in range(4)]
    safety = [torch.randint(0, 2, (64,), generator=generator).double() for _ in range(2)]
    losses = BFPO(beta=beta, b1=b1, alpha=alpha)(PairLogps(*logps, *safety))
    # 1e-12: the same float64 arithmetic in another order
    torch.testing.assert_close(losses, official_bfpo(*logps, *safety, beta, b1, alpha), rtol=1e-12, atol=1e-9)
