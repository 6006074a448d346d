"""The load-balancing loss of mixture-of-experts models, over the tokens that a layout feeds."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from bfpo.errors import ModelError, RecipeError
from bfpo.model.layout import Layout
from bfpo.model.logps import Score
from bfpo.model.lora import CausalLM, unwrap_adapter


def router_loss_weight(model: CausalLM, requested: float | None) -> float:
    """Return the weight of the load-balancing loss: the requested one, or the model's own.

    Args:
        model: Causal language model.
        requested: Weight, at least 0; None for `router_aux_loss_coef` of the model's configuration.

    Returns:
        The weight, 0 for a model without experts.

    Raises:
        RecipeError: If a weight is requested for a model without experts.
    """
    config = unwrap_adapter(model).config.get_text_config()
    if not hasattr(config, "output_router_logits"):
        if requested:
            raise RecipeError(
                f"`router_aux_loss_coef` is {requested:g}, and {config.model_type} has no router; leave it out"
            )
        return 0.0
    return float(getattr(config, "router_aux_loss_coef", 0.0) if requested is None else requested)


def scores_and_router_loss(model: PreTrainedModel, layout: Layout, *, score: Score) -> tuple[Tensor, Tensor]:
    """Return what a score returns, and the load-balancing loss of the tokens that were fed for it.

    Args:
        model: Mixture-of-experts model.
        layout: Layout; each token that is fed counts once, so the prompt of a packed row counts once.
        score: Function that calls the model's decoder once.

    Returns:
        The scores, and the loss of Switch Transformers over all layers, () float32; the number of chosen experts if
        they are chosen equally often.
    """
    # transformers annotates a tuple of all layers' logits as one of a single tensor.
    router_logits: list[Any] = []

    def ask(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, kwargs | {"output_router_logits": True}

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        router_logits.append(getattr(output, "router_logits", None))

    decoder = model.get_decoder()
    handles = (decoder.register_forward_pre_hook(ask, with_kwargs=True), decoder.register_forward_hook(keep))
    try:
        scores = score(model, layout)
    finally:
        for handle in handles:
            handle.remove()
    config = model.config.get_text_config()
    if not router_logits[0]:
        raise ModelError(
            f"{config.model_type}: transformers gives no logits of its routers; set router_aux_loss_coef to 0"
        )
    # Configurations have several names for the number of experts.
    num_experts = router_logits[0][0].shape[-1]
    loss = load_balancing_loss_func(router_logits[0], num_experts, config.num_experts_per_tok, _padding_mask(layout))
    assert isinstance(loss, Tensor)
    return scores, loss


def _padding_mask(layout: Layout) -> Tensor | None:
    """Return which tokens of padded rows are real, (R, L); None for a packed row, of which all are."""
    if not layout.row_lengths:
        return None
    rows, device = layout.input_ids, layout.input_ids.device
    return torch.arange(rows.shape[1], device=device) < torch.tensor(layout.row_lengths, device=device)[:, None]
