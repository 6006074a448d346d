"""One process of a training run under FSDP2, on a CPU: `torchrun ... sharded_run.py OUT [fsdp]`.

accelerate shards on GPUs only. Here its state is told that the processes shard; everything after that is the code
that runs on GPUs: `fully_shard` on every layer, gathering, reducing.
"""

import json
import os
import sys
from pathlib import Path
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


def main(out: str, sharded: bool) -> None:
    torch.set_num_threads(1)
    shard = BFPOTrainer.create_accelerator_and_postprocess

    def sharding(self: BFPOTrainer) -> None:
        shard(self)
        state = self.accelerator.state
        state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap", state_dict_type="FULL_STATE_DICT",
            cpu_ram_efficient_loading=False,
        )  # fmt: skip
        # Where accelerate keeps it too: whoever asks for the state again is given this one.
        state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        self.is_fsdp_enabled = True

    if sharded:
        mock.patch.object(BFPOTrainer, "create_accelerator_and_postprocess", sharding).start()
    rows = [dict(row.values) for row in read_rows(Source(path="main.jsonl"))]
    tokenizer = new_tokenizer([text for row in rows for text in (row["chosen"], row["rejected"])], 300)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    args = TrainingArguments(
        out, max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=4 // world, logging_steps=1,
        optim="sgd", learning_rate=1e-4, max_grad_norm=0.0, lr_scheduler_type="constant", save_strategy="no",
        report_to="none", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = BFPOTrainer(
        new_model(NewModel(vocab_size=300), tokenizer), args, rows[:-4], eval_dataset=rows[-5:],
        processing_class=tokenizer, loss=BFPO(beta=0.5), reference="cache",
        # Few tokens: the processes have different numbers of packs.
        layout=LayoutSection(max_tokens_per_pack=75),
    )  # fmt: skip
    filled: list[bool] = []
    asked = BFPOTrainer.compute_loss

    def progress(self: BFPOTrainer, model: object, inputs: dict[str, Batch], *values: object, **more: object):
        filled.append(inputs["pack"].is_filler)
        return asked(self, model, inputs, *values, **more)

    mock.patch.object(BFPOTrainer, "compute_loss", progress).start()
    trainer.train()
    trained = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    shares = sum(p.to_local().numel() if hasattr(p, "to_local") else p.numel() for p in trainer.model.parameters())
    evaluated = trainer.evaluate()["eval_loss"]
    save_final(trainer, Path(out))
    told = {"losses": trained, "eval_loss": evaluated, "weights": shares, "passes": len(filled)}
    told["filled"] = sum(filled)
    Path(out, f"told-{os.environ.get('RANK', '0')}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main(sys.argv[1], "fsdp" in sys.argv[2:])
