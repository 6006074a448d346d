"""Whether a model can be fed packed rows: what is known of its kind, then a try on real examples."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bfpo.config.recipes import LayoutSection
from bfpo.core.terminal import say
from bfpo.data.table import Example
from bfpo.errors import ModelError
from bfpo.model.attention import UnknownFeature, windows_of
from bfpo.model.layout import Layout, packed_layout, padded_layout
from bfpo.model.lora import CausalLM, under_adapter

# Model types whose packed and padded numbers the tests compare, gradients included. For these a difference at run
# time is a fault of ours, and an error; any other model goes back to padded rows.
VERIFIED = {"llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "mixtral", "qwen3_moe"}


class PackingCheck(NamedTuple):
    """How packed and padded log-probabilities compare; nats.

    Args:
        difference: Largest difference between packed and padded.
        noise: Largest difference between the same rows padded together and fed one by one.
        passed: Whether every completion's difference is at most four times the noise, or rounding.
    """

    difference: float
    noise: float
    passed: bool

    def __str__(self) -> str:
        return (
            f"packed and padded log-probabilities differ by up to {self.difference:.2g} nats, padded ones among "
            f"themselves by {self.noise:.2g}"
        )


def settle_layout(
    model: CausalLM, layout: LayoutSection, examples: Sequence[Example], *, longest: int
) -> tuple[LayoutSection, PackingCheck | None]:
    """Return the layout to train with: what was asked for, or padded rows where the model can't be fed packed ones.

    A fallback is said, with its reason.

    Args:
        model: On its device, with `add_layout_forward`.
        layout: What was asked for.
        examples: A few examples to compare packed and padded rows on.
        longest: Tokens of the longest sequence of the data.

    Raises:
        ModelError: If the numbers differ though the model's type is one of `VERIFIED`.
    """
    if layout.kind == "padded":
        return layout, None
    try:
        refuse_unknown(under_adapter(model), longest)
        check = check_packing(model, examples)
    except UnknownFeature as feature:
        reason = str(feature)
    else:
        if check.passed:
            return layout, check
        model_type = under_adapter(model).get_decoder().config.model_type
        if model_type in VERIFIED:
            raise ModelError(f"{model_type}: {check}. Please report it; layout: {{kind: padded}} goes on without")
        reason = f"{check}"
    say(f"layout: padded rows, because packed ones don't fit this model: {reason}")
    return layout.model_copy(update={"kind": "padded"}), None


def refuse_unknown(model: PreTrainedModel, longest: int) -> None:
    """Look for what the configuration says and an attention function can't see.

    Raises:
        UnknownFeature: Naming it.
    """
    config = model.get_decoder().config
    windows_of(config)
    if not model._can_set_attn_implementation():
        raise UnknownFeature(f"{type(model).__name__} doesn't use transformers' attention interface")
    for name, rope in _rope_parameters(getattr(config, "rope_parameters", None) or {}):
        kind = rope.get("rope_type", "default")
        room = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        if kind in ("dynamic", "longrope") and longest > room:
            raise UnknownFeature(
                f"{name}'{kind}' rotary embeddings depend on the longest sequence fed, beyond {room:,} tokens"
            )


def _rope_parameters(parameters: dict[str, object]) -> list[tuple[str, dict[str, int]]]:
    by_layer_type = {name: value for name, value in parameters.items() if isinstance(value, dict)}
    if by_layer_type:
        return [(f"{name}: ", value) for name, value in by_layer_type.items()]
    return [("", parameters)]  # type: ignore[list-item]


@torch.no_grad()
def check_packing(model: CausalLM, examples: Sequence[Example]) -> PackingCheck:
    """Compare packed with padded log-probabilities, without autocast.

    The yardstick is what padding itself does: the same rows, padded together and fed one by one.

    Args:
        model: With `add_layout_forward`.
        examples: At least two, so that one could leak into another.

    Raises:
        UnknownFeature: If the model's attention tells of something that a packed row doesn't know.
    """

    def logps(layout: Layout) -> Tensor:
        with torch.autocast(model.device.type, enabled=False):
            found: Tensor = model(layout=layout.to(model.device))
        return found.double()

    packed, padded = logps(packed_layout(examples)), logps(padded_layout(examples))
    single = [Example(prompt, (ids,)) for prompt, completions in examples for ids in completions]
    noise = (padded - torch.cat([logps(padded_layout([example])) for example in single])).abs().max()
    difference = (packed - padded).abs()
    # Rounding, where the noise happens to be 0: for float32 about 1e-6 of the log-probability and 1e-5. In half
    # precision such a share would let anything pass; there errors are taken to cancel as random ones do.
    eps, size = torch.finfo(model.dtype).eps, padded.abs() + 10
    rounding = 8 * max(eps, 1e-11) * (size if eps < 1e-6 else size.sqrt())
    # A model with broken weights isn't this check's business: its loss will say so, with the row's name.
    passed = bool(((difference <= torch.maximum(4 * noise, rounding)) | ~torch.isfinite(padded)).all())
    return PackingCheck(float(difference.max()), float(noise), passed)
