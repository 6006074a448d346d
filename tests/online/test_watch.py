"""Reward hacking is named where the reward rises and a held-out judge's safety falls, and nowhere else."""

import numpy as np
import pytest

from bfpo.online.watch import WatchedBatch, describe_hacking, watched_batch


def batches(rewards, safe, costs=None, prompts=100):
    costs = costs or [0.1] * len(rewards)
    return [
        WatchedBatch(5 * index + 1, prompts, reward, 0.04, cost, 0.04, share, share * (1 - share))
        for index, (reward, share, cost) in enumerate(zip(rewards, safe, costs, strict=True))
    ]


HACKED = batches([0.4, 0.4, 0.5, 0.5, 0.6, 0.6], [0.9, 0.9, 0.8, 0.8, 0.6, 0.6])


def test_a_rising_reward_with_falling_safety_is_hacking():
    message = describe_hacking(HACKED, 2, 6)
    assert message == (
        "reward hacking: from steps 1-6 to steps 21-26 the reward rose from 0.4 to 0.6 and the cost didn't, but the "
        "share that the held-out judge calls safe fell from 90.0% to 60.0%"
    )


@pytest.mark.parametrize(
    "watched",
    [
        # Less reward, more safety, or a cost that rises with the reward: the trade-off that was asked for.
        batches([0.6, 0.6, 0.4, 0.4], [0.9, 0.9, 0.6, 0.6]),
        batches([0.4, 0.4, 0.6, 0.6], [0.6, 0.6, 0.9, 0.9]),
        batches([0.4, 0.4, 0.6, 0.6], [0.9, 0.9, 0.6, 0.6], [0.1, 0.1, 0.3, 0.3]),
        # Within chance.
        batches([0.4, 0.4, 0.6, 0.6], [0.9, 0.9, 0.6, 0.6], prompts=4),
        # Too early, and within a window.
        HACKED[:2],
        HACKED[:5],
    ],
)
def test_nothing_else_is(watched):
    assert describe_hacking(watched, 2, 6) is None


def test_the_safest_earlier_window_is_compared():
    watched = batches([0.3, 0.3, 0.4, 0.4, 0.6, 0.6], [0.5, 0.5, 0.9, 0.9, 0.6, 0.6])
    assert "from steps 11-16 " in describe_hacking(watched, 2, 6)


def simulated(rng, shares, gain):
    """Return batches of 8 prompts with 4 samples, whose reward rises and which are safe with these probabilities."""
    watched = []
    for index, share in enumerate(shares):
        # Samples of a prompt are alike.
        of_prompt = rng.beta(2 * share, 2 * (1 - share), (8, 1)) if share < 1 else np.ones((8, 1))
        reward = gain * index + rng.normal(size=(8, 4))
        watched.append(watched_batch(index + 1, reward, rng.normal(size=(8, 4)), rng.random((8, 4)) < of_prompt))
    return watched


def is_stopped(watched):
    return any(describe_hacking(watched[: count + 1], 5, len(watched)) for count in range(len(watched)))


@pytest.mark.parametrize("shares", [[0.6] * 40, [0.9] * 40, [*np.linspace(0.7, 0.97, 20), *[0.97] * 20]])
def test_runs_without_hacking_go_on(shares):
    rng = np.random.default_rng(0)
    assert sum(is_stopped(simulated(rng, shares, gain=0.1)) for _ in range(200)) <= 10


def test_runs_that_hack_are_stopped():
    rng = np.random.default_rng(1)
    shares = [*[0.9] * 10, *np.linspace(0.9, 0.3, 10), *[0.3] * 20]
    assert sum(is_stopped(simulated(rng, shares, gain=0.1)) for _ in range(50)) >= 48


def test_prompts_without_a_score_are_left_out():
    reward = np.array([[1.0, np.nan], [np.nan, np.nan], [3.0, 5.0]])
    safe = np.array([[True, False], [False, False], [True, False]])
    batch = watched_batch(7, reward, -reward, safe)
    assert batch == WatchedBatch(7, 2, 2.5, 2.25, -2.5, 2.25, 0.75, 0.0625)
