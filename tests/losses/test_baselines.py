"""Losses of other papers: golden numbers by hand, closed forms, special cases. Parity with code is in tests/parity.

Gradients and permutations of all losses are in test_pairwise.py.
"""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bfpo.core.pairs import SafetyLabels
from bfpo.errors import DataError, RecipeError
from bfpo.losses.baselines import BSO, DPO, IPO, MODPO, CatDPO, IPOAvg, SafeDPO, SoftLabels
from bfpo.losses.inputs import PairLogps
from bfpo.losses.pairwise import BFPO, Additive

from .test_pairwise import CELL_BITS, batch


def test_dpo_at_step_zero_is_log_two_with_and_without_smoothing():
    pairs = batch([0, 0], [(1, 1), (0, 0)])
    assert DPO()(pairs).tolist() == pytest.approx([math.log(2)] * 2)
    assert DPO(label_smoothing=0.3)(pairs).tolist() == pytest.approx([math.log(2)] * 2)


def test_dpo_smoothing_by_hand():
    # beta 0.5, h = 2: z = 1. 0.9·softplus(-1) + 0.1·softplus(1)
    expected = 0.9 * math.log1p(math.exp(-1)) + 0.1 * math.log1p(math.exp(1))
    assert DPO(beta=0.5, label_smoothing=0.1)(batch([2.0], [(1, 1)])).item() == pytest.approx(expected)


def test_ipo_avg_divides_each_answer_by_its_own_length():
    # h = 6 is spread 3 / -3 over the answers: 3/3 - (-3)/2 = 2.5; target 1/(2·0.1) = 5; loss 6.25
    pairs = batch([6.0], [(1, 1)], chosen_lengths=[3], rejected_lengths=[2])
    assert IPOAvg(beta=0.1)(pairs).item() == pytest.approx(6.25)


def test_safe_dpo_swaps_pairs_whose_rejected_answer_alone_is_safe():
    loss = SafeDPO(beta=0.1, delta=0)
    assert loss(batch([4.0], [(0, 1)])).item() == pytest.approx(DPO(beta=0.1)(batch([-4.0], [(1, 1)])).item())
    assert loss(batch([4.0], [(1, 0)])).item() == pytest.approx(DPO(beta=0.1)(batch([4.0], [(1, 1)])).item())


def test_safe_dpo_adds_its_offset_to_mixed_pairs_only():
    # -log σ(0.1·4 - 10) for the mixed pair
    mixed, safe = SafeDPO(beta=0.1, delta=10)(batch([4.0, 4.0], [(1, 0), (1, 1)])).tolist()
    assert mixed == pytest.approx(math.log1p(math.exp(9.6)))
    assert safe == pytest.approx(math.log1p(math.exp(-0.4)))


def test_safe_dpo_does_not_train_on_both_unsafe_pairs():
    loss = SafeDPO()
    assert [
        loss.keeps(SafetyLabels(c, r)) for c, r in [(True, True), (True, False), (False, True), (False, False)]
    ] == [
        True,
        True,
        True,
        False,
    ]
    assert torch.isnan(loss(batch([1.0], [(0, 0)]))).all()


def test_modpo_by_hand():
    # beta 0.1, weight 0.5: (0.1·4 - 0.5·1)/0.5 = -0.2
    pairs = batch([4.0], [(1, 1)], reward_margin=[1.0])
    assert MODPO(beta=0.1, weight=0.5)(pairs).item() == pytest.approx(math.log1p(math.exp(0.2)))


def test_modpo_with_all_weight_on_its_own_order_is_dpo():
    pairs = batch([4.0, -1.0], [(1, 1), (0, 1)], reward_margin=[1.0, 3.0])
    torch.testing.assert_close(MODPO(beta=0.1, weight=1)(pairs), DPO(beta=0.1)(pairs))


# --- Cat-DPO


def test_cat_dpo_lowers_the_margin_by_that_of_the_category():
    # -log σ(0.1·4 - 1.5), and the violation 1 - σ(0.4), which doesn't depend on the category's margin
    pairs = batch([4.0, 4.0], [(1, 0), (1, 1)], category_margin=[1.5, 0.0])
    loss = CatDPO(beta=0.1)
    assert loss(pairs).tolist() == pytest.approx([math.log1p(math.exp(1.1)), math.log1p(math.exp(-0.4))])
    assert loss.violation(pairs).tolist() == pytest.approx([1 / (1 + math.exp(0.4))] * 2)
    torch.testing.assert_close(loss(pairs)[1:], DPO(beta=0.1)(pairs)[1:])


