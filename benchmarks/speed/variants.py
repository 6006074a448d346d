"""Variants of the benchmark: TRL's DPOTrainer and BFPOTrainer in several settings, each as a step function."""

import copy
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple
from unittest.mock import patch

import datasets
import torch
import transformers
import trl
import trl.trainer.utils
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, TrainingArguments
from trl import DPOConfig, DPOTrainer

from bfpo import BFPOTrainer
from bfpo.config.recipes import LayoutSection, LoraSection
from bfpo.data.table import PairTable
from bfpo.losses.pairwise import BFPO
from bfpo.model.lora import lora_config
from bfpo.model.new import new_tokenizer
from bfpo.training.batches import Collator
from bfpo.training.streams import WeightedRow

from .data import MAX_LENGTH

Step = Callable[[list[int]], None]


class Shape(NamedTuple):
    """Size of a Llama-type model."""

    hidden: int
    layers: int
    heads: int
    key_value_heads: int
    feed_forward: int
    vocabulary: int = 8192


SHAPES = {
    "tiny": Shape(64, 1, 2, 2, 128),
    "9M": Shape(384, 4, 6, 6, 1536),
    "9M, vocabulary 32k": Shape(384, 4, 6, 6, 1536, 32000),
    "25M": Shape(512, 6, 8, 8, 2048),
    # Of Llama 3.2 1B and Llama 3.1 8B, with a head of their own.
    "1B": Shape(2048, 16, 32, 8, 8192, 128256),
    "8B": Shape(4096, 32, 32, 8, 14336, 128256),
}


@dataclass(frozen=True)
class Variant:
    """Trainer with settings of a step.

    Args:
        trainer: Library of the trainer.
        precision: float32, float32 weights under bf16 autocast, or bf16 weights.
        checkpointing: Whether activations are recomputed in the backward pass.
        selective: Whether only `down_proj` is trained.
        lora: Whether an adapter is trained, with the defaults of a recipe's `lora`.
        padded: Whether our layout is the padded one instead of the packed one.
        compact_head: Whether TRL's head is forced to score completion tokens only.
        attention: Attention function of transformers; None is the default.
        liger: Whether TRL uses Liger's kernels.
    """

    trainer: Literal["trl", "bfpo"]
    precision: Literal["fp32", "autocast", "bf16"] = "fp32"
    checkpointing: bool = False
    selective: bool = False
    lora: bool = False
    padded: bool = False
    compact_head: bool = False
    attention: str | None = None
    liger: bool = False

    @property
    def matmul_dtype(self) -> torch.dtype:
        """Data type of the matrix products."""
        return torch.float32 if self.precision == "fp32" else torch.bfloat16


VARIANTS = {
    "TRL": Variant("trl"),
    "TRL, its defaults": Variant("trl", precision="autocast", checkpointing=True),
    "TRL, completion-only head": Variant("trl", compact_head=True),
    "TRL, selective bf16": Variant("trl", precision="autocast", selective=True),
    "bfpo, padded": Variant("bfpo", padded=True),
    "bfpo": Variant("bfpo"),
    "bfpo, bf16": Variant("bfpo", precision="autocast"),
    "bfpo, selective bf16": Variant("bfpo", precision="autocast", selective=True),
    # On a GPU TRL's head scores completion tokens only by default.
    "TRL, SDPA": Variant("trl", precision="bf16", checkpointing=True),
    "TRL, Liger's kernels": Variant("trl", precision="bf16", checkpointing=True, liger=True),
    "TRL, FlashAttention": Variant("trl", precision="bf16", checkpointing=True, attention="flash_attention_2"),
    "bfpo, checkpointed": Variant("bfpo", precision="bf16", checkpointing=True),
    "bfpo, not checkpointed": Variant("bfpo", precision="bf16"),
}


def new_model(shape: Shape, variant: Variant) -> PreTrainedModel:
    """Return the model of a shape with random weights, the same for every variant."""
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        intermediate_size=shape.feed_forward,
        max_position_embeddings=2 * MAX_LENGTH,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    # Created on its final device, because seven billion random numbers take minutes on a CPU.
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        return AutoModelForCausalLM.from_config(
            config,
            dtype=torch.bfloat16 if variant.precision == "bf16" else torch.float32,
            attn_implementation=variant.attention,
        )


