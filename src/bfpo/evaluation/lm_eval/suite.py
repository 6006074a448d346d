"""Tasks of lm-evaluation-harness in a suite: checking, running and scoring them. Their results are kept in files."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from bfpo.core.files import content_hash, file_hash, parse_json, write_json
from bfpo.core.terminal import say
from bfpo.errors import DataError, RecipeError
from bfpo.evaluation.baseline import Baseline
from bfpo.evaluation.differences import compare_scores
from bfpo.evaluation.lm_eval.requests import PlannedRequests, check_requests, plan_requests
from bfpo.evaluation.lm_eval.run import TaskMetric, TaskResults, open_lm, run_task
from bfpo.evaluation.lm_eval.tasks import (
    UNKNOWN_LICENSE,
    RowCount,
    check_task,
    count_task_rows,
    find_builder,
    find_license,
    lm_eval_version,
    load_task,
    require_lm_eval,
)
from bfpo.evaluation.metric_specs import MetricSpec
from bfpo.evaluation.recipe import EvalRecipe
from bfpo.evaluation.results import MetricComparison, MetricResult, TaskData
from bfpo.evaluation.scoring import PromptScores, compute_metrics
from bfpo.evaluation.suite import EvalData, Suite, lm_eval_name, lm_eval_tasks
from bfpo.generation.open import EngineSection

FOLDER = "lm_eval"
NO_INTERVAL = "none: lm-eval has no number per row"
NO_NUMBER = "none: lm-eval found no number on some rows"
# Properties of a task's data in which two runs must be equal to be compared.
_COMPARABLE = ("lm_eval", "version", "few_shot", "template_policy")


class LmEvalTask(NamedTuple):
    """A task of lm-eval in a suite.

    Args:
        suite: Name of the suite.
        spec: lm-eval's name of the task, or path of a YAML task.
        data: Where its rows are read from.
    """

    suite: str
    spec: str
    data: EvalData

    @property
    def name(self) -> str:
        """Name of the task in the results."""
        return lm_eval_name(self.spec)

    @property
    def full_name(self) -> str:
        """Name with that of the suite."""
        return f"{self.suite}/{self.name}"


def find_lm_eval_tasks(recipe: EvalRecipe, suites: Mapping[str, Suite]) -> list[LmEvalTask]:
    """Return the tasks of lm-eval in the suites of a recipe, after checking that they can be run.

    Raises:
        MissingExtra: If there are such tasks and lm-eval isn't installed.
        RecipeError: If lm-eval has no such task, or the model isn't in this process.
        DataError: If a local file of rows is missing.
    """
    tasks = [
        LmEvalTask(suite, spec, recipe.data.get(lm_eval_name(spec), EvalData()))
        for suite, spec in lm_eval_tasks(suites, recipe.leave_out)
    ]
    if not tasks:
        return []
    model = recipe.model
    if model is None or model.server is not None or model.steps is not None:
        origin = "saved completions" if model is None else "a server" if model.server else "a chain of steps"
        names = ", ".join(task.full_name for task in tasks)
        raise RecipeError(
            f"{tasks[0].full_name}: lm-eval needs likelihoods of given answers, which {origin} can't give; name the "
            f"model's folder or hub id as model: path (without server and steps), or leave_out: [{names}]"
        )
    require_lm_eval()
    for task in tasks:
        try:
            check_task(task.spec, with_data=(task.data.path or task.data.revision) is not None)
            if task.data.path is not None:
                find_builder(task.data.path)
        except (RecipeError, DataError) as error:
            raise type(error)(f"{task.full_name}: {error}") from None
    return tasks


def load_tasks(tasks: Sequence[LmEvalTask], folder: str) -> list[Any]:
    """Load tasks with their rows.

    Args:
        tasks: The tasks.
        folder: Folder for files that are needed while they run.

    Raises:
        DataError: If rows can't be read; the message names the keys for a local file.
    """
    loaded, failed = [], {}
    for task in tasks:
        try:
            loaded.append(load_task(task.spec, Path(folder), path=task.data.path, revision=task.data.revision))
        except DataError as error:
            failed[task] = error
    if failed:
        reasons = "\n".join(f"{task.full_name}: {error}" for task, error in failed.items())
        files = ", ".join(f"{task.name}: {{path: FILE}}" for task in failed if task.name == task.spec)
        local = f"data: {{{files}}}, local files with the sets' columns, or " if files else ""
        names = ", ".join(task.full_name for task in failed)
        raise DataError(f"{reasons}\n  in the recipe: {local}leave_out: [{names}]")
    return loaded


class PlannedTask(NamedTuple):
    """A task of lm-eval in a plan.

    Args:
        name: `SUITE/TASK`.
        rows: Number of rows; None if they can't be read here.
        license: License of the data.
        requests: What the model is asked, by kind.
        has_results: Whether the results exist.
        problem: Why the rows can't be read; empty if they can.
    """

    name: str
    rows: RowCount | None
    license: str
    requests: list[PlannedRequests]
    has_results: bool
    problem: str = ""


def plan_lm_eval_tasks(recipe: EvalRecipe, tasks: Sequence[LmEvalTask]) -> list[PlannedTask]:
    """Count rows and requests of tasks, and estimate the time of those without results.

    A task whose rows can't be read, because the hub can't be reached, say, is planned without them.

    Raises:
        ModelError: If the model can't be loaded.
    """
    model = recipe.model
    if not tasks or model is None:
        return []
    from bfpo.generation.in_process import checkpoint_identity

    planned, lm, identity = [], None, checkpoint_identity(model.path, model.revision)
    with TemporaryDirectory() as folder:
        for task in tasks:
            try:
                loaded = load_task(task.spec, Path(folder), path=task.data.path, revision=task.data.revision)
            except DataError as error:
                problem = str(error).partition("\n")[0]
                planned.append(PlannedTask(task.full_name, None, find_license(task.spec), [], False, problem))
                continue
            if lm is None:
                lm, identity = _load_lm(model)
            has_results = result_file(Path(recipe.out), task, recipe, identity).is_file()
            rows = count_task_rows(loaded, recipe.limit)
            rows = rows._replace(origin=task.data.path or rows.origin)
            check_requests(lm, loaded, model.path, limit=recipe.limit)
            requests = plan_requests(lm, loaded, limit=recipe.limit, timed=not has_results)
            license = find_license(task.spec, loaded)
            planned.append(PlannedTask(task.full_name, rows, license, requests, has_results))
    return planned


def _load_lm(model: EngineSection) -> tuple[Any, str]:
    """Return the model for lm-eval, and the identity of its checkpoint."""
    from bfpo.generation.in_process import load_checkpoint

    network, tokenizer, identity = load_checkpoint(model.path, dtype=model.dtype, revision=model.revision)
    # lm-eval's detection of the batch size takes longer on a CPU than it saves.
    return open_lm(network, tokenizer, batch_size="auto" if network.device.type == "cuda" else 8), identity


def run_lm_eval_tasks(recipe: EvalRecipe, tasks: Sequence[LmEvalTask], out: Path) -> list[TaskResults]:
    """Run the tasks that have no results yet; the results of each are kept in the folder `lm_eval`.

    Args:
        recipe: Recipe of the evaluation.
        tasks: Output of `find_lm_eval_tasks`.
        out: Folder of the evaluation.

    Raises:
        DataError: If rows can't be read; raised before any task is run.
        ModelError: If the model can't be loaded.
    """
    from bfpo.generation.in_process import checkpoint_identity

    model = recipe.model
    if not tasks or model is None:
        return []
    identity = checkpoint_identity(model.path, model.revision)
    missing = [task for task in tasks if not result_file(out, task, recipe, identity).is_file()]
    if missing:
        with TemporaryDirectory() as folder:
            loaded = load_tasks(missing, folder)
            lm, identity = _load_lm(model)
            for rows in loaded:
                check_requests(lm, rows, model.path, limit=recipe.limit)
            for number, (task, rows) in enumerate(zip(missing, loaded, strict=True), start=1):
                path = result_file(out, task, recipe, identity)
                if not path.is_file():
                    say(f"lm-eval: {task.full_name} ({number} of {len(missing)})")
                    results = run_task(lm, rows, task.spec, limit=recipe.limit, path=task.data.path)
                    write_json(path, results.to_json())
            del lm
    return [_read_results(result_file(out, task, recipe, identity)) for task in tasks]


def result_file(out: Path, task: LmEvalTask, recipe: EvalRecipe, identity: str) -> Path:
    """Return the file with the results of a task; its name has a hash of everything that they depend on."""
    assert recipe.model is not None
    files = [task.data.path or "", *_own_files(task.spec)]
    rows = [file_hash(Path(file)) for file in files if file and _is_file(file)]
    key = (identity, recipe.model.dtype, task.spec, rows, task.data.revision, recipe.limit, lm_eval_version())
    return out / FOLDER / f"{task.name}-{content_hash(*key)}.json"


def _is_file(path: str) -> bool:
    try:
        return Path(path).is_file()
    except OSError:
        # A text without spaces may be longer than the name of a file can be.
        return False


def _own_files(spec: str) -> list[str]:
    """Return a YAML task, what else is in its folder, and the words in it, some of which are names of files."""
    path = Path(spec)
    if not path.is_file():
        return []
    beside = sorted(str(file) for file in path.parent.iterdir() if file.suffix in (".yaml", ".yml", ".py"))
    words = re.findall(r"[^\s\"'{}\[\],]+", path.read_text(encoding="utf-8", errors="replace"))
    return [spec, *beside, *words, *(str(path.parent / word) for word in words)]


def _read_results(path: Path) -> TaskResults:
    try:
        results = TaskResults.from_json(parse_json(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{path}: not the results of an lm-eval task ({error}); remove it") from None
    return TaskResults(results.metrics, {**results.metadata, "kept_in": f"{FOLDER}/{path.name}"})


def lm_eval_data(tasks: Sequence[LmEvalTask], results: Sequence[TaskResults]) -> list[TaskData]:
    """Return the data of tasks, from the metadata of their results."""
    keys = {"from": "origin", "of": "published"}
    names = {field.name for field in fields(TaskData)}
    rows = []
    for task, task_results in zip(tasks, results, strict=True):
        values = {keys.get(key, key): value for key, value in task_results.metadata.items()}
        # Results of earlier versions have no license.
        values["license"] = values.get("license") or UNKNOWN_LICENSE
        rows.append(
            TaskData(**{key: value for key, value in values.items() if key in names} | {"name": task.full_name})
        )
    return rows


def lm_eval_metrics(tasks: Sequence[LmEvalTask], results: Sequence[TaskResults]) -> list[MetricResult]:
    """Return the metrics of tasks with intervals over rows; a metric that isn't a mean over rows has none."""
    metrics = []
    for task, task_results in zip(tasks, results, strict=True):
        for metric in task_results.metrics:
            if metric.values:
                metrics += compute_metrics(task.suite, [_scores(task, metric)])
            else:
                metrics.append(
                    MetricResult(
                        task.suite,
                        task.name,
                        metric.metric,
                        metric.value,
                        None,
                        None,
                        metric.n,
                        metric.unscored,
                        NO_INTERVAL if metric.value is not None else NO_NUMBER,
                        metric.higher_is_better,
                        category=metric.category,
                    )
                )
    return metrics


