"""Suites: which published prompts make which tasks. One YAML file each; a user's own is named by its path."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import Field, model_validator

from bfpo.config.loading import check_recipe, read_recipe
from bfpo.config.recipes import Count, Section
from bfpo.core.files import content_hash
from bfpo.core.pairs import conversation_key
from bfpo.core.samples import KINDS, Completion, Kind, Prompt
from bfpo.data.prompts import PromptSource, known_source, read_given_outputs, read_prompt_source
from bfpo.errors import DataError, RecipeError, did_you_mean
from bfpo.evaluation.results import TaskData

IndexName = Literal["harmlessness_index", "helpfulness_index"]
INDICES: tuple[IndexName, ...] = get_args(IndexName)
Finding = Literal["safe", "refusal", "helpfulness"]


class SuiteTask(Section):
    """One task of a suite: the prompts of one set that are for one thing."""

    source: str
    """A key of `bfpo.data.prompts.SOURCES`; `file` is one's own."""
    name: str | None = None
    """Of the task; default the source's."""
    only: Kind | None = None
    """Prompts of this kind alone; needed where a set holds several kinds."""
    where: dict[str, str] = Field(default={})
    """Column → value of the rows that are taken; a file without the column is taken whole."""
    kind: Kind | None = None
    """What the prompts are for, where neither the set nor its rows say it."""
    limit: Count | None = None
    """Prompts to take at most, a sample that is the same in every run."""
    system: str | None = None
    """System message before each prompt: a part of the template policy."""
    path: str | None = None
    """File to read instead of the hub; `data:` of the recipe goes before it."""
    license: str | None = None
    """License of one's own file."""
    compare: str | None = None
    """Column with an output of each prompt: the model's answer is set beside it, and its win rate measured."""

    @property
    def called(self) -> str:
        """Name of the task."""
        return self.name or self.source


class SuiteSampling(Section):
    """How a suite's published numbers were sampled."""

    temperature: float | None = None
    """At least 0."""
    top_p: float | None = None
    """Probability mass that was kept."""


class Suite(Section):
    """Tasks that belong together."""

    title: str
    """What the suite measures."""
    note: str = ""
    """What a reader must know before believing a number of it."""
    tasks: list[SuiteTask] = Field(default=[])
    """Its tasks: prompts that are answered, and judged."""
    lm_eval: list[str] = Field(default=[])
    """Tasks of lm-evaluation-harness, which scores them itself: names, or paths of YAML tasks."""
    indices: dict[IndexName, Annotated[dict[str, str], Field(min_length=1)]] = Field(default={})
    """Composite index → its tasks, each with the metric of which it takes the unweighted mean."""
    judges: list[Finding] = Field(default=["safe"])
    """What at least one judge must be able to say."""
    judge_kinds: list[str] = Field(default=[])
    """Kinds of judges of which one is needed for the suite's numbers to mean what its title says."""
    sampling: SuiteSampling = SuiteSampling()
    """How the numbers that these are set beside were sampled."""

    @model_validator(mode="after")
    def _names_apart(self) -> "Suite":
        if not self.tasks and not self.lm_eval:
            raise ValueError("expected tasks or lm_eval")
        names = Counter(task.called for task in self.tasks)
        if twice := [name for name, n in (names + Counter(map(lm_eval_name, self.lm_eval))).items() if n > 1]:
            raise ValueError(f"task '{twice[0]}' stands twice; give one another name:")
        known = [*names, *map(lm_eval_name, self.lm_eval)]
        for index, of in self.indices.items():
            if unknown := [task for task in of if task not in known]:
                raise ValueError(f"{index}: task '{unknown[0]}'; {did_you_mean(unknown[0], sorted(known))}")
        # Numbers over all of a kind go by the kind's name.
        if (named := names.keys() & set(KINDS)) and not names.keys() <= set(KINDS):
            raise ValueError(f"task '{min(named)}' has the name of a kind; so must all tasks of the suite, or none")
        return self


class EvalData(Section):
    """Where a set of prompts is read from, instead of what the program knows."""

    path: str | None = None
    """Local file with the columns that the set is published with."""
    revision: str | None = None
    """Commit on the hub."""


def lm_eval_name(task: str) -> str:
    """Return what a task of lm-eval is called: its name, or that of its YAML file."""
    return Path(task).stem if task.endswith((".yaml", ".yml")) else task


def lm_eval_tasks(suites: Mapping[str, Suite], leave_out: Sequence[str]) -> list[tuple[str, str]]:
    """Return suite and name of the tasks of lm-eval that aren't left out."""
    every = [(name, task) for name, suite in suites.items() for task in suite.lm_eval]
    return [
        (name, task)
        for name, task in every
        if not {lm_eval_name(task), f"{name}/{lm_eval_name(task)}"} & set(leave_out)
    ]


