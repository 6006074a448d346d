"""Losses of score models: golden numbers, TRL's reward loss, and the rewards that they are minimal at."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from bfpo.losses.scores import cost_loss, reward_loss

LN2, LN3 = math.log(2), math.log(3)


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_golden_numbers():
    # σ(ln 3) = 3/4 and σ(-ln 3) = 1/4.
    rewards = reward_loss(tensor(LN3, 0, 1), tensor(0, LN3, 1), regularization=0.5, center_rewards_coefficient=2)
    squares = [0.5 * LN3**2 + 2 * LN3**2, 0.5 * LN3**2 + 2 * LN3**2, 0.5 * 2 + 2 * 4]
    torch.testing.assert_close(rewards, tensor(math.log(4 / 3), math.log(4), LN2) + tensor(*squares))
    costs = tensor([LN3, 0], [LN3, 0], [LN3, LN3], [LN3, LN3], [5, -7])
    signs = tensor([1, -1], [-1, 1], [1, 1], [-1, -1], [0, 0])
    expected = tensor(2 * math.log(4 / 3) + LN2, 2 * math.log(4) + LN2, 2 * math.log(4 / 3), 2 * math.log(4), 0)
    order = tensor(1, -1, 0, 0, 0)
    torch.testing.assert_close(cost_loss(costs, signs, order), expected)
    squares = 0.1 * tensor(LN3**2, LN3**2, 2 * LN3**2, 2 * LN3**2, 0)
    torch.testing.assert_close(cost_loss(costs, signs, order, regularization=0.1), expected + squares)
    # The first of two unsafe answers is the worse one: σ(ln 3 - 0).
    worse = cost_loss(tensor([LN3, 0]), tensor([1, 1]), tensor(1)) - cost_loss(
        tensor([LN3, 0]), tensor([1, 1]), tensor(0)
    )
    torch.testing.assert_close(worse, tensor(math.log(4 / 3)))


@given(
    arrays("f8", (6, 2), elements=st.floats(-30, 30)),
    arrays("f8", (6, 2), elements=st.sampled_from([-1.0, 1.0])),
    arrays("f8", 6, elements=st.sampled_from([-1.0, 0.0, 1.0])),
)
def test_costs_do_not_depend_on_the_order_of_the_answers(costs, signs, order):
    costs, signs, order = (torch.from_numpy(values) for values in (costs, signs, order))
    torch.testing.assert_close(cost_loss(costs, signs, order), cost_loss(costs.flip(-1), signs.flip(-1), -order))
    # A lower loss is one with the right signs further from 0.
    order = torch.where(signs[:, 0] == signs[:, 1], order, signs[:, 0])
    assert bool((cost_loss(costs + signs, signs, order) < cost_loss(costs, signs, order) + 1e-12).all())


def test_the_expected_reward_loss_is_minimal_at_the_rewards_of_the_preferences():
    truth = tensor(-1, 0.3, 2, 0.5)
    rewards = truth.clone().requires_grad_()
    chosen, rejected = torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")
    p_chosen = (truth[chosen] - truth[rejected]).sigmoid()
    loss = (p_chosen * reward_loss(rewards[chosen].flatten(), rewards[rejected].flatten()).view(4, 4)).sum()
    loss.backward()
    torch.testing.assert_close(rewards.grad, torch.zeros_like(truth), atol=1e-12, rtol=0)


@pytest.mark.parametrize("coefficient", [None, 0.0, 0.05])
def test_the_reward_loss_is_that_of_trl(coefficient):
    trl = pytest.importorskip("trl")
    scores = torch.randn(10, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3
    gathering = SimpleNamespace(gather=lambda value: value, gather_for_metrics=lambda value: value)
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=False),
        args=SimpleNamespace(center_rewards_coefficient=coefficient),
        accelerator=gathering,
        _total_train_tokens=0,
        _metrics={"eval": {name: [] for name in ("min_reward", "mean_reward", "max_reward", "accuracy", "margin")}},
    )
    # Only the first five rows are chosen, the others rejected: TRL's batch.
    theirs = trl.RewardTrainer.compute_loss(trainer, lambda **inputs: SimpleNamespace(logits=scores), {})
    ours = reward_loss(scores[:5, 0], scores[5:, 0], center_rewards_coefficient=coefficient or 0.0).mean()
    torch.testing.assert_close(ours, theirs, rtol=1e-14, atol=0)
