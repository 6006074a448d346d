"""The head alone, forward and backward: log-probabilities of given tokens from hidden states.

The shape is the one in which the numbers of github.com/huggingface/trl/issues/7244 were measured.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import linear
from transformers import LlamaConfig, LlamaForCausalLM

from bfpo.model.logps import token_logps

from .cases import Cases, Result, Setting, require, time_and_peak

TOKENS, HIDDEN, VOCABULARY = 8192, 4096, 151_936
TINY = (64, 32, 1000)

Score = Callable[[LlamaForCausalLM, Tensor, Tensor], Tensor]


def cases(setting: Setting) -> Cases:
    """Return the cases, ours first."""
    ways: dict[str, Score] = {
        "bfpo, trained head": token_logps,
        "materialized": _materialized,
        "TRL, chunked": _trl,
        "Liger, cross-entropy": _liger,
    }
    by_name = {name: partial(_measure, way, setting) for name, way in ways.items()}
    frozen = {
        "bfpo, frozen head": partial(_measure, token_logps, setting, frozen=True),
        "materialized, frozen head": partial(_measure, _materialized, setting, frozen=True),
        "TRL, chunked, frozen head": partial(_measure, _trl, setting, frozen=True),
    }
    products = {"three matrix products": partial(_products, setting)}
    return products | by_name | frozen | {"bfpo, other chunks": partial(_chunks, setting)}


def _shape(setting: Setting) -> tuple[int, int, int]:
    return TINY if setting.dry else (TOKENS, HIDDEN, VOCABULARY)


def _inputs(setting: Setting, *, frozen: bool) -> tuple[LlamaForCausalLM, Tensor, Tensor]:
    """Return a model, of which only the head is used, hidden states and targets."""
    tokens, hidden, vocabulary = _shape(setting)
    torch.manual_seed(setting.seed)
    with setting.device:
        config = LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=hidden,
            num_hidden_layers=1,
            num_attention_heads=max(1, hidden // 128),
            intermediate_size=hidden,
        )
        model = LlamaForCausalLM(config).to(setting.dtype)
        states = torch.randn(tokens, hidden, dtype=setting.dtype).requires_grad_()
        targets = torch.randint(vocabulary, (tokens,))
    model.lm_head.requires_grad_(not frozen)
    return model, states, targets


def _measure(way: Score, setting: Setting, *, frozen: bool = False) -> Result:
    model, states, targets = _inputs(setting, frozen=frozen)
    weights = torch.linspace(-1, 1, len(states), device=states.device)

    def step() -> Tensor:
        states.grad = model.lm_head.weight.grad = None
        logps = way(model, states, targets)
        # A loss of preferences weights completions differently; cross-entropy is one number.
        (logps if logps.ndim == 0 else (logps * weights).sum()).backward()
        return logps

    result = time_and_peak(step, repeats=1 if setting.dry else 5)
    logps = step().detach().double()
    if logps.ndim:
        with torch.no_grad():
            pieces = zip(states.split(512), targets.split(512), strict=True)
            exact = torch.cat([_materialized(model, *rows) for rows in pieces])
        result["largest error, nats"] = float((logps - exact.double()).abs().max())
    return result


def _products(setting: Setting) -> Result:
    """Time the products alone: logits, gradient of the states, gradient of the weight."""
    model, states, _ = _inputs(setting, frozen=True)
    weight, states = model.lm_head.weight, states.detach()
    logits = linear(states, weight)

    def run() -> None:
        linear(states, weight)
        torch.mm(logits, weight)
        torch.mm(logits.t(), states)

    return time_and_peak(run, repeats=1 if setting.dry else 5)


def _chunks(setting: Setting) -> Result:
    """Time and peak of our head by the size of its chunks."""
    tokens = _shape(setting)[0]
    return {
        f"{kind}, {size}": _measure(partial(token_logps, chunk=size), setting, frozen=kind == "frozen")
        for size in (tokens // 16, tokens // 4)
        for kind in ("trained", "frozen")
    }


def _materialized(model: LlamaForCausalLM, states: Tensor, targets: Tensor) -> Tensor:
    return linear(states, model.lm_head.weight).float().log_softmax(-1).gather(-1, targets[:, None])[:, 0]


def _trl(model: LlamaForCausalLM, states: Tensor, targets: Tensor) -> Tensor:
    require("trl")
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    arguments = (None, targets, 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ("log_probs",))
    logps: Tensor = ChunkedLogProbFunction.apply(states, model.lm_head.weight, *arguments)[0]
    return logps


def _liger(model: LlamaForCausalLM, states: Tensor, targets: Tensor) -> Tensor:
    require("liger_kernel")
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss: Tensor = LigerFusedLinearCrossEntropyLoss(reduction="sum")(model.lm_head.weight, states, targets)
    return loss
