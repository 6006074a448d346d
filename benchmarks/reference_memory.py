"""Measure the memory that the reference takes in several setups, each in its own process.

    python benchmarks/reference_memory.py            # about a minute; writes benchmarks/results/reference_memory.json

A `base` model (see bfpo.model.new.SHAPES) is trained for three steps. `resident_mib` is the resident memory after
them, with weights, gradients, optimizer state and reference. `second model` trains all weights with a full frozen
copy as reference, as other libraries do.
"""

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

SETUPS = ("second model", "full", "down_proj", "lora")
RESULT = Path(__file__).parent / "results" / "reference_memory.json"


def measure(setup: str) -> dict[str, Any]:
    """Train three steps in this process and return its memory in MiB."""
    import torch
    from transformers import PrinterCallback, TrainingArguments

    from bfpo import BFPOTrainer
    from bfpo.config.recipes import LoraSection, NewModel
    from bfpo.losses.pairwise import BFPO
    from bfpo.model.logps import add_layout_forward
    from bfpo.model.lora import lora_config
    from bfpo.model.new import new_model, new_tokenizer

    torch.set_num_threads(1)
    words = [f"word{number} " * 8 for number in range(64)]
    rows = [
        {"prompt": word, "chosen": word * 3, "rejected": word * 2, "is_chosen_safe": True, "is_rejected_safe": False}
        for word in words
    ]
    tokenizer = new_tokenizer(words, vocab_size=600)
    model = new_model(NewModel(shape="base"), tokenizer)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    args = TrainingArguments(
        "unused", max_steps=3, per_device_train_batch_size=2, save_strategy="no", report_to="none", use_cpu=True,
        disable_tqdm=True,
    )  # fmt: skip
    trainer = BFPOTrainer(
        model,
        args,
        rows,
        processing_class=tokenizer,
        loss=BFPO(beta=0.5),
        peft_config=lora_config(LoraSection()) if setup == "lora" else None,
        train_only=["down_proj"] if setup == "down_proj" else None,
        reference="adapter" if setup == "lora" else "shared",
    )
    reference_bytes = trainer.reference.nbytes
    if setup == "second model":
        frozen = copy.deepcopy(model).requires_grad_(False)
        add_layout_forward(frozen)
        reference_bytes = weights

        class SecondModel:
            nbytes = weights

            @torch.no_grad()
            def logps(self, policy: Any, layout: Any) -> Any:
                return frozen(layout=layout)

        trainer.reference = SecondModel()
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    status = Path("/proc/self/status").read_text()
    resident = int(status.split("VmRSS:")[1].split()[0]) / 1024
    return {
        "way": setup,
        "weights_mib": round(weights / 2**20, 1),
        "trained_share": round(trainer.selection.trained / trainer.selection.total, 4),
        "reference_mib": round(reference_bytes / 2**20, 1),
        "resident_mib": round(resident, 1),
    }


def main() -> None:
    """Measure every setup in a fresh process and write the results."""
    if len(sys.argv) == 2:
        print(json.dumps(measure(sys.argv[1])))
        return
    from bfpo.core.environment import hardware, versions
    from bfpo.core.files import write_json

    measured = []
    for setup in SETUPS:
        process = subprocess.run(
            [sys.executable, "-W", "ignore", __file__, setup], check=True, capture_output=True, text=True
        )
        measured.append(json.loads(process.stdout.splitlines()[-1]))
        print(measured[-1])
    write_json(
        RESULT,
        {
            "command": "python benchmarks/reference_memory.py",
            "seed": 42,
            "versions": versions(),
            "hardware": hardware(),
            "measured": measured,
        },
    )


if __name__ == "__main__":
    main()
