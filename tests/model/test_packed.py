"""Packed rows give the numbers of padded rows: log-probabilities and gradients, for any model, lengths and packs."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import FalconConfig, FalconForCausalLM, GptOssConfig, GptOssForCausalLM

from bfpo.config.recipes import LayoutSection
from bfpo.data.table import Example
from bfpo.errors import ModelError
from bfpo.model import attention, layout_check
from bfpo.model.attention import (
    Segment,
    SpanMasks,
    UnsupportedFeature,
    attend_by_spans,
    block_mask,
    dense_mask,
    make_span_masks,
    span_attention,
)
from bfpo.model.layout import Span, packed_layout, packs, padded_layout
from bfpo.model.layout_check import VERIFIED, check_packing, resolve_layout
from bfpo.model.logps import add_layout_forward, completion_logps

from .families import FAMILIES, SIZE, family

CPU = torch.device("cpu")


def example(prompt: int, *completions: int, seed: int = 0) -> Example:
    """Return an example with random ids of the given lengths."""
    rng = np.random.default_rng([seed, prompt, *completions])
    pieces = [rng.integers(3, 250, length, dtype=np.int32) for length in (prompt, *completions)]
    return Example(pieces[0], tuple(pieces[1:]))


# One-token completions, one huge pair, a prompt of one token, a single completion.
PAIRS = [example(5, 7, 1), example(1, 1, 1), example(30, 60, 45), example(11, 4, 4), example(120, 1, 9)]
EQUAL = example(4, 6)
PAIRS.append(Example(EQUAL.prompt_ids, EQUAL.completions * 2))


def gradient(model, logps) -> torch.Tensor:
    """Return the gradient of a weighted sum of the logps for all parameters, as one vector in float64."""
    model.zero_grad()
    coefficients = torch.linspace(-1, 1, len(logps), dtype=logps.dtype)
    (coefficients * logps).sum().backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return torch.cat([gradient.flatten().double() for gradient in gradients])


def relative_error(actual, expected) -> float:
    assert expected.norm() > 0
    return ((actual - expected).norm() / expected.norm()).item()


@pytest.fixture
def exact_softmax(monkeypatch):
    """Keep float64 in transformers' eager attention, which rounds its softmax to float32."""
    softmax = torch.nn.functional.softmax

    def exact(scores, dim=-1, dtype=None, **options):
        return softmax(scores, dim=dim, dtype=torch.promote_types(scores.dtype, dtype or scores.dtype), **options)

    monkeypatch.setattr(torch.nn.functional, "softmax", exact)


def test_every_verified_family_is_tested():
    assert set(FAMILIES) == VERIFIED
    assert {family(name).get_decoder().config.model_type for name in FAMILIES} == VERIFIED


@pytest.mark.parametrize("name", FAMILIES)
def test_packed_is_padded_in_float64(name, exact_softmax):
    model = family(name, torch.float64)
    packed, padded = (completion_logps(model, make(PAIRS)) for make in (packed_layout, padded_layout))
    torch.testing.assert_close(packed, padded, rtol=0, atol=1e-10)
    assert relative_error(gradient(model, packed), gradient(model, padded)) < 1e-6


@pytest.mark.parametrize("name", FAMILIES)
def test_packed_is_padded_in_float32(name):
    model = family(name)
    packed, padded = (completion_logps(model, make(PAIRS)) for make in (packed_layout, padded_layout))
    torch.testing.assert_close(packed, padded, rtol=1e-6, atol=1e-5)
    assert relative_error(gradient(model, packed), gradient(model, padded)) < 1e-5


lengths = st.integers(1, 12)
pairs = st.lists(st.builds(example, lengths, lengths, lengths, seed=st.integers(0, 9)), min_size=1, max_size=5)


# All examples for Llama; a few for other families, and all of them in the slow tests.
MANY, FEW = 20, 5


@pytest.mark.parametrize("min_split_tokens", [1, attention.MIN_SPLIT_TOKENS])
@pytest.mark.parametrize(
    ("name", "max_examples"),
    [
        ("llama", MANY),
        ("mistral", FEW),
        ("gemma3_text", FEW),
        pytest.param("mistral", MANY, marks=pytest.mark.slow),
        pytest.param("gemma3_text", MANY, marks=pytest.mark.slow),
    ],
)
def test_any_lengths_in_any_packs_give_the_padded_numbers(name, max_examples, min_split_tokens, monkeypatch):
    monkeypatch.setattr(attention, "MIN_SPLIT_TOKENS", min_split_tokens)
    model = family(name, torch.float64)

    @settings(max_examples=max_examples)
    @given(examples=pairs, budget=st.integers(1, 80))
    def check(examples, budget):
        padded = completion_logps(model, padded_layout(examples))
        expected = gradient(model, padded)
        parts = [completion_logps(model, packed_layout(examples[part])) for part in packs(examples, budget)]
        packed = torch.cat(parts)
        torch.testing.assert_close(packed, padded, rtol=0, atol=1e-10)
        assert relative_error(gradient(model, packed), expected) < 1e-6

    check()


