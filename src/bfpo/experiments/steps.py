"""Steps of the quickstart and of experiments: world, base model, training, evaluation. Finished steps are reused."""

import json
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from bfpo.config.loading import dump_recipe, holds_recipe
from bfpo.config.recipes import SftRecipe, TrainRecipe
from bfpo.constraints.outer import run_outer
from bfpo.constraints.rounds import Round
from bfpo.core.files import write_jsonl, write_text
from bfpo.core.samples import Completion, Engine, Prompt, Sampling
from bfpo.data.stages import read_prompt_file
from bfpo.errors import RecipeError
from bfpo.evaluation.baseline import read_baseline
from bfpo.evaluation.pipeline import evaluate
from bfpo.evaluation.results import EVALUATION_FOLDER, FILE_NAME, Results
from bfpo.evaluation.subject import TEMPLATE_POLICY
from bfpo.evaluation.suite import tasks_by_kind
from bfpo.generation.in_process import load_engine
from bfpo.testbed.oracle import Oracle
from bfpo.testbed.world import World, WorldOptions, with_reward_margin
from bfpo.training.probe import Answers
from bfpo.training.run import run_training
from bfpo.training.run_sft import run_sft

SUITE = "testbed"
SAMPLING = Sampling(samples=1, temperature=0.7, max_new_tokens=48)
BASE_STEPS = {"pretraining": 900, "base": 100}
BASE_SHAPE = {"shape": "nano", "vocab_size": 2048}


def write_world(options: WorldOptions, folder: Path) -> None:
    """Write the files of a world, unless they exist.

    Raises:
        RecipeError: If the folder holds another world.
    """
    if not holds_world(options, folder):
        World(options).write(folder)


ANNOTATIONS = {"safety_with_costs": World.with_costs, "safety_with_categories": World.with_category}
"""Files of the safety pairs with columns that few methods read, and what adds them to a pair."""


def write_annotations(files: Collection[str], options: WorldOptions, folder: Path) -> None:
    """Write those of some files that are in `ANNOTATIONS` beside the other files of a world, unless they exist."""
    for name in ANNOTATIONS.keys() & set(files):
        path = folder / f"{name}.jsonl"
        if path.exists():
            continue
        world = World(options)
        pairs = (with_reward_margin(ANNOTATIONS[name](world, pair)) for pair in world.safety_set())
        write_jsonl(path, (pair.to_row() for pair in pairs))


def holds_world(options: WorldOptions, folder: Path) -> bool:
    """Return whether a folder holds the files of a world.

    Raises:
        RecipeError: If it holds another world.
    """
    # world.json is written last, so if it exists the other files do too.
    file = folder / "world.json"
    if not file.exists():
        return False
    existing = json.loads(file.read_text(encoding="utf-8")).get("options")
    if existing != options.model_dump():
        raise RecipeError(
            f"{folder} holds a world of other options ({existing}); choose another folder, or remove this one"
        )
    return True


def base_recipes(out: Path, *, seed: int) -> list[SftRecipe]:
    """Return the recipes of the base model in `out/base`: clean demonstrations, then imperfect ones."""
    world = out / "world"
    trainer = {
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.05,
        "per_device_train_batch_size": 32,
        "save_steps": 100,
        "save_total_limit": 1,
        "logging_steps": 25,
        "seed": seed,
        "use_cpu": True,
        "resume_from_checkpoint": True,
    }
    new_model = {"new": BASE_SHAPE | {"seed": seed}}
    stages = (
        ("pretraining", "pretraining", new_model, 4e-3),
        ("base", "fine_tuning", {"path": str(out / "pretraining")}, 1e-3),
    )
    return [
        SftRecipe.model_validate(
            {
                "model": model,
                "data": [{"adapter": "demonstrations", "path": str(world / f"{data}.jsonl")}],
                "text": {"max_length": 128},
                "trainer": trainer
                | {"output_dir": str(out / name), "learning_rate": learning_rate, "max_steps": BASE_STEPS[name]},
            }
        )
        for name, data, model, learning_rate in stages
    ]


def make_base(out: Path, *, seed: int) -> None:
    """Train the base model in `out/base`."""
    for recipe in base_recipes(out, seed=seed):
        run_once(recipe)


def is_finished(recipe: SftRecipe | TrainRecipe) -> bool:
    """Return whether the output folder of a recipe holds its finished run.

    Raises:
        RecipeError: If the folder holds a finished run of another recipe.
    """
    out = Path(recipe.trainer["output_dir"])
    if not (out / "run.json").exists():
        return False
    if holds_recipe(out.with_name(f"{out.name}.yaml"), recipe):
        return True
    raise RecipeError(f"{out} holds a run of another recipe; choose another folder, or remove this one")


def run_once(recipe: SftRecipe | TrainRecipe, *, answers: Answers | None = None) -> list[Round]:
    """Run a training recipe and save it next to its output folder; do nothing if the run is already finished.

    Args:
        recipe: The recipe.
        answers: Function that lets the policy answer the prompts of `probe:`; None for no probe.

    Returns:
        The rounds that were run, of a training in rounds; that their limit was reached is a result.

    Raises:
        RecipeError: If the folder holds a finished run of another recipe.
    """
    if is_finished(recipe):
        return []
    out = Path(recipe.trainer["output_dir"])
    write_text(out.with_name(f"{out.name}.yaml"), dump_recipe(recipe))
    if isinstance(recipe, TrainRecipe) and recipe.outer is not None:
        return run_outer(recipe, allow_unmet=True).rounds
    run_sft(recipe) if isinstance(recipe, SftRecipe) else run_training(recipe, answers=answers)
    return []


def evaluate_run(folder: Path, prompts_file: Path, oracle: Oracle, *, baseline: Path | None = None) -> Results:
    """Evaluate the checkpoint of a folder on held-out prompts, into `evaluation/`.

    Args:
        folder: Folder of the checkpoint; its name is the run's.
        prompts_file: Held-out prompts of the world.
        oracle: Judge; another revision of it judges the same completions again.
        baseline: Folder of an evaluated run to compare with.
    """
    prompts = read_prompt_file(str(prompts_file))
    return _evaluate(folder, prompts, oracle, lambda: load_engine(str(folder), SAMPLING), baseline=baseline)


def can_judge_again(evaluation: Path) -> bool:
    """Return whether a finished evaluation has its completions, which another revision of the oracle needs."""
    return all((evaluation / name).exists() for name in (Prompt.file_name, Completion.file_name, FILE_NAME))


def judge_again(evaluation: Path, oracle: Oracle) -> Results:
    """Judge and score the completions of a finished evaluation again; the model isn't needed.

    Args:
        evaluation: Folder that `evaluate_run` filled, without a baseline.
        oracle: Current revision of the judge.

    Raises:
        DataError: If a file is damaged.
    """
    prompts = read_prompt_file(str(evaluation / Prompt.file_name))
    return _evaluate(evaluation.parent, prompts, oracle, None)


def _evaluate(
    folder: Path,
    prompts: Sequence[Prompt],
    oracle: Oracle,
    open_engine: Callable[[], Engine] | None,
    *,
    baseline: Path | None = None,
) -> Results:
    results = evaluate(
        tasks_by_kind(SUITE, prompts),
        open_engine,
        [oracle],
        folder / EVALUATION_FOLDER,
        run=folder.name,
        model=str(folder),
        sampling=SAMPLING,
        by_category=False,
        baseline=None if baseline is None else read_baseline(str(baseline), TEMPLATE_POLICY),
    ).results
    results.write(folder / EVALUATION_FOLDER)
    return results
