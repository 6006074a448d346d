import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bfpo.core.pairs import CELLS, SafetyLabels
from bfpo.errors import RecipeError
from bfpo.losses.labeling import LabelingFunction

number = st.floats(-10, 10)
probability = st.floats(0, 1)


def test_default_table_is_that_of_the_paper():
    # g = 3/2 s_w - 1/2 s_l - 1/2
    assert LabelingFunction.from_parameters() == LabelingFunction(ss=0.5, su=1.0, us=-1.0, uu=-0.5)


def test_label_is_antisymmetric_in_safety_at_alpha_one_half():
    g = LabelingFunction.from_parameters()
    assert (g.ss, g.su) == (-g.uu, -g.us)


def test_default_order_of_the_cells():
    g = LabelingFunction.from_parameters()
    assert g.su > g.ss > g.uu > g.us


@given(st.floats(1.01, 20), number, number)
def test_parameters_give_the_formula(b1, b2, alpha):
    g = LabelingFunction.from_parameters(b1, b2, alpha)
    for chosen in (0, 1):
        for rejected in (0, 1):
            expected = (b1 * chosen - rejected + b2) / (b1 - 1) - alpha
            assert g(chosen, rejected) == pytest.approx(expected, abs=1e-9)


@given(number, number, number, number)
def test_bits_give_exactly_the_cells(ss, su, us, uu):
    g = LabelingFunction(ss, su, us, uu)
    for cell, labels in zip(CELLS, [(True, True), (True, False), (False, True), (False, False)], strict=True):
        assert SafetyLabels(*labels).cell == cell
        assert g(*labels) == getattr(g, cell)


@given(number, number, number, number, probability, probability, st.integers(0, 2**32 - 1))
def test_probabilities_give_the_expected_label(ss, su, us, uu, p, q, seed):
    g = LabelingFunction(ss, su, us, uu)
    expected = p * q * ss + p * (1 - q) * su + (1 - p) * q * us + (1 - p) * (1 - q) * uu
    assert g(p, q) == pytest.approx(expected, abs=1e-9)


def test_tensors_and_arrays_give_the_same_as_numbers():
    g = LabelingFunction.from_parameters(b1=5, b2=0.3, alpha=0.2)
    p, q = np.array([0.0, 0.3, 1.0]), np.array([1.0, 0.9, 0.0])
    expected = [g(a, b) for a, b in zip(p, q, strict=True)]
    assert g(p, q).tolist() == expected
    assert g(torch.tensor(p), torch.tensor(q)).tolist() == expected
    assert g(torch.tensor([True, False]), torch.tensor([True, True])).tolist() == pytest.approx([g.ss, g.us])


@pytest.mark.parametrize("b1", [1, 0.5, -3, math.nan, math.inf])
def test_invalid_b1_is_refused(b1):
    with pytest.raises(RecipeError, match="b1 is"):
        LabelingFunction.from_parameters(b1=b1)


def test_not_a_number_is_refused():
    with pytest.raises(RecipeError, match="us is nan"):
        LabelingFunction(1, 1, math.nan, 1)
    with pytest.raises(RecipeError, match="alpha is nan"):
        LabelingFunction.from_parameters(alpha=math.nan)


def test_printed_table_shows_the_four_numbers_in_their_places():
    lines = str(LabelingFunction(ss=0.5, su=1, us=-1, uu=-0.5)).splitlines()
    assert lines[0].split() == ["rejected", "safe", "rejected", "unsafe"]
    assert lines[1].split() == ["chosen", "safe", "+0.5", "+1"]
    assert lines[2].split() == ["chosen", "unsafe", "-1", "-0.5"]