def test_examples_with_one_completion_are_packed_too():
    model = family("llama", torch.float64)
    examples = [example(5, 7), example(1, 1), example(9, 3)]
    packed, padded = (completion_logps(model, make(examples)) for make in (packed_layout, padded_layout))
    torch.testing.assert_close(packed, padded, rtol=0, atol=1e-10)


def test_a_packed_row_by_hand():
    prompt, chosen, rejected = (np.array(ids, dtype=np.int32) for ids in ([1, 2], [3, 4, 5], [6]))
    layout = packed_layout([Example(prompt, (chosen, rejected)), Example(rejected, (prompt,))])
    assert layout.input_ids.tolist() == [[1, 2, 3, 4, 6, 1]]
    assert layout.positions.tolist() == [[0, 1, 2, 3, 0, 1]]
    assert layout.hidden_index.tolist() == [1, 2, 3, 1, 4, 5]
    assert layout.targets.tolist() == [3, 4, 5, 6, 1, 2]
    assert layout.lengths == (3, 1, 2)
    assert layout.spans == (Span(2, (2, 0)), Span(1, (1,)))
    assert layout.num_tokens == 6


def test_a_mask_by_hand():
    spans = [Span(2, (1, 2)), Span(1, (0,))]
    assert dense_mask(spans, None, CPU).int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 0, 1, 0, 0],
        [1, 1, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]
    # A window of 2 positions: the rejected branch starts at position 2, so it attends only to position 1.
    assert dense_mask(spans, 2, CPU).int().tolist()[3] == [0, 1, 0, 1, 0, 0]


@given(sizes=st.lists(lengths, min_size=1, max_size=30), budget=st.integers(1, 40))
def test_packs_keep_order_and_budget_and_are_filled(sizes, budget):
    examples = [example(size, 1) for size in sizes]
    parts = list(packs(examples, budget))
    assert [number for part in parts for number in range(len(sizes))[part]] == list(range(len(sizes)))
    totals = [sum(sizes[part]) for part in parts]
    assert all(total <= budget or len(sizes[part]) == 1 for total, part in zip(totals, parts, strict=True))
    assert all(total + sizes[part.start] > budget for total, part in zip(totals, parts[1:], strict=False))


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
def test_checkpointed_layers_get_the_span_masks_again(name):
    model = family(name).train()
    expected = gradient(model, completion_logps(model, packed_layout(PAIRS)))
    model.activation_checkpointing_enable()
    with span_attention(model.config):
        recomputed = gradient(model, completion_logps(model, packed_layout(PAIRS)))
    torch.testing.assert_close(recomputed, expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_backward_pass_after_the_switch_fails_instead_of_being_wrong(name):
    model = family(name).train()
    model.activation_checkpointing_enable()
    logps = completion_logps(model, packed_layout(PAIRS))
    with pytest.raises(RuntimeError):
        logps.sum().backward()


def test_bfloat16_autocast_is_as_exact_packed_as_padded():
    model = family("llama")
    with torch.no_grad():
        exact = completion_logps(model, padded_layout(PAIRS))
        with torch.autocast("cpu", torch.bfloat16):
            packed_error, padded_error = (
                (completion_logps(model, make(PAIRS)) - exact).norm() for make in (packed_layout, padded_layout)
            )
    assert 0 < packed_error < 2 * padded_error


def test_a_dense_mask_of_the_whole_row_gives_the_same_attention():
    model, layout = family("gemma2", torch.float64), packed_layout(PAIRS)
    layer = model.model.layers[0].self_attn
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, heads, layout.num_tokens, 8, dtype=torch.float64) for heads in (4, 2, 2))
    whole_row = SpanMasks((Segment(layout.num_tokens),), {4: [dense_mask(layout.spans, 4, CPU)]})
    by_segment = make_span_masks(layout.spans, [4], CPU)
    for softcap in (None, 1.5):
        outputs = [
            attend_by_spans(layer, query, key, value, None, span_masks=masks, sliding_window=4, softcap=softcap)[0]
            for masks in (whole_row, by_segment)
        ]
        torch.testing.assert_close(*outputs, rtol=0, atol=1e-12)


@pytest.mark.slow  # compiles
@pytest.mark.filterwarnings("ignore")  # of torch.compile
@pytest.mark.parametrize("window", [None, 4])
def test_flex_attention_gives_the_numbers_of_a_dense_mask(window):
    layout = packed_layout(PAIRS)
    layer = family("llama").model.layers[0].self_attn
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, heads, layout.num_tokens, 16) for heads in (4, 2, 2))
    sparse = SpanMasks((), {window: block_mask(layout.spans, window, CPU)})
    dense = SpanMasks((Segment(layout.num_tokens),), {window: [dense_mask(layout.spans, window, CPU)]})

    def attend(masks, value=value):
        return attend_by_spans(layer, query, key, value, None, span_masks=masks, sliding_window=window)[0]

    with torch.no_grad():
        expected = attend(dense)
        torch.testing.assert_close(attend(sparse), expected, rtol=1e-4, atol=1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            # As under autocast, where rotary embeddings leave query and key in float32.
            rounded = attend(sparse, value.bfloat16())
        torch.testing.assert_close(rounded.float(), expected, rtol=0.05, atol=0.05)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "qwen3_moe"])
