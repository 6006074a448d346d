"""The work of `bfpo sft` with `experts:`: an adapter for each step of the chain, on the same base model."""

from pathlib import Path

from accelerate import PartialState

from bfpo.config.loading import dump_yaml, holds_recipe
from bfpo.config.recipes import SftRecipe
from bfpo.core.chain import EXPERTS, SHARED, STEPS, Expert
from bfpo.core.files import write_text
from bfpo.core.terminal import say
from bfpo.data.guided_answers import step_adapter
from bfpo.errors import RecipeError
from bfpo.model.lora import is_adapter
from bfpo.model.shared_adapter import find_shared, read_record
from bfpo.training.arguments import output_folder, without_resume
from bfpo.training.run_sft import run_sft

STEPS_FILE = "steps.yaml"


def run_experts(recipe: SftRecipe, *, dry_run: bool = False, limit: int | None = None) -> None:
    """Train an adapter for each step in `experts`, and write the file that engines take as `--steps`.

    Each is an ordinary run of `bfpo sft` on the demonstrations of its step, in a folder with the name of the step.
    `shared` is one on those of all the steps; it is trained first, and the others beside it. Otherwise nothing of one
    expert depends on another. With `trainer.resume_from_checkpoint` those that are finished stay.

    Args:
        recipe: Recipe with `experts`.
        dry_run: Whether to stop before a model is loaded or trained, for each step.
        limit: Maximum number of completions of each source.

    Raises:
        RecipeError: If there is neither `lora` nor an adapter to train further.
    """
    if recipe.lora is None and not (recipe.model.path and is_adapter(recipe.model.path, recipe.model.revision)):
        raise RecipeError("experts are adapters: set lora, or model.path to an adapter that each starts from")
    out = output_folder(recipe.trainer)
    runs = {name: expert_recipe(recipe, name) for name in sorted(recipe.experts, key=lambda name: name != SHARED)}
    for number, (name, expert) in enumerate(runs.items(), start=1):
        folder = Path(expert.trainer["output_dir"])
        say(f"expert {number} of {len(runs)}: {name}, in {folder}")
        if dry_run and SHARED in runs:
            # It isn't trained yet.
            expert = expert.model_copy(update={"shared_adapter": None})
        if not dry_run and recipe.trainer.get("resume_from_checkpoint") and _is_finished(folder, expert):
            say(f"{folder} is finished; it stays")
            continue
        run_sft(expert, dry_run=dry_run, limit=limit)
    if not dry_run and PartialState().is_main_process:
        path = out / STEPS_FILE
        write_text(path, dump_yaml({"steps": _adapters(recipe, runs)}))
        say(f"{path} names the adapters for `steps`, on their base model")


def expert_recipe(recipe: SftRecipe, name: Expert) -> SftRecipe:
    """Return the recipe of one expert, which is an ordinary one."""
    out = Path(str(recipe.trainer["output_dir"]))
    steps = [step for step in STEPS if step in recipe.experts and name in (step, SHARED)]
    is_beside = SHARED in recipe.experts and name != SHARED
    return recipe.model_copy(
        update={
            "experts": [],
            "data": [
                source.model_copy(update={"adapter": step_adapter(step)}) for step in steps for source in recipe.data
            ],
            "shared_adapter": str(out / SHARED) if is_beside else recipe.shared_adapter,
            "trainer": {**recipe.trainer, "output_dir": str(out / name)},
        }
    )


def _is_finished(folder: Path, recipe: SftRecipe) -> bool:
    """Return whether a folder has the run of this recipe, whether that run was itself told to resume or not."""
    started = (recipe, recipe.model_copy(update={"trainer": without_resume(recipe.trainer)}))
    file = folder / "recipe.resolved.yaml"
    if not (folder / "run.json").exists() or not any(holds_recipe(file, other) for other in started):
        return False
    shared = None if recipe.shared_adapter is None else find_shared(recipe.shared_adapter)
    return read_record(str(folder)) == shared


def _adapters(recipe: SftRecipe, runs: dict[Expert, SftRecipe]) -> dict[Expert, str | None]:
    """Return the adapters to answer with: steps without an expert have none of their own, the check is optional."""
    folders: dict[Expert, str | None] = {name: str(run.trainer["output_dir"]) for name, run in runs.items()}
    if recipe.shared_adapter is not None:
        folders[SHARED] = recipe.shared_adapter
    required: dict[Expert, str | None] = dict.fromkeys(STEPS[: STEPS.index("check")])
    return {name: (required | folders)[name] for name in EXPERTS if name in required | folders}
