"""The noise of sampling: uniform, independent across seeds, positions and tokens; samples follow the softmax."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import chi2, kstest

from bfpo.core.samples import Sampling
from bfpo.generation.noise import TokenNoise
from bfpo.generation.sampler import Sampler, keep_nucleus

CPU = torch.device("cpu")
# Seeds as the engine makes them are 63-bit hashes; small ones and neighbors must be as good.
SEEDS = (0, 1, 2, 3, 1 << 40, (1 << 63) - 1)


def gumbel(vocab_size, seeds, positions):
    scores = torch.zeros(len(seeds), vocab_size, dtype=torch.float64)
    return TokenNoise(vocab_size, CPU).add(scores, seeds, positions)


def uniform(noise):
    """Return the uniform numbers that Gumbel noise was made of."""
    return torch.exp(-torch.exp(-noise)).numpy()


def uniformity(values, bins=64):
    """Return the p-value of a chi-square test that values in (0, 1) are uniform."""
    counts, _ = np.histogram(values, bins=bins, range=(0, 1))
    expected = values.size / bins
    return chi2.sf(((counts - expected) ** 2 / expected).sum(), bins - 1)


def joint_uniformity(first, second, bins=16):
    """Return the p-value of a chi-square test that pairs are uniform on the unit square."""
    counts, _, _ = np.histogram2d(first.ravel(), second.ravel(), bins=bins, range=((0, 1), (0, 1)))
    expected = first.size / bins**2
    return chi2.sf(((counts - expected) ** 2 / expected).sum(), bins**2 - 1)


# Seeds are fixed, so a test always gives the same result; of 1,000 right generators one would fail at 0.001.


@pytest.mark.parametrize("seed", SEEDS)
def test_the_noise_of_a_row_is_gumbel_distributed(seed):
    noise = gumbel(50_000, [seed], [7])[0]
    assert kstest(noise.numpy(), "gumbel_r").pvalue > 0.001
    assert uniformity(uniform(noise)) > 0.001


def test_the_noise_of_one_token_is_uniform_over_positions_and_over_seeds():
    count = 20_000
    over_positions = uniform(gumbel(3, [5] * count, range(count)))
    over_seeds = uniform(gumbel(3, range(count), [0] * count))
    for values in (*over_positions.T, *over_seeds.T):
        assert uniformity(values) > 0.001
        assert kstest(values, "uniform").pvalue > 0.001


def test_neighbors_are_independent():
    positions, seeds = range(200), [11] * 200
    noise = uniform(gumbel(500, seeds, positions))
    other_seed = uniform(gumbel(500, [12] * 200, positions))
    pairs = {
        "tokens": (noise[:, :-1], noise[:, 1:]),
        "tokens apart": (noise[:, :-256], noise[:, 256:]),
        "positions": (noise[:-1], noise[1:]),
        "seeds": (noise, other_seed),
        "seed and position": (noise[1:], other_seed[:-1]),
        "token and position": (noise[1:, :-1], noise[:-1, 1:]),
    }
    for name, (first, second) in pairs.items():
        assert joint_uniformity(first, second) > 0.001, name
        # Four standard errors.
        assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 4 / math.sqrt(first.size), name


def test_no_two_rows_have_the_same_noise():
    seeds, positions = zip(*((seed, position) for seed in range(60) for position in range(60)), strict=True)
    noise = gumbel(8, seeds, positions)
    assert len({tuple(row) for row in noise.tolist()}) == 3600


def test_the_noise_is_finite_at_the_ends_of_the_hash():
    ends = torch.tensor([[0, 1, -1, -(1 << 31), (1 << 31) - 1, 1 << 30]], dtype=torch.int32)
    noise = TokenNoise(6, CPU)
    # A hash is what its last step is given; here the steps before leave some numbers of both ends.
    noise._tokens = ends[0]
    assert torch.isfinite(
        noise._log_exponentials(torch.zeros(1, 1, dtype=torch.int32), torch.ones_like(ends[:, :1]))
    ).all()
    every = gumbel(1 << 20, [3], [0])
    assert torch.isfinite(every).all()
    assert every.max() > 10


def test_the_noise_is_that_of_the_definition():
    """The same numbers as an independent program in arbitrary precision, so a change of the noise can't go unseen."""
    mask32, mask64 = (1 << 32) - 1, (1 << 64) - 1

    def mix(value):
        value = (value ^ (value >> 16)) * 0x7FEB352D & mask32
        value = (value ^ (value >> 15)) * 0x846CA68B & mask32
        return value ^ (value >> 16)

    def key(seed, position):
        value = (seed + (position + 1) * 0x9E3779B97F4A7C15) & mask64
        value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & mask64
        value = (value ^ (value >> 27)) * 0x94D049BB133111EB & mask64
        return value ^ (value >> 31)

    def reference(seed, position, token):
        state = key(seed, position)
        value = (mix(token) ^ (state & mask32)) * ((state >> 32) | 1) & mask32
        value = (value ^ (value >> 16)) * 0x846CA68B & mask32
        value ^= value >> 16
        signed = value - (1 << 32) if value >> 31 else value
        u = abs(signed) * (1 - 2**-24) * 2**-31 + 2**-32
        return -math.log(-math.log1p(-u))

    seeds, positions = [0, 1, 12345678901234567, (1 << 63) - 1], [0, 1, 500, 100_000]
    noise = gumbel(1000, seeds, positions)
    expected = [
        [reference(seed, position, token) for token in range(1000)]
        for seed, position in zip(seeds, positions, strict=True)
    ]
    # float32 rounding of numbers up to about 10.
    np.testing.assert_allclose(noise.numpy(), expected, rtol=1e-5, atol=2e-5)