@dataclass(frozen=True, slots=True)
class Task:
    """A task with its prompts.

    Args:
        suite: Name of the suite.
        name: Of the task.
        kind: What its prompts are for.
        prompts: In the order they are asked.
        data: Where the prompts are from; None for prompts of no published set.
        references: Prompt → the output that its answer is compared with; empty where nothing is compared.
        positions: Prompt → its number in the published set, from 0; empty where nothing is compared.
    """

    suite: str
    name: str
    kind: Kind
    prompts: list[Prompt]
    data: TaskData | None = None
    references: dict[str, Completion] = field(default_factory=dict)
    positions: dict[str, int] = field(default_factory=dict)


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
    """Return a suite by its name or its file, and what it is called.

    Raises:
        RecipeError: If there is none, or a key of it is wrong.
    """
    own = Path(name)
    if own.suffix in (".yaml", ".yml"):
        suite = check_recipe(read_recipe(own), Suite, str(own))
        called = own.stem
    elif name in shipped_suites():
        suite = check_recipe(
            read_recipe(str(files("bfpo.evaluation").joinpath("suites", f"{name}.yaml"))), Suite, name
        )
        called = name
    else:
        raise RecipeError(f"suite '{name}'; {did_you_mean(name, shipped_suites())}, or the path of a YAML file")
    for task in suite.tasks:
        known_source(task.source)
    return called, suite


def read_tasks(
    suites: Mapping[str, Suite],
    *,
    data: Mapping[str, EvalData],
    leave_out: Sequence[str] = (),
    limit: int | None = None,
) -> list[Task]:
    """Read the prompts of all tasks; those of lm-eval have none.

    Args:
        suites: By name.
        data: Source → where it is read from.
        leave_out: Names of tasks (`alert` or `safety/alert`) that are left out.
        limit: Prompts of a task at most, a sample that is the same in every run.

    Raises:
        RecipeError: If a source or a task named here isn't in any suite, or nothing is left.
        DataError: If a set can't be read.
    """
    every = [(name, task) for name, suite in suites.items() for task in suite.tasks]
    named = [(name, lm_eval_name(task)) for name, task in lm_eval_tasks(suites, ())]
    sources = sorted({task.source for _, task in every} | {called for _, called in named})
    for source in data:
        if source not in sources:
            raise RecipeError(f"data: no task of these suites reads '{source}'; {did_you_mean(source, sources)}")
    named += [(name, task.called) for name, task in every]
    known = [word for name, called in named for word in (called, f"{name}/{called}")]
    for word in leave_out:
        if word not in known:
            raise RecipeError(f"leave_out: '{word}'; {did_you_mean(word, known)}")
    wanted = [(name, task) for name, task in every if not {task.called, f"{name}/{task.called}"} & set(leave_out)]
    if not wanted and not lm_eval_tasks(suites, leave_out):
        raise RecipeError("leave_out: no task is left")
    return [_read(name, task, data.get(task.source, EvalData()), limit) for name, task in wanted]


def _read(suite: str, task: SuiteTask, place: EvalData, limit: int | None) -> Task:
    where = f"{suite}/{task.called}"
    source = PromptSource(
        name=task.source,
        path=place.path or (None if place.revision else task.path),
        revision=place.revision,
        kind=task.kind,
        license=task.license,
    )
    try:
        prompts, facts = read_prompt_source(source, where=task.where, system=task.system)
    except (DataError, RecipeError) as error:
        raise type(error)(
            f"{where}: {error}\n  in the recipe: data: {{{task.source}: {{path: FILE}}}}, or leave_out: [{where}]"
        ) from None
    if task.only is not None:
        prompts = [prompt for prompt in prompts if prompt.kind == task.only]
    kinds = sorted({prompt.kind for prompt in prompts if prompt.kind is not None}, key=KINDS.index)
    if not kinds:
        raise DataError(f"{where}: {facts['from']} holds no prompt of kind '{task.only}'")
    if len(kinds) > 1:
        raise DataError(f"{where}: prompts of several kinds ({', '.join(kinds)}); say which by only:")
    most = min(filter(None, (limit, task.limit)), default=None)
    published = len(prompts)
    positions = {prompt.prompt_id: index for index, prompt in enumerate(prompts)}
    if most is not None and most < len(prompts):
        # The smaller sample is a part of the larger one, so a higher limit goes on where a lower one ended.
        order = sorted(range(len(prompts)), key=lambda index: content_hash("sample", prompts[index].prompt_id))
        prompts = [prompts[index] for index in sorted(order[:most])]
    data = TaskData(
        name=where,
        source=task.source,
        origin=facts["from"],
        license=facts["license"],
        hash=facts["prompts_hash"],
        prompts=len(prompts),
        published=published,
    )
    if task.compare is None:
        return Task(suite, task.called, kinds[0], prompts, data)
    references = _references(source, task, prompts)
    data = replace(
        data,
        compared_with=sorted({output.model for output in references.values()}),
        references_hash=content_hash([references[prompt.prompt_id].text for prompt in prompts]),
    )
    return Task(suite, task.called, kinds[0], prompts, data, references, positions)


def _references(source: PromptSource, task: SuiteTask, prompts: Sequence[Prompt]) -> dict[str, Completion]:
    assert task.compare is not None
    given = read_given_outputs(source, task.compare, where=task.where, system=task.system)
    found = {}
    for prompt in prompts:
        text, generator = given[conversation_key(prompt.prompt)]
        told = generator or task.called
        # Whose tokens it would have isn't known, so its length is in words; only characters are compared.
        found[prompt.prompt_id] = Completion(
            prompt.prompt_id, 0, prompt.prompt, text, "stop", 0, len(text.split()), told, "given", content_hash(told)
        )
    return found


def with_prompts_of(tasks: Sequence[Task], wanted: Collection[str]) -> list[Task]:
    """Return tasks with those of their prompts alone whose ids are wanted; a task without any is gone."""
    kept = [replace(task, prompts=[one for one in task.prompts if one.prompt_id in wanted]) for task in tasks]
    return [task for task in kept if task.prompts]
