"""The work of `bfpo model interpolate`: the weighted mean of two models' weights."""

from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bfpo.config.recipes import ModelSection
from bfpo.core.terminal import say
from bfpo.errors import ModelError, RecipeError
from bfpo.model.load import load_model, load_tokenizer
from bfpo.model.merge import DTYPES
from bfpo.model.reference_cache import without_provenance
from bfpo.model.save import check_out, save_checkpoint


def interpolate_checkpoints(first: str, second: str, out: Path, *, weight: float, dtype: str = "float32") -> None:
    """Save the model with the weights (1 - weight)·first + weight·second, with the tokenizer of the second.

    Adapters are merged into their base models first. The mean is taken in float32. The model is saved under a
    temporary name and renamed, so that `out` is never incomplete.

    Args:
        first: Folder or hub id of a model or a LoRA adapter.
        second: Same for a model of the same architecture.
        out: Output folder; must be empty or not exist yet.
        weight: Weight of the second model, in [0, 1].
        dtype: Type of the saved weights, one of `DTYPES`.

    Raises:
        RecipeError: If the weight or `dtype` isn't allowed.
        ModelError: If a model can't be loaded, the models differ in their parameters, settings or vocabularies, or
            `out` isn't empty.

    Source:
        P-SACPO, Wachi et al., arXiv 2404.11049: merging the model aligned for helpfulness with that of the second
        stage; official `config/merge/linear_*.yaml` of line/sacpo @681c53c.
    """
    if not 0 <= weight <= 1:
        raise RecipeError(f"weight is {weight}; expected a number from 0 to 1")
    if dtype not in DTYPES:
        raise RecipeError(f"dtype is '{dtype}'; expected one of {', '.join(DTYPES)}")
    check_out(out)
    (model, tokenizer), (other, other_tokenizer) = _load(second), _load(first)
    if tokenizer.get_vocab() != other_tokenizer.get_vocab():
        raise ModelError(f"'{first}' and '{second}' have different vocabularies; expected models of one tokenizer")
    theirs, ours = dict(other.named_parameters()), dict(model.named_parameters())
    for name in sorted({*theirs, *ours}):
        shapes = [tuple(each[name].shape) if name in each else "missing" for each in (theirs, ours)]
        if shapes[0] != shapes[1]:
            raise ModelError(
                f"parameter '{name}' is {shapes[0]} in '{first}' and {shapes[1]} in '{second}'; expected models of "
                "one architecture"
            )
    settings = [without_provenance(each.config.to_dict()) for each in (other, model)]
    keys = {key for each in settings for key in each if not key.endswith("_token_id")}
    if differing := sorted(key for key in keys if settings[0].get(key) != settings[1].get(key)):
        raise ModelError(
            f"'{first}' and '{second}' differ in {', '.join(differing[:5])} of config.json; expected models of one "
            "architecture"
        )
    with torch.no_grad():
        for name, parameter in ours.items():
            parameter.copy_((1 - weight) * theirs[name] + weight * parameter)
    save_checkpoint(model.to(getattr(torch, dtype)), tokenizer, out)
    say(f"saved {1 - weight:g} · {first} + {weight:g} · {second} to {out} ({dtype})")


def _load(path: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    section = ModelSection(path=path)
    model = load_model(section)
    merged = model.merge_and_unload() if isinstance(model, PeftModel) else model
    assert isinstance(merged, PreTrainedModel)
    return merged, load_tokenizer(section)
