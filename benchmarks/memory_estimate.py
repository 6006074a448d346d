"""Compare the estimate of a run's memory with the peak of its process, for a few architectures and ways to train.

    python benchmarks/memory_estimate.py      # about four minutes; writes benchmarks/results/memory_estimate.json

Each run has a process of its own, on one thread: two steps of `BFPOTrainer` with random weights and random tokens.
`peak` is the maximum resident memory that the system reports (`getrusage`), `estimate` what `bfpo train --dry-run`
prints, and `process` what the process takes before there is a model.
"""

import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

RESULT = Path(__file__).parent / "results" / "memory_estimate.json"
SEED = 42
PAIRS, PROMPT, COMPLETION = 2, 80, 176
"""Pairs of each stream in a micro-batch, and their lengths in tokens: 256 for a prompt with a completion."""
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    # The shape of SmolLM2-135M, with six layers.
    "llama": ("LlamaConfig", {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 6,
              "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 6,
              "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 16000}),
    "gemma2": ("Gemma2Config", {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 6,
               "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 16000}),
    "phi3": ("Phi3Config", {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 6,
             "num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": 16000, "pad_token_id": 0}),
}  # fmt: skip
"""Family → configuration class of transformers, and its changes."""
RUNS = [(family, "lora") for family in CONFIGS] + [("llama", "full"), ("llama", "down_proj")]


def measure(family: str, way: str) -> dict[str, Any]:
    """Train two steps in this process, and return estimate and peak in GiB."""
    import numpy as np
    import torch
    import transformers
    from transformers import PrinterCallback, TrainingArguments

    from bfpo import BFPOTrainer
    from bfpo.config.recipes import LoraSection, ModelSection
    from bfpo.data.table import PairTable
    from bfpo.losses.pairwise import BFPO
    from bfpo.model.lora import lora_config
    from bfpo.model.new import new_tokenizer
    from bfpo.training.estimate import Arithmetic, footprint

    torch.set_num_threads(1)
    # Libraries are imported, and there is no model yet.
    process = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    name, changes = CONFIGS[family]
    config = getattr(transformers, name)(**changes)
    tokenizer = new_tokenizer(["a b c"], 300)
    count = 4 * PAIRS
    rng = np.random.default_rng(SEED)
    bounds = np.arange(count)[:, None] * (PROMPT + 2 * COMPLETION) + np.cumsum([0, PROMPT, COMPLETION, COMPLETION])
    table = PairTable(
        rng.integers(3, 300, int(bounds.max()), dtype=np.int32),
        bounds.astype(np.int64),
        tuple(f"{number:016x}" for number in range(count)),
        chosen_safe=rng.random(count).round(),
        rejected_safe=rng.random(count).round(),
        cells=np.zeros(count, np.int8),
        is_buffer=np.arange(count) % 2 == 1,
        signals={"expected_safety": np.full(count, 0.5)},
    )
    lora = LoraSection() if way == "lora" else None
    train_only = ["down_proj"] if way == "down_proj" else None
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        needed = footprint(
            ModelSection(path=folder),
            tokenizer,
            train_only=train_only,
            lora=lora,
            reference="auto",
            arithmetic=Arithmetic(),
        )
        assert needed is not None
        estimate = needed.estimate(2 * PAIRS * (PROMPT + 2 * COMPLETION - 2))
        model = transformers.AutoModelForCausalLM.from_config(config)
        args = TrainingArguments(
            folder, max_steps=2, per_device_train_batch_size=PAIRS, save_strategy="no", report_to="none",
            use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        trainer = BFPOTrainer(
            model,
            args,
            table,
            processing_class=tokenizer,
            loss=BFPO(beta=0.5),
            peft_config=None if lora is None else lora_config(lora),
            train_only=train_only,
            cache_dir=f"{folder}/cache",
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "family": family,
        "trained": way,
        "parameters": estimate.selection.total,
        "estimate_gib": round(estimate.total / 2**30, 3),
        "peak_gib": round(peak / 2**30, 3),
        "ratio": round(estimate.total / peak, 3),
        "process_gib": round(process / 2**30, 3),
        "ratio_without_process": round((estimate.total - estimate.process) / (peak - process), 3),
        "parts_gib": {
            part: round(value / 2**30, 3) for part, value in estimate._asdict().items() if part != "selection"
        },
    }


def main() -> None:
    """Measure every run in a fresh process, and write the results."""
    if len(sys.argv) == 3:
        print(json.dumps(measure(*sys.argv[1:])))
        return
    from bfpo.core.environment import hardware, versions
    from bfpo.core.files import write_json

    measured = []
    for family, way in RUNS:
        process = subprocess.run(
            [sys.executable, "-W", "ignore", __file__, family, way], check=True, capture_output=True, text=True
        )
        measured.append(json.loads(process.stdout.splitlines()[-1]))
        print(measured[-1])
    write_json(
        RESULT,
        {
            "command": "python benchmarks/memory_estimate.py",
            "seed": SEED,
            "pairs": [PAIRS, PAIRS],
            "tokens": [PROMPT, COMPLETION, COMPLETION],
            "versions": versions(),
            "hardware": hardware(),
            "measured": measured,
        },
    )


if __name__ == "__main__":
    main()