def test_soft_labels_of_cat_dpo_are_refused():
    with pytest.raises(RecipeError, match="no order for CatDPO's violations; use another `draw`"):
        SoftLabels(0.1, CatDPO())


# --- BSO


def test_bso_is_the_divergence_of_its_generator():
    # f'(R)·R - f(R) - f'(1/R) for f = (R^(1+p) - R) / (s·p·(1+p)), and for KLIEP's generator R·log R - R + 1 over s
    pairs = batch([4.0, -7.0, 11.0, 0.0], [(1, 1)] * 4)
    r = torch.exp(-0.3 * pairs.margin)
    for power in (0.2, 1.0, -0.5, 3.0):
        scale = 4.0 * power * (1 + power)

        def f(x, power=power, scale=scale):
            return (x ** (1 + power) - x) / scale

        def slope(x, power=power, scale=scale):
            return ((1 + power) * x**power - 1) / scale

        divergence = slope(r) * r - f(r) - slope(1 / r)
        constant = slope(torch.ones(1)) - f(torch.ones(1)) - slope(torch.ones(1))
        loss = BSO(beta=0.3, power=power)(pairs)
        # Relative to a loss of 0 at R = 1.
        torch.testing.assert_close(loss, divergence - constant, rtol=1e-12, atol=1e-12)
    kliep = r.log() * r - (r * r.log() - r + 1) - (1 / r).log()
    torch.testing.assert_close(BSO(beta=0.3, power=0, scale=2)(pairs), kliep / 2, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(BSO(beta=0.3, power=1e-9)(pairs), BSO(beta=0.3, power=0)(pairs), rtol=1e-6, atol=1e-6)


def test_the_logistic_generator_gives_safe_dpo():
    # f = R·log R - (1+R)·log(1+R): f'(R)·R - f(R) - f'(1/R) = log(1+R) - log((1/R)/(1+1/R)) = 2·log(1+R)
    pairs = batch([4.0, -7.0, 11.0], [(1, 1), (1, 0), (0, 1)])
    offset = torch.tensor([0.0, 2.0, 2.0], dtype=torch.float64)
    order = torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64)
    r = torch.exp(offset - 0.3 * order * pairs.margin)
    f, slope, inverse_slope = r * r.log() - (1 + r) * (1 + r).log(), (r / (1 + r)).log(), (1 / (1 + r)).log()
    torch.testing.assert_close(SafeDPO(beta=0.3, delta=2)(pairs), (slope * r - f - inverse_slope) / 2)


def test_bso_by_hand_in_the_four_cells():
    # beta 0.1, h = 5, C = 1, power 1, scale 1: R²/2 - 1/R + 1/2. ss: log R = -0.5; su: 1 - 0.5; us: 1 + 0.5
    loss = BSO(beta=0.1, penalty=1, power=1, scale=1)(batch([5.0] * 4))
    expected = [math.exp(2 * rho) / 2 - math.exp(-rho) + 0.5 for rho in (-0.5, 0.5, 1.5)]
    assert loss[:3].tolist() == pytest.approx(expected)
    assert torch.isnan(loss[3])
    assert not BSO().keeps(SafetyLabels(False, False))
    assert BSO().direction(batch([0.0] * 4)).tolist()[:3] == [1, 1, -1]


@given(st.floats(0.02, 0.98), st.floats(-0.9, 3), st.floats(0.5, 8))
def test_every_generator_has_the_minimum_of_dpo(p_chosen, power, scale):
    # If both orders of a pair occur, with p and 1 - p, the expected loss is least at beta·h = log(p / (1 - p)).
    loss = BSO(beta=0.5, power=power, scale=scale)
    h = torch.tensor(2 * math.log(p_chosen / (1 - p_chosen)), dtype=torch.float64, requires_grad=True)
    zero, safe = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    pairs = PairLogps(h[None], zero, zero, zero, safe, safe)
    (p_chosen * loss(pairs) + (1 - p_chosen) * loss(pairs.swapped())).sum().backward()
    slope = p_chosen * (1 / p_chosen - 1) ** (1 + power) / scale
    assert abs(h.grad.item()) < 1e-9 * max(1.0, slope)


