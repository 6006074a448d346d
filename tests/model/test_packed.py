"""Packed rows give what padded rows give: log-probabilities and gradients, for any model, lengths and packing."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import FalconConfig, FalconForCausalLM, GptOssConfig, GptOssForCausalLM

from bfpo.config.recipes import LayoutSection
from bfpo.data.table import Example
from bfpo.errors import ModelError
from bfpo.model import attention, layout_check
from bfpo.model.attention import (
    Segment,
    SpanMasks,
    UnknownFeature,
    attend_by_spans,
    block_mask,
    dense_mask,
    span_attention,
    span_masks,
)
from bfpo.model.layout import Span, packed_layout, packs, padded_layout
from bfpo.model.layout_check import VERIFIED, check_packing, settle_layout
from bfpo.model.logps import add_layout_forward, completion_logps

from .families import FAMILIES, SIZE, family

CPU = torch.device("cpu")


def example(prompt: int, *completions: int, seed: int = 0) -> Example:
    """Return an example with pieces of these lengths."""
    rng = np.random.default_rng([seed, prompt, *completions])
    pieces = [rng.integers(3, 250, length, dtype=np.int32) for length in (prompt, *completions)]
    return Example(pieces[0], tuple(pieces[1:]))


# One-token completions, one huge pair, a prompt of one token, a single completion.
PAIRS = [example(5, 7, 1), example(1, 1, 1), example(30, 60, 45), example(11, 4, 4), example(120, 1, 9)]
EQUAL = example(4, 6)
PAIRS.append(Example(EQUAL.prompt_ids, EQUAL.completions * 2))


def gradient(model, logps) -> torch.Tensor:
    """Return the gradient of all parameters for one coefficient per completion, as one vector in float64."""
    model.zero_grad()
    coefficients = torch.linspace(-1, 1, len(logps), dtype=logps.dtype)
    (coefficients * logps).sum().backward()
    return torch.cat([p.grad.flatten().double() for p in model.parameters() if p.grad is not None])


def relative(found, expected) -> float:
    assert expected.norm() > 0
    return ((found - expected).norm() / expected.norm()).item()


@pytest.fixture
def exact_softmax(monkeypatch):
    """Let eager attention of transformers keep float64, where it would round its softmax to float32."""
    softmax = torch.nn.functional.softmax

    def keep(scores, dim=-1, dtype=None, **options):
        return softmax(scores, dim=dim, dtype=torch.promote_types(scores.dtype, dtype or scores.dtype), **options)

    monkeypatch.setattr(torch.nn.functional, "softmax", keep)


def test_every_verified_family_is_tested():
    assert set(FAMILIES) == VERIFIED
    assert {family(name).get_decoder().config.model_type for name in FAMILIES} == VERIFIED


@pytest.mark.parametrize("name", FAMILIES)
def test_packed_is_padded_in_float64(name, exact_softmax):
    model = family(name, torch.float64)
    packed, padded = (completion_logps(model, make(PAIRS)) for make in (packed_layout, padded_layout))
    torch.testing.assert_close(packed, padded, rtol=0, atol=1e-10)
    assert relative(gradient(model, packed), gradient(model, padded)) < 1e-6


@pytest.mark.parametrize("name", FAMILIES)
def test_packed_is_padded_in_float32(name):
    model = family(name)
    packed, padded = (completion_logps(model, make(PAIRS)) for make in (packed_layout, padded_layout))
    torch.testing.assert_close(packed, padded, rtol=1e-6, atol=1e-5)
    assert relative(gradient(model, packed), gradient(model, padded)) < 1e-5


lengths = st.integers(1, 12)
pairs = st.lists(st.builds(example, lengths, lengths, lengths, seed=st.integers(0, 9)), min_size=1, max_size=5)


@pytest.mark.parametrize("split", [1, attention.SPLIT])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3_text"])
@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(examples=pairs, budget=st.integers(1, 80))
def test_any_lengths_in_any_packs_give_the_padded_numbers(name, split, monkeypatch, examples, budget):
    monkeypatch.setattr(attention, "SPLIT", split)
    model = family(name, torch.float64)
    padded = completion_logps(model, padded_layout(examples))
    expected = gradient(model, padded)
    parts = [completion_logps(model, packed_layout(examples[part])) for part in packs(examples, budget)]
    torch.testing.assert_close(torch.cat(parts), padded, rtol=0, atol=1e-10)
    assert relative(gradient(model, torch.cat(parts)), expected) < 1e-6


def test_single_completions_share_a_row_too():
    model = family("llama", torch.float64)
    examples = [example(5, 7), example(1, 1), example(9, 3)]
    packed, padded = (completion_logps(model, make(examples)) for make in (packed_layout, padded_layout))
    torch.testing.assert_close(packed, padded, rtol=0, atol=1e-10)


def test_a_packed_row_by_hand():
    prompt, chosen, rejected = (np.array(ids, dtype=np.int32) for ids in ([1, 2], [3, 4, 5], [6]))
    layout = packed_layout([Example(prompt, (chosen, rejected)), Example(rejected, (prompt,))])
    assert layout.input_ids.tolist() == [[1, 2, 3, 4, 6, 1]]
    assert layout.positions.tolist() == [[0, 1, 2, 3, 0, 1]]
    assert layout.places.tolist() == [1, 2, 3, 1, 4, 5]
    assert layout.targets.tolist() == [3, 4, 5, 6, 1, 2]
    assert layout.lengths == (3, 1, 2)
    assert layout.spans == (Span(2, (2, 0)), Span(1, (1,)))
    assert layout.num_tokens == 6


def test_who_sees_whom_by_hand():
    spans = [Span(2, (1, 2)), Span(1, (0,))]
    seen = dense_mask(spans, None, CPU).int().tolist()
    assert seen == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 0, 1, 0, 0],
        [1, 1, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]
    # a window of 2 positions: the rejected branch begins at position 2, so it sees only position 1 of the prompt
    assert dense_mask(spans, 2, CPU).int().tolist()[3] == [0, 1, 0, 1, 0, 0]


@given(sizes=st.lists(lengths, min_size=1, max_size=30), budget=st.integers(1, 40))
def test_packs_keep_order_and_budget_and_waste_no_pack(sizes, budget):
    examples = [example(size, 1) for size in sizes]
    parts = list(packs(examples, budget))
    assert [number for part in parts for number in range(len(sizes))[part]] == list(range(len(sizes)))
    totals = [sum(sizes[part]) for part in parts]
    assert all(total <= budget or len(sizes[part]) == 1 for total, part in zip(totals, parts, strict=True))
    assert all(total + sizes[part.start] > budget for total, part in zip(totals, parts[1:], strict=False))


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
def test_checkpointed_layers_find_the_spans_again(name):
    model = family(name).train()
    expected = gradient(model, completion_logps(model, packed_layout(PAIRS)))
    model.activation_checkpointing_enable()
    with span_attention(model.config):
        found = gradient(model, completion_logps(model, packed_layout(PAIRS)))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_backward_pass_after_the_switch_fails_instead_of_being_wrong(name):
    model = family(name).train()
    model.activation_checkpointing_enable()
    logps = completion_logps(model, packed_layout(PAIRS))
    with pytest.raises(RuntimeError):
        logps.sum().backward()


def test_bfloat16_autocast_is_as_close_to_the_truth_packed_as_padded():
    model = family("llama")
    with torch.no_grad():
        truth = completion_logps(model, padded_layout(PAIRS))
        with torch.autocast("cpu", torch.bfloat16):
            errors = [
                (completion_logps(model, make(PAIRS)) - truth).norm() for make in (packed_layout, padded_layout)
            ]
    assert 0 < errors[0] < 2 * errors[1]


def test_a_dense_mask_of_the_whole_row_gives_the_same_attention():
    model, layout = family("gemma2", torch.float64), packed_layout(PAIRS)
    layer = model.model.layers[0].self_attn
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, heads, layout.num_tokens, 8, dtype=torch.float64) for heads in (4, 2, 2))
    whole = SpanMasks((Segment(layout.num_tokens),), {4: [dense_mask(layout.spans, 4, CPU)]})
    apart = span_masks(layout.spans, [4], CPU)
    for softcap in (None, 1.5):
        outputs = [
            attend_by_spans(layer, query, key, value, None, spans=spans, sliding_window=4, softcap=softcap)[0]
            for spans in (whole, apart)
        ]
        torch.testing.assert_close(*outputs, rtol=0, atol=1e-12)


@pytest.mark.slow  # compiles
@pytest.mark.filterwarnings("ignore")  # of torch.compile
@pytest.mark.parametrize("window", [None, 4])
def test_flex_attention_sees_the_same(window):
    layout = packed_layout(PAIRS)
    layer = family("llama").model.layers[0].self_attn
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, heads, layout.num_tokens, 16) for heads in (4, 2, 2))
    sparse = SpanMasks((), {window: block_mask(layout.spans, window, CPU)})
    dense = SpanMasks((Segment(layout.num_tokens),), {window: [dense_mask(layout.spans, window, CPU)]})

    def attend(spans, value=value):
        return attend_by_spans(layer, query, key, value, None, spans=spans, sliding_window=window)[0]

    with torch.no_grad():
        expected = attend(dense)
        torch.testing.assert_close(attend(sparse), expected, rtol=1e-4, atol=1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            # as under autocast, where rotary embeddings leave query and key in float32
            rounded = attend(sparse, value.bfloat16())
        torch.testing.assert_close(rounded.float(), expected, rtol=0.05, atol=0.05)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "qwen3_moe"])
def test_flex_attention_on_a_gpu_gives_the_padded_numbers(name):
    model = family(name).cuda()
    packed, padded = (
        completion_logps(model, make(PAIRS).to(model.device)) for make in (packed_layout, padded_layout)
    )
    torch.testing.assert_close(packed, padded, rtol=1e-4, atol=1e-3)
    assert relative(gradient(model, packed.cpu()), gradient(model, padded.cpu())) < 1e-3


# Whether a model can be fed packed rows.


def settled(model, examples=PAIRS, **options):
    add_layout_forward(model)
    return settle_layout(model, LayoutSection(), examples, **{"longest": 90, **options})


@pytest.mark.parametrize("name", FAMILIES)
def test_the_check_passes_where_the_numbers_are_right(name):
    layout, check = settled(family(name))
    assert layout.kind == "packed"
    assert check.passed
    assert check.difference < 1e-3


def leaky(monkeypatch):
    """Let the rejected branch see the chosen one."""
    sight = attention.sight

    def with_siblings(spans, window, device):
        return sight([Span(span.prompt, (sum(span.branches),)) for span in spans], window, device)

    monkeypatch.setattr(attention, "sight", with_siblings)
    # Masks of small spans are kept between packs; here each test makes its own.
    monkeypatch.setattr(attention, "_small_masks", attention._masks_of_runs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_wrong_numbers_of_a_verified_family_are_an_error(monkeypatch, dtype):
    assert settled(family("llama", dtype))[1].passed
    leaky(monkeypatch)
    with pytest.raises(ModelError, match=r"llama: packed and padded .* differ by up to .* layout: {kind: padded}"):
        settled(family("llama", dtype))


def test_wrong_numbers_of_another_family_mean_padded_rows_and_a_line(monkeypatch, capsys):
    leaky(monkeypatch)
    monkeypatch.setattr(layout_check, "VERIFIED", set())
    layout, check = settled(family("llama"))
    assert (layout.kind, check) == ("padded", None)
    assert (
        "layout: padded rows, because packed ones don't fit this model: packed and padded" in capsys.readouterr().out
    )


def test_positions_that_ignore_the_prompt_are_caught(monkeypatch):
    def restarted(examples):
        layout = packed_layout(examples)
        layout.positions[:] = torch.arange(layout.num_tokens)
        return layout

    model = family("llama")
    add_layout_forward(model)
    monkeypatch.setattr(layout_check, "packed_layout", restarted)
    assert not check_packing(model, PAIRS).passed


def gpt_oss():
    size = {**SIZE, "intermediate_size": 16, "num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 8}
    rope = {"rope_type": "default", "rope_theta": 1e4}
    return GptOssForCausalLM(GptOssConfig(**size, rope_parameters=rope, attn_implementation="eager"))


def falcon():
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "bos_token_id", "eos_token_id")
    return FalconForCausalLM(FalconConfig(**{name: SIZE[name] for name in names}))


def longer_than_its_embeddings():
    model = copy.deepcopy(family("llama"))
    model.config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    model.config.max_position_embeddings = 64
    return model


def of_mixed_layers():
    model = copy.deepcopy(family("llama"))
    model.config.layer_types = ["full_attention", "linear_attention", "full_attention"]
    return model


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (gpt_oss, "GptOssAttention uses s_aux"),
        (falcon, "FalconForCausalLM doesn't use transformers' attention interface"),
        (
            longer_than_its_embeddings,
            "'dynamic' rotary embeddings depend on the longest sequence fed, beyond 64 tokens",
        ),
        (of_mixed_layers, "layers of type linear_attention"),
    ],
)
def test_a_feature_that_is_not_understood_is_named(make, named, capsys):
    layout, check = settled(make())
    assert (layout.kind, check) == ("padded", None)
    assert f"layout: padded rows, because packed ones don't fit this model: {named}" in capsys.readouterr().out


def test_what_a_layer_says_beyond_the_understood_is_refused():
    layer = family("llama").model.layers[0].self_attn
    states = torch.zeros(1, 4, 2, 8)
    spans = SpanMasks((Segment(2),), {None: [None]})
    for told, named in [
        ({"spans": spans, "position_bias": states}, "position_bias"),
        ({"spans": spans, "dropout": 0.1}, "attention dropout"),
        ({"spans": spans, "sliding_window": 7}, "a window of 7"),
        ({}, "hands no spans down"),
    ]:
        with pytest.raises(UnknownFeature, match=named):
            attend_by_spans(layer, states, states, states, None, **told)
