import copy

import numpy as np
import pytest
import torch

from bfpo.data.table import Example
from bfpo.errors import ModelError, RecipeError
from bfpo.model.layout import padded_layout
from bfpo.model.logps import add_layout_forward
from bfpo.model.reference import SharedReference
from bfpo.model.selective import disable_dropout, select_parameters

LAYOUT = padded_layout([Example(np.arange(3, 8, dtype=np.int32), (np.array([9, 8, 7]), np.array([5, 6])))])


def test_patterns_select_parameters_by_name(make_model):
    model = make_model()
    selection = select_parameters(model, ["down_proj"])
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained == [f"model.layers.{layer}.mlp.down_proj.weight" for layer in range(2)]
    assert (selection.trained, selection.tensors) == (2 * 128 * 384, 2)
    assert str(selection).startswith("98,304 of ")


def test_no_patterns_train_everything_even_after_a_selection(make_model):
    model = make_model()
    select_parameters(model, ["down_proj"])
    selection = select_parameters(model, None)
    assert selection.trained == selection.total == sum(p.numel() for p in model.parameters())


def test_a_pattern_without_a_match_names_the_nearest(make_model):
    with pytest.raises(
        ModelError, match=r"'down_prj' matches no parameter; the nearest parts of names are down_proj"
    ):
        select_parameters(make_model(), ["up_proj", "down_prj"])


def test_an_invalid_regular_expression_is_refused(make_model):
    with pytest.raises(RecipeError, match="not a regular expression"):
        select_parameters(make_model(), ["layers.(0"])


def test_dropout_is_off_in_modules_and_in_numbers(make_model):
    model = make_model()
    model.model.extra = torch.nn.Dropout(0.3)
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    disable_dropout(model)
    assert model.model.extra.p == 0
    assert all(layer.self_attn.attention_dropout == 0 for layer in model.model.layers)


@pytest.mark.parametrize("patterns", [None, ["down_proj"], ["embed_tokens"]])
@pytest.mark.parametrize("tied", [False, True])
def test_shared_reference_equals_a_full_copy_after_training(make_model, patterns, tied):
    model = make_model()
    if tied:
        model.config.tie_word_embeddings = True
        model.tie_weights()
    add_layout_forward(model)
    select_parameters(model, patterns)
    full_copy = copy.deepcopy(model)
    add_layout_forward(full_copy)
    reference = SharedReference(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        model(layout=LAYOUT).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        expected = full_copy(layout=LAYOUT)
    assert (model(layout=LAYOUT) - expected).abs().max() > 1e-3
    torch.testing.assert_close(reference.logps(model, LAYOUT), expected, rtol=0, atol=0)


def test_reference_copies_only_what_is_trained(make_model):
    model = make_model()
    select_parameters(model, ["down_proj"])
    assert SharedReference(model).nbytes == 4 * 2 * 128 * 384


def test_the_reference_does_not_change_the_gradients_of_the_policy(make_model):
    model = make_model()
    add_layout_forward(model)
    gradients = []
    for with_reference in (False, True):
        model.zero_grad()
        if with_reference:
            reference = SharedReference(model).logps(model, LAYOUT)
            assert not reference.requires_grad
        model(layout=LAYOUT).sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=0)
