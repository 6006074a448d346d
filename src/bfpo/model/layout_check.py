"""Whether a model can be fed packed rows: checks of its configuration, then a comparison on real examples."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bfpo.config.recipes import LayoutSection
from bfpo.core.terminal import say
from bfpo.data.table import Example
from bfpo.errors import ModelError
from bfpo.model.attention import UnsupportedFeature, windows_of
from bfpo.model.layout import Layout, packed_layout, padded_layout
from bfpo.model.lora import CausalLM, unwrap_adapter

# Model types whose packed and padded numbers the tests compare, gradients included. For these a difference at run
# time is a bug in bfpo, and an error; any other model falls back to padded rows.
VERIFIED = {"llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "mixtral", "qwen3_moe"}


class PackingCheck(NamedTuple):
    """Comparison of packed and padded outputs: log-probabilities in nats, or scores.

    Args:
        difference: Largest difference between packed and padded.
        noise: Largest difference between rows padded together and the same rows fed one at a time.
        passed: Whether every completion's difference is at most four times the noise, or within rounding.
    """

    difference: float
    noise: float
    passed: bool

    def __str__(self) -> str:
        return (
            f"packed and padded outputs differ by up to {self.difference:.2g}, padded ones among themselves by "
            f"{self.noise:.2g}"
        )


def resolve_layout(
    model: CausalLM, requested: LayoutSection, examples: Sequence[Example], *, longest: int
) -> tuple[LayoutSection, PackingCheck | None]:
    """Return the layout to train with: the requested one, or padded rows if the model can't be fed packed ones.

    A fallback is reported with its reason.

    Args:
        model: Model on its device, after `add_layout_forward`.
        requested: Layout of the recipe.
        examples: Examples to compare packed and padded rows on.
        longest: Number of tokens of the longest sequence in the data.

    Raises:
        ModelError: If the numbers differ although the model's type is one of `VERIFIED`.
    """
    if requested.kind == "padded":
        return requested, None
    try:
        check_supported(unwrap_adapter(model), longest)
        check = check_packing(model, examples)
    except UnsupportedFeature as feature:
        reason = str(feature)
    else:
        if check.passed:
            return requested, check
        model_type = unwrap_adapter(model).get_decoder().config.model_type
        if model_type in VERIFIED:
            raise ModelError(f"{model_type}: {check}; report this bug, and set layout: {{kind: padded}} to avoid it")
        reason = str(check)
    say(f"layout: padded rows, because packed ones don't fit this model: {reason}")
    return requested.model_copy(update={"kind": "padded"}), None


def check_supported(model: PreTrainedModel, longest: int) -> None:
    """Check the configuration for features that the attention function doesn't get to see.

    Args:
        model: Model without an adapter.
        longest: Number of tokens of the longest sequence in the data.

    Raises:
        UnsupportedFeature: If packed rows don't support a feature; the message names it.
    """
    config = model.get_decoder().config
    windows_of(config)
    if not model._can_set_attn_implementation():
        raise UnsupportedFeature(f"{type(model).__name__} doesn't use transformers' attention interface")
    for prefix, rope in _rope_parameters(config):
        rope_type = rope.get("rope_type", "default")
        max_positions = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        if rope_type in ("dynamic", "longrope") and longest > max_positions:
            raise UnsupportedFeature(
                f"{prefix}'{rope_type}' rotary embeddings depend on the longest sequence fed, beyond "
                f"{max_positions:,} tokens"
            )


def _rope_parameters(config: Any) -> list[tuple[str, dict[str, Any]]]:
    """Return the rotary embeddings' parameters, by layer type where they differ, each with a prefix for messages."""
    parameters: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    by_layer_type = [(f"{name}: ", value) for name, value in parameters.items() if isinstance(value, dict)]
    return by_layer_type or [("", parameters)]


@torch.no_grad()
def check_packing(model: CausalLM, examples: Sequence[Example]) -> PackingCheck:
    """Compare packed with padded log-probabilities, without autocast.

    The difference is judged by what padding itself changes: the same rows, padded together and fed one at a time.

    Args:
        model: Model after `add_layout_forward`.
        examples: At least two examples, so that one could leak into another.

    Raises:
        UnsupportedFeature: If the model's attention uses a feature that packed rows don't support.
    """

    def score(layout: Layout) -> Tensor:
        with torch.autocast(model.device.type, enabled=False):
            logps: Tensor = model(layout=layout.to(model.device))
        return logps.double()

    packed, padded = score(packed_layout(examples)), score(padded_layout(examples))
    single = [Example(prompt, (completion,)) for prompt, completions in examples for completion in completions]
    noise = (padded - torch.cat([score(padded_layout([example])) for example in single])).abs().max()
    difference = (packed - padded).abs()
    # Rounding, for when the noise happens to be 0: in float32 about 1e-6 of the log-probability plus 1e-5. In half
    # precision such a share would let anything pass, so there errors are assumed to cancel like random ones.
    eps, size = torch.finfo(model.dtype).eps, padded.abs() + 10
    rounding = 8 * max(eps, 1e-11) * (size if eps < 1e-6 else size.sqrt())
    # Broken weights are not what is checked here: the first loss that isn't finite names its row.
    passed = bool(((difference <= torch.maximum(4 * noise, rounding)) | ~torch.isfinite(padded)).all())
    return PackingCheck(float(difference.max()), float(noise), passed)
