"""Whole runs: QLoRA, resuming with equal bits, and the second start with a reference cache."""

import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from speed.data import PROFILES, synthetic_pairs
from speed.variants import SHAPES, Variant, new_model
from transformers import TrainingArguments

from bfpo import BFPOTrainer
from bfpo.config.recipes import LoraSection, ModelSection
from bfpo.data.table import PairTable
from bfpo.losses.pairwise import BFPO
from bfpo.model.load import load_model
from bfpo.model.lora import lora_config
from bfpo.model.reference_cache import hash_model

from .cases import Cases, Result, Setting, require, time_and_peak

STEPS, SAVED = 4, 2


def quantized_cases(setting: Setting) -> Cases:
    """Return the cases of QLoRA; dry, the same without quantization."""
    return {"load and train": partial(_qlora, setting)}


def resume_cases(setting: Setting) -> Cases:
    """Return the cases of resuming, in two precisions."""
    return {name: partial(_resume, setting, bf16=name == "bf16") for name in ("float32", "bf16")}


def cache_cases(setting: Setting) -> Cases:
    """Return the cases of the reference cache."""
    return {"bf16": partial(_second_start, setting)}


def _table(setting: Setting, count: int) -> PairTable:
    return synthetic_pairs(PROFILES["pku"], count, np.random.default_rng(setting.seed))


def _trainer(model: Any, table: PairTable, folder: str, setting: Setting, **options: Any) -> BFPOTrainer:
    arguments = TrainingArguments(
        output_dir=f"{folder}/run",
        per_device_train_batch_size=2 if setting.dry else 4,
        max_steps=STEPS,
        save_steps=SAVED,
        learning_rate=1e-4,
        report_to="none",
        disable_tqdm=True,
        use_cpu=setting.dry,
        bf16=options.pop("bf16", False),
        seed=setting.seed,
    )
    return BFPOTrainer(model, arguments, table, loss=BFPO(beta=0.5), **options)


def _qlora(setting: Setting) -> Result:
    if not setting.dry:
        require("bitsandbytes")
    table = _table(setting, 16)
    with tempfile.TemporaryDirectory() as folder:
        model = new_model(SHAPES["tiny" if setting.dry else "1B"], Variant("bfpo", precision="bf16"))
        model.save_pretrained(f"{folder}/model")
        section = ModelSection(path=f"{folder}/model", dtype="bfloat16", load_in_4bit=not setting.dry)
        start = time.perf_counter()
        model = load_model(section)
        loaded = time.perf_counter() - start
        trainer = _trainer(model, table, folder, setting, peft_config=lora_config(LoraSection()), bf16=True)
        start = time.perf_counter()
        loss = trainer.train().training_loss
        return {
            "loading, s": round(loaded, 2),
            f"{STEPS} steps, s": round(time.perf_counter() - start, 2),
            "weights, MiB": round(trainer.model.get_memory_footprint() / 2**20),
            "loss": loss,
            "passed": bool(np.isfinite(loss)),
        }


def _resume(setting: Setting, *, bf16: bool) -> Result:
    """Train twice, and once from a checkpoint of the first run: weights must have equal bits."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    table = _table(setting, 16)
    shape = SHAPES["tiny" if setting.dry else "25M"]

    def train(folder: str, checkpoint: str | None = None) -> str:
        torch.manual_seed(setting.seed)
        trainer = _trainer(new_model(shape, Variant("bfpo")), table, folder, setting, reference="shared", bf16=bf16)
        trainer.train(resume_from_checkpoint=checkpoint)
        return hash_model(trainer.model)

    try:
        with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
            hashes = {
                "one run": train(first),
                "another run": train(second),
                "resumed": train(first, f"{first}/run/checkpoint-{SAVED}"),
            }
    finally:
        torch.use_deterministic_algorithms(False)
    return {"hashes": hashes, "passed": len(set(hashes.values())) == 1}


def _second_start(setting: Setting) -> Result:
    """Start twice with a cache: the second start reads what the first has computed."""
    table = _table(setting, 4 if setting.dry else 256)
    result: Result = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in ("first", "second"):
            model = new_model(SHAPES["tiny" if setting.dry else "1B"], Variant("bfpo", precision="bf16"))
            start = time.perf_counter()
            trainer = _trainer(model, table, folder, setting, reference="cache", cache_dir=f"{folder}/cache")
            result[f"{name} start, s"] = round(time.perf_counter() - start, 2)
        check = trainer.check_start()
        files = sum(1 for path in Path(folder, "cache").rglob("*") if path.is_file())
    return result | {
        "largest margin, nats": check.largest_margin,
        "median log-probability, nats": check.typical_logp,
        "files": files,
        "start check": time_and_peak(trainer.check_start, repeats=1),
        "passed": True,  # both starts compare rows with the model and stop if they differ
    }