def make_step(variant: Variant, shape: Shape, table: PairTable, *, batch_size: int) -> tuple[Step, PreTrainedModel]:
    """Return a function that takes an optimizer step on some rows of a table, and its model.

    A step is the trainer's work on a batch: collate, `training_step` (reference, policy, backward), clip, AdamW.
    """
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    model = new_model(shape, variant)
    build = trl_trainer if variant.trainer == "trl" else bfpo_trainer
    trainer, collate = build(variant, model, table, batch_size)
    if variant.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    # As in `train()`. It must precede the construction of the next trainer, because accelerate's state is global.
    trainer.create_optimizer()
    prepared, trainer.optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
    trainer.current_gradient_accumulation_steps = 1

    def step(rows: list[int]) -> None:
        with patch.object(trl.trainer.utils, "_use_triton", _always if variant.compact_head else _USE_TRITON):
            trainer.training_step(prepared, collate(rows))
        trainer.accelerator.clip_grad_norm_(prepared.parameters(), trainer.args.max_grad_norm)
        trainer.optimizer.step()
        prepared.zero_grad()

    return step, model


_USE_TRITON = trl.trainer.utils._use_triton


def _always(device: torch.device) -> bool:
    return True


def _arguments(variant: Variant, batch_size: int) -> dict[str, Any]:
    return {
        "output_dir": tempfile.gettempdir(),
        "per_device_train_batch_size": batch_size,
        # An adapter of a bf16 model is float32.
        "bf16": variant.precision == "autocast" or (variant.lora and variant.precision == "bf16"),
        # Enabled in `make_step`, because trainers enable it in `train()` only.
        "gradient_checkpointing": False,
        "learning_rate": 1e-6,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": not torch.cuda.is_available(),
        "disable_tqdm": True,
    }


def bfpo_trainer(variant: Variant, model: Any, table: PairTable, batch_size: int) -> tuple[Any, Any]:
    """Return our trainer and a function that collates rows for it."""
    trainer = BFPOTrainer(
        model,
        TrainingArguments(**_arguments(variant, batch_size)),
        table,
        loss=BFPO(beta=0.5),
        train_only=["down_proj"] if variant.selective else None,
        peft_config=lora_config(LoraSection()) if variant.lora else None,
        layout=LayoutSection(kind="padded" if variant.padded else "packed"),
        reference="adapter" if variant.lora else "shared",
    )
    if trainer.layout_section.kind == "padded" and not variant.padded:
        raise SystemExit("the trainer fell back to the padded layout; the benchmark needs the packed one")
    collate = Collator(table, trainer.layout_section)
    return trainer, lambda rows: collate([WeightedRow(row, 1 / len(rows)) for row in rows])


def trl_trainer(variant: Variant, model: Any, table: PairTable, batch_size: int) -> tuple[Any, Any]:
    """Return TRL's trainer and a function that collates rows for it."""
    datasets.disable_progress_bars()
    reference = None if variant.lora else copy.deepcopy(model).requires_grad_(False)
    if variant.selective:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("down_proj" in name)
    # TRL's constructor tokenizes a data set; the batches have the same tokens as ours.
    text = ["a text to train a tokenizer on"]
    trainer = DPOTrainer(
        model,
        reference,
        DPOConfig(**_arguments(variant, batch_size), max_length=MAX_LENGTH, use_liger_kernel=variant.liger),
        train_dataset=datasets.Dataset.from_dict({"prompt": text, "chosen": text, "rejected": text}),
        processing_class=new_tokenizer(text, vocab_size=300),
        peft_config=lora_config(LoraSection()) if variant.lora else None,
    )

    def collate(rows: list[int]) -> Any:
        examples = []
        for row in rows:
            prompt, (chosen, rejected) = table[row]
            ids = {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}
            examples.append({name: values.tolist() for name, values in ids.items()})
        return trainer.data_collator(examples)

    return trainer, collate
