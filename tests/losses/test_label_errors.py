"""Labels corrected for the errors of a judge: exactly unbiased on finite answer sets, and where they aren't."""

import json
from dataclasses import asdict, replace
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bfpo.core.pairs import CELLS, Provenance
from bfpo.errors import DataError, RecipeError
from bfpo.losses.build import make_loss
from bfpo.losses.inputs import PairLogps
from bfpo.losses.label_errors import LabelErrors, read_label_errors
from bfpo.losses.labeling import TABLES, LabelingFunction
from bfpo.losses.pairwise import BFPO

BITS = (True, False)
PAPER = LabelingFunction.from_parameters()
CELL_BITS = [(1, 1), (1, 0), (0, 1), (0, 0)]
EXACT = 1e-10

number = st.floats(-5, 5)
tables = st.builds(LabelingFunction, number, number, number, number)
label_errors = st.tuples(st.floats(0.55, 1), st.floats(0.55, 1)).map(lambda rates: LabelErrors(*rates))


def confusion(errors: LabelErrors) -> np.ndarray:
    """Probability of each verdict (columns: safe, unsafe) of a safe and of an unsafe answer (rows)."""
    return np.array([[errors.sensitivity, 1 - errors.sensitivity], [1 - errors.specificity, errors.specificity]])


def batch(margins, bits=CELL_BITS, judged=None) -> PairLogps:
    """Return pairs with these margins."""
    h, safe = torch.tensor(margins, dtype=torch.float64), torch.tensor(bits, dtype=torch.float64)
    zero = torch.zeros_like(h)
    column = None if judged is None else torch.tensor(judged, dtype=torch.float64)
    return PairLogps(h, zero, zero, zero, chosen_safe=safe[:, 0], rejected_safe=safe[:, 1], judged=column)


def cells_of(labeling: LabelingFunction) -> np.ndarray:
    return np.array([getattr(labeling, cell) for cell in CELLS])


# --- the table


@given(tables, label_errors)
def test_the_corrected_table_is_the_inverse_of_the_confusion_of_pairs(labeling, errors):
    # Rows and columns in the order of CELLS; independent errors of the two answers.
    of_pairs = np.kron(confusion(errors), confusion(errors))
    expected = np.linalg.solve(of_pairs, cells_of(labeling))
    np.testing.assert_allclose(cells_of(labeling.corrected(errors)), expected, atol=1e-9 / errors.youden**2)


@given(tables)
def test_a_judge_without_errors_changes_nothing_to_the_bit(labeling):
    assert labeling.corrected(LabelErrors(1, 1)) == labeling


def test_corrected_labels_by_hand():
    # A fifth of the bits flipped both ways: the bits become (1 - .2)/.6 = 4/3 and (0 - .2)/.6 = -1/3, and the
    # paper's label 3/2 s_c - 1/2 s_r - 1/2 becomes 5/6, 5/3, -5/3 and -5/6.
    corrected = PAPER.corrected(LabelErrors(0.8, 0.8))
    assert cells_of(corrected).tolist() == pytest.approx([5 / 6, 5 / 3, -5 / 3, -5 / 6])


# --- the mean over all verdicts on a pair


def test_the_loss_itself_is_larger_by_the_variance_of_the_label():
    # So losses on held-out pairs are comparable only between runs with the same errors.
    errors, beta = LabelErrors(0.9, 0.7), 0.5
    corrected = PAPER.corrected(errors)
    for chosen, rejected in product(BITS, BITS):
        mean, variance = moments(corrected, errors, chosen, rejected)
        assert mean == pytest.approx(PAPER(chosen, rejected), abs=EXACT)
        # The paper's label is 3/2 s_c - 1/2 s_r - 1/2, without an interaction.
        p, q = (errors.sensitivity if safe else 1 - errors.specificity for safe in (chosen, rejected))
        by_formula = (1.5**2 * p * (1 - p) + 0.5**2 * q * (1 - q)) / errors.youden**2
        assert variance == pytest.approx(by_formula)
        expected = sum(
            weight * float(BFPO(beta=beta, table=corrected)(batch([1.0], [bits]))[0])
            for bits, weight in verdicts(errors, chosen, rejected)
        )
        clean = float(BFPO(beta=beta)(batch([1.0], [(chosen, rejected)]))[0])
        assert expected - clean == pytest.approx(variance / beta**2)


