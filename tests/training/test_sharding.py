"""What is refused before weights are sharded, and how often each process passes through the model."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from bfpo.errors import RecipeError
from bfpo.model.layout import Example, packed_layout
from bfpo.training.batches import Batch
from bfpo.training.processes import check_sharding, equal_packs, gradients_held_back


def pack(tokens: int) -> Batch:
    ids = torch.arange(tokens).numpy()
    return Batch(packed_layout([Example(ids, (ids[:2], ids[:3]))]), torch.ones(1), {}, (f"row of {tokens}",))


def of_processes(counts: list[int]) -> SimpleNamespace:
    """Stand for an accelerator whose processes have so many packs."""
    return SimpleNamespace(
        num_processes=len(counts),
        device=torch.device("cpu"),
        gather=lambda count: torch.tensor([*counts, int(count)]),
    )


def test_processes_fill_up_with_their_smallest_pack_at_weight_0():
    packs = [pack(9), pack(4)]
    filled = equal_packs(of_processes([4, 2]), packs, sharded=True)
    assert filled[:2] == packs
    assert [one.is_filler for one in filled] == [False, False, True, True]
    assert all(one.layout is packs[1].layout and float(one.weights.sum()) == 0 for one in filled[2:])
    assert equal_packs(of_processes([4, 2]), packs, sharded=False) == packs


def test_gradients_are_held_back_from_an_engine_that_steps_when_they_are_exchanged():
    accelerator = Accelerator(cpu=True)
    with gradients_held_back(accelerator, torch.nn.Linear(1, 1)):
        assert not accelerator.sync_gradients
    assert accelerator.sync_gradients


@pytest.mark.parametrize(
    ("plugin", "message"),
    [
        (SimpleNamespace(fsdp_version=1, cpu_ram_efficient_loading=False), "set fsdp_version: 2"),
        (SimpleNamespace(fsdp_version=2, cpu_ram_efficient_loading=True), "set it to false in the launcher's"),
    ],
)
def test_ways_of_sharding_that_hide_weights_are_refused(plugin, message):
    accelerator = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin))
    with pytest.raises(RecipeError, match=message):
        check_sharding(accelerator, torch.nn.Linear(1, 1))


def test_fsdp_that_would_not_happen_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    # As accelerate leaves it when it sees several processes and no GPU.
    state = SimpleNamespace(fsdp_plugin=None)
    accelerator = SimpleNamespace(state=state, distributed_type=DistributedType.MULTI_CPU)
    with pytest.raises(RecipeError, match="the launcher asks for FSDP, and accelerate would run MULTI_CPU instead"):
        check_sharding(accelerator, torch.nn.Linear(1, 1))


def test_weights_that_are_cut_up_already_are_refused():
    model = torch.nn.Linear(1, 1)
    model.weight.ds_id = 0
    with pytest.raises(RecipeError, match="ZeRO-3 has cut the weights up"):
        check_sharding(SimpleNamespace(state=SimpleNamespace(fsdp_plugin=None)), model)
