"""Suites: tasks on published prompts, one YAML file per suite. Your own suite is named by its path."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import Field, model_validator

from bfpo.config.loading import check_recipe, read_recipe
from bfpo.config.recipes import Count, Section
from bfpo.core.conversation import conversation_key
from bfpo.core.files import content_hash
from bfpo.core.samples import KINDS, Completion, Kind, Prompt
from bfpo.data.prompt_sets import find_prompt_set
from bfpo.data.prompts import PromptSource, read_prompt_source, read_reference_outputs
from bfpo.errors import DataError, RecipeError, did_you_mean
from bfpo.evaluation.results import TaskData
from bfpo.generation.attacks import AttackSection
from bfpo.judging.spec import Finding

IndexName = Literal["harmlessness_index", "helpfulness_index"]
INDICES: tuple[IndexName, ...] = get_args(IndexName)


class SuiteTask(Section):
    """One task of a suite: prompts of one kind from one data set."""

    source: str
    """A key of `bfpo.data.prompt_sets.PROMPT_SETS`; `file` is your own file."""
    name: str | None = None
    """Name of the task; default the source's."""
    only: Kind | None = None
    """Kind of prompts to use; needed if the data set has several kinds."""
    where: dict[str, str] = Field(default={})
    """Column → value of the rows to use; a file without the column is used whole."""
    kind: Kind | None = None
    """Kind of the prompts, if neither the data set nor its rows say it."""
    limit: Count | None = None
    """Maximum number of prompts, a sample that is the same in every run."""
    system: str | None = None
    """System message before each prompt; it is part of the template policy."""
    path: str | None = None
    """File to read instead of the hub; the recipe's `data:` overrides it."""
    license: str | None = None
    """License of your own file."""
    ignore_columns: list[str] = Field(default=[])
    """Columns of your own file that are left out; without it, a text that isn't read is an error."""
    ignore_message_keys: list[str] = Field(default=[])
    """Keys of messages that are left out; without it, an unknown key is an error."""
    compare: str | None = None
    """Column with a reference output for each prompt; the win rate of the completions against it is computed."""

    @property
    def task_name(self) -> str:
        """Name of the task."""
        return self.name or self.source


class SuiteSampling(Section):
    """Sampling of a suite's published numbers."""

    temperature: float | None = None
    """Temperature, at least 0."""
    top_p: float | None = None
    """Probability mass that was sampled from."""


class Suite(Section):
    """Tasks that belong together."""

    title: str
    """What the suite measures."""
    note: str = ""
    """Warning that a reader needs before relying on its numbers."""
    tasks: list[SuiteTask] = Field(default=[])
    """Tasks whose prompts the model answers and judges read."""
    lm_eval: list[str] = Field(default=[])
    """Tasks of lm-evaluation-harness, which scores them itself: names, or paths of YAML tasks."""
    indices: dict[IndexName, Annotated[dict[str, str], Field(min_length=1)]] = Field(default={})
    """Composite index → its tasks, each with the metric that enters the unweighted mean."""
    judges: list[Finding] = Field(default=["safe"])
    """Questions that at least one judge must answer."""
    judge_kinds: list[str] = Field(default=[])
    """Kinds of judges of which one is needed for the numbers to mean what the title says."""
    sampling: SuiteSampling = SuiteSampling()
    """Sampling of the published numbers."""

    @model_validator(mode="after")
    def _check_names(self) -> "Suite":
        if not self.tasks and not self.lm_eval:
            raise ValueError("expected tasks or lm_eval")
        counts = Counter(task.task_name for task in self.tasks)
        all_counts = counts + Counter(map(lm_eval_name, self.lm_eval))
        if duplicates := [name for name, count in all_counts.items() if count > 1]:
            raise ValueError(f"task '{duplicates[0]}' is duplicated; give one of them another name:")
        names = [*all_counts]
        for index, parts in self.indices.items():
            if unknown := [task for task in parts if task not in names]:
                raise ValueError(f"{index}: task '{unknown[0]}'; {did_you_mean(unknown[0], sorted(names))}")
        # Metrics over all prompts of a kind have the kind's name as their task.
        if (shared := counts.keys() & set(KINDS)) and not counts.keys() <= set(KINDS):
            raise ValueError(f"task '{min(shared)}' has the name of a kind; so must all tasks of the suite, or none")
        return self


