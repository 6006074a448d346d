"""The model that an evaluation is about, as the recipe and the model's folder describe it."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from bfpo.core.files import parse_json
from bfpo.core.samples import Engine, Judge, Prompt
from bfpo.data.readings import name_without_part
from bfpo.errors import DataError
from bfpo.evaluation.recipe import EvalRecipe
from bfpo.evaluation.results import EVALUATION_FOLDER
from bfpo.evaluation.suite import Suite, Task
from bfpo.generation.open import open_engine
from bfpo.judging.guarded_engine import FirstSafeSection, guard_engine
from bfpo.judging.open import open_judge
from bfpo.judging.refusal_rule import kinds_of
from bfpo.judging.spec import JudgeSpec, parse_judge

TEMPLATE_POLICY = "the tokenizer's own chat template"
SERVER_POLICY = "the server's own chat template"
LM_EVAL_POLICY = "as data says of each task"
SAVED_POLICY = "as the program that saved the answers put them"


def model_name(recipe: EvalRecipe) -> str:
    """Return the name of the model: its path, or the file of its saved completions."""
    if recipe.model is not None:
        steps = f" with steps {', '.join(recipe.model.steps)}" if recipe.model.steps else ""
        return recipe.model.path + (f"@{recipe.model.revision}" if recipe.model.revision else "") + steps
    return str(recipe.completions)


def run_name(recipe: EvalRecipe) -> str:
    """Return the short name of the run; of `runs/NAME/evaluation`, where runs keep their evaluation, it is NAME."""
    folder = Path(recipe.out).resolve()
    return recipe.run or (folder.parent.name if folder.name == EVALUATION_FOLDER else folder.name)


def open_model(recipe: EvalRecipe) -> Engine:
    """Open the model of a recipe, behind its guard, or the file of its saved completions."""
    if recipe.model is None:
        from bfpo.generation.saved import SavedEngine

        return SavedEngine(str(recipe.completions), run_name(recipe))
    sampling = recipe.sampling.settings
    return guard_engine(open_engine(recipe.model, sampling), sampling, recipe.guard)


def open_recipe_judge(recipe: EvalRecipe, spec: str | JudgeSpec, prompts: Sequence[Prompt]) -> Judge:
    """Open a judge of these prompts' completions with the threshold and the server settings of a recipe."""
    return open_judge(spec, threshold=recipe.threshold, server=recipe.judge_server, kinds=kinds_of(prompts))


def is_guard_judge(recipe: EvalRecipe, spec: str) -> bool:
    """Return whether a judge, or a member of it, judges the samples of the recipe's guard too."""
    if not isinstance(recipe.guard, FirstSafeSection):
        return False
    return not set(parse_judge(spec).parts).isdisjoint(parse_judge(recipe.guard.judge).parts)


def training_judges(recipe: EvalRecipe) -> set[str]:
    """Return the names of the judges that labeled or scored the training data, from the manifest beside the model.

    Raises:
        DataError: If the manifest is malformed.
    """
    if recipe.model is None:
        return set()
    path = Path(recipe.model.path) / "data_manifest.json"
    if not path.is_file():
        return set()
    try:
        manifest = parse_json(path.read_text(encoding="utf-8"))
        sources = [*(manifest.get("label_sources") or {}), *(manifest.get("labels") or {}).get("scorers", ())]
        return {name_without_part(part.partition("@")[0]) for source in sources for part in str(source).split("+")}
    except (ValueError, AttributeError, TypeError):
        raise DataError(f"{path}: not the JSON object that training leaves; who labeled the data?") from None


def template_policy(recipe: EvalRecipe, suites: Mapping[str, Suite], tasks: Sequence[Task]) -> str:
    """Return how prompts are given to the model; the system messages of tasks are part of it."""
    if not tasks:
        return LM_EVAL_POLICY
    if recipe.template_policy is not None:
        policy = recipe.template_policy
    elif recipe.model is None:
        policy = SAVED_POLICY
    else:
        policy = SERVER_POLICY if recipe.model.server is not None else TEMPLATE_POLICY
    names = {(task.suite, task.name) for task in tasks}
    for suite, content in suites.items():
        for task in content.tasks:
            if task.system is not None and (suite, task.task_name) in names:
                policy += f"; {suite}/{task.task_name} with the system message {task.system!r}"
    return policy
