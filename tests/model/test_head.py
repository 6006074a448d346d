"""The head: exact gradients in every form, factors and caps of the families, and memory."""

import shutil

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    HyperCLOVAXConfig,
    HyperCLOVAXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)
from transformers.models.falcon_h1 import FalconH1Config

from bfpo.model import logps
from bfpo.model.divergence import logps_and_divergences, vocabulary_logps
from bfpo.model.layout import packed_layout, padded_layout
from bfpo.model.logps import (
    add_layout_forward,
    check_against_plain_forward,
    chunk_size,
    completion_logps,
    completion_states,
    token_logps,
)

from .test_logps import examples

SIZE = {
    "vocab_size": 250,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 16,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.5,
}
HEADS = {
    "plain": lambda: LlamaForCausalLM(LlamaConfig(**SIZE)),
    "tied": lambda: LlamaForCausalLM(LlamaConfig(**SIZE, tie_word_embeddings=True)),
    "bias": lambda: PhiForCausalLM(PhiConfig(**SIZE)),
    "cap": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZE, head_dim=8, final_logit_softcapping=3.0)),
    "factor": lambda: CohereForCausalLM(CohereConfig(**SIZE, logit_scale=0.25)),
    "divisor": lambda: GraniteForCausalLM(GraniteConfig(**SIZE, logits_scaling=4.0)),
    "factor of the same name": lambda: HyperCLOVAXForCausalLM(HyperCLOVAXConfig(**SIZE, logits_scaling=0.25)),
}


def make(name, dtype=torch.float64):
    torch.manual_seed(0)
    return HEADS[name]().to(dtype).eval()


def gradients(model):
    grads = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    return grads


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_in_chunks_are_those_of_the_models_own_logits(name, frozen):
    model, layout = make(name), padded_layout(examples())
    model.get_output_embeddings().requires_grad_(not frozen)
    own = model(input_ids=layout.input_ids).logits.log_softmax(-1).flatten(0, 1)[layout.hidden_index, layout.targets]
    weights = torch.linspace(-1, 2, len(layout.targets), dtype=torch.float64)
    (own * weights).sum().backward()
    expected = gradients(model)
    chunked = token_logps(model, completion_states(model, layout), layout.targets, chunk=4)
    # transformers computes norms and rotary angles in float32, the same ones here
    torch.testing.assert_close(chunked, own, rtol=1e-12, atol=1e-12)
    (chunked * weights).sum().backward()
    found = gradients(model)
    assert found.keys() == expected.keys()
    for weight, gradient in expected.items():
        torch.testing.assert_close(found[weight], gradient, rtol=1e-6, atol=1e-8, msg=weight)


@pytest.mark.parametrize("name", ["plain", "bias", "cap", "factor"])
@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_are_those_of_finite_differences(name, frozen, monkeypatch):
    monkeypatch.setitem(SIZE, "vocab_size", 11)
    monkeypatch.setitem(SIZE, "hidden_size", 4)
    model = make(name)
    head = model.get_output_embeddings().requires_grad_(not frozen)
    states = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([3, 10, 0, 3, 7])
    weights = () if frozen else tuple(head.parameters())
    # gradcheck changes its inputs in place, so the weights of the head needn't be passed on.
    assert torch.autograd.gradcheck(
        lambda states, *_: token_logps(model, states, targets, chunk=2), (states, *weights)
    )


def test_a_frozen_head_is_applied_once(monkeypatch):
    model, layout = make("plain", torch.float32), padded_layout(examples())
    rows, vocabulary_logits = [], logps.vocabulary_logits

    def count(model, states):
        rows.append(len(states))
        return vocabulary_logits(model, states)

    monkeypatch.setattr(logps, "vocabulary_logits", count)
    for frozen, times in ((False, 2), (True, 1)):
        model.get_output_embeddings().requires_grad_(not frozen)
        completion_logps(model, layout, chunk=4).sum().backward()
        assert sum(rows) == times * len(layout.targets)
        rows.clear()


