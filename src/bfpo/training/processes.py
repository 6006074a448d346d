"""Several processes: what each of them may hold, and what all of them must do equally often.

Under plain data parallelism (DDP) a process may have more packs than another; only the last backward pass of a step
waits for the others. Under FSDP and DeepSpeed every forward and backward pass does, because weights are gathered in
it.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from accelerate import Accelerator
from torch import nn
from transformers import TrainingArguments

from bfpo.errors import RecipeError
from bfpo.training.arguments import launched_processes
from bfpo.training.batches import Batch


def check_devices(args: TrainingArguments) -> None:
    """Refuse a launch in which something other than what was asked for would run.

    Raises:
        RecipeError: If a launcher started several processes and transformers doesn't see them, one process would use
            several GPUs, or the device has no float64.
    """
    if args.world_size != launched_processes():
        raise RecipeError(
            f"{launched_processes()} processes were launched, but each would train by itself (world size "
            f"{args.world_size}); on a machine without a GPU set use_cpu: true"
        )
    if args.n_gpu > 1:
        raise RecipeError(
            f"this one process sees {args.n_gpu} GPUs; start one process for each "
            f"(torchrun --nproc_per_node {args.n_gpu} -m bfpo ...), or show it one with CUDA_VISIBLE_DEVICES=0"
        )
    if args.device.type == "mps":
        raise RecipeError("MPS devices have no float64, which sums of log-probabilities need; set use_cpu: true")


def check_sharding(accelerator: Accelerator, model: nn.Module) -> None:
    """Refuse ways of sharding that would not happen, or that hide the weights the reference is scored with.

    Raises:
        RecipeError: Saying which line of the launcher's configuration to change.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true" and plugin is None:
        raise RecipeError(
            f"the launcher asks for FSDP, and accelerate would run {accelerator.distributed_type.value} instead, "
            "with whole weights on every process: it shards on several GPUs only; use torchrun for plain data "
            "parallelism"
        )
    if plugin is not None and plugin.fsdp_version != 2:
        raise RecipeError("FSDP 1 is not supported; set fsdp_version: 2 in the launcher's configuration")
    if plugin is not None and plugin.cpu_ram_efficient_loading:
        raise RecipeError(
            "fsdp_cpu_ram_efficient_loading leaves all processes but one without weights, and each of them scores "
            "its share of the reference; set it to false in the launcher's configuration"
        )
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise RecipeError(
            "ZeRO-3 has cut the weights up while the model was loaded; load it before the training arguments are made"
        )


def equal_packs(accelerator: Accelerator, packs: list[Batch], *, sharded: bool) -> list[Batch]:
    """Return as many packs as the process with most of them has, if that is needed.

    Args:
        accelerator: Of the run. With sharded weights every process must call this equally often.
        packs: Of this process.
        sharded: Whether every pass waits for the other processes.

    Returns:
        The packs, then copies of the smallest with weight 0 and no row ids.
    """
    if not sharded or accelerator.num_processes == 1:
        return packs
    count = torch.tensor([len(packs)], device=accelerator.device)
    most = int(accelerator.gather(count).max())
    smallest = min(packs, key=lambda pack: pack.layout.num_tokens)
    filler = replace(smallest, weights=torch.zeros_like(smallest.weights), row_ids=())
    return packs + [filler] * (most - len(packs))


@contextmanager
def gradients_held_back(accelerator: Accelerator, model: nn.Module) -> Iterator[None]:
    """Keep the gradients of a pass for a later one, which exchanges them all."""
    state = accelerator.gradient_state
    before = state.sync_gradients
    # DeepSpeed takes an optimizer step in every backward pass that is to be synchronized.
    state._set_sync_gradients(False)
    try:
        with accelerator.no_sync(model):
            yield
    finally:
        state._set_sync_gradients(before)
