"""Divergences over the vocabulary: KL, its tail against a minimum over thresholds, gradients, and whole models."""

import pytest
import torch

from bfpo.losses.baselines import DPO
from bfpo.model.divergence import logps_and_divergences, tail_divergence, vocabulary_logps
from bfpo.model.layout import packed_layout, padded_layout
from bfpo.model.logps import add_layout_forward, completion_logps, completion_states
from bfpo.training.encode import encode_pairs


def distributions(seed, *shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).log_softmax(-1)


def test_a_share_of_one_is_the_kl_divergence():
    policy, reference = distributions(0, 3, 50), distributions(1, 3, 50)
    expected = torch.nn.functional.kl_div(policy, reference, reduction="none", log_target=True).sum(-1)
    torch.testing.assert_close(tail_divergence(policy, reference, share=1.0), expected)


@pytest.mark.parametrize("share", [0.02, 0.3, 0.95])
def test_a_tail_is_the_least_over_thresholds(share):
    # CVaR = min over b of b + E(X - b)+ / share, reached at one of the values (Rockafellar and Uryasev 2000).
    policy, reference = distributions(0, 3, 50), distributions(1, 3, 50)
    ratio, probability = reference - policy, reference.exp()
    excess = (ratio[:, None, :] - ratio[:, :, None]).clamp(min=0)
    expected = (ratio + (probability[:, None, :] * excess).sum(-1) / share).min(-1).values
    tail = tail_divergence(policy, reference, share=share)
    torch.testing.assert_close(tail, expected)
    assert (tail > tail_divergence(policy, reference, share=1.0)).all()


def test_by_hand_with_a_token_that_counts_in_part():
    reference, policy = torch.tensor([0.5, 0.3, 0.2]).log(), torch.tensor([0.2, 0.3, 0.5]).log()
    # The largest ratio is log 2.5, of a token with half of the probability; then log 1.
    half, most = (tail_divergence(policy, reference, share=share).item() for share in (0.5, 0.75))
    log = torch.tensor(2.5).log().item()
    assert (half, most) == (pytest.approx(log), pytest.approx(log * 0.5 / 0.75))


def test_a_token_without_probability_counts_for_nothing():
    reference = torch.tensor([0.6, 0.4, 0.0]).log()
    policy = torch.tensor([0.3, 0.3, 0.4], requires_grad=True)
    for share in (1.0, 0.5):
        (gradient,) = torch.autograd.grad(tail_divergence(policy.log(), reference, share=share), policy)
        assert torch.isfinite(gradient).all()
        assert gradient[2] == 0


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_gradients_are_those_of_finite_differences(share):
    logits, reference = distributions(0, 2, 12).requires_grad_(), distributions(1, 2, 12)
    assert torch.autograd.gradcheck(lambda x: tail_divergence(x.log_softmax(-1), reference, share=share), logits)


@pytest.fixture
def scored(make_model, tokenizer, main_pairs):
    """Policy, reference, and examples."""
    policy, reference = make_model(), make_model()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    for model in (policy, reference):
        add_layout_forward(model)
    return policy, reference, list(encode_pairs(main_pairs[:3], DPO(), tokenizer))


def score(policy, reference, layout, *, share=0.4):
    with torch.no_grad():
        states = completion_states(reference, layout)
    return logps_and_divergences(
        policy,
        layout,
        reference_states=states,
        reference_logps=lambda rows: vocabulary_logps(reference, rows),
        share=share,
    )


@pytest.mark.parametrize("layout_of", [packed_layout, padded_layout])
def test_sums_over_the_positions_are_those_of_the_models_own_logits(scored, layout_of):
    policy, reference, examples = scored
    layout, plain = layout_of(examples), padded_layout(examples)
    scores = score(policy, reference, layout)
    with torch.no_grad():
        own, theirs = (
            model(input_ids=plain.input_ids).logits.log_softmax(-1).flatten(0, 1)[plain.hidden_index]
            for model in (policy, reference)
        )
    per_position = tail_divergence(own, theirs, share=0.4).split(plain.lengths)
    expected = torch.stack([positions.double().sum() for positions in per_position])
    torch.testing.assert_close(scores[:, 1].float(), expected.float(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(scores[:, 0], completion_logps(policy, layout), rtol=0, atol=0)
    torch.testing.assert_close(scores[:, 2], completion_logps(reference, layout), rtol=0, atol=0)


def test_chunks_do_not_change_gradients(scored, monkeypatch):
    policy, reference, examples = scored
    layout, gradients = packed_layout(examples), []
    for kept in (2**25, 1):
        monkeypatch.setattr("bfpo.model.logps.MAX_KEPT_LOGITS", kept)
        monkeypatch.setattr("bfpo.model.logps.CHUNK", 7)
        policy.zero_grad()
        reference.zero_grad()
        score(policy, reference, layout).sum().backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in policy.parameters()]))
        assert all(parameter.grad is None for parameter in reference.parameters())
    whole, in_chunks = gradients
    assert (whole - in_chunks).norm() < 1e-5 * whole.norm()