def test_flex_attention_on_a_gpu_gives_the_padded_numbers(name):
    # FlexAttention's kernels need heads of at least 16.
    model = family(name, hidden_size=128).cuda()
    packed, padded = (
        completion_logps(model, make(PAIRS).to(model.device)) for make in (packed_layout, padded_layout)
    )
    torch.testing.assert_close(packed, padded, rtol=1e-4, atol=1e-3)
    assert relative_error(gradient(model, packed.cpu()), gradient(model, padded.cpu())) < 1e-3


# Whether a model can be fed packed rows.


def resolve(model):
    add_layout_forward(model)
    return resolve_layout(model, LayoutSection(), PAIRS, longest=90)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_check_passes_where_the_numbers_are_right(name):
    layout, check = resolve(family(name))
    assert layout.kind == "packed"
    assert check.passed
    assert check.difference < 1e-3


def leak(monkeypatch):
    """Make the rejected branch attend to the chosen one."""
    mask_mod = attention.mask_mod

    def with_siblings(spans, window, device):
        return mask_mod([Span(span.prompt, (sum(span.branches),)) for span in spans], window, device)

    monkeypatch.setattr(attention, "mask_mod", with_siblings)
    # Masks of short spans are cached: this test must not use right ones, nor leave wrong ones to other tests.
    monkeypatch.setattr(attention, "_cached_segment_masks", attention._segment_masks)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_wrong_numbers_of_a_verified_family_are_an_error(monkeypatch, dtype):
    assert resolve(family("llama", dtype))[1].passed
    leak(monkeypatch)
    with pytest.raises(ModelError, match=r"llama: packed and padded .* differ by up to .* layout: {kind: padded}"):
        resolve(family("llama", dtype))


def test_wrong_numbers_of_another_family_mean_padded_rows_and_a_line(monkeypatch, capsys):
    leak(monkeypatch)
    monkeypatch.setattr(layout_check, "VERIFIED", set())
    layout, check = resolve(family("llama"))
    assert (layout.kind, check) == ("padded", None)
    assert (
        "layout: padded rows, because packed ones don't fit this model: packed and padded" in capsys.readouterr().out
    )


def test_positions_that_ignore_the_prompt_are_caught(monkeypatch):
    def with_row_positions(examples):
        layout = packed_layout(examples)
        layout.positions[:] = torch.arange(layout.num_tokens)
        return layout

    model = family("llama")
    add_layout_forward(model)
    monkeypatch.setattr(layout_check, "packed_layout", with_row_positions)
    assert not check_packing(model, PAIRS).passed


def gpt_oss():
    size = {**SIZE, "intermediate_size": 16, "num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 8}
    rope = {"rope_type": "default", "rope_theta": 1e4}
    return GptOssForCausalLM(GptOssConfig(**size, rope_parameters=rope, attn_implementation="eager"))


def falcon():
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "bos_token_id", "eos_token_id")
    return FalconForCausalLM(FalconConfig(**{name: SIZE[name] for name in names}))


def dynamic_rope():
    model = copy.deepcopy(family("llama"))
    model.config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    model.config.max_position_embeddings = 64
    return model


def linear_attention():
    model = copy.deepcopy(family("llama"))
    model.config.layer_types = ["full_attention", "linear_attention", "full_attention"]
    return model


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (gpt_oss, "GptOssAttention uses s_aux"),
        (falcon, "FalconForCausalLM doesn't use transformers' attention interface"),
        (dynamic_rope, "'dynamic' rotary embeddings depend on the longest sequence fed, beyond 64 tokens"),
        (linear_attention, "layers of type linear_attention"),
    ],
)
def test_an_unsupported_feature_is_named(make, named, capsys):
    layout, check = resolve(make())
    assert (layout.kind, check) == ("padded", None)
    assert f"layout: padded rows, because packed ones don't fit this model: {named}" in capsys.readouterr().out


def test_an_unsupported_argument_of_a_layer_is_refused():
    layer = family("llama").model.layers[0].self_attn
    states = torch.zeros(1, 4, 2, 8)
    masks = SpanMasks((Segment(2),), {None: [None]})
    for arguments, named in [
        ({"span_masks": masks, "position_bias": states}, "position_bias"),
        ({"span_masks": masks, "dropout": 0.1}, "attention dropout"),
        ({"span_masks": masks, "sliding_window": 7}, "a window of 7"),
        ({}, "gets no span masks"),
    ]:
        with pytest.raises(UnsupportedFeature, match=named):
            attend_by_spans(layer, states, states, states, None, **arguments)
