"""The load-balancing loss of a mixture of experts: its value, its gradient, and its place in a step."""

import numpy as np
import pytest
import torch
from transformers import GraniteMoeConfig, GraniteMoeForCausalLM, TrainingArguments

from bfpo.data.table import Example
from bfpo.errors import ModelError, RecipeError
from bfpo.losses.pairwise import BFPO
from bfpo.model.attention import span_attention
from bfpo.model.layout import packed_layout, padded_layout
from bfpo.model.logps import completion_logps
from bfpo.model.router_loss import router_loss_weight, scores_and_router_loss
from bfpo.training.encode import encode_pairs
from bfpo.training.sft import SFTTrainer
from bfpo.training.trainer import BFPOTrainer

from ..model.families import SIZE, family

FAMILIES = ["mixtral", "qwen3_moe"]


def examples():
    rng = np.random.default_rng(0)
    ids = [[rng.integers(3, 250, size, dtype=np.int32) for size in sizes] for sizes in ((5, 7), (11, 4))]
    return [Example(prompt, (completion,)) for prompt, completion in ids]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_loss_is_the_models_own_over_real_tokens(name):
    model, padded = family(name), padded_layout(examples())
    mask = torch.tensor([[True] * length + [False] * (11 - length + 3) for length in padded.row_lengths])
    own = model(padded.input_ids, attention_mask=mask.long(), output_router_logits=True).aux_loss
    for layout in (padded, packed_layout(examples())):
        scores, loss = scores_and_router_loss(model, layout, score=completion_logps)
        torch.testing.assert_close(loss, own, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(scores, completion_logps(model, layout), rtol=0, atol=0)


def test_the_number_of_experts_has_another_name_in_other_families():
    config = GraniteMoeConfig(**SIZE, num_local_experts=4, num_experts_per_tok=2, experts_implementation="eager")
    model, padded = GraniteMoeForCausalLM(config), padded_layout(examples())
    mask = torch.tensor([[True] * length + [False] * (14 - length) for length in padded.row_lengths])
    own = model(padded.input_ids, attention_mask=mask.long(), output_router_logits=True).aux_loss
    torch.testing.assert_close(
        scores_and_router_loss(model, padded, score=completion_logps)[1], own, rtol=1e-5, atol=1e-6
    )


def test_a_model_that_gives_no_router_logits_is_named():
    with pytest.raises(
        ModelError, match="llama: transformers gives no logits of its routers; set router_aux_loss_coef"
    ):
        scores_and_router_loss(family("llama"), padded_layout(examples()), score=completion_logps)


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_are_the_same_with_checkpointed_layers(name):
    def gradients(model):
        with span_attention(model.config):
            scores_and_router_loss(model, packed_layout(examples()), score=completion_logps)[1].backward()
        return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}

    plain, checkpointed = family(name).train(), family(name).train()
    checkpointed.activation_checkpointing_enable()
    expected = gradients(plain)
    routers = [name for name in expected if "gate.weight" in name]
    assert len(routers) == 3
    assert all(expected[name].norm() > 0 for name in routers)
    torch.testing.assert_close(gradients(checkpointed), expected, rtol=0, atol=0)


def args(folder, **changes):
    settings = {"max_steps": 1, "logging_steps": 1, "per_device_train_batch_size": 4, "learning_rate": 1e-3} | changes
    quiet = {"report_to": "none", "save_strategy": "no", "use_cpu": True, "disable_tqdm": True}
    return TrainingArguments(output_dir=str(folder), **settings, **quiet)


@pytest.fixture
def step(tmp_path, main_pairs, tokenizer):
    """Return a function that takes one step and returns its logs and the routers' weights."""

    def take(weight, *, kind=BFPOTrainer, **changes):
        model = family("mixtral", vocab_size=len(tokenizer))
        if kind is SFTTrainer:
            rows = [{"prompt": pair.prompt[0].content, "completion": pair.chosen} for pair in main_pairs]
            options = {}
        else:
            rows, options = encode_pairs(main_pairs, BFPO(), tokenizer), {"loss": BFPO(), "reference": "shared"}
        trainer = kind(
            model,
            args(tmp_path, **changes),
            rows,
            processing_class=tokenizer,
            router_aux_loss_coef=weight,
            **options,
        )
        trainer.train()
        routers = [value for name, value in model.named_parameters() if "gate.weight" in name]
        return trainer, trainer.state.log_history[0], torch.cat(routers).detach()

    return take


@pytest.mark.parametrize("kind", [BFPOTrainer, SFTTrainer])
def test_a_step_adds_the_weighted_loss(step, kind):
    without, with_loss = step(0.0, kind=kind), step(0.5, kind=kind)
    logs = with_loss[1]
    assert logs["router_aux_loss"] > 1.5  # two experts per token, chosen about equally often: 2
    # The logged loss is a float32 of up to 1e4.
    assert logs["loss"] - without[1]["loss"] == pytest.approx(0.5 * logs["router_aux_loss"], abs=2e-3)
    assert "router_aux_loss" not in without[1]
    assert logs.get("stream/main/loss") == without[1].get("stream/main/loss")
    assert not torch.equal(without[2], with_loss[2])
    assert with_loss[0].resume_settings().items() >= {("router_aux_loss_coef", 0.5)}
    assert "router_aux_loss_coef" not in without[0].resume_settings()


def test_accumulated_batches_add_their_shares(step):
    # The shares of two halves of a step add up to 1: the mean of their losses is logged and added once.
    without, with_loss = (
        step(weight, per_device_train_batch_size=2, gradient_accumulation_steps=2)[1] for weight in (0.0, 0.5)
    )
    assert with_loss["loss"] - without["loss"] == pytest.approx(0.5 * with_loss["router_aux_loss"], abs=2e-3)


def test_the_default_is_the_models_own_weight():
    moe, dense = family("mixtral"), family("llama")
    assert router_loss_weight(moe, None) == moe.config.router_aux_loss_coef == 0.001
    assert router_loss_weight(moe, 0.0) == router_loss_weight(dense, None) == router_loss_weight(dense, 0.0) == 0
    with pytest.raises(RecipeError, match=r"`router_aux_loss_coef` is 0.1, and llama has no router; leave it out"):
        router_loss_weight(dense, 0.1)
