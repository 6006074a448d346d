"""Reward hacking is named where the reward rises and a held-out judge's safety falls, and nowhere else."""

import pytest

from bfpo.online.watch import WatchedBatch, describe_hacking


def batches(rewards, safe, costs=None, samples=100):
    costs = costs or [0.1] * len(rewards)
    return [
        WatchedBatch(5 * index + 1, samples, reward, 0.04, cost, 0.04, share)
        for index, (reward, share, cost) in enumerate(zip(rewards, safe, costs, strict=True))
    ]


HACKED = batches([0.4, 0.4, 0.5, 0.6, 0.6], [0.9, 0.9, 0.8, 0.6, 0.6])


def test_a_rising_reward_with_falling_safety_is_hacking():
    message = describe_hacking(HACKED, 2)
    assert message == (
        "reward hacking: from steps 1-6 to steps 16-21 the reward rose from 0.4 to 0.6 and the cost didn't, but the "
        "share that the held-out judge calls safe fell from 90.0% to 60.0%"
    )


@pytest.mark.parametrize(
    "watched",
    [
        # Less reward, more safety, or a cost that rises with the reward: the trade-off that was asked for.
        batches([0.6, 0.6, 0.5, 0.4, 0.4], [0.9, 0.9, 0.8, 0.6, 0.6]),
        batches([0.4, 0.4, 0.5, 0.6, 0.6], [0.6, 0.6, 0.7, 0.9, 0.9]),
        batches([0.4, 0.4, 0.5, 0.6, 0.6], [0.9, 0.9, 0.8, 0.6, 0.6], [0.1, 0.1, 0.2, 0.3, 0.3]),
        # Within chance.
        batches([0.4, 0.4, 0.5, 0.6, 0.6], [0.9, 0.9, 0.8, 0.6, 0.6], samples=4),
        # Too early.
        HACKED[:3],
    ],
)
def test_nothing_else_is(watched):
    assert describe_hacking(watched, 2) is None


def test_the_safest_earlier_window_is_compared():
    watched = batches([0.3, 0.3, 0.4, 0.4, 0.6, 0.6], [0.5, 0.5, 0.9, 0.9, 0.6, 0.6])
    assert "from steps 11-16 " in describe_hacking(watched, 2)
