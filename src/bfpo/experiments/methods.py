"""Methods that are compared on the testbed; each is a short list of stages, which are recipes of the product."""

from pathlib import Path
from typing import Any

from bfpo.config.loading import check_recipe
from bfpo.config.recipes import OuterSection, ScoreRecipe, TrainRecipe
from bfpo.experiments.stages import LogRatioStage, Method, OnlineStage, OuterStage, SamplesStage, ScorerStage, Stage
from bfpo.online.recipe import OnlineRecipe

# Beside the output of a method that is trained in rounds: prompts for them, and the scorer that measures them.
FRESH_PROMPTS, HEADS = "fresh-prompts.jsonl", "heads"
# Longer than any answer in the language of worlds.
MAX_NEW_TOKENS = 48


def _squared(name: str, **options: Any) -> dict[str, Any]:
    return {"name": name, "beta": 0.3, **options}


def _constrained() -> dict[str, Any]:
    """Return the stages of a method with a multiplier, which are the same for all of them and so shared."""
    return {
        "scorer": ScorerStage(),
        "samples": SamplesStage(),
        "max_unsafe": 0.05,
        "main": "samples",
        "buffer": False,
    }


def _online(name: str, **options: Any) -> dict[str, Any]:
    """Return the stages of a method that is run by reinforcement learning."""
    return {"scorer": ScorerStage(), "online": OnlineStage(combine={"name": name, **options})}


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
    "cat_dpo": Method(
        title="Cat-DPO: the safe answer first, with a margin for each harm category",
        loss={"name": "cat_dpo", "beta": 0.3},
        main="safety_with_categories",
        labels={"from": "safety"},
    ),
    "sacpo": Method(
        title="SACPO: DPO for helpfulness, then for safety",
        prepare=[Stage(loss={"name": "dpo", "beta": 0.3})],
        loss={"name": "dpo", "beta": 0.3},
        main="safety_by_safety",
        buffer=False,
    ),
    "modpo": Method(title="MODPO's margin", loss={"name": "modpo", "beta": 0.3}),
    "bfpo_constrained": Method(
        title="BFPO with a multiplier, on samples of the base", loss=_squared("bfpo"), **_constrained()
    ),
    # IPO's squared loss on soft labels reaches a threshold more closely than DPO's (docs/constraints.md).
    "mocan": Method(
        title="MoCAN: IPO on scores with a multiplier, on samples of the base",
        loss={"name": "ipo", "beta": 2.0},
        labels={"from": "scores"},
        **_constrained(),
    ),
    "pecan": Method(
        title="PeCAN: IPO on log-ratios with a multiplier, on samples of the base",
        loss={"name": "ipo", "beta": 0.3},
        labels={"from": "scores"},
        log_ratios=LogRatioStage(),
        samples=SamplesStage(),
        min_gain=1.0,
        main="samples",
        buffer=False,
    ),
    "c_dpo": Method(
        title="C-DPO: DPO on scores, with a multiplier that is moved in rounds",
        loss={"name": "dpo", "beta": 2.0},
        labels={"from": "scores"},
        outer=OuterStage(),
        **_constrained(),
    ),
    # Half of the prompts are harmful: 5 % of their answers, as for the methods above.
    "safe_rlhf": Method(
        title="Safe RLHF: reward and cost with a multiplier, online",
        **_online("lagrangian", cost_at_most=0.025, measure="unsafe", rate=0.5, max=20.0),
    ),
    "online_bilinear": Method(title="BFPO's own objective, online", **_online("bilinear")),
    "online_multiplicative": Method(title="multiplicative value, online", **_online("multiplicative")),
    "online_tail": Method(title="worst fifth of reward and cost, online", **_online("tail", multiplier=2.0)),
}