def test_the_noise_does_not_depend_on_the_batch(monkeypatch):
    seeds, positions = list(range(40)), [index % 7 for index in range(40)]
    together = gumbel(300, seeds, positions)
    monkeypatch.setattr("bfpo.generation.noise._CHUNK", 1000)
    assert torch.equal(gumbel(300, seeds, positions), together)
    for row, (seed, position) in enumerate(zip(seeds, positions, strict=True)):
        assert torch.equal(gumbel(300, [seed], [position])[0], together[row])
    # The noise of a token is the same in a larger vocabulary.
    assert torch.equal(gumbel(500, seeds, positions)[:, :300], together)


PROBABILITIES = torch.tensor([0.42, 0.25, 0.15, 0.1, 0.05, 0.02, 0.01], dtype=torch.float64)


def frequencies(sampling, count=60_000):
    sampler, logits = Sampler(sampling), PROBABILITIES.log().repeat(count, 1)
    tokens = sampler.choose(logits, [17] * count, range(count))
    return np.bincount(tokens, minlength=len(PROBABILITIES)) / count


def goodness(observed, expected, count=60_000):
    kept = expected > 0
    assert not observed[~kept].any()
    statistic = count * ((observed - expected)[kept] ** 2 / expected[kept]).sum()
    return chi2.sf(statistic, kept.sum() - 1) if kept.sum() > 1 else 1.0


@pytest.mark.parametrize("temperature", [0.3, 0.7, 1.0, 2.0])
def test_samples_follow_the_softmax_at_a_temperature(temperature):
    expected = (PROBABILITIES.log() / temperature).softmax(-1).numpy()
    assert goodness(frequencies(Sampling(temperature=temperature)), expected) > 0.001


@pytest.mark.parametrize(("top_p", "kept"), [(0.3, 1), (0.41, 1), (0.43, 2), (0.8, 3), (0.95, 5), (0.999, 7)])
def test_samples_follow_the_softmax_within_the_nucleus(top_p, kept):
    expected = PROBABILITIES.numpy().copy()
    expected[kept:] = 0
    assert goodness(frequencies(Sampling(temperature=1.0, top_p=top_p)), expected / expected.sum()) > 0.001


def test_the_nucleus_is_the_smallest_set_with_the_mass(monkeypatch):
    monkeypatch.setattr("bfpo.generation.sampler._FIRST_TOKENS", 16)
    generator = torch.Generator().manual_seed(0)
    # Flat rows need more tokens than are looked at first.
    scores = torch.randn(30, 400, generator=generator, dtype=torch.float64) * torch.linspace(0, 6, 30)[:, None]
    for top_p in (0.1, 0.5, 0.9, 0.999):
        kept = keep_nucleus(scores, top_p)
        for row, nucleus in zip(scores.softmax(-1), torch.isfinite(kept), strict=True):
            mass, smallest = row[nucleus].sum(), row[nucleus].min()
            assert mass >= top_p - 1e-12
            assert mass - smallest < top_p + 1e-12
            if (~nucleus).any():
                assert row[~nucleus].max() <= smallest
        assert torch.equal(kept[torch.isfinite(kept)], scores[torch.isfinite(kept)])


def test_temperature_zero_takes_the_likeliest_token_whatever_the_seed():
    sampler, logits = Sampler(Sampling(temperature=0.0)), torch.tensor([[0.0, 2.0, 1.0]] * 50)
    assert sampler.choose(logits, range(50), range(50)) == [1] * 50
