"""The trainers: training independent of layout and split, resuming, metrics, and refused inputs."""

import inspect
import json
import weakref
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from bfpo import BFPOTrainer, SFTTrainer
from bfpo.config.recipes import LayoutSection
from bfpo.core.pairs import CELLS, PairSignals
from bfpo.data.table import token_table
from bfpo.errors import DataError, ModelError, RecipeError, TrainingError
from bfpo.losses.baselines import DPO, MODPO, SafeDPO
from bfpo.losses.pairwise import BFPO, BFPOSoft
from bfpo.losses.token_level import TDPO
from bfpo.model import attention
from bfpo.model.layout import Span
from bfpo.training import callbacks, stream_trainer
from bfpo.training.encode import encode_pairs
from bfpo.training.processes import bf16_slowdown


@pytest.fixture(scope="module")
def make_arguments(tmp_path_factory):
    """Return a function that makes plain arguments: SGD, constant rate, no clipping, one epoch."""

    def make(**changes):
        options = {
            "output_dir": str(tmp_path_factory.mktemp("run") / "out"),
            "optim": "sgd",
            "learning_rate": 1e-4,
            "lr_scheduler_type": "constant",
            "max_grad_norm": 0.0,
            "per_device_train_batch_size": 4,
            "max_steps": 3,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
            "remove_unused_columns": False,
        }
        return TrainingArguments(**(options | changes))

    return make


@pytest.fixture(scope="module")
def make_trainer(make_model, tokenizer, make_arguments, main_pairs, buffer_pairs):
    def make(train=None, buffer=None, model=None, args=None, **options):
        return BFPOTrainer(
            model or make_model(),
            args or make_arguments(),
            main_pairs if train is None else train,
            buffer_dataset=buffer_pairs if buffer is None else buffer,
            processing_class=tokenizer,
            loss=options.pop("loss", BFPO(beta=0.5)),
            **options,
        )

    return make


EVALUATED = {"eval_strategy": "steps", "eval_steps": 3}


@pytest.fixture(scope="module")
def baseline(make_trainer, make_arguments, main_pairs):
    """A trainer after three steps with packed rows, evaluated once; tests compare their own runs with it."""
    trainer = make_trainer(args=make_arguments(**EVALUATED), eval_dataset=main_pairs)
    trainer.start_weights = weights(trainer)
    trainer.train()
    return trainer


def weights(trainer) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])


def losses(trainer) -> list[float]:
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


def relative_difference(first, second, start) -> float:
    """Return the distance between two trained models, as a share of how far they moved."""
    return ((first - second).norm() / (first - start).norm()).item()


@pytest.mark.parametrize(("per_device", "accumulation"), [(2, 2), (1, 4)])
def test_accumulation_does_not_change_training(baseline, make_trainer, make_arguments, per_device, accumulation):
    split = make_trainer(
        args=make_arguments(per_device_train_batch_size=per_device, gradient_accumulation_steps=accumulation)
    )
    split.train()
    # float32 sums in another order: the rounding of the weights over how far they moved
    assert relative_difference(weights(baseline), weights(split), baseline.start_weights) < 1e-4
    torch.testing.assert_close(weights(split), weights(baseline), rtol=1e-6, atol=1e-7)
    assert losses(baseline) == pytest.approx(losses(split), rel=1e-5)


def packs_of_first_batch(trainer) -> int:
    return len(next(iter(trainer.get_train_dataloader()))["packs"])


@pytest.mark.parametrize(
    ("layout", "min_packs"),
    [
        (LayoutSection(kind="padded"), 1),
        (LayoutSection(max_tokens_per_pack=1), 3),
        (LayoutSection(max_tokens_per_pack=60), 3),
    ],
)
def test_packing_does_not_change_training(baseline, make_trainer, make_arguments, main_pairs, layout, min_packs):
    trainer = make_trainer(args=make_arguments(**EVALUATED), layout=layout, eval_dataset=main_pairs)
    assert packs_of_first_batch(baseline) == 1
    assert packs_of_first_batch(trainer) >= min_packs
    assert (packs_of_first_batch(trainer) == 1) == (layout.kind == "padded")
    trainer.train()
    # float32 sums in another order
    assert relative_difference(weights(baseline), weights(trainer), baseline.start_weights) < 1e-4
    for log, expected in zip(trainer.state.log_history, baseline.state.log_history, strict=True):
        compared = {name for name in expected if not any(part in name for part in ("second", "runtime", "flos"))}
        assert "step" in compared
        # margins are differences of log-probabilities of about 100 nats
        assert {name: log[name] for name in compared} == pytest.approx(
            {name: expected[name] for name in compared}, rel=1e-4, abs=1e-4
        )


