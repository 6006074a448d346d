"""Golden numbers by hand, gradients against finite differences, properties. Parity is in tests/parity."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bfpo.errors import DataError, RecipeError
from bfpo.losses.baselines import DPO, IPO, MODPO, SoftLabels
from bfpo.losses.build import LOSSES, make_loss
from bfpo.losses.inputs import PairLogps
from bfpo.losses.pairwise import BFPO, Additive, BFPOSoft, bfpo_loss

CELL_BITS = [(1.0, 1.0), (1.0, 0.0), (0.0, 1.0), (0.0, 0.0)]


def batch(margins, bits=CELL_BITS, **optional) -> PairLogps:
    """Return pairs with these margins; the margin is spread over all four log-probabilities."""
    h = torch.tensor(margins, dtype=torch.float64)
    safe = torch.tensor(bits, dtype=torch.float64)
    base = torch.arange(len(h), dtype=torch.float64) - 30
    return PairLogps(
        chosen_logps=base + 0.75 * h,
        rejected_logps=base - 4 + 0.25 * h,
        ref_chosen_logps=base + 0.25 * h,
        ref_rejected_logps=base - 4 + 0.75 * h,
        chosen_safe=safe[:, 0],
        rejected_safe=safe[:, 1],
        **{name: torch.tensor(values, dtype=torch.float64) for name, values in optional.items()},
    )


def test_four_losses_at_step_zero_with_the_shipped_beta():
    # h = 0: loss = (label / beta)²; labels ±1/2, ±1 at beta 0.01 are targets of ±50 and ±100 nats
    assert BFPO()(batch([0, 0, 0, 0])).tolist() == pytest.approx([2500, 10000, 10000, 2500])


def test_a_tail_is_of_the_step_and_changes_no_pair():
    pairs = batch([0.3, -0.7, 1.1, 0.2], **OPTIONAL)
    assert torch.equal(DPO(tail=0.1)(pairs), DPO()(pairs))
    assert SoftLabels(0.5, IPO(beta=0.5, tail=0.2)).tail == 0.2
    for tail in (0, 1.1, math.nan):
        with pytest.raises(RecipeError, match=r"DPO.tail is .*; expected a share above 0, at most 1"):
            DPO(tail=tail)


def test_graded_losses_by_hand():
    pairs = batch([0.5, 0.5], [(1, 1), (1, 0)], degree_difference=[0.25, math.nan])
    # beta 0.5: the targets 1 and 2 nats; a quarter of the first
    assert BFPO(beta=0.5, graded=True)(pairs).tolist() == pytest.approx([0.25**2, 1.5**2])
    assert IPO(beta=0.5, graded=True)(pairs).tolist() == pytest.approx([0.25**2, 0.5**2])
    # z = 0.25 - 0.25 and 0.25
    assert DPO(beta=0.5, graded=True)(pairs).tolist() == pytest.approx([math.log(2), math.log1p(math.exp(-0.25))])


@pytest.mark.parametrize("loss", [BFPO(beta=0.5), IPO(beta=0.5), DPO(beta=0.5)])
def test_a_graded_loss_is_the_plain_one_to_the_bit_where_no_pair_has_degrees(loss):
    pairs = batch([0.3, -0.7, 1.1, 0.2])
    ordinary = replace(pairs, degree_difference=torch.full((4,), math.nan, dtype=torch.float64))
    assert torch.equal(replace(loss, graded=True)(ordinary), loss(pairs))
    assert (replace(loss, graded=True).needs, loss.needs) == (("degree_difference",), ())
    with pytest.raises(DataError, match="needs 'degree_difference' for every pair"):
        replace(loss, graded=True)(pairs)


def test_the_squared_graded_losses_are_the_same_on_the_swapped_pair():
    # An answer is above its version by as much as the version is below it.
    pairs = batch([0.3], [(1, 1)], degree_difference=[0.75])
    for loss in (BFPO(beta=0.5, graded=True), IPO(beta=0.5, graded=True)):
        assert torch.equal(loss(pairs), loss(pairs.swapped()))


def test_half_safe_pairs_half_mixed_pairs_average_by_hand():
    # beta 0.1: (0.5/0.1)² = 25 and (1/0.1)² = 100; mean 62.5
    assert BFPO(beta=0.1)(batch([0, 0], [(1, 1), (1, 0)])).mean().item() == pytest.approx(62.5)


def test_loss_at_a_nonzero_margin_by_hand():
    # beta 0.1, su: target 10, h = 7: 9. us: target -10, h = 7: 289
    assert BFPO(beta=0.1)(batch([7, 7], [(1, 0), (0, 1)])).tolist() == pytest.approx([9, 289])


@given(st.lists(st.floats(-300, 300), min_size=1, max_size=5), st.floats(0.005, 2))
def test_all_safe_bfpo_at_alpha_one_half_is_ipo(margins, beta):
    pairs = batch(margins, [(1, 1)] * len(margins))
    torch.testing.assert_close(BFPO(beta=beta)(pairs), IPO(beta=beta)(pairs), rtol=1e-12, atol=1e-9)


@given(st.lists(st.floats(-300, 300), min_size=1, max_size=5), st.floats(0.005, 2))
def test_all_unsafe_bfpo_is_ipo_with_the_pair_swapped(margins, beta):
    unsafe = batch(margins, [(0, 0)] * len(margins))
    swapped = PairLogps(
        unsafe.rejected_logps,
        unsafe.chosen_logps,
        unsafe.ref_rejected_logps,
        unsafe.ref_chosen_logps,
        unsafe.rejected_safe,
        unsafe.chosen_safe,
    )
    torch.testing.assert_close(BFPO(beta=beta)(unsafe), IPO(beta=beta)(swapped), rtol=1e-12, atol=1e-9)


@given(st.floats(-200, 200), st.sampled_from(CELL_BITS), st.floats(0.01, 1))
def test_bfpo_is_least_at_its_target_and_nowhere_else(h, bits, beta):
    loss = BFPO(beta=beta)
    pairs = batch([h], [bits])
    target = loss.target(pairs).item()
    assert loss(pairs).item() >= 0
    assert loss(batch([target], [bits])).item() == pytest.approx(0, abs=1e-18)
    if abs(h - target) > 1e-6:
        assert loss(pairs).item() > 0


@given(st.floats(-50, 50), st.floats(-50, 50))
def test_margin_is_invariant_to_a_shift_of_both_answers(shift, ref_shift):
    pairs = batch([1.5, -2, 0, 3])
    moved = replace(
        pairs,
        chosen_logps=pairs.chosen_logps + shift,
        rejected_logps=pairs.rejected_logps + shift,
        ref_chosen_logps=pairs.ref_chosen_logps + ref_shift,
        ref_rejected_logps=pairs.ref_rejected_logps + ref_shift,
    )
    torch.testing.assert_close(moved.margin, pairs.margin, atol=1e-10, rtol=0)


def test_margin_is_exactly_zero_when_policy_equals_reference():
    logps = torch.randn(50, dtype=torch.float64) * 1e3, torch.randn(50, dtype=torch.float64)
    ones = torch.ones(50)
    assert PairLogps(*logps, *logps, ones, ones).margin.count_nonzero() == 0


OPTIONAL = {
    "chosen_lengths": [5, 9, 2, 7],
    "rejected_lengths": [3, 3, 8, 1],
    "chosen_win_rate": [0.9, 0.7, 0.6, 0.8],
    "rejected_win_rate": [0.2, 0.4, 0.1, 0.5],
    "expected_safety": [0.4, 0.4, 0.7, 0.7],
    "reward_margin": [1.0, -2.0, 0.5, 0.0],
    "score_margin": [0.5, 1.0, -2.0, 0.0],
    "category_margin": [0.0, 0.5, 1.0, 0.2],
    "judged": [1, 0, 1, 1],
    "chosen_divergence": [0.5, 0.1, 0.0, 2.0],
    "rejected_divergence": [0.25, 0.7, 1.0, 0.1],
    "degree_difference": [0.5, math.nan, math.nan, -0.25],
}


@pytest.mark.parametrize("name", LOSSES)
def test_gradient_agrees_with_finite_differences(name):
    # At the default penalty of BSO, mixed pairs have losses of 1e15, in whose sum those of the others are lost.
    loss = LOSSES[name](penalty=2) if name == "bso" else LOSSES[name]()
    pairs = batch([0.3, -0.7, 1.1, 0.2], [(1, 1), (1, 0), (0, 1), (1, 0)], **OPTIONAL)

    def total(chosen, rejected):
        return loss(replace(pairs, chosen_logps=chosen, rejected_logps=rejected)).sum()

    inputs = [pairs.chosen_logps.clone().requires_grad_(), pairs.rejected_logps.clone().requires_grad_()]
    # 1e-5 relative: central differences of quadratics are exact up to rounding at these sizes
    assert torch.autograd.gradcheck(total, inputs, eps=1e-4, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_unreduced_and_ignore_the_order_in_the_batch(name):
    loss = LOSSES[name]()
    pairs = batch([0.3, -0.7, 1.1, 0.2], [(1, 1), (1, 0), (0, 1), (1, 1)], **OPTIONAL)
    order = torch.tensor([2, 0, 3, 1])
    fields = {f: getattr(pairs, f) for f in pairs.__dataclass_fields__}
    shuffled = PairLogps(**{f: v[order] for f, v in fields.items()})
    assert loss(pairs).shape == (4,)
    torch.testing.assert_close(loss(shuffled), loss(pairs)[order])


@pytest.mark.parametrize("name", ["bfpo", "bfpo_soft", "ipo", "additive"])
def test_target_is_where_the_gradient_vanishes(name):
    loss = LOSSES[name]()
    pairs = batch([0.0, 0.0, 0.0, 0.0], [(1, 1), (1, 0), (0, 1), (1, 1)], **OPTIONAL)
    target = loss.target(pairs)
    h = torch.zeros(4, dtype=torch.float64) + target
    chosen = (pairs.chosen_logps + h).requires_grad_()
    loss(replace(pairs, chosen_logps=chosen)).sum().backward()
    torch.testing.assert_close(chosen.grad, torch.zeros(4, dtype=torch.float64), atol=1e-9, rtol=0)


def test_additive_targets_by_hand():
    # (1/2 + 2·(s_c - s_r))/0.5
    assert Additive(beta=0.5, weight=2).target(batch([0, 0, 0, 0])).tolist() == pytest.approx([1, 5, -3, 1])


def test_bfpo_soft_regresses_onto_the_rl_reward_itself():
    # E_s = 0.4, A2 = 1/2. chosen: (1 + 0.4)(0.9 + 0.5) = 1.96; rejected: (0 + 0.4)(0.2 + 0.5) = 0.28; gap 1.68
    pairs = batch([0.0], [(1, 0)], chosen_win_rate=[0.9], rejected_win_rate=[0.2], expected_safety=[0.4])
    assert BFPOSoft(beta=0.1).target(pairs).item() == pytest.approx(16.8)
    assert BFPOSoft(beta=0.1)(pairs).item() == pytest.approx(16.8**2)


@pytest.mark.parametrize(("loss", "column"), [(MODPO(), "reward_margin"), (BFPOSoft(), "expected_safety")])
def test_a_missing_column_is_named(loss, column):
    with pytest.raises(DataError, match=column):
        loss(batch([0.0], [(1, 1)]))


def test_safety_weight_moves_the_targets_of_mixed_pairs_by_hand():
    # beta 0.1: labels 1/2, 1 + 2, -1 - 2, -1/2 over beta
    weighted = BFPO(beta=0.1, safety_weight=2)
    assert weighted.target(batch([0, 0, 0, 0])).tolist() == pytest.approx([5, 30, -30, -5])
    assert weighted(batch([7, 7, 7, 7])).tolist() == pytest.approx([4, 529, 1369, 144])
    # Probabilities: the label grows by 2·(0.9 - 0.4) = 1.
    soft = batch([0.0], [(0.9, 0.4)])
    assert (weighted.target(soft) - BFPO(beta=0.1).target(soft)).item() == pytest.approx(10)


def test_safety_weight_of_zero_changes_no_bit():
    pairs = batch([3.0, -4.0, 10.0, 0.5], [(1, 0), (0.3, 0.8), (0, 1), (0, 0)])
    for options in ({}, {"beta": 0.07, "b1": 2.3, "b2": 0.4, "alpha": 0.1}):
        assert torch.equal(BFPO(**options, safety_weight=0.0)(pairs), BFPO(**options)(pairs))
        plain, weighted = BFPO(**options).labeling, BFPO(**options, safety_weight=0.0).labeling
        assert (plain.ss, plain.su, plain.us, plain.uu) == (weighted.ss, weighted.su, weighted.us, weighted.uu)


def test_bfpo_loss_function_is_the_class():
    pairs = batch([3.0, -4.0, 10.0, 0.5])
    logps = (pairs.chosen_logps, pairs.rejected_logps, pairs.ref_chosen_logps, pairs.ref_rejected_logps)
    bits = torch.tensor([True, True, False, False]), torch.tensor([1, 0, 1, 0])
    torch.testing.assert_close(
        bfpo_loss(*logps, *bits, beta=0.2, b1=5.0, alpha=0.1), BFPO(beta=0.2, b1=5.0, alpha=0.1)(pairs)
    )
    torch.testing.assert_close(bfpo_loss(*logps, *bits, safety_weight=0.7), BFPO(safety_weight=0.7)(pairs))


def test_shapes_that_differ_are_refused():
    vector, column = torch.zeros(4), torch.zeros(4, 1)
    with pytest.raises(ValueError, match=r"Shape mismatch: chosen_logps is \(4,\), rejected_safe is \(4, 1\)"):
        PairLogps(vector, vector, vector, vector, vector, column)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("beta", [0, -1, math.nan, math.inf])
def test_invalid_beta_is_refused(name, beta):
    with pytest.raises(RecipeError, match="beta"):
        make_loss({"name": name, "beta": beta})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "bpfo"}, "did you mean 'bfpo'"),
        ({"name": "bfpo", "alhpa": 0.5}, "did you mean 'alpha'"),
        ({"name": "bfpo", "beta": "0.1"}, r"loss.beta is '0.1' \(str\); expected a number"),
        ({"name": "bfpo", "b1": 1}, "b1 is 1"),
        ({"name": "bfpo", "b1": 5, "table": {"ss": 1, "su": 1, "us": 1, "uu": 1}}, "'table' replaces"),
        ({"name": "bfpo", "table": {"ss": 1, "su": 1, "us": 1}}, "expected four numbers"),
        ({"name": "bfpo", "table": {"ss": 1, "su": 1, "us": 1, "uu": "x"}}, "loss.table.uu is 'x'"),
        ({"name": "bfpo", "table": "helpful"}, r"or a name \(helpful_ties\)"),
        ({"name": "dpo", "label_smoothing": 0.5}, "label_smoothing is 0.5"),
        ({"name": "modpo", "weight": 0}, "weight is 0"),
        ({"name": "safe_dpo", "delta": -1}, "delta is -1"),
        ({"name": "nowhere.losses:Mine"}, "No module named"),
        ({"name": "bfpo.losses.pairwise:PairLogps"}, "not a subclass"),
        ({"name": "bfpo.losses.pairwise:PairLoss"}, "doesn't define __call__"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(RecipeError, match=message):
        make_loss(options)


def test_recipe_options_build_the_loss():
    assert make_loss({"name": "bfpo", "beta": 0.1, "b1": 5, "alpha": 0}) == BFPO(beta=0.1, b1=5, alpha=0)
    table = {"ss": 0.5, "su": 1, "us": -1, "uu": 0}
    assert make_loss({"table": table}).labeling.uu == 0
    named = make_loss({"table": "helpful_ties"}).labeling
    assert [named(*bits) for bits in ((1, 1), (1, 0), (0, 1), (0, 0))] == [0.5, 1, -0.5, 0.5]


def test_a_custom_loss_is_named_by_its_import_path(tmp_path, monkeypatch):
    (tmp_path / "my_losses.py").write_text(
        "from dataclasses import dataclass\n"
        "from bfpo.losses.pairwise import PairLoss\n"
        "@dataclass(frozen=True)\n"
        "class Hinge(PairLoss):\n"
        "    edge: float = 1.0\n"
        "    def __call__(self, pairs):\n"
        "        return (self.edge - self.beta * pairs.margin).clamp(min=0)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    loss = make_loss({"name": "my_losses:Hinge", "beta": 0.5, "edge": 2})
    assert loss(batch([2.0, 6.0], [(1, 1), (1, 1)])).tolist() == [1, 0]
