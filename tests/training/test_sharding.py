"""Checks before weights are sharded, and equal numbers of passes on all processes."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from bfpo.errors import RecipeError
from bfpo.model.layout import Example, packed_layout
from bfpo.training.batches import Batch
from bfpo.training.processes import check_sharding, equal_packs, no_gradient_sync


def pack(tokens: int) -> Batch:
    ids = torch.arange(tokens).numpy()
    return Batch(packed_layout([Example(ids, (ids[:2], ids[:3]))]), torch.ones(1), {}, (f"row of {tokens}",))


def fake_accelerator(counts: list[int]) -> SimpleNamespace:
    """Return a stand-in for an accelerator whose processes have the given numbers of packs."""
    return SimpleNamespace(
        num_processes=len(counts),
        device=torch.device("cpu"),
        gather=lambda count: torch.tensor([*counts, int(count)]),
    )


def test_processes_fill_up_with_their_smallest_pack_at_weight_0():
    packs = [pack(9), pack(4)]
    filled = equal_packs(fake_accelerator([4, 2]), packs, sharded=True)
    assert filled[:2] == packs
    assert [batch.is_filler for batch in filled] == [False, False, True, True]
    assert all(batch.layout is packs[1].layout and float(batch.weights.sum()) == 0 for batch in filled[2:])
    assert equal_packs(fake_accelerator([4, 2]), packs, sharded=False) == packs


def test_no_gradient_sync_also_stops_engines_that_step_on_synchronization():
    accelerator = Accelerator(cpu=True)
    with no_gradient_sync(accelerator, torch.nn.Linear(1, 1)):
        assert not accelerator.sync_gradients
    assert accelerator.sync_gradients


@pytest.mark.parametrize(
    ("plugin", "message"),
    [
        (SimpleNamespace(fsdp_version=1, cpu_ram_efficient_loading=False), "set fsdp_version: 2"),
        (SimpleNamespace(fsdp_version=2, cpu_ram_efficient_loading=True), "set it to false in the launcher's"),
    ],
)
def test_unsupported_sharding_is_refused(plugin, message):
    accelerator = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin))
    with pytest.raises(RecipeError, match=message):
        check_sharding(accelerator, torch.nn.Linear(1, 1))


def test_fsdp_that_accelerate_would_not_run_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    # The state of accelerate with several processes and no GPU.
    state = SimpleNamespace(fsdp_plugin=None)
    accelerator = SimpleNamespace(state=state, distributed_type=DistributedType.MULTI_CPU)
    with pytest.raises(RecipeError, match="the launcher requests FSDP, but accelerate would run MULTI_CPU instead"):
        check_sharding(accelerator, torch.nn.Linear(1, 1))


def test_weights_that_are_partitioned_already_are_refused():
    model = torch.nn.Linear(1, 1)
    model.weight.ds_id = 0
    with pytest.raises(RecipeError, match="ZeRO-3 partitioned the weights"):
        check_sharding(SimpleNamespace(state=SimpleNamespace(fsdp_plugin=None)), model)


def test_a_limit_of_deepspeeds_own_is_refused():
    def state(**config):
        return SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=SimpleNamespace(deepspeed_config=config)))

    check_sharding(state(gradient_clipping=0.5), torch.nn.Linear(1, 1))
    with pytest.raises(RecipeError, match='"gradient_clipping": "auto"'):
        check_sharding(state(train_batch_size=8), torch.nn.Linear(1, 1))