def _scores(task: LmEvalTask, metric: TaskMetric) -> PromptScores:
    is_rate = set(metric.values.values()) <= {0.0, 1.0}
    spec = MetricSpec(metric.metric, metric.higher_is_better, is_rate, needs_judge=False)
    return PromptScores(task.name, spec, metric.values, 0, 1, "", metric.category)


def compare_lm_eval_tasks(
    tasks: Sequence[LmEvalTask], results: Sequence[TaskResults], baseline: Baseline
) -> tuple[list[MetricComparison], list[str]]:
    """Compare tasks with those of a baseline, row by row.

    Args:
        tasks: Tasks of this run.
        results: Their results.
        baseline: Evaluation to compare with.

    Returns:
        The comparisons, and notes for the reader of the results.
    """
    comparisons, notes = list[MetricComparison](), []
    baseline_data = {row.name: row for row in baseline.results.data if row.kept_in is not None}
    for task, task_results in zip(tasks, results, strict=True):
        data = baseline_data.get(task.full_name)
        if data is None:
            notes.append(f"No comparison of {task.full_name} with {baseline.results.run}: it wasn't run there.")
            continue
        if differing := [key for key in _COMPARABLE if getattr(data, key) != task_results.metadata.get(key)]:
            keys = ", ".join(differing)
            notes.append(f"No comparison of {task.full_name} with {baseline.results.run}: {keys} differ.")
            continue
        baseline_results = _read_results(baseline.folder / str(data.kept_in))
        comparisons += compare_scores(
            task.suite,
            [_scores(task, metric) for metric in task_results.metrics if metric.values],
            [_scores(task, metric) for metric in baseline_results.metrics if metric.values],
            against=baseline.results,
        )
    return comparisons, notes
