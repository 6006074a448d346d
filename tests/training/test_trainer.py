import inspect
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from bfpo import BFPOTrainer, SFTTrainer
from bfpo.config.recipes import LayoutSection
from bfpo.core.pairs import CELLS, PairSignals
from bfpo.data.table import token_table
from bfpo.errors import DataError, ModelError, RecipeError, TrainingError
from bfpo.losses.pairwise import BFPO, DPO, MODPO, BFPOSoft, SafeDPO
from bfpo.model import attention
from bfpo.model.layout import Span
from bfpo.training.trainer import encode_pairs


@pytest.fixture
def arguments(tmp_path):
    """Return a function that makes plain arguments: SGD, constant rate, no clipping, one epoch."""

    def make(**changes):
        options = {
            "output_dir": str(tmp_path / "out"),
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


@pytest.fixture
def make_trainer(make_model, tokenizer, arguments, main_pairs, buffer_pairs):
    def make(train=None, buffer=None, model=None, args=None, **options):
        return BFPOTrainer(
            model or make_model(),
            args or arguments(),
            main_pairs if train is None else train,
            buffer_dataset=buffer_pairs if buffer is None else buffer,
            processing_class=tokenizer,
            loss=options.pop("loss", BFPO(beta=0.5)),
            **options,
        )

    return make


def weights(trainer) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])


def relative_difference(first, second, start) -> float:
    """Return how far two trainings differ, as a share of how far they moved."""
    return ((first - second).norm() / (first - start).norm()).item()


