"""Training with several processes: checks of the launch, and equal numbers of packs where weights are sharded.

Under plain data parallelism (DDP) processes may have different numbers of packs, because only the last backward pass
of a step waits for the other processes. Under FSDP and DeepSpeed every forward and backward pass does, because it
gathers weights.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache

import torch
from accelerate import Accelerator
from torch import nn
from transformers import TrainingArguments

from bfpo.core.terminal import say
from bfpo.errors import RecipeError
from bfpo.training.arguments import launched_processes
from bfpo.training.batches import Batch

# A processor with instructions for bfloat16 takes about half as long as for float32, one without 50 times as long.
_SLOW = 3


def check_devices(args: TrainingArguments) -> None:
    """Check that the launched processes and devices are the ones that would be used, and warn of slow arithmetic.

    Raises:
        RecipeError: If transformers doesn't see all launched processes, one process would use several GPUs, or the
            device has no float64.
    """
    if args.world_size != launched_processes():
        raise RecipeError(
            f"{launched_processes()} processes were launched, but each would train separately (world size "
            f"{args.world_size}); on a machine without a GPU set use_cpu: true"
        )
    if args.n_gpu > 1:
        raise RecipeError(
            f"one process sees {args.n_gpu} GPUs; start one process per GPU "
            f"(torchrun --nproc_per_node {args.n_gpu} -m bfpo ...), or use one GPU with CUDA_VISIBLE_DEVICES=0"
        )
    if args.device.type == "mps":
        raise RecipeError("MPS devices have no float64, which sums of log-probabilities need; set use_cpu: true")
    _warn_of_slow_bf16(args)


def _warn_of_slow_bf16(args: TrainingArguments) -> None:
    """Warn if the run computes in bfloat16 on a processor that multiplies such matrices much more slowly."""
    if args.bf16 and args.device.type == "cpu" and (factor := bf16_slowdown()) >= _SLOW:
        say(
            f"warning: this processor multiplies bfloat16 matrices {factor:,.0f} times as slowly as float32 ones; "
            "set trainer.bf16=false"
        )


@cache
def bf16_slowdown() -> float:
    """Return how many times as long a product of bfloat16 matrices takes on the CPU as one of float32 matrices."""
    return _product_time(torch.bfloat16) / _product_time(torch.float32)


def _product_time(dtype: torch.dtype) -> float:
    """Return the time of a product of two matrices in seconds, the shortest of three."""
    first, second = torch.ones(128, 512, dtype=dtype), torch.ones(512, 512, dtype=dtype)
    first @ second
    times = []
    for _ in range(3):
        start = time.perf_counter()
        first @ second
        times.append(time.perf_counter() - start)
    return min(times)


def check_sharding(accelerator: Accelerator, model: nn.Module) -> None:
    """Check that the requested sharding would happen, and that every process can score the reference before it.

    Raises:
        RecipeError: If not; the message names the line of the launcher's configuration to change.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true" and plugin is None:
        raise RecipeError(
            f"the launcher requests FSDP, but accelerate would run {accelerator.distributed_type.value} instead, "
            "with whole weights on every process, because it shards only on several GPUs; use torchrun for plain "
            "data parallelism"
        )
    if plugin is not None and plugin.fsdp_version != 2:
        raise RecipeError("FSDP 1 is not supported; set fsdp_version: 2 in the launcher's configuration")
    if plugin is not None and plugin.cpu_ram_efficient_loading:
        raise RecipeError(
            "fsdp_cpu_ram_efficient_loading leaves all processes but one without weights, but each must score its "
            "share of the reference; set it to false in the launcher's configuration"
        )
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise RecipeError(
            "ZeRO-3 partitioned the weights while the model was loaded; load the model before creating the training "
            "arguments"
        )
    deepspeed = getattr(accelerator.state, "deepspeed_plugin", None)
    if deepspeed is not None and "gradient_clipping" not in deepspeed.deepspeed_config:
        raise RecipeError(
            "DeepSpeed's configuration file has no gradient_clipping, so DeepSpeed clips at a limit of its own; add "
            '"gradient_clipping": "auto", which takes trainer.max_grad_norm'
        )


def equal_packs(accelerator: Accelerator, packs: list[Batch], *, sharded: bool) -> list[Batch]:
    """Return the same number of packs on every process, if weights are sharded.

    Args:
        accelerator: Accelerator of the run. With sharded weights every process must call this equally often.
        packs: Packs of this process.
        sharded: Whether weights are sharded, so that every pass waits for the other processes.

    Returns:
        The packs, followed by fillers: copies of the smallest pack with weight 0 and no row ids.
    """
    if not sharded or accelerator.num_processes == 1:
        return packs
    count = torch.tensor([len(packs)], device=accelerator.device)
    max_count = int(accelerator.gather(count).max())
    smallest = min(packs, key=lambda pack: pack.layout.num_tokens)
    filler = replace(smallest, weights=torch.zeros_like(smallest.weights), row_ids=())
    return packs + [filler] * (max_count - len(packs))


@contextmanager
def no_gradient_sync(accelerator: Accelerator, model: nn.Module) -> Iterator[None]:
    """Accumulate the gradients of a pass without exchanging them; a later pass exchanges them all."""
    state = accelerator.gradient_state
    before = state.sync_gradients
    # DeepSpeed takes an optimizer step in every backward pass with synchronization.
    state._set_sync_gradients(False)
    try:
        with accelerator.no_sync(model):
            yield
    finally:
        state._set_sync_gradients(before)
