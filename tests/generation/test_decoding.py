"""Decoding with rows that come and go: the same answers as a plain loop, for models of several families."""

import time

import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM

from bfpo.core.samples import Sampling
from bfpo.generation.decoding import Decoder, DecodeRequest, max_rows
from bfpo.generation.noise import TokenNoise
from bfpo.generation.sampler import Sampler
from bfpo.generation.slots import UnsupportedModel
from bfpo.generation.whole_batches import WholeBatches

from ..model.families import FAMILIES, family

# Many, so that some answers end before their limit.
ENDS = range(2, 250, 9)


def make_requests(count=12, seed=0):
    """Return requests of several lengths, of which some share a prompt."""
    generator = torch.Generator().manual_seed(seed)

    def random(high):
        return int(torch.randint(1, high, (), generator=generator))

    prompts = [tuple(random(250) for _ in range(3 + index % 5)) for index in range(count // 2)]
    return [DecodeRequest(prompts[index // 2], random(10**9), 2 + random(14)) for index in range(count)]


def plain_answer(model, request, temperature, ends=ENDS):
    """Decode one answer by feeding the whole sequence for every token."""
    ids, vocab_size = list(request.prompt_ids), model.config.get_text_config().vocab_size
    noise = TokenNoise(vocab_size, torch.device("cpu"))
    for position in range(request.max_new_tokens):
        with torch.no_grad():
            scores = model(torch.tensor([ids]), use_cache=False).logits[:, -1].double()
        if temperature:
            scores = noise.add(scores / temperature, [request.seed], [position])
        ids.append(int(scores.argmax()))
        if ids[-1] in ends:
            break
    return ids[len(request.prompt_ids) :]


def decode(decoder, requests):
    answers = [answer for batch in decoder.decode(requests) for answer in batch]
    assert sorted(answer.number for answer in answers) == list(range(len(requests)))
    return [token_ids for _, token_ids in sorted(answers)]


@pytest.mark.parametrize("name", FAMILIES)
def test_answers_are_those_of_a_plain_loop(name):
    model, requests = family(name, torch.float64).eval(), make_requests()
    sampler = Sampler(Sampling(temperature=1.0))
    expected = [plain_answer(model, request, 1.0) for request in requests]
    assert any(len(answer) < request.max_new_tokens for answer, request in zip(expected, requests, strict=True))
    for options in ({"max_tokens": 1000}, {"max_tokens": 60}, {"max_tokens": 1}, {"max_tokens": 1000, "max_rows": 3}):
        decoder = Decoder(model, ENDS, sampler, **options)
        decoder.check(requests[0].prompt_ids)
        assert decode(decoder, requests) == expected
    # Whole batches, which other models get, give the same answers. (Padding is NaN in eager attention in float64.)
    max_tokens = 1 if name == "gemma2" else 60
    assert decode(WholeBatches(model, ENDS, sampler, pad_id=0, max_tokens=max_tokens), requests) == expected


def test_greedy_answers_are_those_of_a_plain_loop():
    model, requests = family("gemma3_text", torch.float64).eval(), make_requests()
    expected = [plain_answer(model, request, 0) for request in requests]
    assert decode(Decoder(model, ENDS, Sampler(Sampling(temperature=0)), max_tokens=90), requests) == expected


def test_answers_longer_than_the_window_are_those_of_a_plain_loop():
    # The windows of the families are 4 tokens: every answer here leaves its prompt behind.
    model = family("mistral", torch.float64).eval()
    requests = [DecodeRequest((5, 9, 17), seed, 40) for seed in range(4)]
    expected = [plain_answer(model, request, 1.0, ends=()) for request in requests]
    assert set(map(len, expected)) == {40}
    assert decode(Decoder(model, [], Sampler(Sampling(temperature=1.0)), max_tokens=200), requests) == expected


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3_text", "gemma2"])
def test_candidates_are_read_as_a_plain_forward_pass_reads_them(name):
    model, requests = family(name, torch.float64).eval(), make_requests(8)[::-1]
    seen = []

    class Recorder:
        """Guard that changes nothing, and keeps the states of the two likeliest tokens."""

        def adjust(self, scores, peek):
            candidates = scores.topk(2).indices
            seen.append((candidates, *peek(candidates, (1, -1)).chunk(2, dim=-1)))
            return scores

    # At most three rows, so that rows of different lengths are read together.
    sampler = Sampler(Sampling(temperature=1.0), Recorder())
    answers = decode(Decoder(model, ENDS, sampler, max_tokens=1000, max_rows=3), requests)
    assert answers == decode(Decoder(model, ENDS, Sampler(Sampling(temperature=1.0)), max_tokens=1000), requests)
    read = {}
    for candidates, *states in seen:
        for row, tokens in enumerate(candidates.tolist()):
            for number, token in enumerate(tokens):
                pair = torch.stack([layer[row, number] for layer in states])
                read.setdefault(token, []).append(pair)
    for request, answer in zip(requests, answers, strict=True):
        for position in range(len(answer)):
            ids = [*request.prompt_ids, *answer[:position]]
            with torch.inference_mode():
                token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
                hidden = model(torch.tensor([[*ids, token]]), output_hidden_states=True).hidden_states
            expected = torch.stack([hidden[1][0, -1], hidden[-1][0, -1]])
            assert min(float((states - expected).abs().max()) for states in read[token]) < 1e-6


def count_forwards(model):
    shapes = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    return shapes


def test_a_shared_prompt_is_encoded_once_and_rows_are_refilled():
    model = family("llama").eval()
    shapes = count_forwards(model)
    # No end token, so that every answer has its full length.
    requests = [DecodeRequest((5, 9, 17), seed, 2 + 6 * (seed % 2)) for seed in range(8)]
    reported = []
    decoder = Decoder(
        model, [], Sampler(Sampling(temperature=1.0)), max_tokens=1000, max_rows=4, report=reported.append
    )
    batches = [[answer.number for answer in batch] for batch in decoder.decode(requests)]
    assert shapes[0] == (1, 3)
    assert all(shape[1] == 1 for shape in shapes[1:])
    # Short answers end first; their rows go to the requests that wait.
    assert batches[0] == [0, 2]
    steps = [shape[0] for shape in shapes[1:]]
    assert max(steps) == 4
    assert sum(steps) + 8 == sum(reported) == sum(request.max_new_tokens for request in requests)
    assert len(steps) < 2 * 7


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3_text"])
def test_a_common_prefix_is_encoded_once(name):
    model = family(name, torch.float64).eval()
    system = tuple(range(30, 42))
    requests = [request._replace(prompt_ids=system + request.prompt_ids) for request in make_requests()]
    expected = [plain_answer(model, request, 1.0) for request in requests]
    shapes = count_forwards(model)
    assert decode(Decoder(model, ENDS, Sampler(Sampling(temperature=1.0)), max_tokens=400), requests) == expected
    assert shapes[0] == (1, 12)
    assert max(length for _, length in shapes[1:]) == max(len(request.prompt_ids) for request in requests) - 12


def test_answers_are_yielded_as_they_end():
    model = family("llama").eval()
    requests = [DecodeRequest((5, 9, 17), 1, 3), DecodeRequest((5, 9, 17, 4), 2, 200)]
    decoder = Decoder(model, [], Sampler(Sampling(temperature=1.0)), max_tokens=1000)
    reported = []
    decoder._report = reported.append
    assert [answer.number for answer in next(decoder.decode(requests))] == [0]
    assert sum(reported) < 10


def test_an_answer_ends_where_it_is_not_to_go_on_and_others_are_unchanged():
    model, sampler = family("llama", torch.float64).eval(), Sampler(Sampling(temperature=1.0))
    requests = [DecodeRequest((5, 9, 17), seed, 12) for seed in range(6)]
    whole = decode(Decoder(model, ENDS, sampler, max_tokens=1000), requests)
    asked = []

    def goes_on(token_ids):
        asked.append(list(token_ids))
        return len(token_ids) < 3

    stopped = [request._replace(goes_on=goes_on) if request.seed % 2 else request for request in requests]
    answers = decode(Decoder(model, ENDS, sampler, max_tokens=1000), stopped)
    assert answers == [answer[:3] if index % 2 else answer for index, answer in enumerate(whole)]
    assert sorted(asked) == sorted(
        answer[:length]
        for answer in whole[1::2]
        for length in range(1, min(len(answer), 3) + 1)
        if length < len(answer) or (answer[-1] not in ENDS and len(answer) < 12)
    )


def test_a_model_with_another_cache_is_refused():
    config = MambaConfig(vocab_size=50, hidden_size=16, state_size=4, num_hidden_layers=2)
    model = MambaForCausalLM(config).eval()
    with pytest.raises(UnsupportedModel, match="its forward has no"):
        Decoder(model, ENDS, Sampler(Sampling()), max_tokens=100)


def test_a_model_whose_logits_change_is_refused(monkeypatch):
    model = family("llama").eval()
    decoder = Decoder(model, ENDS, Sampler(Sampling()), max_tokens=100)
    decoder.check([5, 9, 17])
    # As of a model that ignores the positions it is given.
    forward = model.forward

    def shifted(*args, position_ids=None, **kwargs):
        return forward(*args, position_ids=None if position_ids is None else position_ids * 2, **kwargs)

    monkeypatch.setattr(model, "forward", shifted)
    with pytest.raises(UnsupportedModel, match="its logits change by"):
        decoder.check([5, 9, 17])


def test_rows_on_a_cpu_are_limited_by_the_time_of_an_answer():
    assert max_rows(135_000_000, 64) > 60
    assert 15 < max_rows(135_000_000, 256) < 40
    assert max_rows(7_000_000_000, 64) == 4
    assert max_rows(135_000_000, 4096) == 4


def test_a_large_prompt_does_not_widen_the_rows_of_small_ones():
    model = family("llama").eval()
    shapes = count_forwards(model)
    requests = [*(DecodeRequest((5, 9, index), index, 4) for index in range(3, 23)), DecodeRequest((7,) * 150, 1, 4)]
    decode(Decoder(model, [], Sampler(Sampling(temperature=1.0)), max_tokens=160), requests)
    steps = [shape[0] for shape in shapes if shape[1] == 1]
    assert max(steps) == 20
    assert steps[-1] == 1


def test_decoding_starts_without_delay():
    """A guard against quadratic bookkeeping: thousands of requests must not keep the first answer waiting."""
    model = family("llama").eval()
    requests = [DecodeRequest((5, 9, index % 200 + 3), index, 2) for index in range(4000)]
    start = time.monotonic()
    next(Decoder(model, [], Sampler(Sampling(temperature=1.0)), max_tokens=100).decode(requests))
    assert time.monotonic() - start < 5