def test_bso_has_no_gradient_beyond_its_limit():
    pairs = batch([-1.0, 1.0], [(1, 0), (1, 0)])
    chosen = pairs.chosen_logps.clone().requires_grad_()
    # log R = 30 ± 0.1 with the penalty of the paper and the limit of the authors' code
    BSO(limit=30)(replace(pairs, chosen_logps=chosen)).sum().backward()
    assert chosen.grad[0] == 0
    assert chosen.grad[1] < 0
    chosen.grad = None
    BSO()(replace(pairs, chosen_logps=chosen)).sum().backward()
    assert (chosen.grad < 0).all()


# --- preferences from scores


def score_batch(margins, scores, **changes):
    return replace(batch(margins, **changes), score_margin=torch.tensor(scores, dtype=torch.float64))


def test_soft_labels_of_dpo_average_both_orders():
    pairs = score_batch([3.0, -1.0, 0.0, 2.0], [0.0, 2.0, -1.5, 40.0])
    loss = SoftLabels(0.5, DPO(beta=0.5))
    p = torch.tensor([0.5, 1 / (1 + math.exp(-2)), 1 / (1 + math.exp(1.5)), 1.0], dtype=torch.float64)
    z = 0.5 * pairs.margin
    expected = -p * torch.nn.functional.logsigmoid(z) - (1 - p) * torch.nn.functional.logsigmoid(-z)
    torch.testing.assert_close(loss(pairs), expected, rtol=1e-12, atol=1e-12)
    assert loss.target(pairs) is None
    assert loss.direction(pairs).tolist() == [0, 1, -1, 1]


def test_soft_labels_of_dpo_are_least_where_the_margin_is_the_score_over_beta():
    pairs = score_batch([0.0] * 3, [0.7, -2.0, 0.0], bits=CELL_BITS[:3])
    loss = SoftLabels(0.2, DPO(beta=0.2))
    h = (pairs.score_margin / 0.2).requires_grad_()
    loss(
        replace(pairs, chosen_logps=h + pairs.ref_chosen_logps, rejected_logps=pairs.ref_rejected_logps)
    ).sum().backward()
    assert h.grad.abs().max() < 1e-12


@pytest.mark.parametrize("inner", [IPO(beta=0.2), BFPO(beta=0.2), Additive(beta=0.2)])
def test_soft_labels_of_squared_losses_regress_onto_the_score(inner):
    pairs = score_batch([5.0, 5.0, 5.0, 5.0], [1.0, -0.4, 0.0, 2.0])
    loss = SoftLabels(0.2, inner)
    assert loss.target(pairs).tolist() == pytest.approx([5, -2, 0, 10])
    assert loss(pairs).tolist() == pytest.approx([0, 49, 25, 25])


def test_soft_labels_do_not_depend_on_the_order_of_a_pair():
    extra = {name: [1.0, 2, 3, 4] for name in ("chosen_lengths", "rejected_lengths", "reward_margin")}
    pairs = replace(score_batch([3.0, -1.0, 0.5, 2.0], [1.0, 2.0, -1.5, 0.0]),
                    **{name: torch.tensor(values) for name, values in extra.items()})  # fmt: skip
    for inner in (DPO(beta=0.3), IPO(beta=0.3), MODPO(beta=0.3), IPOAvg(beta=0.3)):
        loss = SoftLabels(0.3, inner)
        torch.testing.assert_close(loss(pairs.swapped()), loss(pairs), rtol=1e-9, atol=1e-9)
    assert torch.equal(pairs.swapped().swapped().margin, pairs.margin)
    assert torch.equal(pairs.swapped().margin, -pairs.margin)


def test_soft_labels_need_scores_and_what_their_loss_needs():
    assert SoftLabels(0.1, MODPO()).needs == ("score_margin", "reward_margin")
    assert SoftLabels(10, SafeDPO(beta=10)).keeps(SafetyLabels(False, False)) is False
    with pytest.raises(DataError, match="score_margin"):
        SoftLabels()(batch([0.0] * 4))
    with pytest.raises(RecipeError, match=r"SoftLabels.beta is 0.2; expected that of its loss, 0.1"):
        SoftLabels(0.2, DPO(beta=0.1))