class EvalData(Section):
    """Where a data set is read from, instead of its published place."""

    path: str | None = None
    """Local file with the published columns."""
    revision: str | None = None
    """Commit on the hub."""


def lm_eval_name(task: str) -> str:
    """Return the name of a task of lm-eval; of a YAML file, its stem."""
    return Path(task).stem if task.endswith((".yaml", ".yml")) else task


def lm_eval_tasks(suites: Mapping[str, Suite], leave_out: Sequence[str]) -> list[tuple[str, str]]:
    """Return suite and spec of the tasks of lm-eval that aren't left out."""
    return [
        (suite, spec)
        for suite, content in suites.items()
        for spec in content.lm_eval
        if not {lm_eval_name(spec), f"{suite}/{lm_eval_name(spec)}"} & set(leave_out)
    ]


@dataclass(frozen=True, slots=True)
class Task:
    """A task with its prompts.

    Args:
        suite: Name of the suite.
        name: Name of the task.
        kind: Kind of the prompts.
        prompts: Prompts in the order in which they are answered.
        data: Where the prompts are from; None for prompts of no published set.
        references: Prompt id → output that the completion is compared with; empty if nothing is compared.
        positions: Prompt id → number of the prompt in the published set, from 0; empty if nothing is compared.
        attack: Attack of several turns on the prompts; None if they are only asked.
    """

    suite: str
    name: str
    kind: Kind
    prompts: list[Prompt]
    data: TaskData | None = None
    references: dict[str, Completion] = field(default_factory=dict)
    positions: dict[str, int] = field(default_factory=dict)
    attack: AttackSection | None = None


def tasks_by_kind(suite: str, prompts: Sequence[Prompt]) -> list[Task]:
    """Return a task for each kind of prompts, named after the kind; prompts without a kind are left out."""
    by_kind: dict[Kind, list[Prompt]] = {}
    for prompt in prompts:
        if prompt.kind is not None:
            by_kind.setdefault(prompt.kind, []).append(prompt)
    return [Task(suite, kind, kind, of_kind) for kind, of_kind in by_kind.items()]


