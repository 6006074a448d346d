"""Methods that are compared on the testbed; each is a short list of recipes of `bfpo train`."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_serializer, model_validator
from pydantic_core.core_schema import SerializerFunctionWrapHandler

from bfpo.config.loading import check_recipe
from bfpo.config.recipes import Count, Section, TrainRecipe


class Stage(Section):
    """A training of a method: loss, data and optimizer settings."""

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
    labels: dict[str, Any] | None = None
    """`labels` section of the recipe; default the order of the data."""

    @model_validator(mode="after")
    def _check_halves(self) -> "Stage":
        if self.buffer and self.pairs_per_step % 2:
            raise ValueError(f"pairs_per_step is {self.pairs_per_step}; with a buffer, half of them, expected even")
        return self

    @model_serializer(mode="wrap")
    def _dump_what_is_set(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # Runs are named by a hash of this; those of methods without these keys keep their names.
        return {key: value for key, value in dump(self).items() if key not in ("labels", "prepare") or value}


class Method(Stage):
    """A method: its last stage, and the stages before it."""

    title: str = ""
    """Short description."""
    prepare: list[Stage] = Field(default=[])
    """Stages before; each starts from the model of the one before it, which is its reference."""


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
    "dpo_safe_first": Method(
        title="DPO with the safe answer first", loss={"name": "dpo", "beta": 0.3}, labels={"from": "safety"}
    ),
    "ipo_mix": Method(title="IPO on the naive mix", loss=_squared("ipo"), main="safety_by_safety"),
    "safe_dpo": Method(title="SafeDPO", loss={"name": "safe_dpo", "beta": 0.3}),
    "bso": Method(title="Bregman safety optimization", loss={"name": "bso", "beta": 0.3}),
    "sacpo": Method(
        title="SACPO: DPO for helpfulness, then for safety",
        prepare=[Stage(loss={"name": "dpo", "beta": 0.3})],
        loss={"name": "dpo", "beta": 0.3},
        main="safety_by_safety",
        buffer=False,
    ),
    "modpo": Method(title="MODPO's margin", loss={"name": "modpo", "beta": 0.3}),
}


def train_recipes(
    method: Method,
    *,
    world: Path,
    base: Path,
    out: Path,
    seed: int,
    steps: int = 100,
    save: bool = True,
    where: str = "method",
) -> list[TrainRecipe]:
    """Return the training recipes of the stages of a method, which share the steps equally.

    Args:
        method: The method.
        world: Folder that `World.write` filled.
        base: Checkpoint that the first stage starts from.
        out: Output folder of the last stage; those of the others are beside it.
        seed: Seed of the trainings.
        steps: Number of optimizer steps of all stages.
        save: Whether to save checkpoints and resume from them; not worth it for one of many short runs.
        where: Name of the method, for errors.

    Raises:
        RecipeError: If a loss isn't possible.
    """
    stages = [*method.prepare, method]
    recipes = []
    for number, stage in enumerate(stages, start=1):
        folder = out if stage is method else out.parent / f"{out.name}-stage-{number}"
        share = max(steps * number // len(stages) - steps * (number - 1) // len(stages), 1)
        recipes.append(
            train_recipe(stage, world=world, base=base, out=folder, seed=seed, steps=share, save=save, where=where)
        )
        base = folder
    return recipes


def train_recipe(
    stage: Stage,
    *,
    world: Path,
    base: Path,
    out: Path,
    seed: int,
    steps: int = 100,
    save: bool = True,
    where: str = "method",
) -> TrainRecipe:
    """Return the training recipe of a stage.

    Args:
        stage: The stage.
        world: Folder that `World.write` filled.
        base: Checkpoint to start from.
        out: Output folder.
        seed: Seed of the training.
        steps: Number of optimizer steps.
        save: Whether to save checkpoints and resume from them; not worth it for one of many short runs.
        where: Name of the method, for errors.

    Raises:
        RecipeError: If the loss isn't possible.
    """
    return check_recipe(
        {
            "model": {"path": str(base)},
            "data": [{"path": str(world / f"{stage.main}.jsonl")}],
            "buffer": [{"path": str(world / "helpfulness.jsonl")}] if stage.buffer else [],
            "benchmarks": [str(world / "prompts.jsonl")],
            # Pairs are ordered by noisy annotators: the same two answers may occur in both orders.
            "conflicts": "keep",
            "text": {"max_length": 128},
            "loss": stage.loss,
            "labels": stage.labels,
            "train_only": stage.train_only,
            # A single run uses each pair about once, so a cache pays off only for several runs of one base.
            # Token-level DPO can't use it.
            "reference": "shared" if save or stage.loss.get("name") == "tdpo" else "cache",
            "trainer": {
                "output_dir": str(out),
                "learning_rate": stage.learning_rate,
                "lr_scheduler_type": "cosine",
                "warmup_steps": 0.1,
                "per_device_train_batch_size": stage.pairs_per_step // (2 if stage.buffer else 1),
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