@pytest.mark.parametrize(("per_device", "accumulation"), [(2, 2), (1, 4)])
def test_accumulation_does_not_change_training(make_trainer, arguments, per_device, accumulation):
    whole = make_trainer()
    start = weights(whole)
    whole.train()
    split = make_trainer(
        args=arguments(per_device_train_batch_size=per_device, gradient_accumulation_steps=accumulation)
    )
    split.train()
    # float32 sums in another order: the weights' own rounding over what they moved
    assert relative_difference(weights(whole), weights(split), start) < 1e-4
    torch.testing.assert_close(weights(split), weights(whole), rtol=1e-6, atol=1e-7)
    losses = [[log["loss"] for log in t.state.log_history if "loss" in log] for t in (whole, split)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_packing_does_not_change_training(make_trainer, arguments, main_pairs):
    evaluated = {"eval_strategy": "steps", "eval_steps": 3}
    budgets = (LayoutSection(max_tokens_per_pack=budget) for budget in (1, 60))
    layouts = LayoutSection(), LayoutSection(kind="padded"), *budgets
    trainers = [
        make_trainer(args=arguments(**evaluated), layout=layout, eval_dataset=main_pairs) for layout in layouts
    ]
    packs = [len(next(iter(trainer.get_train_dataloader()))["packs"]) for trainer in trainers]
    assert packs[:2] == [1, 1]
    assert min(packs[2:]) >= 3
    start = weights(trainers[0])
    for trainer in trainers:
        trainer.train()
    whole, *others = trainers
    for other in others:
        # float32 sums in another order
        assert relative_difference(weights(whole), weights(other), start) < 1e-4
        for log, expected in zip(other.state.log_history, whole.state.log_history, strict=True):
            # margins are differences of log-probabilities of about 100 nats
            compared = {name for name in expected if not any(word in name for word in ("second", "runtime", "flos"))}
            assert "step" in compared
            found, wanted = ({name: logs[name] for name in compared} for logs in (log, expected))
            assert found == pytest.approx(wanted, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize(
    "how",
    [
        {"train_only": ["down_proj"]},
        {"peft_config": LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")},
        {"activation_checkpointing": True},
        {"train_only": ["q_proj", "o_proj"], "activation_checkpointing": True},
        {"tied": True},
    ],
    ids=lambda how: ", ".join(how),
)
def test_packed_and_padded_train_alike(make_trainer, make_model, arguments, how):
    options = dict(how)
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
        trainers.append(make_trainer(model=model, args=arguments(**args), layout=layout, **options))
        assert trainers[-1].layout.kind == kind
        start = weights(trainers[-1])
        trainers[-1].train()
        # float32 rounding of some 30 nats where the reference was computed in other packs
        rounding = 0 if trainers[-1].reference else 1e-5
        assert trainers[-1].start_check.largest_margin <= rounding
    assert relative_difference(*map(weights, trainers), start) < 1e-4


def test_packed_bfloat16_trains_like_padded_bfloat16(make_trainer, arguments):
    # Large steps against the rounding of activations to 8 bits; the layouts may differ by that rounding only.
    plain, *rounded = (
        make_trainer(args=arguments(bf16=bf16), layout=LayoutSection(kind=kind))
        for kind, bf16 in (("padded", False), ("padded", True), ("packed", True))
    )
    start = weights(plain)
    for trainer in (plain, *rounded):
        trainer.train()
    padded, packed = (relative_difference(weights(plain), weights(trainer), start) for trainer in rounded)
    assert 0 < packed < 2 * padded


def test_training_leaves_generation_and_saving_as_they_were(make_trainer, tmp_path):
    trainer = make_trainer()
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    assert trainer.layout.kind == "packed"
    assert trainer.model.config._attn_implementation == "sdpa"
    assert "bfpo" not in (tmp_path / "saved/config.json").read_text()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    ids = torch.tensor([[5, 6, 7]])
    texts = [model.eval().generate(ids, max_new_tokens=8, do_sample=False) for model in (trainer.model, loaded)]
    assert torch.equal(*texts)


def test_an_error_in_a_step_leaves_the_model_its_attention(make_trainer, monkeypatch):
    trainer = make_trainer()
    monkeypatch.setattr(trainer, "example_losses", lambda *args, **options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert trainer.model.config._attn_implementation == "sdpa"


def test_a_run_stops_when_packed_numbers_are_wrong(make_trainer, monkeypatch):
    sight = attention.sight

    def with_siblings(spans, window, device):
        return sight([Span(span.prompt, (sum(span.branches),)) for span in spans], window, device)

    monkeypatch.setattr(attention, "sight", with_siblings)
    # Masks that are kept would be the right ones here, and the wrong ones in later tests.
    monkeypatch.setattr(attention, "_small_masks", attention._masks_of_runs)
    with pytest.raises(ModelError, match="Please report it"):
        make_trainer().train()


def test_a_model_that_packed_rows_do_not_fit_is_trained_on_padded_ones(make_trainer, make_model, capsys):
    model = make_model()
    model.config.layer_types = ["full_attention", "chunked_attention"]
    trainer = make_trainer(model=model)
    trainer.train()
    assert trainer.layout.kind == "padded"
    assert trainer.start_check.packing_difference is None
    assert capsys.readouterr().out.count("because packed ones don't fit this model: layers of type chunked") == 1


def test_logged_loss_is_mean_of_main_plus_weighted_mean_of_buffer(make_trainer, arguments):
    trainer = make_trainer(args=arguments(max_steps=1), buffer_weight=0.3)
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["loss"] == pytest.approx(log["stream/main/loss"] + 0.3 * log["stream/buffer/loss"], rel=1e-6)
    # step 0: margins are 0, buffer pairs are all safe: (0.5/0.5)² = 1
    assert log["stream/buffer/loss"] == pytest.approx(1)


def test_a_buffer_equal_to_the_main_set_doubles_the_loss(make_trainer, arguments, main_pairs):
    args = {"per_device_train_batch_size": len(main_pairs), "max_steps": 2}
    plain = make_trainer(buffer=[], args=arguments(learning_rate=2e-4, **args))
    double = make_trainer(buffer=main_pairs, args=arguments(learning_rate=1e-4, **args))
    start = weights(plain)
    plain.train()
    double.train()
    assert relative_difference(weights(plain), weights(double), start) < 1e-4
    losses = [t.state.log_history[0]["loss"] for t in (plain, double)]
    assert losses[1] == pytest.approx(2 * losses[0], rel=1e-6)


def test_training_everything_by_pattern_is_full_training(make_trainer):
    full, by_pattern = make_trainer(), make_trainer(train_only=[".*"])
    full.train()
    by_pattern.train()
    torch.testing.assert_close(weights(by_pattern), weights(full), rtol=0, atol=0)


def test_selective_training_changes_only_what_is_selected(make_trainer):
    trainer = make_trainer(train_only=["down_proj"])
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    changed = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
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


def test_targets_beyond_the_completions_are_told(make_trainer):
    assert "raise loss.beta" in make_trainer(loss=BFPO(beta=0.001)).check_start().advice
    assert make_trainer(loss=BFPO(beta=0.5)).check_start().advice is None
    assert make_trainer(loss=DPO()).check_start().advice is None


def test_first_metrics_are_those_of_zero_margins(make_trainer, arguments, main_pairs):
    trainer = make_trainer(args=arguments(max_steps=1, per_device_train_batch_size=len(main_pairs)))
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


def test_training_moves_margins_towards_their_targets(make_trainer, arguments, main_pairs):
    args = arguments(
        max_steps=60, per_device_train_batch_size=len(main_pairs), optim="adamw_torch", learning_rate=1e-3
    )
    trainer = make_trainer(buffer=[], args=args, eval_dataset=main_pairs)
    trainer.train()
    metrics = trainer.evaluate()
    for cell, label in {"ss": 0.5, "su": 1, "us": -1, "uu": -0.5}.items():
        assert metrics[f"eval_bfpo/margin/{cell}"] == pytest.approx(label / 0.5, abs=0.4)
        assert metrics[f"eval_bfpo/sign_agreement/{cell}"] == 1


def test_evaluation_is_the_exact_mean_over_pairs(make_trainer, arguments, main_pairs):
    # A copy of the start's weights, which the trainers below can take over; a cache would be of their own starts.
    first = make_trainer(eval_dataset=main_pairs[:1], reference="shared")
    with torch.no_grad():
        first.model.lm_head.weight += 0.05 * torch.randn_like(first.model.lm_head.weight)

    def evaluated(pairs, batch_size):
        args = arguments(per_device_eval_batch_size=batch_size)
        trainer = make_trainer(model=first.model, args=args, eval_dataset=pairs, reference="shared")
        trainer.reference = first.reference
        return trainer.evaluate()["eval_loss"]

    expected = [evaluated([one], 1) for one in main_pairs[:11]]
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


def test_a_loss_that_is_not_finite_stops_and_names_the_row(make_trainer, main_pairs):
    class Broken(BFPO):
        def __call__(self, pairs):
            return torch.where(pairs.chosen_safe > pairs.rejected_safe, torch.nan, super().__call__(pairs))

    trainer = make_trainer(loss=Broken(beta=0.5), buffer=[])
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


def test_clipped_steps_are_counted(make_trainer, arguments):
    for limit, share in ((1e-9, 1.0), (1e9, 0.0)):
        trainer = make_trainer(args=arguments(max_grad_norm=limit, max_steps=1))
        trainer.train()
        assert trainer.state.log_history[0]["bfpo/clip_fraction"] == share


def test_resuming_in_the_middle_of_an_epoch_gives_the_same_bits(make_trainer, arguments):
    # several packs to a step
    layout = LayoutSection(max_tokens_per_pack=60)
    options = {
        "max_steps": 7,
        "save_strategy": "steps",
        "save_steps": 1,
        "optim": "adamw_torch",
        "learning_rate": 1e-3,
    }
    unbroken = make_trainer(args=arguments(**options), layout=layout)
    unbroken.train()
    # 12 main pairs in steps of 4: epochs end after 3 and 6; 10 buffer pairs wrap inside step 2
    for step in (2, 5):
        resumed = make_trainer(args=arguments(**options), layout=layout)
        resumed.train(resume_from_checkpoint=f"{unbroken.args.output_dir}/checkpoint-{step}")
        assert torch.equal(weights(resumed), weights(unbroken))
        losses = [[log["loss"] for log in t.state.log_history if "loss" in log] for t in (unbroken, resumed)]
        assert losses[0] == losses[1]


def test_a_run_may_be_resumed_with_another_layout(make_trainer, arguments):
    args = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    unbroken = make_trainer(args=arguments(**args))
    start = weights(unbroken)
    unbroken.train()
    for layout in (LayoutSection(kind="padded"), LayoutSection(max_tokens_per_pack=60)):
        resumed = make_trainer(args=arguments(**args), layout=layout)
        resumed.train(resume_from_checkpoint=f"{unbroken.args.output_dir}/checkpoint-2")
        assert relative_difference(weights(unbroken), weights(resumed), start) < 1e-4


def test_rows_of_a_data_set_serve_as_pairs(make_trainer, main_pairs, buffer_pairs):
    import datasets

    rows = datasets.Dataset.from_list([pair.to_row() for pair in main_pairs])
    from_rows = make_trainer(train=rows, buffer=[{**p.to_row(), "stream": None} for p in buffer_pairs])
    from_pairs = make_trainer()
    assert from_rows.table.row_ids == from_pairs.table.row_ids
    np.testing.assert_array_equal(from_rows.table.ids, from_pairs.table.ids)
    np.testing.assert_array_equal(from_rows.table.is_buffer, from_pairs.table.is_buffer)
    np.testing.assert_array_equal(from_rows.table.cells, from_pairs.table.cells)


def test_unlabeled_pairs_are_refused(make_trainer, main_pairs):
    with pytest.raises(DataError, match="toy: pairs without safety labels"):
        make_trainer(train=[replace(pair, labels=None) for pair in main_pairs])


@pytest.mark.parametrize(("loss", "column"), [(MODPO(), "reward_margin"), (BFPOSoft(), "chosen_win_rate")])
def test_a_loss_without_its_columns_is_refused_before_training(make_trainer, loss, column):
    with pytest.raises(DataError, match=column):
        make_trainer(loss=loss)


def test_bfpo_soft_takes_expected_safety_from_the_data_set(tokenizer, main_pairs):
    with_rates = [replace(p, signals=PairSignals(chosen_win_rate=0.9, rejected_win_rate=0.2)) for p in main_pairs]
    table = encode_pairs(with_rates, BFPOSoft(), tokenizer, None)
    assert set(table.signals["expected_safety"]) == {0.5}
    given = [replace(p, signals=replace(p.signals, expected_safety=0.1)) for p in with_rates]
    assert set(encode_pairs(given, BFPOSoft(), tokenizer, None).signals["expected_safety"]) == {0.1}


def test_pairs_that_a_loss_leaves_out_are_counted(make_trainer, caplog):
    trainer = make_trainer(loss=SafeDPO(), buffer=[])
    assert len(trainer.table) == 9
    assert "SafeDPO leaves out 3 of 12 pairs" in caplog.text


def test_processes_that_do_not_see_each_other_are_refused(make_trainer, arguments, monkeypatch):
    args = arguments()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RecipeError, match="2 processes were launched, but each would train by itself"):
        make_trainer(args=args)


def test_names_of_transformers_that_are_not_public_still_exist():
    assert list(inspect.signature(Trainer._get_grad_norm).parameters) == ["self", "model", "grad_norm"]
    source = inspect.getsource(Trainer.training_step)
    assert "self.loss_is_scaled_for_ga is not None" in source


@pytest.fixture
def demonstrations(tokenizer, main_pairs):
    table = encode_pairs(main_pairs, BFPO(), tokenizer, None)
    examples = [table[row]._replace(completions=table[row].completions[:1]) for row in range(len(table))]
    return token_table(examples, table.row_ids)


def test_supervised_loss_is_the_mean_over_tokens_whatever_the_split(make_model, arguments, demonstrations):
    trainers = []
    for per_device, accumulation in ((12, 1), (3, 4)):
        args = arguments(
            per_device_train_batch_size=per_device, gradient_accumulation_steps=accumulation, learning_rate=0.1
        )
        trainers.append(SFTTrainer(make_model(), args, demonstrations, demonstrations))
        assert trainers[-1].evaluate()["eval_loss"] > 0
        trainers[-1].train()
    whole, split = trainers
    torch.testing.assert_close(weights(split), weights(whole), rtol=1e-5, atol=1e-6)
    log = next(log for log in whole.state.log_history if "loss" in log)
    assert log["loss"] == pytest.approx(log["stream/main/loss"], rel=1e-6)
    # the same number from plain logits: sum over all completion tokens, divided by their count
    model, total, count = make_model(), 0.0, 0
    for row in range(len(demonstrations)):
        prompt, (ids,) = demonstrations[row]
        fed = torch.tensor(np.concatenate([prompt, ids]))[None].long()
        logps = model(input_ids=fed).logits.double().log_softmax(-1)[0, len(prompt) - 1 : -1]
        total -= logps.gather(1, fed[0, len(prompt) :, None]).sum().item()
        count += len(ids)
    assert log["loss"] == pytest.approx(total / count, rel=1e-5)


def test_metrics_file_holds_one_json_object_per_log(make_trainer, tmp_path):
    from bfpo.training.callbacks import MetricsFile

    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1, "old": true}\n{"half')
    trainer = make_trainer()
    trainer.add_callback(MetricsFile(file))
    trainer.train()
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 3]
    assert not any("old" in line for line in lines)


def test_activation_checkpointing_changes_memory_not_training(make_trainer, arguments):
    plain, checkpointed = make_trainer(), make_trainer(args=arguments(activation_checkpointing=True))
    plain.train()
    checkpointed.train()
    torch.testing.assert_close(weights(checkpointed), weights(plain), rtol=1e-6, atol=1e-7)


def test_bfloat16_autocast_starts_at_zero_margins_and_trains(make_trainer, arguments):
    trainer = make_trainer(args=arguments(bf16=True))
    before = weights(trainer)
    trainer.train()
    assert trainer.start_check.largest_margin == 0
    assert not torch.equal(weights(trainer), before)


def test_workers_give_the_same_batches(make_trainer, arguments):
    alone, helped = make_trainer(), make_trainer(args=arguments(dataloader_num_workers=2))
    alone.train()
    helped.train()
    torch.testing.assert_close(weights(helped), weights(alone), rtol=0, atol=0)


def test_the_best_of_several_evaluations_can_be_kept(make_trainer, arguments, main_pairs, buffer_pairs):
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_main_loss", "greater_is_better": False}
    args = arguments(eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, **best)
    trainer = make_trainer(args=args, eval_dataset={"main": main_pairs, "buffer": buffer_pairs})
    trainer.train()
    losses = [log["eval_main_loss"] for log in trainer.state.log_history if "eval_main_loss" in log]
    assert len(losses) == 3
    assert trainer.evaluate()["eval_main_loss"] == pytest.approx(min(losses), rel=1e-6)
