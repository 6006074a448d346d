"""The methods that the testbed compares: each is a recipe for `bfpo train`, and nothing else."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bfpo.recipe import TrainRecipe

PAIRS_PER_STEP = 32


@dataclass(frozen=True, slots=True)
class Method:
    """How a method trains.

    Args:
        title: What it is, in a few words.
        loss: The recipe's `loss` section.
        learning_rate: Peak of the cosine schedule.
        buffer: Whether it draws from the helpfulness set too; without, the safety set is drawn from twice as fast.
    """

    title: str
    loss: dict[str, Any]
    learning_rate: float = 1e-3
    buffer: bool = True


METHODS = {
    "bfpo": Method("BFPO with both streams", {"name": "bfpo", "beta": 0.3}),
    "bfpo_no_buffer": Method("BFPO on the safety set alone", {"name": "bfpo", "beta": 0.3}, buffer=False),
    "bfpo_soft": Method("BFPO on known win rates", {"name": "bfpo_soft", "beta": 0.3}),
    "additive": Method("squared loss, additive label", {"name": "additive", "beta": 0.3}),
    "dpo": Method("DPO: helpfulness only", {"name": "dpo", "beta": 0.3}),
    "ipo": Method("IPO: helpfulness only", {"name": "ipo", "beta": 0.3}),
    "safe_dpo": Method("SafeDPO: re-ordered by safety", {"name": "safe_dpo", "beta": 0.3}),
}


def train_recipe(method: Method, *, world: Path, base: Path, out: Path, seed: int, steps: int = 100) -> TrainRecipe:
    """Return the recipe of a method.

    Args:
        method: What to train.
        world: Folder that `World.write` filled.
        base: Checkpoint to start from.
        out: Output folder.
        seed: Of the plan.
        steps: Optimizer steps.
    """
    return TrainRecipe.model_validate(
        {
            "model": {"path": str(base)},
            "data": [{"path": str(world / "safety.jsonl")}],
            "buffer": [{"path": str(world / "helpfulness.jsonl")}] if method.buffer else [],
            "benchmarks": [str(world / "prompts.jsonl")],
            # The order of a pair is an annotator's: the same two answers may stand in both orders.
            "conflicts": "keep",
            "text": {"max_length": 128},
            "loss": method.loss,
            "trainer": {
                "output_dir": str(out),
                "learning_rate": method.learning_rate,
                "lr_scheduler_type": "cosine",
                "warmup_steps": 0.1,
                "per_device_train_batch_size": PAIRS_PER_STEP * (1 if method.buffer else 2),
                "max_steps": steps,
                "save_steps": 25,
                "save_total_limit": 1,
                "logging_steps": 5,
                "seed": seed,
                "use_cpu": True,
                "resume_from_checkpoint": True,
            },
        }
    )