def verdicts(errors, chosen, rejected, *, correlation=0.0):
    """Verdicts on a pair with their probabilities; `correlation` is the covariance of the two verdicts."""
    p, q = (errors.sensitivity if safe else 1 - errors.specificity for safe in (chosen, rejected))
    return [
        ((a, b), (p if a else 1 - p) * (q if b else 1 - q) + (correlation if a == b else -correlation))
        for a, b in product(BITS, BITS)
    ]


def moments(labeling, errors, chosen, rejected, *, correlation=0.0):
    """Mean and variance of the label of a pair over the verdicts of a judge."""
    of_pair = verdicts(errors, chosen, rejected, correlation=correlation)
    labels, weights = np.array([labeling(*bits) for bits, _ in of_pair]), np.array([weight for _, weight in of_pair])
    assert weights.min() >= 0
    return weights @ labels, weights @ (labels - weights @ labels) ** 2


# --- where it isn't


@given(tables, st.floats(0, 0.03))
def test_correlated_errors_bias_only_the_interaction_of_the_table(labeling, correlation):
    errors = LabelErrors(0.9, 0.7)
    interaction = labeling.ss - labeling.su - labeling.us + labeling.uu
    for chosen, rejected in product(BITS, BITS):
        mean, _ = moments(labeling.corrected(errors), errors, chosen, rejected, correlation=correlation)
        bias = interaction * correlation / errors.youden**2
        assert mean - labeling(chosen, rejected) == pytest.approx(bias, abs=1e-9)


def test_the_papers_table_has_no_interaction_and_helpful_ties_has_one():
    for b1, b2, alpha in [(3, 0, 0.5), (5, 0.3, 0.1)]:
        ss, su, us, uu = cells_of(LabelingFunction.from_parameters(b1, b2, alpha).with_safety_weight(0.7))
        assert ss - su - us + uu == pytest.approx(0)
    ss, su, us, uu = cells_of(TABLES["helpful_ties"])
    assert ss - su - us + uu == 0.5


@given(label_errors, label_errors)
def test_wrong_rates_scale_and_shift_the_safety_of_an_answer(assumed, true):
    for safe in BITS:
        p = true.sensitivity if safe else 1 - true.specificity
        mean = p * assumed.estimate(1) + (1 - p) * assumed.estimate(0)
        shift = (assumed.specificity - true.specificity) / assumed.youden
        assert mean == pytest.approx(shift + true.youden / assumed.youden * safe, abs=1e-9)


# --- the loss


def test_only_labels_of_a_judge_are_corrected():
    loss, errors = BFPO(beta=1, label_errors=LabelErrors(0.8, 0.8)), LabelErrors(0.8, 0.8)
    judged = loss.target(batch([0, 0, 0, 0], judged=[1, 1, 1, 1]))
    assert judged.tolist() == pytest.approx(cells_of(PAPER.corrected(errors)).tolist())
    half = loss.target(batch([0, 0, 0, 0], judged=[1, 0, 0, 1]))
    assert half.tolist() == [judged[0], 1.0, -1.0, judged[3]]
    assert loss.labeling == PAPER
    with pytest.raises(DataError, match="needs 'judged' for every pair"):
        loss(batch([0, 0, 0, 0]))
    assert (loss.needs, BFPO().needs) == (("judged",), ())


