"""Score heads on a language model: one linear output per score, read at the last token of an answer.

The model is transformers' sequence classifier of the architecture, so each head is saved as an ordinary checkpoint
with one output.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from bfpo.data.table import Example, token_ids
from bfpo.errors import ModelError
from bfpo.model.layout import Layout, padded_layout
from bfpo.model.logps import completion_states
from bfpo.model.lora import CausalLM, unwrap_adapter

# Name of the head in transformers' sequence classifiers of decoders; recipes and adapters find it by this name.
HEAD = "score"


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the id of the padding; None if it can't be distinguished from the end of a text.

    transformers reads a score at the last token that isn't padding.
    """
    pad_id = tokenizer.pad_token_id
    return None if pad_id is None or pad_id == tokenizer.eos_token_id else int(pad_id)


def with_heads(train_only: list[str] | None) -> list[str] | None:
    """Return patterns of parameters to train, with the heads."""
    return None if train_only is None else [*train_only, rf"^{HEAD}\."]


def add_score_heads(model: CausalLM, count: int, *, pad_id: int | None, seed: int) -> PreTrainedModel:
    """Return a sequence classifier with the backbone of a language model, and new heads.

    Args:
        model: Language model without an adapter; its own head is dropped.
        count: Number of scores.
        pad_id: Id of the padding, see `padding_id`.
        seed: Seed of the initial heads.

    Raises:
        ModelError: If the model has an adapter, or transformers has no sequence classifier of its architecture with a
            linear head on the decoder.
    """
    if not isinstance(model, PreTrainedModel):
        raise ModelError(
            "the model has an adapter; merge it first (bfpo export --to merged), score heads are saved without one"
        )
    model.config.num_labels = count
    model.config.get_text_config().pad_token_id = pad_id
    backbone = model.get_decoder()
    try:
        with torch.device("meta"):
            scorer: PreTrainedModel = AutoModelForSequenceClassification.from_config(model.config)
    except ValueError:
        scorer = model
    head = getattr(scorer, HEAD, None)
    if not isinstance(head, nn.Linear) or type(scorer.base_model) is not type(backbone):
        raise ModelError(
            f"transformers has no sequence classifier of {type(model).__name__} with one linear head on its decoder; "
            "choose a model of another architecture, such as llama or qwen3"
        )
    setattr(scorer, scorer.base_model_prefix, backbone)
    new_head = nn.Linear(head.in_features, count, bias=False, device="cpu", dtype=model.dtype)
    std = getattr(model.config.get_text_config(), "initializer_range", 0.02)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        new_head.weight.copy_(torch.randn(new_head.weight.shape, generator=generator) * std)
    setattr(scorer, HEAD, new_head.to(model.device))
    return scorer


def completion_scores(model: PreTrainedModel, layout: Layout) -> Tensor:
    """Return the scores at the scored tokens of a layout, (N, heads), in float32 or float64.

    For a `ScoreTable` these are the last tokens of its completions.

    Args:
        model: Model of `add_score_heads`.
        layout: Layout with N scored tokens.
    """
    states, head = completion_states(model, layout), getattr(model, HEAD)
    weights = next(head.parameters())
    # In half precision two close scores would often be equal.
    with torch.autocast(states.device.type, enabled=False):
        scores: Tensor = head(states.to(weights.dtype))
    return scores.to(torch.promote_types(scores.dtype, torch.float32))


@torch.no_grad()
def check_against_classifier(model: nn.Module, examples: Sequence[Example], *, tolerance: float) -> float:
    """Compare scores with those of the classifier's own forward, which is how a saved head is read.

    Args:
        model: Model whose forward takes layouts.
        examples: Examples of a `ScoreTable`.
        tolerance: Largest allowed difference, as a share of the score's size or of 1.

    Returns:
        The largest difference.

    Raises:
        ModelError: If a difference is larger than allowed.
    """
    device = next(model.parameters()).device
    scores = model(layout=padded_layout(examples).to(device)).double().cpu()
    rows = [
        torch.tensor([[*prompt.tolist(), *token_ids(completion[:-1]).tolist()]], device=device)
        for prompt, completions in examples
        for completion in completions
    ]
    expected = torch.cat([model(input_ids=row).logits for row in rows]).double().cpu()
    difference = (scores - expected).abs()
    if bool((difference > tolerance * expected.abs().clamp(min=1)).any()):
        raise ModelError(
            f"{type(unwrap_adapter(model)).__name__}: scores computed from hidden states differ from the "  # type: ignore[arg-type]
            f"classifier's own by {difference.max():.3g}; its head does something that bfpo doesn't support"
        )
    return float(difference.max())


def save_score_head(
    model: PreTrainedModel, index: int, name: str, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    """Save one head with the backbone as a sequence classifier with one output.

    Args:
        model: Model of `add_score_heads`, without an adapter.
        index: Index of the head.
        name: Name of the score, which becomes the label of the output.
        tokenizer: Tokenizer, saved with it.
        folder: Output folder.
    """
    config, before = model.config, (model.config.id2label, model.config.label2id)
    config.id2label, config.label2id = {0: name}, {name: 0}
    # Training sets it to the tokenizer's.
    config.get_text_config().pad_token_id = padding_id(tokenizer)
    weights = model.state_dict()
    weights[f"{HEAD}.weight"] = weights[f"{HEAD}.weight"][index : index + 1].clone()
    try:
        model.save_pretrained(folder, state_dict=weights)
        tokenizer.save_pretrained(folder)
    finally:
        config.id2label, config.label2id = before