@pytest.mark.parametrize(
    "changes",
    [
        {"train_only": ["down_proj"]},
        {"peft_config": LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")},
        {"activation_checkpointing": True},
        {"train_only": ["q_proj", "o_proj"], "activation_checkpointing": True},
        {"tied": True},
    ],
    ids=lambda changes: ", ".join(changes),
)
def test_packed_and_padded_train_alike(make_trainer, make_model, make_arguments, changes):
    options = dict(changes)
    args = {"activation_checkpointing": options.pop("activation_checkpointing", False)}
    # an adapter starts at 0 and moves slowly
    args["learning_rate"] = 1e-2 if "peft_config" in options else 1e-4
    tied = options.pop("tied", False)
    trainers = []
    for kind in ("packed", "padded"):
        model = make_model()
        if tied:
            model.config.tie_word_embeddings = True
            model.tie_weights()
        layout = LayoutSection(kind=kind, max_tokens_per_pack=150)
        trainer = make_trainer(model=model, args=make_arguments(**args), layout=layout, **options)
        assert trainer.layout_section.kind == kind
        start = weights(trainer)
        trainer.train()
        # float32 rounding of some 30 nats where the reference was computed in other packs
        rounding = 0 if trainer.reference else 1e-5
        assert trainer.start_check.largest_margin <= rounding
        trainers.append(trainer)
    assert relative_difference(*map(weights, trainers), start) < 1e-4


def test_packed_bfloat16_trains_like_padded_bfloat16(make_trainer, make_arguments):
    # Large steps against the rounding of activations to 8 bits; the layouts may differ by that rounding only.
    plain, *rounded = (
        make_trainer(args=make_arguments(bf16=bf16), layout=LayoutSection(kind=kind))
        for kind, bf16 in (("padded", False), ("padded", True), ("packed", True))
    )
    start = weights(plain)
    for trainer in (plain, *rounded):
        trainer.train()
    padded, packed = (relative_difference(weights(plain), weights(trainer), start) for trainer in rounded)
    assert 0 < packed < 2 * padded


def test_training_does_not_change_generation_and_saving(baseline, tmp_path):
    baseline.save_model(str(tmp_path / "saved"))
    assert baseline.layout_section.kind == "packed"
    assert baseline.model.config._attn_implementation == "sdpa"
    assert "bfpo" not in (tmp_path / "saved/config.json").read_text()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    ids = torch.tensor([[5, 6, 7]])
    completions = [
        model.eval().generate(ids, max_new_tokens=8, do_sample=False) for model in (baseline.model, loaded)
    ]
    assert torch.equal(*completions)


def test_an_error_in_a_step_restores_the_attention_of_the_model(make_trainer, monkeypatch):
    trainer = make_trainer()
    monkeypatch.setattr(trainer, "example_losses", lambda *args, **options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert trainer.model.config._attn_implementation == "sdpa"


def test_a_run_stops_when_packed_numbers_are_wrong(make_trainer, monkeypatch):
    mask_mod = attention.mask_mod

    def with_siblings(spans, window, device):
        return mask_mod([Span(span.prompt, (sum(span.branches),)) for span in spans], window, device)

    monkeypatch.setattr(attention, "mask_mod", with_siblings)
    # Masks of short spans are cached: this test must not use right ones, nor leave wrong ones to other tests.
    monkeypatch.setattr(attention, "_cached_segment_masks", attention._segment_masks)
    with pytest.raises(ModelError, match="report this bug"):
        make_trainer().train()


def test_a_model_that_packed_rows_do_not_fit_is_trained_on_padded_ones(make_trainer, make_model, capsys):
    model = make_model()
    model.config.layer_types = ["full_attention", "chunked_attention"]
    trainer = make_trainer(model=model)
    trainer.train()
    assert trainer.layout_section.kind == "padded"
    assert trainer.start_check.packing_difference is None
    assert capsys.readouterr().out.count("because packed ones don't fit this model: layers of type chunked") == 1


def test_logged_loss_is_mean_of_main_plus_weighted_mean_of_buffer(make_trainer, make_arguments):
    trainer = make_trainer(args=make_arguments(max_steps=1), buffer_weight=0.3)
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["loss"] == pytest.approx(log["stream/main/loss"] + 0.3 * log["stream/buffer/loss"], rel=1e-6)
    # step 0: margins are 0, buffer pairs are all safe: (0.5/0.5)² = 1
    assert log["stream/buffer/loss"] == pytest.approx(1)


def test_a_buffer_equal_to_the_main_set_doubles_the_loss(make_trainer, make_arguments, main_pairs):
    args = {"per_device_train_batch_size": len(main_pairs), "max_steps": 2}
    plain = make_trainer(buffer=[], args=make_arguments(learning_rate=2e-4, **args))
    double = make_trainer(buffer=main_pairs, args=make_arguments(learning_rate=1e-4, **args))
    start = weights(plain)
    plain.train()
    double.train()
    assert relative_difference(weights(plain), weights(double), start) < 1e-4
    assert losses(double)[0] == pytest.approx(2 * losses(plain)[0], rel=1e-6)


@pytest.mark.parametrize("layout", [LayoutSection(kind="padded"), LayoutSection(max_tokens_per_pack=1)])
def test_the_tail_of_a_step_is_the_same_however_its_pairs_are_packed(make_trainer, layout):
    loss = BFPO(beta=0.5, tail=0.4)
    whole, split = make_trainer(loss=loss), make_trainer(loss=loss, layout=layout)
    start = weights(whole)
    whole.train()
    split.train()
    assert relative_difference(weights(whole), weights(split), start) < 1e-4
    assert losses(whole) == pytest.approx(losses(split), rel=1e-5)
    everything = make_trainer()
    everything.train()
    assert relative_difference(weights(whole), weights(everything), start) > 0.05


def test_the_loss_of_a_tail_is_the_mean_of_the_largest_losses_of_each_stream(
    make_trainer, make_arguments, main_pairs
):
    args = make_arguments(max_steps=1, per_device_train_batch_size=12)
    trainer = make_trainer(loss=BFPO(beta=0.5, tail=0.75), args=args, buffer_weight=0.3)
    trainer.train()
    log = trainer.state.log_history[0]
    # Margins are 0: of the 12 main pairs 6 have the loss (1/0.5)² = 4 and 6 have 1; the worst 9 are 6 of the first
    # and 3 of the second. All buffer pairs have 1.
    assert log["loss"] == pytest.approx((6 * 4 + 3 * 1) / 9 + 0.3, rel=1e-6)
    # The metrics are those of all pairs.
    assert log["stream/main/loss"] == pytest.approx(2.5, rel=1e-6)


def test_a_tail_of_everything_is_the_plain_loss_to_the_bit(baseline, make_trainer):
    trainer = make_trainer(loss=BFPO(beta=0.5, tail=1.0))
    trainer.train()
    assert torch.equal(weights(trainer), weights(baseline))


def test_a_tail_of_accumulated_steps_is_refused(make_trainer, make_arguments):
    args = make_arguments(gradient_accumulation_steps=2)
    with pytest.raises(
        RecipeError, match=r"loss.tail is 0.2 and gradient_accumulation_steps is 2; .* raise per_device"
    ):
        make_trainer(loss=BFPO(beta=0.5, tail=0.2), args=args)


def test_token_level_dpo_without_divergences_is_dpo(make_trainer):
    plain, token_level = (
        make_trainer(loss=DPO(beta=0.5)),
        make_trainer(loss=TDPO(beta=0.5, alpha=0), reference="shared"),
    )
    start = weights(plain)
    plain.train()
    token_level.train()
    assert relative_difference(weights(plain), weights(token_level), start) < 1e-4
    assert losses(plain) == pytest.approx(losses(token_level), rel=1e-5)


@pytest.mark.parametrize(
    "changes", [{}, {"peft_config": LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")}]
)
def test_token_level_dpo_trains_alike_on_packed_and_padded_rows(make_trainer, make_arguments, changes):
    loss, layouts = TDPO(beta=0.5, alpha=5, token_tail=0.3), (None, LayoutSection(kind="padded"))
    args = {"learning_rate": 1e-2}
    packed, padded = (
        make_trainer(loss=loss, layout=layout, args=make_arguments(**args), **changes) for layout in layouts
    )
    start = weights(packed)
    packed.train()
    padded.train()
    assert packed.reference_kind == ("adapter" if changes else "shared")
    assert packed.start_check.largest_margin == 0
    assert relative_difference(weights(packed), weights(padded), start) < 1e-3
    plain = make_trainer(loss=DPO(beta=0.5), args=make_arguments(**args), **changes)
    plain.train()
    assert relative_difference(weights(packed), weights(plain), start) > 1e-3


def test_token_level_dpo_is_refused_with_the_cache(make_trainer):
    with pytest.raises(
        RecipeError, match=r"probabilities of all tokens, and reference is cache, .* use reference: shared"
    ):
        make_trainer(loss=TDPO(), reference="cache")


def test_training_everything_by_pattern_is_full_training(baseline, make_trainer):
    by_pattern = make_trainer(train_only=[".*"])
    by_pattern.train()
    torch.testing.assert_close(weights(by_pattern), weights(baseline), rtol=0, atol=0)


def test_selective_training_changes_only_what_is_selected(make_trainer):
    trainer = make_trainer(train_only=["down_proj"])
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    after = dict(trainer.model.named_parameters())
    changed = {name for name in before if not torch.equal(after[name], before[name])}
    assert changed == {name for name in before if "down_proj" in name}


def test_margins_before_the_first_step_are_exactly_zero(make_trainer):
    trainer = make_trainer()
    check = trainer.check_start()
    assert check.largest_margin == 0
    assert check.plain_difference < 1e-3
    assert check.largest_target == pytest.approx(2)  # ±1 / 0.5


def test_a_policy_that_is_not_the_reference_is_caught(make_trainer):
    trainer = make_trainer()
    with torch.no_grad():
        trainer.model.lm_head.weight += 0.01 * torch.randn_like(trainer.model.lm_head.weight)
    with pytest.raises(TrainingError, match="policy and reference differ before the first step"):
        trainer.train()


def test_targets_that_cannot_be_reached_are_reported(make_trainer):
    assert "raise loss.beta" in make_trainer(loss=BFPO(beta=0.001)).check_start().advice
    assert make_trainer(loss=BFPO(beta=0.5)).check_start().advice is None
    assert make_trainer(loss=DPO()).check_start().advice is None
    weighted = make_trainer(loss=BFPO(beta=0.5, safety_weight=1e4)).check_start()
    assert weighted.largest_target == pytest.approx((1 + 1e4) / 0.5)
    assert "lower loss.safety_weight" in weighted.advice


def test_first_metrics_are_those_of_zero_margins(make_trainer, make_arguments, main_pairs):
    trainer = make_trainer(args=make_arguments(max_steps=1, per_device_train_batch_size=len(main_pairs)))
    trainer.train()
    log = trainer.state.log_history[0]
    # three pairs of each cell: labels ±1/2, ±1; beta²·loss = label²
    assert log["bfpo/normalized_loss"] == pytest.approx((0.25 + 1 + 1 + 0.25) / 4)
    for cell, label in {"ss": 0.5, "su": 1, "us": -1, "uu": -0.5}.items():
        assert log[f"bfpo/fraction/{cell}"] == 0.25
        assert log[f"bfpo/margin/{cell}"] == 0
        assert log[f"bfpo/target_gap/{cell}"] == pytest.approx(-label / 0.5)
    assert log["rewards/margins"] == log["rewards/accuracies"] == 0
    assert log["logps/chosen"] < 0


def test_metrics_know_the_safety_weight(make_trainer, make_arguments, main_pairs):
    args = make_arguments(max_steps=1, per_device_train_batch_size=len(main_pairs))
    trainer = make_trainer(args=args, loss=BFPO(beta=0.5, safety_weight=2))
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["bfpo/normalized_loss"] == pytest.approx((0.25 + 9 + 9 + 0.25) / 4)
    for cell, label in {"ss": 0.5, "su": 3, "us": -3, "uu": -0.5}.items():
        assert log[f"bfpo/target_gap/{cell}"] == pytest.approx(-label / 0.5)


def test_training_moves_margins_towards_their_targets(make_trainer, make_arguments, main_pairs):
    args = make_arguments(
        max_steps=30,
        per_device_train_batch_size=len(main_pairs),
        optim="adamw_torch",
        learning_rate=1e-3,
        lr_scheduler_type="linear",
    )
    trainer = make_trainer(buffer=[], args=args, eval_dataset=main_pairs)
    trainer.train()
    metrics = trainer.evaluate()
    for cell, label in {"ss": 0.5, "su": 1, "us": -1, "uu": -0.5}.items():
        assert metrics[f"eval_bfpo/margin/{cell}"] == pytest.approx(label / 0.5, abs=0.4)
        assert metrics[f"eval_bfpo/sign_agreement/{cell}"] == 1


def test_evaluation_is_the_exact_mean_over_pairs(make_trainer, make_arguments, main_pairs):
    # With a copy as reference, which the trainers below can share; the cache would score the model they start from.
    first = make_trainer(eval_dataset=main_pairs[:1], reference="shared")
    with torch.no_grad():
        first.model.lm_head.weight += 0.05 * torch.randn_like(first.model.lm_head.weight)

    def evaluated(pairs, batch_size):
        args = make_arguments(per_device_eval_batch_size=batch_size)
        trainer = make_trainer(model=first.model, args=args, eval_dataset=pairs, reference="shared")
        trainer.reference = first.reference
        return trainer.evaluate()["eval_loss"]

    expected = [evaluated([pair], 1) for pair in main_pairs[:11]]
    assert np.std(expected) > 0.1
    for batch_size in (1, 5, 12):
        assert evaluated(main_pairs[:11], batch_size) == pytest.approx(np.mean(expected), rel=1e-6)


def test_a_cell_without_pairs_is_none_not_zero(make_trainer, buffer_pairs):
    metrics = make_trainer(eval_dataset=buffer_pairs).evaluate()
    assert metrics["eval_bfpo/margin/ss"] == 0
    assert [metrics[f"eval_bfpo/margin/{cell}"] for cell in CELLS[1:]] == [None, None, None]


def test_several_evaluation_sets_are_named(make_trainer, main_pairs, buffer_pairs):
    metrics = make_trainer(eval_dataset={"main": main_pairs, "buffer": buffer_pairs}).evaluate()
    assert metrics["eval_buffer_loss"] == pytest.approx(1)
    assert metrics["eval_main_loss"] == pytest.approx((1 + 4 + 4 + 1) / 4)


def test_other_evaluation_data_than_the_trainer_s_own_are_refused(make_trainer, main_pairs, buffer_pairs):
    trainer = make_trainer(eval_dataset={"main": main_pairs})
    assert "eval_main_loss" in trainer.evaluate()
    for data in (buffer_pairs, {"test": buffer_pairs}, "test"):
        with pytest.raises(TypeError, match="give the name of one of main"):
            trainer.evaluate(data)
    with pytest.raises(TypeError, match="Make another trainer"):
        make_trainer(eval_dataset=main_pairs).evaluate(buffer_pairs)


def test_a_seed_of_the_data_changes_their_order_only(make_trainer, make_arguments):
    def first_rows(**changes):
        return [int(row) for row in make_trainer(args=make_arguments(**changes)).plan.step(0).main]

    assert first_rows() == first_rows(data_seed=42)
    assert first_rows() != first_rows(data_seed=7)
    assert first_rows(data_seed=7) == first_rows(seed=7)


def test_the_start_check_needs_no_more_memory_than_a_step(make_trainer, make_arguments, monkeypatch):
    kwargs = {"use_reentrant": False, "every_n_layers": 1}
    args = make_arguments(activation_checkpointing=True, activation_checkpointing_kwargs=kwargs)
    trainer = make_trainer(args=args, layout=LayoutSection(max_tokens_per_pack=24))
    graphs, pair_logps = [], trainer.pair_logps

    def watched(model, batch):
        # What is left of the packs before.
        graphs.append(sum(ref() is not None for ref in refs))
        pairs = pair_logps(model, batch)
        refs.append(weakref.ref(pairs.chosen_logps))
        return pairs

    refs = []
    monkeypatch.setattr(trainer, "pair_logps", watched)
    trainer.check_start()
    assert len(graphs) > 1
    assert not any(graphs[1:])
    assert trainer.model.is_activation_checkpointing


@pytest.mark.parametrize("tail", [1.0, 0.5])
def test_a_loss_that_is_not_finite_stops_and_names_the_row(make_trainer, main_pairs, tail):
    class Broken(BFPO):
        def __call__(self, pairs):
            return torch.where(pairs.chosen_safe > pairs.rejected_safe, torch.nan, super().__call__(pairs))

    trainer = make_trainer(loss=Broken(beta=0.5, tail=tail), buffer=[])
    with pytest.raises(TrainingError, match="step 0: the loss is not finite for rows") as caught:
        trainer.train()
    bad = {pair.row_id for pair in main_pairs if pair.cell == "su"}
    named = {pair.row_id for pair in main_pairs if pair.row_id in str(caught.value)}
    assert named
    assert named <= bad


def test_an_evaluation_that_is_not_finite_is_an_error_too(make_trainer, main_pairs):
    trainer = make_trainer(eval_dataset=main_pairs)
    with torch.no_grad():
        trainer.model.lm_head.weight.fill_(torch.nan)
    with pytest.raises(TrainingError, match="evaluation: the loss is not finite"):
        trainer.evaluate()


def test_clipped_steps_are_counted(make_trainer, make_arguments):
    for limit, share in ((1e-9, 1.0), (1e9, 0.0)):
        trainer = make_trainer(args=make_arguments(max_grad_norm=limit, max_steps=1))
        trainer.train()
        assert trainer.state.log_history[0]["bfpo/clip_fraction"] == share


def test_resuming_in_the_middle_of_an_epoch_gives_the_same_bits(make_trainer, make_arguments, tmp_path):
    # Small packs, several to a step.
    layout = LayoutSection(max_tokens_per_pack=60)
    options = {
        "output_dir": str(tmp_path / "out"),
        "max_steps": 7,
        "save_strategy": "steps",
        "save_steps": 1,
        "optim": "adamw_torch",
        "learning_rate": 1e-3,
    }
    unbroken = make_trainer(args=make_arguments(**options), layout=layout)
    unbroken.train()
    # 12 main pairs in steps of 4: epochs end after steps 3 and 6; 10 buffer pairs wrap around within step 2.
    for step in (2, 5):
        resumed = make_trainer(args=make_arguments(**options), layout=layout)
        resumed.train(resume_from_checkpoint=f"{unbroken.args.output_dir}/checkpoint-{step}")
        assert torch.equal(weights(resumed), weights(unbroken))
        assert losses(resumed) == losses(unbroken)


def test_a_run_can_be_resumed_with_another_layout(make_trainer, make_arguments, tmp_path):
    args = {"output_dir": str(tmp_path / "out"), "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    unbroken = make_trainer(args=make_arguments(**args))
    start = weights(unbroken)
    unbroken.train()
    for layout in (LayoutSection(kind="padded"), LayoutSection(max_tokens_per_pack=60)):
        resumed = make_trainer(args=make_arguments(**args), layout=layout)
        resumed.train(resume_from_checkpoint=f"{unbroken.args.output_dir}/checkpoint-2")
        assert relative_difference(weights(unbroken), weights(resumed), start) < 1e-4


def test_rows_of_a_data_set_are_read_as_pairs(make_trainer, main_pairs, buffer_pairs):
    import datasets

    rows = datasets.Dataset.from_list([pair.to_row() for pair in main_pairs])
    from_rows = make_trainer(train=rows, buffer=[{**pair.to_row(), "stream": None} for pair in buffer_pairs])
    from_pairs = make_trainer()
    assert from_rows.table.row_ids == from_pairs.table.row_ids
    np.testing.assert_array_equal(from_rows.table.ids, from_pairs.table.ids)
    np.testing.assert_array_equal(from_rows.table.is_buffer, from_pairs.table.is_buffer)
    np.testing.assert_array_equal(from_rows.table.cells, from_pairs.table.cells)


def test_unlabeled_pairs_are_refused(make_trainer, main_pairs):
    with pytest.raises(DataError, match="train_dataset row 1 has no safety labels"):
        make_trainer(train=[replace(pair, labels=None) for pair in main_pairs])


@pytest.mark.parametrize(("loss", "column"), [(MODPO(), "reward_margin"), (BFPOSoft(), "chosen_win_rate")])
def test_a_loss_without_its_columns_is_refused_before_training(make_trainer, loss, column):
    with pytest.raises(DataError, match=column):
        make_trainer(loss=loss)


def test_bfpo_soft_takes_expected_safety_from_the_data_set(tokenizer, main_pairs):
    signals = PairSignals(chosen_win_rate=0.9, rejected_win_rate=0.2)
    for pair_signals, expected in ((signals, 0.5), (replace(signals, expected_safety=0.1), 0.1)):
        pairs = [replace(pair, signals=pair_signals) for pair in main_pairs]
        assert set(encode_pairs(pairs, BFPOSoft(), tokenizer).signals["expected_safety"]) == {expected}


def test_pairs_that_a_loss_leaves_out_are_counted(make_trainer, caplog):
    trainer = make_trainer(loss=SafeDPO(), buffer=[])
    assert len(trainer.table) == 9
    assert "SafeDPO leaves out 3 of 12 pairs" in caplog.text


def test_processes_that_would_train_separately_are_refused(make_trainer, make_arguments, monkeypatch):
    args = make_arguments()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RecipeError, match="2 processes were launched, but each would train separately"):
        make_trainer(args=args)


@pytest.mark.parametrize(
    ("bf16", "slowdown", "warns"), [(True, 50.0, True), (True, 0.5, False), (False, 50.0, False)]
)
def test_slow_bf16_is_warned_of(make_trainer, make_arguments, monkeypatch, capsys, bf16, slowdown, warns):
    monkeypatch.setattr("bfpo.training.processes.bf16_slowdown", lambda: slowdown)
    make_trainer(args=make_arguments(bf16=bf16))
    message = "multiplies bfloat16 matrices 50 times as slowly as float32 ones; set trainer.bf16=false"
    assert (message in capsys.readouterr().out) == warns


def test_slowdown_of_bf16_is_that_of_products_of_matrices():
    assert 0.1 < bf16_slowdown() < 1000


def test_names_of_transformers_that_are_not_public_still_exist():
    assert list(inspect.signature(Trainer._get_grad_norm).parameters) == ["self", "model", "grad_norm"]
    source = inspect.getsource(Trainer.training_step)
    assert "self.loss_is_scaled_for_ga is not None" in source
    assert "self._train_batch_size * args.gradient_accumulation_steps" in inspect.getsource(
        Trainer.get_total_train_batch_size
    )


@pytest.fixture
def demonstrations(tokenizer, main_pairs):
    table = encode_pairs(main_pairs, BFPO(), tokenizer)
    examples = [table[row]._replace(completions=table[row].completions[:1]) for row in range(len(table))]
    return token_table(examples, table.row_ids)


def test_supervised_loss_is_the_mean_over_tokens_whatever_the_split(make_model, make_arguments, demonstrations):
    trainers = []
    for per_device, accumulation in ((12, 1), (3, 4)):
        args = make_arguments(
            per_device_train_batch_size=per_device, gradient_accumulation_steps=accumulation, learning_rate=0.1
        )
        trainers.append(SFTTrainer(make_model(), args, demonstrations, demonstrations))
        assert trainers[-1].evaluate()["eval_loss"] > 0
        trainers[-1].train()
    whole, split = trainers
    torch.testing.assert_close(weights(split), weights(whole), rtol=1e-5, atol=1e-6)
    log = next(log for log in whole.state.log_history if "loss" in log)
    assert log["loss"] == pytest.approx(log["stream/main/loss"], rel=1e-6)
    # The same number from plain logits: the sum over all completion tokens, divided by their count.
    model, total, count = make_model(), 0.0, 0
    for row in range(len(demonstrations)):
        prompt, (ids,) = demonstrations[row]
        sequence = torch.tensor(np.concatenate([prompt, ids]))[None].long()
        logps = model(input_ids=sequence).logits.double().log_softmax(-1)[0, len(prompt) - 1 : -1]
        total -= logps.gather(1, sequence[0, len(prompt) :, None]).sum().item()
        count += len(ids)
    assert log["loss"] == pytest.approx(total / count, rel=1e-5)


def test_metrics_file_has_one_json_object_per_log(make_trainer, tmp_path):
    from bfpo.training.callbacks import MetricsFile

    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1, "old": true}\n{"half')
    trainer = make_trainer()
    trainer.add_callback(MetricsFile(file))
    trainer.train()
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 3]
    assert not any("old" in line for line in lines)


def test_activation_checkpointing_does_not_change_training(baseline, make_trainer, make_arguments):
    checkpointed = make_trainer(args=make_arguments(activation_checkpointing=True))
    checkpointed.train()
    torch.testing.assert_close(weights(checkpointed), weights(baseline), rtol=1e-6, atol=1e-7)


def test_bfloat16_autocast_starts_at_zero_margins_and_trains(make_trainer, make_arguments):
    trainer = make_trainer(args=make_arguments(bf16=True))
    before = weights(trainer)
    trainer.train()
    assert trainer.start_check.largest_margin == 0
    assert not torch.equal(weights(trainer), before)


def test_workers_give_the_same_batches(baseline, make_trainer, make_arguments):
    trainer = make_trainer(args=make_arguments(dataloader_num_workers=2))
    trainer.train()
    torch.testing.assert_close(weights(trainer), weights(baseline), rtol=0, atol=0)


class Timed(TrainerCallback):
    """A clock on which a step takes 1 second, and a batch of an evaluation 1,000."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        for module in (callbacks, stream_trainer):
            monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: self.now))

    def on_step_begin(self, args, state, control, **kwargs):
        self.now += 1

    def on_prediction_step(self, args, state, control, **kwargs):
        self.now += 1000


def test_the_speed_of_training_leaves_evaluations_out(make_trainer, make_arguments, main_pairs, monkeypatch):
    trainer = make_trainer(
        args=make_arguments(eval_strategy="steps", eval_steps=1, logging_steps=1),
        eval_dataset={"main": main_pairs},
        callbacks=[Timed(monkeypatch)],
    )
    trainer.train()
    speeds = [log["tokens_per_second"] for log in trainer.state.log_history if "tokens_per_second" in log]
    assert len(speeds) == 3
    # The tokens of a step, which takes a second.
    assert all(speed == int(speed) > 10 for speed in speeds)


def test_the_best_of_several_evaluations_can_be_kept(make_trainer, make_arguments, main_pairs, buffer_pairs):
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_main_loss", "greater_is_better": False}
    args = make_arguments(eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, **best)
    trainer = make_trainer(args=args, eval_dataset={"main": main_pairs, "buffer": buffer_pairs})
    trainer.train()
    # An unknown metric is named at the first evaluation.
    wrong = make_arguments(metric_for_best_model="main_los", eval_strategy="steps", eval_steps=1)
    with pytest.raises(TrainingError, match=r"metric_for_best_model is 'main_los'; expected one of .*eval_main_loss"):
        make_trainer(args=wrong, eval_dataset={"main": main_pairs}).train()
    eval_losses = [log["eval_main_loss"] for log in trainer.state.log_history if "eval_main_loss" in log]
    assert len(eval_losses) == 3
    assert trainer.evaluate()["eval_main_loss"] == pytest.approx(min(eval_losses), rel=1e-6)
