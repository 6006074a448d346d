"""`bfpo eval`: prompts → completions → verdicts of each judge → results; every file on the way can be used again."""

import gc
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from bfpo.config.loading import dump_recipe
from bfpo.core.files import file_name, write_text
from bfpo.core.samples import Completion, Engine, Judge, Prompt
from bfpo.core.terminal import say
from bfpo.data.stages import generate_completions, judge_completions
from bfpo.errors import DataError, Unanswered
from bfpo.evaluation import correction as calibrating
from bfpo.evaluation.baseline import compare_with_base, read_base
from bfpo.evaluation.comparisons import ModelComparison
from bfpo.evaluation.gate import check_bounds, enforce, read_gate
from bfpo.evaluation.indices import index_metrics
from bfpo.evaluation.lm_eval.suite import (
    capabilities_of,
    capability_metrics,
    compare_capabilities,
    run_capabilities,
)
from bfpo.evaluation.panel import JudgeOutput, agreement, all_metrics, measure_all
from bfpo.evaluation.recipe import EvalRecipe
from bfpo.evaluation.results import MetricComparison, Results, answers_hash
from bfpo.evaluation.run import TEMPLATE_POLICY, write_prompts
from bfpo.evaluation.show import show_evaluation
from bfpo.evaluation.suite import Suite, Task, load_suite, read_tasks, with_prompts_of
from bfpo.evaluation.warnings import warnings_of
from bfpo.evaluation.win_rates import check_judges, compare, export, length_controlled, references_of
from bfpo.generation.open import open_engine
from bfpo.judging.open import open_judge
from bfpo.judging.people import PeopleJudge
from bfpo.judging.spec import JudgeSpec

SERVER_POLICY = "the server's own chat template"
LM_EVAL_POLICY = "as data says of each task"
SAVED_POLICY = "as the program that saved the answers put them"


def run_eval(recipe: EvalRecipe, *, gate: str | None = None) -> Results:
    """Evaluate a model, or saved completions.

    Args:
        recipe: What to do.
        gate: File of bounds; default the recipe's.

    Raises:
        RecipeError: If a suite, a source, a judge or a bound isn't possible.
        DataError: If prompts can't be read, or the folder holds another evaluation.
        GateViolated: If a bound is violated with confidence; the results are written all the same.
    """
    given = gate if gate is not None else recipe.gate
    bounds = read_gate(given) if isinstance(given, str) else given or []
    suites, tasks = read_questions(recipe)
    # What can be known to be wrong is told before hours of work.
    wanted = capabilities_of(recipe, suites)
    check_judges(recipe, tasks)
    check_bounds(bounds, tasks, {one.where: one.name for one in wanted}, corrected=recipe.calibration is not None)
    labeled = [] if recipe.calibration is None else calibrating.read_calibration(recipe.calibration)
    policy = template_policy(recipe, suites, tasks)
    base = None if recipe.base is None else read_base(recipe.base, policy if tasks else None)
    out = Path(recipe.out)
    prompts = questions(tasks)
    if prompts:
        write_prompts(out, prompts)
    found = run_capabilities(recipe, wanted, out)
    release()
    completions, remarks = _answers(recipe, prompts, out) if prompts else ([], [])
    tasks = with_prompts_of(tasks, {one.prompt_id for one in completions})
    names = {model_name(recipe), run_name(recipe), *(one.model for one in completions[:1])}
    calibration = calibrating.calibration_for(recipe.calibration or "", labeled, names)
    references = references_of(tasks)
    panel = (
        judge_all(recipe, completions, out, labeled=calibration.completions, references=references) if prompts else []
    )
    calibrated = [calibrating.hold(one.label, calibration, one.on_labeled) for one in panel if one.on_labeled]
    labeled_by = {*recipe.labeled_by, *training_judges(recipe)}
    results = Results(
        run=run_name(recipe),
        model=model_name(recipe),
        template_policy=policy,
        judges=[
            {"name": one.label, "revision": one.revision, "circular": bool({*one.name.split("+")} & labeled_by)}
            for one in panel
        ],
        sampling=asdict(recipe.sampling.settings),
        metrics=[],
        answers=answers_hash(completions) if completions else "",
        agreement=agreement(tasks, panel),
        data=[*(task.facts for task in tasks), *(one.facts for one in found)],
        calibration=calibrating.facts(calibration, calibrated),
    )
    measures = measure_all(tasks, completions, panel)
    metrics, comparisons, pairs = all_metrics(measures), list[MetricComparison](), list[ModelComparison]()
    metrics = calibrating.with_corrected(metrics, calibrated)
    metrics += [*length_controlled(tasks, completions, panel), *capability_metrics(wanted, found)]
    metrics += index_metrics(suites, metrics)
    if calibrated:
        remarks += calibrating.remarks(calibration, calibrated, metrics, recipe.judges)
    if base is not None:
        if tasks:
            comparisons, pairs, told = compare_with_base(*base, results, tasks, measures, panel)
            remarks += told
        of_lm_eval, told = compare_capabilities(wanted, found, *base)
        comparisons, remarks = [*comparisons, *of_lm_eval], [*remarks, *told]
    warned = [*warnings_of(recipe, suites, results, panel), *remarks]
    results = replace(results, metrics=metrics, comparisons=comparisons, model_comparisons=pairs, warnings=warned)
    write_text(out / "recipe.resolved.yaml", dump_recipe(recipe))
    results.write(out)
    export(tasks, completions, panel, results.run, out)
    show_evaluation(results)
    say(f"results in {out / 'results.json'}")
    if bounds:
        enforce(results, bounds)
    return results


