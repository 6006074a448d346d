"""Methods that are compared on the testbed; each is a recipe of `bfpo train`."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from bfpo.config.loading import check_recipe
from bfpo.config.recipes import Count, Section, TrainRecipe


class Method(Section):
    """A method: loss, data and optimizer settings."""

    title: str = ""
    """Short description."""
    loss: dict[str, Any]
    """`loss` section of the recipe."""
    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1e-3
    """Peak learning rate of the cosine schedule."""
    main: Literal["safety", "safety_by_safety", "safety_without_uu"] = "safety"
    """File of the main stream: pairs ordered by helpfulness, ordered by safety, or without both-unsafe pairs."""
    buffer: bool = True
    """Whether the helpfulness pairs are the buffer."""
    pairs_per_step: Count = 64
    """Pairs of both streams per step; half of them are from the buffer, if there is one."""
    train_only: list[str] | None = None
    """Patterns of the parameters to train; default all parameters."""

    @model_validator(mode="after")
    def _check_halves(self) -> "Method":
        if self.buffer and self.pairs_per_step % 2:
            raise ValueError(f"pairs_per_step is {self.pairs_per_step}; with a buffer, half of them, expected even")
        return self


def _squared(name: str, **options: Any) -> dict[str, Any]:
    return {"name": name, "beta": 0.3, **options}


METHODS = {
    "bfpo": Method(title="BFPO with both streams", loss=_squared("bfpo")),
    "bfpo_no_buffer": Method(title="BFPO on the safety set alone", loss=_squared("bfpo"), buffer=False),
    "bfpo_soft": Method(title="BFPO on known win rates", loss=_squared("bfpo_soft")),
    "additive": Method(title="squared loss, additive label", loss=_squared("additive")),
    "dpo_h": Method(title="DPO, helpfulness only", loss={"name": "dpo", "beta": 0.3}),
    "dpo_s": Method(
        title="DPO, safety only", loss={"name": "dpo", "beta": 0.3}, main="safety_by_safety", buffer=False
    ),
    "dpo_mix": Method(title="DPO on the naive mix", loss={"name": "dpo", "beta": 0.3}, main="safety_by_safety"),
    "ipo_mix": Method(title="IPO on the naive mix", loss=_squared("ipo"), main="safety_by_safety"),
    "safe_dpo": Method(title="SafeDPO", loss={"name": "safe_dpo", "beta": 0.3}),
    "modpo": Method(title="MODPO's margin", loss={"name": "modpo", "beta": 0.3}),
}


def train_recipe(
    method: Method,
    *,
    world: Path,
    base: Path,
    out: Path,
    seed: int,
    steps: int = 100,
    save: bool = True,
    where: str = "method",
) -> TrainRecipe:
    """Return the training recipe of a method.

    Args:
        method: The method.
        world: Folder that `World.write` filled.
        base: Checkpoint to start from.
        out: Output folder.
        seed: Seed of the training.
        steps: Number of optimizer steps.
        save: Whether to save checkpoints and resume from them; not worth it for one of many short runs.
        where: Name of the method, for errors.

    Raises:
        RecipeError: If the method's loss isn't possible.
    """
    return check_recipe(
        {
            "model": {"path": str(base)},
            "data": [{"path": str(world / f"{method.main}.jsonl")}],
            "buffer": [{"path": str(world / "helpfulness.jsonl")}] if method.buffer else [],
            "benchmarks": [str(world / "prompts.jsonl")],
            # Pairs are ordered by noisy annotators: the same two answers may occur in both orders.
            "conflicts": "keep",
            "text": {"max_length": 128},
            "loss": method.loss,
            "train_only": method.train_only,
            # A single run uses each pair about once, so a cache pays off only for several runs of one base.
            # Token-level DPO can't use it.
            "reference": "shared" if save or method.loss.get("name") == "tdpo" else "cache",
            "trainer": {
                "output_dir": str(out),
                "learning_rate": method.learning_rate,
                "lr_scheduler_type": "cosine",
                "warmup_steps": 0.1,
                "per_device_train_batch_size": method.pairs_per_step // (2 if method.buffer else 1),
                "max_steps": steps,
                "save_strategy": "steps" if save else "no",
                "save_steps": 25,
                "save_total_limit": 1,
                "logging_steps": 5,
                "seed": seed,
                "use_cpu": True,
                "resume_from_checkpoint": save,
            },
        },
        TrainRecipe,
        where,
    )
