"""One process of a training run under FSDP2 or ZeRO-3 on a CPU: `torchrun ... sharded_run.py OUT [fsdp | zero3]`.

accelerate shards on GPUs only. Here its state is changed to say that the processes shard; everything after that is
the code that runs on GPUs: `fully_shard` on every layer or DeepSpeed's engine, gathering, reducing.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from transformers import TrainingArguments

from bfpo import BFPOTrainer
from bfpo.config.recipes import LayoutSection, NewModel, Source
from bfpo.data.rows import read_rows
from bfpo.losses.pairwise import BFPO
from bfpo.model.new import new_model, new_tokenizer
from bfpo.training.batches import Batch
from bfpo.training.output import save_final


def main(out: str, sharding: str | None) -> None:
    torch.set_num_threads(1)
    if sharding == "zero3":
        # accelerate starts DeepSpeed where it finds an accelerator with a backend; this is a CPU's.
        backend = ("gloo", DistributedType.MULTI_CPU)
        mock.patch.object(PartialState, "_prepare_backend", return_value=backend).start()
    create_accelerator = BFPOTrainer.create_accelerator_and_postprocess

    def create_sharding_accelerator(self: BFPOTrainer) -> None:
        create_accelerator(self)
        state = self.accelerator.state
        state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap", state_dict_type="FULL_STATE_DICT",
            cpu_ram_efficient_loading=False,
        )  # fmt: skip
        # accelerate reads it from the shared state too.
        state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        self.is_fsdp_enabled = True

    if sharding == "fsdp":
        mock.patch.object(BFPOTrainer, "create_accelerator_and_postprocess", create_sharding_accelerator).start()
    rows = [dict(row.values) for row in read_rows(Source(path="main.jsonl"))]
    tokenizer = new_tokenizer([text for row in rows for text in (row["chosen"], row["rejected"])], 300)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    args = TrainingArguments(
        out, max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=4 // world, logging_steps=1,
        optim="sgd", learning_rate=1e-4, max_grad_norm=0.0, lr_scheduler_type="constant", save_strategy="no",
        report_to="none", use_cpu=sharding != "zero3", disable_tqdm=True,
    )  # fmt: skip
    trainer = BFPOTrainer(
        new_model(NewModel(vocab_size=300), tokenizer), args, rows[:-4], eval_dataset=rows[-5:],
        processing_class=tokenizer, loss=BFPO(beta=0.5), reference="cache",
        # So few tokens that the processes have different numbers of packs.
        layout=LayoutSection(max_tokens_per_pack=75),
    )  # fmt: skip
    is_filler: list[bool] = []
    compute_loss = BFPOTrainer.compute_loss

    def record(self: BFPOTrainer, model: object, inputs: dict[str, Batch], *values: object, **options: object):
        is_filler.append(inputs["pack"].is_filler)
        return compute_loss(self, model, inputs, *values, **options)

    mock.patch.object(BFPOTrainer, "compute_loss", record).start()
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    num_weights = sum(own_part(parameter).numel() for parameter in trainer.model.parameters())
    eval_loss = trainer.evaluate()["eval_loss"]
    save_final(trainer, Path(out))
    results = {"losses": losses, "eval_loss": eval_loss, "weights": num_weights}
    results |= {"passes": len(is_filler), "fillers": sum(is_filler)}
    Path(out, f"results-{os.environ.get('RANK', '0')}.json").write_text(json.dumps(results))


def own_part(parameter: Any) -> torch.Tensor:
    """Return the part of a weight that this process holds."""
    if hasattr(parameter, "ds_tensor"):
        part: torch.Tensor = parameter.ds_tensor
        return part
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


if __name__ == "__main__":
    main(sys.argv[1], *sys.argv[2:] or [None])