def read_questions(recipe: EvalRecipe) -> tuple[dict[str, Suite], list[Task]]:
    """Return the suites of a recipe by name, and their tasks with prompts."""
    suites = dict(load_suite(name) for name in recipe.suites)
    return suites, read_tasks(suites, data=recipe.data, leave_out=recipe.leave_out, limit=recipe.limit)


def questions(tasks: Sequence[Task]) -> list[Prompt]:
    """Return the prompts of all tasks; one that several tasks ask is asked once."""
    return list({prompt.prompt_id: prompt for task in tasks for prompt in task.prompts}.values())


def run_name(recipe: EvalRecipe) -> str:
    """Return the short name of the run."""
    return recipe.run or Path(recipe.out).resolve().name


def model_name(recipe: EvalRecipe) -> str:
    """Return what is evaluated."""
    if recipe.model is not None:
        return recipe.model.path + (f"@{recipe.model.revision}" if recipe.model.revision else "")
    return str(recipe.completions)


def engine_of(recipe: EvalRecipe) -> Engine:
    """Return what answers."""
    if recipe.model is None:
        from bfpo.generation.saved import SavedEngine

        return SavedEngine(str(recipe.completions), run_name(recipe))
    return open_engine(recipe.model, recipe.sampling.settings)


def _answers(recipe: EvalRecipe, prompts: Sequence[Prompt], out: Path) -> tuple[list[Completion], list[str]]:
    engine, path, samples = engine_of(recipe), out / "completions.jsonl", recipe.sampling.samples
    remarks = []
    try:
        found = generate_completions(engine, prompts, path, samples=samples)
    except Unanswered as error:
        lost = {key[0] for key in error.failed}
        if len(lost) > recipe.max_unanswered * len(prompts):
            say(f"max_unanswered is {recipe.max_unanswered:g}; a larger share leaves these prompts out")
            raise
        answered = [prompt for prompt in prompts if prompt.prompt_id not in lost]
        found = generate_completions(engine, answered, path, samples=samples)
        remarks.append(f"{len(lost):,} of {len(prompts):,} prompts have no answer and take no part.")
    if getattr(engine, "counts_tokens", True) is False:
        remarks.append("Lengths are in words: the saved answers don't say how many tokens they have.")
    del engine
    release()
    return found, remarks


def judge_of(recipe: EvalRecipe, spec: str | JudgeSpec) -> Judge:
    """Return the judge of a spec, at the recipe's threshold if it has one."""
    return open_judge(spec, threshold=recipe.threshold, server=recipe.judge_server)


def judge_all(
    recipe: EvalRecipe,
    completions: Sequence[Completion],
    out: Path,
    *,
    labeled: Sequence[Completion] = (),
    references: Mapping[str, Completion] | None = None,
) -> list[JudgeOutput]:
    """Ask the judges one after the other, so that one at a time is in memory.

    Args:
        recipe: Whose judges they are.
        completions: The evaluated answers.
        out: Folder of the evaluation.
        labeled: Answers that people labeled; the judges read them too, people themselves don't.
        references: Prompt → the output that its answer is compared with.
    """
    panel: list[JudgeOutput] = []
    for spec in recipe.judges:
        judge = judge_of(recipe, spec)
        name, revision = judge.name, judge.revision
        if any((name, revision) == (one.name, one.revision) for one in panel):
            raise DataError(f"judges: {spec} is {name}@{revision}, which stands there already")
        label = name if name not in {one.label for one in panel} else f"{name}@{revision[:8]}"
        verdicts = judge_completions(judge, completions, out / verdicts_file(label, first=not panel))
        asked_too = labeled if name != PeopleJudge.name else ()
        on_labeled = (
            judge_completions(judge, asked_too, out / f"calibration-{file_name(label)}.jsonl") if asked_too else []
        )
        one = JudgeOutput(label, name, revision, verdicts, on_labeled)
        panel.append(compare(judge, one, completions, references, out) if references else one)
        del judge
        release()
    return panel


def verdicts_file(label: str, *, first: bool) -> str:
    """Return the name of the file with a judge's verdicts."""
    return "verdicts.jsonl" if first else f"verdicts-{file_name(label)}.jsonl"


def release() -> None:
    """Give the memory of what isn't used any more back to the accelerator."""
    if (torch := sys.modules.get("torch")) is not None and torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


def training_judges(recipe: EvalRecipe) -> set[str]:
    """Return the names of the judges that labeled what the model was trained on, as its folder tells."""
    if recipe.model is None:
        return set()
    path = Path(recipe.model.path) / "data_manifest.json"
    if not path.is_file():
        return set()
    try:
        sources = json.loads(path.read_text(encoding="utf-8")).get("label_sources") or {}
    except (ValueError, AttributeError):
        raise DataError(f"{path}: not the JSON object that training leaves; who labeled the data?") from None
    return {part.partition("@")[0] for source in sources for part in str(source).split("+")}


def template_policy(recipe: EvalRecipe, suites: dict[str, Suite], tasks: Sequence[Task]) -> str:
    """Return in words how prompts were put to the model; system messages of tasks are a part of it."""
    if not tasks:
        return LM_EVAL_POLICY
    if recipe.template_policy is not None:
        policy = recipe.template_policy
    elif recipe.model is None:
        policy = SAVED_POLICY
    else:
        policy = SERVER_POLICY if recipe.model.server is not None else TEMPLATE_POLICY
    asked = {(task.suite, task.name) for task in tasks}
    for suite, content in suites.items():
        for task in content.tasks:
            if task.system is not None and (suite, task.called) in asked:
                policy += f"; {suite}/{task.called} with the system message {task.system!r}"
    return policy