def test_bfloat16_gradients_are_as_exact_in_chunks():
    """A frozen head's gradient is rounded once more; that of a trained one is a sum of rounded chunks."""
    exact_model, layout = make("plain"), packed_layout(examples())
    completion_logps(exact_model, layout).sum().backward()
    exact = gradients(exact_model)

    def error(chunk, frozen):
        model = make("plain").to(torch.bfloat16)
        model.get_output_embeddings().requires_grad_(not frozen)
        completion_logps(model, layout, chunk=chunk).sum().backward()
        name = "model.norm.weight" if frozen else "lm_head.weight"
        return float((gradients(model)[name].double() - exact[name]).norm() / exact[name].norm())

    for frozen in (False, True):
        assert error(4, frozen) < 1.5 * error(1024, frozen) < 0.05


def test_a_factor_that_is_not_known_stops_the_run(monkeypatch):
    model, layout = make("factor", torch.float32), padded_layout(examples(1))
    add_layout_forward(model)
    assert check_against_plain_forward(model, layout, tolerance=1e-5) < 1e-3
    monkeypatch.setattr(logps, "_logit_factor", lambda config: 1.0)
    with pytest.raises(logps.ModelError, match="its head does something that bfpo doesn't support"):
        check_against_plain_forward(model, layout, tolerance=1e-5)


def test_the_factor_of_falcon_h1_is_read():
    assert logps._logit_factor(FalconH1Config(lm_head_multiplier=0.5)) == 0.5


def test_chunks_hold_a_limited_number_of_logits():
    assert chunk_size(50_000, 600) == 600  # kept
    assert chunk_size(50_000, 6000) == 1024
    assert chunk_size(151_936, 6000) == 768  # 2^27 / 151,936 = 883.4, in tiles of 128
    assert chunk_size(262_144, 6000) == 512
    assert chunk_size(5_000_000, 6000) == 128


class LargestTensor(TorchDispatchMode):
    """Largest number of elements of a tensor that an operation returns, forward and backward."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, tuple | list) else (output,):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return output


@pytest.mark.parametrize("kind", ["trained", "frozen", "divergence"])
def test_no_tensor_is_larger_than_the_logits_of_a_chunk(kind, monkeypatch):
    model, reference = (make("plain", torch.float32) for _ in range(2))
    layout, chunk = packed_layout(examples()), 16
    # Larger than a weight of the model, smaller than all logits.
    allowed = chunk * SIZE["vocab_size"]
    assert SIZE["vocab_size"] * SIZE["hidden_size"] <= allowed < len(layout.targets) * SIZE["vocab_size"] / 1.5
    monkeypatch.setattr(logps, "MAX_KEPT_LOGITS", 1)
    monkeypatch.setattr(logps, "CHUNK", chunk)
    model.get_output_embeddings().requires_grad_(kind != "frozen")
    with LargestTensor() as largest:
        if kind == "divergence":
            with torch.no_grad():
                states = completion_states(reference, layout)

            def reference_logps(rows):
                with torch.no_grad():
                    return vocabulary_logps(reference, rows)

            scores = logps_and_divergences(
                model, layout, reference_states=states, reference_logps=reference_logps, share=0.5
            )
        else:
            scores = completion_logps(model, layout)
        scores.sum().backward()
    assert largest.numel == allowed


@pytest.mark.slow  # compiles
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler on a CPU")
@pytest.mark.filterwarnings("ignore")  # of torch.compile
@pytest.mark.parametrize("frozen", [False, True])
def test_a_compiled_head_gives_the_same_numbers(frozen):
    model = make("plain", torch.float32)
    model.get_output_embeddings().requires_grad_(not frozen)
    torch.compiler.reset()

    def score(states, targets):
        return token_logps(model, states, targets, chunk=4)

    results = []
    for run in (score, torch.compile(score)):
        states = torch.randn(9, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
        values = run(states, torch.arange(9))
        values.sum().backward()
        results.append((values.detach(), states.grad, gradients(model).get("lm_head.weight")))
    for plain, compiled in zip(*results, strict=True):
        assert (plain is None) == (compiled is None)
        if plain is not None:
            torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-5)
