import numpy as np
import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaModel,
    MistralConfig,
    MistralForCausalLM,
)

from bfpo.data.table import Example
from bfpo.errors import ModelError
from bfpo.model.layout import padded_layout
from bfpo.model.logps import add_layout_forward, check_against_plain_forward, completion_logps


def examples(count=3, vocab=250) -> list[Example]:
    """Return prompts with pairs of completions of different lengths, one of a single token."""
    rng = np.random.default_rng(0)
    lengths = [(5, 7, 1), (3, 2, 9), (11, 4, 4)][:count]
    pieces = [[rng.integers(3, vocab, size, dtype=np.int32) for size in sizes] for sizes in lengths]
    return [Example(prompt, (chosen, rejected)) for prompt, chosen, rejected in pieces]


def plain_logp(model, example, completion) -> float:
    """Return a completion's log-probability from the full logits of a single sequence, in float64."""
    ids = torch.tensor(np.concatenate([example.prompt_ids, completion]))[None].long()
    logps = model(input_ids=ids).logits.double().log_softmax(-1)
    start = len(example.prompt_ids)
    return sum(logps[0, index - 1, ids[0, index]].item() for index in range(start, ids.shape[1]))


SMALL = {"vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
GEMMA = {**SMALL, "num_key_value_heads": 2, "intermediate_size": 48, "head_dim": 8, "final_logit_softcapping": 2.0}
MISTRAL = {**SMALL, "num_key_value_heads": 2, "intermediate_size": 48, "sliding_window": 4}


@pytest.fixture(params=["llama", "gpt2", "gemma2", "mistral with a window"])
def any_model(request, make_model):
    torch.manual_seed(0)
    if request.param == "llama":
        return make_model().double()
    if request.param == "gpt2":
        return GPT2LMHeadModel(GPT2Config(vocab_size=400, n_embd=32, n_layer=2, n_head=4)).double().eval()
    if request.param == "gemma2":
        return Gemma2ForCausalLM(Gemma2Config(**GEMMA, attn_implementation="eager")).double().eval()
    return MistralForCausalLM(MistralConfig(**MISTRAL)).double().eval()


def test_logps_equal_those_of_single_sequences(any_model):
    batch = examples()
    expected = [plain_logp(any_model, example, ids) for example in batch for ids in example.completions]
    # float64; 1e-6 because rotary angles and norms are computed in float32 inside transformers
    np.testing.assert_allclose(completion_logps(any_model, padded_layout(batch)).tolist(), expected, rtol=1e-6)


def test_the_size_of_chunks_does_not_change_logps_or_gradients(make_model):
    model, layout = make_model(), padded_layout(examples())
    whole, chunked = (completion_logps(model, layout, chunk=chunk) for chunk in (1024, 4))
    torch.testing.assert_close(chunked, whole, rtol=1e-7, atol=0)
    gradients = []
    for logps in (whole, chunked):
        model.zero_grad()
        logps.sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert gradients[0].norm() > 0
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-5)


def test_sums_are_more_exact_than_float32_sums(make_model):
    rng = np.random.default_rng(1)
    long = [Example(np.array([5], dtype=np.int32), (rng.integers(3, 250, 2000, dtype=np.int32),))]
    model = make_model()
    with torch.no_grad():
        logps = completion_logps(model, padded_layout(long))
        exact = plain_logp(model.double(), long[0], long[0].completions[0])
    assert logps.dtype == torch.float64
    # About 11,000 nats: a float32 sum can't be closer than its spacing there, 1e-3; errors of tokens average out.
    assert logps.item() == pytest.approx(exact, abs=2e-3)


def test_the_last_completion_token_is_never_fed(make_model):
    batch = examples()
    changed = [
        Example(prompt_ids, tuple(np.append(ids[:-1], 5).astype(np.int32) for ids in completions))
        for prompt_ids, completions in batch
    ]
    torch.testing.assert_close(padded_layout(changed).input_ids, padded_layout(batch).input_ids)
    fed = [(5, 7), (5, 1), (3, 2), (3, 9), (11, 4), (11, 4)]
    assert padded_layout(batch).num_tokens == sum(prompt + completion - 1 for prompt, completion in fed)


def test_padding_does_not_leak_into_a_shorter_row(make_model):
    model, batch = make_model(), examples()
    alone = completion_logps(model, padded_layout(batch[:1]))
    together = completion_logps(model, padded_layout(batch))
    torch.testing.assert_close(together[:2], alone, rtol=1e-6, atol=0)


def test_layout_forward_does_not_change_the_plain_forward(make_model):
    model, ids = make_model(), torch.tensor([[4, 5, 6, 7]])
    before = model(input_ids=ids).logits
    add_layout_forward(model)
    add_layout_forward(model)
    torch.testing.assert_close(model(input_ids=ids).logits, before, rtol=0, atol=0)
    layout = padded_layout(examples())
    torch.testing.assert_close(model(layout=layout), completion_logps(model, layout), rtol=0, atol=0)


def test_an_unsupported_head_is_caught(make_model):
    model = make_model()
    add_layout_forward(model)
    layout = padded_layout(examples(1))
    assert check_against_plain_forward(model, layout, tolerance=1e-5) < 1e-3
    original_forward = model.forward

    def scaled(self, *args, **kwargs):
        output = original_forward(*args, **kwargs)
        if "layout" not in kwargs:
            output.logits = output.logits / 3
        return output

    model.forward = scaled.__get__(model)
    with pytest.raises(ModelError, match="its head does something that bfpo doesn't support"):
        check_against_plain_forward(model, layout, tolerance=1e-5)


def test_a_model_without_a_head_is_refused(make_model):
    with pytest.raises(ModelError, match="LlamaModel has no language-model head"):
        add_layout_forward(LlamaModel(make_model().config))