def samples_folder(out: Path) -> Path:
    """Return the folder beside the output folder of a method with its pairs of samples and its multiplier."""
    return out.parent / f"{out.name}-samples"


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
    stages = method.trainings
    recipes = []
    for number, stage in enumerate(stages, start=1):
        folder = out if stage is method else out.parent / f"{out.name}-stage-{number}"
        share = max(steps * number // len(stages) - steps * (number - 1) // len(stages), 1)
        if stage is method and method.has_constraint:
            stage = _with_multiplier(method, samples_folder(out))
        recipes.append(
            train_recipe(stage, world=world, base=base, out=folder, seed=seed, steps=share, save=save, where=where)
        )
        base = folder
    if method.outer is not None:
        recipes[-1] = _with_outer(recipes[-1], method.outer, samples_folder(out), seed=seed)
    return recipes


def _with_outer(recipe: TrainRecipe, stage: OuterStage, prepared: Path, *, seed: int) -> TrainRecipe:
    """Return a recipe that is trained in rounds, with the prompts and the scorer in the folder beside its output."""
    section = OuterSection(
        prompts=str(prepared / FRESH_PROMPTS),
        judge=f"cost:{prepared / HEADS / 'cost'}",
        reward=f"reward:{prepared / HEADS / 'reward'}",
        rounds=stage.rounds,
        samples=stage.samples,
        max_new_tokens=MAX_NEW_TOKENS,
        # Samples of the base have the seed 0, the evaluation too.
        seed=1000 * (seed + 1),
    )
    return recipe.model_copy(update={"outer": section})


def _with_multiplier(method: Method, dual: Path) -> Method:
    """Return a method whose labels, or else whose loss, have the multiplier of a `dual.json`."""
    if method.labels is not None and method.is_labeled_by_scores:
        return method.model_copy(update={"labels": method.labels | {"multiplier": str(dual)}})
    return method.model_copy(update={"loss": method.loss | {"multiplier": str(dual)}})


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
        out: Output folder; pairs of samples are in the folder beside it.
        seed: Seed of the training.
        steps: Number of optimizer steps.
        save: Whether to save checkpoints and resume from them; not worth it for one of many short runs.
        where: Name of the method, for errors.

    Raises:
        RecipeError: If the loss isn't possible.
    """
    pairs = samples_folder(out) / "pairs.jsonl" if stage.main == "samples" else world / f"{stage.main}.jsonl"
    return check_recipe(
        _data(world, pairs, buffer=stage.buffer)
        | {
            "model": {"path": str(base)},
            "loss": stage.loss,
            "labels": stage.labels,
            "train_only": stage.train_only,
            # A single run uses each pair about once, so a cache pays off only for several runs of one base.
            # Token-level DPO can't use it.
            "reference": "shared" if save or stage.loss.get("name") == "tdpo" else "cache",
            "trainer": _trainer(stage, out, buffer=stage.buffer, seed=seed, steps=steps)
            | {
                "save_strategy": "steps" if save else "no",
                "save_steps": 25,
                "save_total_limit": 1,
                "resume_from_checkpoint": save,
            },
        },
        TrainRecipe,
        where,
    )


def score_recipe(stage: ScorerStage, *, world: Path, base: Path, out: Path, seed: int) -> ScoreRecipe:
    """Return the recipe that trains a scorer.

    Args:
        stage: The stage.
        world: Folder that `World.write` filled.
        base: Checkpoint to start from.
        out: Output folder.
        seed: Seed of the training.
    """
    return check_recipe(
        _data(world, world / f"{stage.main}.jsonl", buffer=True)
        | {
            "model": {"path": str(base)},
            "holdout": 0.05,
            "trainer": _trainer(stage, out, buffer=True, seed=seed, steps=stage.steps) | {"save_strategy": "no"},
        },
        ScoreRecipe,
        "scorer",
    )


def online_recipe(
    stage: OnlineStage, *, prompts: Path, heads: Path, base: Path, out: Path, seed: int, where: str = "online"
) -> OnlineRecipe:
    """Return the recipe of reinforcement learning on a scorer.

    Args:
        stage: The stage.
        prompts: File of the prompts.
        heads: Folder of the scorer.
        base: Checkpoint to start from.
        out: Output folder.
        seed: Seed of the training.
        where: Name of the method, for errors.

    Raises:
        RecipeError: If the combiner isn't possible.
    """
    return check_recipe(
        {
            "model": {"path": str(base)},
            "prompts": [{"name": "file", "path": str(prompts), "license": "MIT"}],
            "reward": f"reward:{heads / 'reward'}",
            "cost": f"cost:{heads / 'cost'}",
            "combine": stage.combine,
            "trainer": {
                "output_dir": str(out),
                "learning_rate": stage.learning_rate,
                "lr_scheduler_type": "cosine",
                "warmup_steps": 0.1,
                "per_device_train_batch_size": stage.prompts_per_step * stage.samples,
                "num_generations": stage.samples,
                "max_completion_length": 48,
                "max_steps": stage.steps,
                "beta": stage.beta,
                "logging_steps": 5,
                "save_strategy": "no",
                "seed": seed,
                "use_cpu": True,
            },
        },
        OnlineRecipe,
        where,
    )


def _data(world: Path, pairs: Path, *, buffer: bool) -> dict[str, Any]:
    return {
        "data": [{"path": str(pairs)}],
        "buffer": [{"path": str(world / "helpfulness.jsonl")}] if buffer else [],
        "benchmarks": [str(world / "prompts.jsonl")],
        # Pairs are ordered by noisy annotators: the same two answers may occur in both orders.
        "conflicts": "keep",
        "text": {"max_length": 128},
    }


def _trainer(stage: Stage | ScorerStage, out: Path, *, buffer: bool, seed: int, steps: int) -> dict[str, Any]:
    return {
        "output_dir": str(out),
        "learning_rate": stage.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.1,
        "per_device_train_batch_size": stage.pairs_per_step // (2 if buffer else 1),
        "max_steps": steps,
        "logging_steps": 5,
        "seed": seed,
        "use_cpu": True,
    }