def shipped_suites() -> list[str]:
    """Return the names of the suites that come with the program."""
    folder = files("bfpo.evaluation").joinpath("suites")
    return sorted(file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml"))


def load_suite(name: str) -> tuple[str, Suite]:
    """Load a suite by its name or its file.

    Returns:
        Name of the suite, and the suite.

    Raises:
        RecipeError: If the suite is unknown or malformed.
    """
    if Path(name).suffix in (".yaml", ".yml"):
        path, label, suite_name = Path(name), name, Path(name).stem
    elif name in shipped_suites():
        path, label, suite_name = Path(str(files("bfpo.evaluation") / "suites" / f"{name}.yaml")), name, name
    else:
        raise RecipeError(f"suite '{name}'; {did_you_mean(name, shipped_suites())}, or the path of a YAML file")
    suite = check_recipe(read_recipe(path), Suite, label)
    for task in suite.tasks:
        find_prompt_set(task.source)
    return suite_name, suite


def read_tasks(
    suites: Mapping[str, Suite],
    *,
    data: Mapping[str, EvalData],
    leave_out: Sequence[str] = (),
    limit: int | None = None,
) -> list[Task]:
    """Read the prompts of all tasks; tasks of lm-eval have none.

    Args:
        suites: Suites by name.
        data: Source → where it is read from.
        leave_out: Names of tasks (`alert` or `safety/alert`) that are left out.
        limit: Maximum number of prompts of a task, a sample that is the same in every run.

    Raises:
        RecipeError: If no suite has a source or a task that is named here, or no task is left.
        DataError: If a data set can't be read.
    """
    tasks = [(suite, task) for suite, content in suites.items() for task in content.tasks]
    lm_eval = [(suite, lm_eval_name(spec)) for suite, spec in lm_eval_tasks(suites, ())]
    sources = sorted({task.source for _, task in tasks} | {name for _, name in lm_eval})
    for source in data:
        if source not in sources:
            raise RecipeError(f"data: no task of these suites reads '{source}'; {did_you_mean(source, sources)}")
    pairs = [*lm_eval, *((suite, task.task_name) for suite, task in tasks)]
    names = [name for suite, task_name in pairs for name in (task_name, f"{suite}/{task_name}")]
    for name in leave_out:
        if name not in names:
            raise RecipeError(f"leave_out: '{name}'; {did_you_mean(name, names)}")
    selected = [
        (suite, task) for suite, task in tasks if not {task.task_name, f"{suite}/{task.task_name}"} & set(leave_out)
    ]
    if not selected and not lm_eval_tasks(suites, leave_out):
        raise RecipeError("leave_out: no task is left")
    return [_read_task(suite, task, data.get(task.source, EvalData()), limit) for suite, task in selected]


def _read_task(suite: str, task: SuiteTask, place: EvalData, limit: int | None) -> Task:
    name = f"{suite}/{task.task_name}"
    source = PromptSource(
        name=task.source,
        path=place.path or (None if place.revision else task.path),
        revision=place.revision,
        kind=task.kind,
        license=task.license,
        ignore_columns=task.ignore_columns,
        ignore_message_keys=task.ignore_message_keys,
    )
    other_columns = [task.compare] if task.compare else []
    try:
        prompts, metadata = read_prompt_source(
            source, where=task.where, system=task.system, other_columns=other_columns
        )
    except (DataError, RecipeError) as error:
        raise type(error)(
            f"{name}: {error}\n  in the recipe: data: {{{task.source}: {{path: FILE}}}}, or leave_out: [{name}]"
        ) from None
    if task.only is not None:
        prompts = [prompt for prompt in prompts if prompt.kind == task.only]
    kinds = sorted({prompt.kind for prompt in prompts if prompt.kind is not None}, key=KINDS.index)
    if not kinds:
        raise DataError(f"{name}: {metadata['from']} holds no prompt of kind '{task.only}'")
    if len(kinds) > 1:
        raise DataError(f"{name}: prompts of several kinds ({', '.join(kinds)}); name one as only:")
    published = len(prompts)
    positions = {prompt.prompt_id: index for index, prompt in enumerate(prompts)}
    prompts = _sample(prompts, min(filter(None, (limit, task.limit)), default=None))
    data = TaskData(
        name=name,
        source=task.source,
        origin=metadata["from"],
        license=metadata["license"],
        hash=metadata["prompts_hash"],
        prompts=len(prompts),
        published=published,
    )
    if task.compare is None:
        return Task(suite, task.task_name, kinds[0], prompts, data)
    references = _read_references(source, task, task.compare, prompts)
    data = replace(
        data,
        compared_with=sorted({output.model for output in references.values()}),
        references_hash=content_hash([references[prompt.prompt_id].text for prompt in prompts]),
    )
    return Task(suite, task.task_name, kinds[0], prompts, data, references, positions)


def _sample(prompts: list[Prompt], limit: int | None) -> list[Prompt]:
    if limit is None or limit >= len(prompts):
        return prompts
    # A smaller sample is part of a larger one, so a run with a higher limit reuses the completions.
    order = sorted(range(len(prompts)), key=lambda index: content_hash("sample", prompts[index].prompt_id))
    return [prompts[index] for index in sorted(order[:limit])]


def _read_references(
    source: PromptSource, task: SuiteTask, column: str, prompts: Sequence[Prompt]
) -> dict[str, Completion]:
    outputs = read_reference_outputs(source, column, where=task.where, system=task.system)
    references = {}
    for prompt in prompts:
        text, generator = outputs[conversation_key(prompt.prompt)]
        model = generator or task.task_name
        references[prompt.prompt_id] = Completion(
            prompt.prompt_id,
            0,
            prompt.prompt,
            text,
            "stop",
            prompt_tokens=0,
            # The tokenizer of the generator is unknown, so the length is in words; only characters are compared.
            completion_tokens=len(text.split()),
            model=model,
            engine="given",
            settings_hash=content_hash(model),
        )
    return references


def select_prompts(tasks: Sequence[Task], prompt_ids: Collection[str]) -> list[Task]:
    """Return tasks with only the given prompts; a task without any of them is left out."""
    selected = [
        replace(task, prompts=[prompt for prompt in task.prompts if prompt.prompt_id in prompt_ids]) for task in tasks
    ]
    return [task for task in selected if task.prompts]
