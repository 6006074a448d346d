"""The plan of a launch: micro-batches that fit, operations, and what the command prints."""

import numpy as np
import pytest
from transformers import LlamaConfig

from bfpo.config.loading import check_recipe
from bfpo.config.recipes import LayoutSection, ModelSection, TrainRecipe
from bfpo.core.files import write_jsonl
from bfpo.data.table import Example, pair_table
from bfpo.errors import RecipeError
from bfpo.training.estimate import Arithmetic, footprint
from bfpo.training.launch_plan import HARDWARE, find_hardware, plan_strategy, plan_time, show_launch_plan

LLAMA_8B = LlamaConfig(
    hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_key_value_heads=8, vocab_size=128256
)
BF16 = Arithmetic(bf16=True, checkpointing=False, gpu=True)


@pytest.fixture(scope="module")
def needed_by_8b(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("8b")
    LLAMA_8B.save_pretrained(folder)
    return footprint(
        ModelSection(path=str(folder)), tokenizer, train_only=None, lora=None, reference="cache", arithmetic=BF16
    )


@pytest.fixture(scope="module")
def table(main_pairs, buffer_pairs):
    """Pairs of 100 prompt tokens and two completions of 51, of which 50 are fed."""
    pairs = [*main_pairs, *buffer_pairs]
    return pair_table([Example(np.arange(100), (np.arange(51), np.arange(51)))] * len(pairs), pairs)


def plan(needed, table, strategy, processes, memory=80e9, batch=8, **layout):
    return plan_strategy(
        needed,
        table,
        strategy=strategy,
        processes=processes,
        batch=batch,
        layout=LayoutSection(**layout),
        memory=memory,
    )


def test_eight_billion_weights_need_shards(needed_by_8b, table):
    # 16 bytes a weight for weights, gradients and moments in float32.
    assert 1.28e11 < 16 * needed_by_8b.selection.total < 1.3e11
    assert not plan(needed_by_8b, table, "none", 1).fits
    assert not plan(needed_by_8b, table, "ddp", 8).fits
    assert plan(needed_by_8b, table, "fsdp2", 8).fits
    assert plan(needed_by_8b, table, "zero3", 8).memory == plan(needed_by_8b, table, "fsdp2", 8).memory


def test_the_micro_batch_is_the_largest_that_fits_and_keeps_the_batch(needed_by_8b, table):
    plans = [plan(needed_by_8b, table, "fsdp2", 8, memory=memory) for memory in (80e9, 30e9, 26e9)]
    sizes = [found.micro_batch for found in plans]
    assert sizes[0] == 8 > sizes[1] >= sizes[2]
    assert all(found.fits and found.micro_batch * found.accumulation == 8 for found in plans)
    for found, memory in zip(plans, (80e9, 30e9, 26e9), strict=True):
        assert found.memory.total <= memory
        larger = needed_by_8b.estimate(2 * (2 * found.micro_batch) * 200, "fsdp2", 8)
        assert found.micro_batch == 8 or larger.total > memory


def test_a_pack_is_split_to_one_pair_before_nothing_fits(needed_by_8b, table):
    alone = needed_by_8b.estimate(200, "fsdp2", 8).total
    split = plan(needed_by_8b, table, "fsdp2", 8, memory=alone + 100 * needed_by_8b.token)
    assert (split.fits, split.micro_batch, split.max_tokens) == (True, 1, 300)
    assert not plan(needed_by_8b, table, "fsdp2", 8, memory=alone - 1).fits
    assert not plan(needed_by_8b, table, "fsdp2", 8, memory=alone + 100 * needed_by_8b.token, kind="padded").fits


def test_the_time_is_operations_over_the_assumed_rate(needed_by_8b, table):
    device = HARDWARE["h100"]
    options = {"steps": 10, "batch": 8, "processes": 8, "sharded": True, "hardware": device}
    found = plan_time(needed_by_8b, table, **options)
    # 10 steps of 8 pairs of each stream, 200 tokens fed and 102 scored; all weights: 6 operations a weight.
    assert (found.pairs, found.tokens) == (160, 160 * 200)
    body = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336 + 2 * 4096)
    head = 4096 * 128256
    expected = 160 * (200 * 6 * body + 102 * 6 * head) + len(table) * 200 * 2 * body
    assert found.seconds == pytest.approx(expected / (989e12 * 0.225 * 8), rel=1e-3)
    assert found.device_hours_per_million == pytest.approx(found.seconds * 8 / 3600 * 1e6 / 160)
    each_step = plan_time(needed_by_8b._replace(each_step=True), table, **options | {"sharded": False})
    assert each_step.seconds > found.seconds


def test_the_source_of_the_share_agrees_with_its_tokens():
    """OLMo2-7B, 7.3 B weights, 5,282 tokens a second and GPU."""
    assert pytest.approx(HARDWARE["h100"].share, rel=0.05) == 5282 * 6 * 7.3e9 / 989e12


def test_an_unknown_device_is_refused():
    with pytest.raises(RecipeError, match="`hardware` is 'h10'; did you mean 'h100'"):
        find_hardware("h10", 1)
    assert find_hardware("cpu", 2).memory == find_hardware("cpu", 1).memory / 2


def test_the_command_plans_without_weights(tmp_path, monkeypatch, main_pairs, make_model, tokenizer, capsys):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "pairs.jsonl", (pair.to_row() for pair in main_pairs))
    make_model().config.save_pretrained("model")
    tokenizer.save_pretrained("model")
    content = {
        "model": {"path": "model"},
        "data": [{"path": "pairs.jsonl"}],
        "trainer": {"output_dir": "runs/toy", "bf16": True, "per_device_train_batch_size": 4},
    }
    recipe = check_recipe(content, TrainRecipe, "toy")
    show_launch_plan(recipe, hardware="h100", gpus=8, price=2.0)
    text = capsys.readouterr().out
    assert "Memory of each process, GiB; 8 x h100, 74.5 GiB each" in text
    assert "start it with: torchrun --nproc_per_node 8 -m bfpo train RECIPE\n" in text
    assert "an estimate, not measured by this project: 22.5% of 989 TFLOP/s" in text
    assert "at 2 an hour" in text
    assert not (tmp_path / "runs").exists()
    monkeypatch.setitem(HARDWARE, "l4", HARDWARE["l4"]._replace(memory=1e6))
    show_launch_plan(recipe, hardware="l4", gpus=1)
    assert "nothing fits: lower text.max_length" in capsys.readouterr().out
