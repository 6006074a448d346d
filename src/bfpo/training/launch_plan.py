"""What a run needs on named hardware: memory of each GPU by strategy, micro-batch, tokens a second, hours.

Arithmetic only: nothing here was measured on a GPU by this project. Memory is that of `bfpo.training.estimate`.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import psutil
from transformers import TrainingArguments

from bfpo.config.recipes import LayoutSection, TrainRecipe
from bfpo.core.terminal import say, show_table
from bfpo.data.table import PairTable
from bfpo.errors import RecipeError, did_you_mean
from bfpo.training.estimate import Arithmetic, Estimate, Footprint, Strategy, footprint, max_micro_batch_tokens
from bfpo.training.run import RunInputs, count_steps, read_inputs, trained_adapter


class Hardware(NamedTuple):
    """A device, by its data sheet.

    Args:
        flops: Peak of dense matrix products, operations a second: in bfloat16, on a CPU in float32.
        memory: Bytes; 0 for the memory of this machine.
        share: Share of the peak that training is assumed to reach.
        source: Where the share is from.
    """

    flops: float
    memory: float
    share: float
    source: str


# OLMo2-7B, packed, two nodes of eight H100: 5,282 tokens a second and GPU with the largest batch of that comparison,
# smaller ones reach 2 to 20 %. Counted are 6 operations a weight and token, as here; activations are recomputed.
_GPU_SHARE = 0.225
_GPU_SOURCE = "DPO of a 7 B model on 16 H100 in open-instruct, github.com/allenai/open-instruct/pull/1466"

HARDWARE = {
    # nvidia.com, "A100 80GB" data sheet (SXM): 312 TFLOPS, 80 GB.
    "a100-80gb": Hardware(312e12, 80e9, _GPU_SHARE, _GPU_SOURCE),
    # nvidia.com, "H100" data sheet (SXM): 1,979 TFLOPS with sparsity, which is twice the dense rate; 80 GB.
    "h100": Hardware(989e12, 80e9, _GPU_SHARE, _GPU_SOURCE),
    # nvidia.com, "H200" data sheet (SXM): as H100; 141 GB.
    "h200": Hardware(989e12, 141e9, _GPU_SHARE, _GPU_SOURCE),
    # nvidia.com, "L4" data sheet: 242 TFLOPS with sparsity; 24 GB.
    "l4": Hardware(121e12, 24e9, _GPU_SHARE, _GPU_SOURCE),
    # nvidia.com, "Ada GPU architecture" white paper, RTX 4090: 165.2 TFLOPS with float32 accumulation; 24 GB.
    "rtx4090": Hardware(165e12, 24e9, _GPU_SHARE, _GPU_SOURCE),
    # A thread of a server CPU in float32, and this project's share of it: docs/performance.md.
    "cpu": Hardware(87e9, 0, 0.8, "one thread of a server CPU and models of 9 to 25 M weights, docs/performance.md"),
}
"""Name → device. Gigabytes are 10⁹ bytes; what devices have beyond that is room for fragmentation."""

STRATEGIES: dict[Strategy, str] = {"none": "one", "ddp": "DDP", "fsdp2": "FSDP2", "zero3": "ZeRO-3"}
"""Strategy → its name in the table."""


@dataclass(frozen=True)
class StrategyPlan:
    """How a run fits with one strategy.

    Args:
        strategy: How processes share the work.
        processes: Number of processes.
        memory: Memory of each with this micro-batch.
        fits: Whether that is at most the memory of the device.
        micro_batch: Pairs of each stream that a process feeds at a time.
        accumulation: Micro-batches of a step.
        max_tokens: `layout.max_tokens_per_pack` that the micro-batch needs to fit; None for that of the recipe.
    """

    strategy: Strategy
    processes: int
    memory: Estimate
    fits: bool
    micro_batch: int
    accumulation: int
    max_tokens: int | None


@dataclass(frozen=True)
class TimePlan:
    """How long a run takes if the assumed share of the peak is reached.

    Args:
        steps: Optimizer steps.
        pairs: Pairs of both streams that are trained on, repetitions included.
        tokens: Tokens that are fed, each prompt once.
        seconds: Time of the reference's pass and of all steps.
        processes: Number of devices.
    """

    steps: int
    pairs: int
    tokens: float
    seconds: float
    processes: int

    @property
    def device_hours_per_million(self) -> float:
        """Hours of one device for a million pairs."""
        return self.seconds * self.processes / 3600 / self.pairs * 1e6


def find_hardware(name: str, processes: int) -> Hardware:
    """Return a device by its name, with the memory that a process has.

    Raises:
        RecipeError: If the name is unknown.
    """
    if name not in HARDWARE:
        raise RecipeError(f"`hardware` is '{name}'; {did_you_mean(name, list(HARDWARE))}")
    hardware = HARDWARE[name]
    return hardware if hardware.memory else hardware._replace(memory=psutil.virtual_memory().total / processes)


def plan_strategy(
    needed: Footprint,
    table: PairTable,
    *,
    strategy: Strategy,
    processes: int,
    batch: int,
    layout: LayoutSection,
    memory: float,
) -> StrategyPlan:
    """Return the largest micro-batch that fits, with the accumulation that keeps the batch.

    Args:
        needed: What the memory of the run is computed from.
        table: Training pairs.
        strategy: How processes share the work.
        processes: Number of processes.
        batch: Pairs of each stream in a step of one process.
        layout: How tokens are fed.
        memory: Bytes of a device.
    """
    streams = 2 if len(table.buffer_rows) else 1
    smallest = max_micro_batch_tokens(table, 1, layout.model_copy(update={"max_tokens_per_pack": 1}))
    sizes = [size for size in range(batch, 0, -1) if batch % size == 0]
    for size in sizes:
        tokens = max_micro_batch_tokens(table, streams * size, layout)
        estimate = needed.estimate(tokens, strategy, processes)
        if estimate.total <= memory:
            return StrategyPlan(strategy, processes, estimate, True, size, batch // size, None)
    # Not even a pair of each stream at a time: a packed row can still be split to one pair.
    estimate = needed.estimate(smallest, strategy, processes)
    room = int((memory - (estimate.total - estimate.activations)) / needed.per_token)
    if layout.kind == "padded" or room < smallest:
        return StrategyPlan(strategy, processes, estimate, False, 1, batch, None)
    return StrategyPlan(strategy, processes, needed.estimate(room, strategy, processes), True, 1, batch, room)


def plan_time(
    needed: Footprint, table: PairTable, *, steps: int, batch: int, processes: int, sharded: bool, hardware: Hardware
) -> TimePlan:
    """Return the time of a run by its operations; attention, communication, evaluation and saving are not counted.

    Args:
        needed: What the operations of a token are computed from.
        table: Training pairs.
        steps: Optimizer steps.
        batch: Pairs of each stream in a step of all processes.
        processes: Number of devices.
        sharded: Whether weights are sharded, so that the reference is in the cache.
        hardware: The devices.
    """
    lengths = table.lengths
    fed, scored = lengths.sum(axis=1) - table.completions, lengths[:, 1:].sum(axis=1)
    tokens = scored_tokens = 0.0
    pairs = 0
    for rows in (table.main_rows, table.buffer_rows):
        if len(rows):
            pairs += steps * batch
            tokens += steps * batch * float(fed[rows].mean())
            scored_tokens += steps * batch * float(scored[rows].mean())
    operations = tokens * needed.operations + scored_tokens * needed.head_operations
    if needed.each_step and not sharded:
        operations += tokens * needed.forward_operations
    else:
        operations += float(fed.sum()) * needed.forward_operations
    seconds = operations / (hardware.flops * hardware.share * processes)
    return TimePlan(steps, pairs, tokens, seconds, processes)


def show_launch_plan(
    recipe: TrainRecipe, *, hardware: str, gpus: int, price: float | None = None, limit: int | None = None
) -> None:
    """Print what a run needs on named hardware, without loading weights.

    Args:
        recipe: Recipe of the run.
        hardware: Key of `HARDWARE`.
        gpus: Number of GPUs; of threads, each a process, on a CPU.
        price: Price of an hour of a GPU, in any currency; None to leave out the cost.
        limit: Maximum number of pairs of each source.

    Raises:
        RecipeError: If the hardware is unknown, or the model is an adapter, whose configuration doesn't say what it
            needs.
    """
    device = find_hardware(hardware, gpus)
    inputs = read_inputs(recipe, limit=limit)
    args, table = inputs.args, inputs.tables.train
    needed = _footprint_on(recipe, inputs, gpu=hardware != "cpu")
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps
    strategies: tuple[Strategy, ...] = ("none",) if gpus == 1 else ("ddp",)
    if gpus > 1 and hardware != "cpu":
        strategies = ("ddp", "fsdp2", "zero3")
    plans = [
        plan_strategy(
            needed,
            table,
            strategy=strategy,
            processes=gpus,
            batch=batch,
            layout=recipe.layout,
            memory=device.memory,
        )
        for strategy in strategies
    ]
    _show_memory(plans, device, f"{gpus} x {hardware}")
    chosen = next((plan for plan in plans if plan.fits), None)
    if chosen is None:
        say(
            "nothing fits: lower text.max_length, set trainer.activation_checkpointing=true, train an adapter "
            "(lora.r=16), or take more or larger GPUs"
        )
        return
    _show_overrides(chosen, recipe, args)
    total_batch = batch * gpus
    time = plan_time(
        needed,
        table,
        steps=count_steps(args, len(table.main_rows), total_batch),
        batch=total_batch,
        processes=gpus,
        sharded=chosen.strategy in ("fsdp2", "zero3"),
        hardware=device,
    )
    _show_time(time, device, chosen, price)
    if hardware != "cpu" and not args.bf16 and inputs.model_section.dtype == "float32":
        say("note: the time is that of bfloat16, and trainer.bf16 is false; set trainer.bf16=true")
    if inputs.model_section.load_in_4bit:
        say("note: dequantizing 4-bit weights takes time that isn't counted")


def _footprint_on(recipe: TrainRecipe, inputs: RunInputs, *, gpu: bool) -> Footprint:
    needed = footprint(
        inputs.model_section,
        inputs.tokenizer,
        train_only=recipe.train_only,
        lora=trained_adapter(recipe),
        reference=recipe.reference,
        arithmetic=Arithmetic(inputs.args.bf16, bool(inputs.args.activation_checkpointing), gpu),
    )
    if needed is None:
        raise RecipeError(
            f"model.path '{inputs.model_section.path}' is an adapter, whose memory isn't estimated; plan with its "
            "base model and lora"
        )
    return needed


def _show_memory(plans: list[StrategyPlan], device: Hardware, name: str) -> None:
    columns = ("weights", "casts", "gradients", "optimizer", "reference", "activations", "logits", "process", "total")
    rows = [
        (
            STRATEGIES[plan.strategy],
            *(f"{getattr(plan.memory, column) / 2**30:.1f}" for column in columns),
            "yes" if plan.fits else "no",
            f"{plan.micro_batch} x {plan.accumulation}" if plan.fits else "",
        )
        for plan in plans
    ]
    title = f"Memory of each process, GiB; {name}, {device.memory / 2**30:.1f} GiB each"
    show_table(title, ("strategy", *columns, "fits", "micro-batch x accumulation"), rows)


def _show_overrides(plan: StrategyPlan, recipe: TrainRecipe, args: TrainingArguments) -> None:
    overrides: dict[str, Any] = {}
    if plan.micro_batch != args.per_device_train_batch_size:
        overrides["trainer.per_device_train_batch_size"] = plan.micro_batch
        overrides["trainer.gradient_accumulation_steps"] = plan.accumulation
    if plan.max_tokens is not None:
        overrides["layout.max_tokens_per_pack"] = plan.max_tokens
    launch = {
        "none": "bfpo train",
        "ddp": f"torchrun --nproc_per_node {plan.processes} -m bfpo train",
        "fsdp2": f"accelerate launch --config_file recipes/accelerate/fsdp2.yaml --num_processes {plan.processes} -m "
        "bfpo train",
        "zero3": f"accelerate launch --config_file recipes/accelerate/zero3.yaml --num_processes {plan.processes} -m "
        "bfpo train",
    }[plan.strategy]
    settings = "".join(f" {key}={value}" for key, value in overrides.items())
    say(f"\nstart it with: {launch} RECIPE{settings}")


def _show_time(time: TimePlan, device: Hardware, plan: StrategyPlan, price: float | None) -> None:
    per_device = time.tokens / time.seconds / time.processes
    say(
        f"\n{time.steps:,} steps, {time.pairs:,} pairs, {time.tokens:,.0f} tokens with {STRATEGIES[plan.strategy]}: "
        f"about {_duration(time.seconds)}, {per_device:,.0f} tokens/s each"
    )
    hours = time.device_hours_per_million
    cost = "" if price is None else f", {hours * price:,.0f} at {price:g} an hour"
    say(f"a million pairs take {hours:,.1f} hours of one device{cost}")
    say(
        f"an estimate, not measured by this project: {device.share:.1%} of {device.flops / 1e12:,.3g} TFLOP/s, from "
        f"{device.source}. Attention, communication, evaluation and saving aren't counted; small batches and short "
        "texts reach less"
    )


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"