def test_the_mean_gradient_over_all_verdicts_is_that_of_the_true_labels():
    errors = LabelErrors(0.9, 0.75)
    loss = BFPO(beta=0.3, safety_weight=0.4, label_errors=errors)
    for chosen, rejected in product(BITS, BITS):
        gradients = []
        for bits, weight in [*verdicts(errors, chosen, rejected), (None, 1.0)]:
            pairs = batch([1.3], [bits or (chosen, rejected)], judged=[1])
            logps = pairs.chosen_logps.clone().requires_grad_()
            clean = replace(loss, label_errors=None)
            (loss if bits else clean)(replace(pairs, chosen_logps=logps)).sum().backward()
            gradients.append(weight * logps.grad.item())
        assert sum(gradients[:-1]) == pytest.approx(gradients[-1])


def test_the_safety_weight_is_corrected_with_the_table():
    errors = LabelErrors(0.8, 0.9)
    target = BFPO(beta=1, safety_weight=0.4, label_errors=errors).target(batch([0, 0, 0, 0], judged=[1, 1, 1, 1]))
    expected = cells_of(PAPER.with_safety_weight(0.4).corrected(errors))
    torch.testing.assert_close(target, torch.tensor(expected))


def test_whose_labels_are_a_judges():
    def is_judged(source, stream="main"):
        return Provenance("set", source, stream).is_judged

    assert all([is_judged("linear@3f"), is_judged("linear@3f", "buffer"), is_judged("dataset"), is_judged(None)])
    assert not any([is_judged("assumed"), is_judged("human"), is_judged("dataset", "buffer")])


# --- rates and files


@pytest.mark.parametrize(
    ("rates", "message"),
    [
        ((1.2, 0.9), "sensitivity is 1.2; expected a share from 0 to 1"),
        ((0.9, float("nan")), "specificity is nan"),
        ((0.5, 0.55), "sensitivity 0.5 and specificity 0.55 add up to 1.05; expected at least 1.1"),
    ],
)
def test_impossible_rates_and_a_judge_near_chance_are_refused(rates, message):
    with pytest.raises(RecipeError, match=message):
        LabelErrors(*rates)


def results(**recalls):
    row = {"recall_yes": [0.9, 0.8, 0.95], "recall_no": [0.75, 0.6, 0.85]} | recalls
    return {"judges": {"linear:judge.json": {"safe": {"all": row}}}}


def test_the_rates_are_read_from_the_results_of_an_evaluation(tmp_path):
    file = tmp_path / "eval.json"
    file.write_text(json.dumps(results()))
    assert read_label_errors(file) == LabelErrors(0.9, 0.75)
    assert make_loss({"label_errors": str(file)}) == make_loss({"label_errors": asdict(LabelErrors(0.9, 0.75))})


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (None, DataError, "No such file or directory; `bfpo judge eval` writes this file"),
        ("[]", DataError, "not the results of `bfpo judge eval`"),
        (results(recall_no=None), DataError, "run it on answers with labels of both kinds"),
        ({"judges": {}}, RecipeError, r"has the judges \(none\); expected one"),
        (
            {"judges": results()["judges"] | {"b": results()["judges"]["linear:judge.json"]}},
            RecipeError,
            "run `bfpo ",
        ),
        (results(recall_no=[0.3, 0.1, 0.5]), RecipeError, "may be no better than chance; label more"),
    ],
)
def test_other_files_are_refused(tmp_path, content, error, message):
    file = tmp_path / "eval.json"
    if content is not None:
        file.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(error, match=message):
        read_label_errors(file)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"sensitivity": 0.9}, "loss.label_errors is .*; expected {sensitivity: .., specificity: ..}, or the path"),
        ({"sensitivity": 0.9, "specificity": "x"}, "loss.label_errors.specificity is 'x'; expected a number"),
        (0.9, "loss.label_errors is 0.9"),
    ],
)
def test_other_values_are_refused(value, message):
    with pytest.raises(RecipeError, match=message):
        make_loss({"label_errors": value})
