"""Tasks of lm-evaluation-harness in a suite: checked before any work, run once, kept, turned into numbers."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from bfpo.core.files import content_hash, file_hash, write_json
from bfpo.core.terminal import say
from bfpo.errors import DataError, RecipeError
from bfpo.evaluation.differences import compare
from bfpo.evaluation.lm_eval.run import Found, Number, open_lm, run_task
from bfpo.evaluation.lm_eval.tasks import (
    builder_of,
    known_task,
    lm_eval_version,
    load_task,
    need_lm_eval,
    rows_of,
)
from bfpo.evaluation.recipe import EvalRecipe
from bfpo.evaluation.results import MetricComparison, MetricResult, Results, TaskData
from bfpo.evaluation.scoring import MetricSpec, PromptScores, to_metrics
from bfpo.evaluation.suite import EvalData, Suite, lm_eval_name, lm_eval_tasks

FOLDER = "lm_eval"
NO_INTERVAL = "none: lm-eval has no number per row"
NO_NUMBER = "none: lm-eval found no number on some rows"


class Capability(NamedTuple):
    """A task of lm-eval that a suite asks for.

    Args:
        suite: Name of the suite.
        name: As lm-eval takes it.
        place: Where its rows are read from.
    """

    suite: str
    name: str
    place: EvalData

    @property
    def called(self) -> str:
        """Name of the task in the results."""
        return lm_eval_name(self.name)

    @property
    def where(self) -> str:
        """How messages call it."""
        return f"{self.suite}/{self.called}"


def capabilities_of(recipe: EvalRecipe, suites: Mapping[str, Suite]) -> list[Capability]:
    """Return the tasks of lm-eval that a recipe asks for, once it is known that they can be run.

    Raises:
        MissingExtra: If there are any and lm-eval isn't installed.
        RecipeError: If lm-eval has no such task, or the model isn't in this process.
        DataError: If a local file of rows isn't there.
    """
    found = [
        Capability(suite, name, recipe.data.get(lm_eval_name(name), EvalData()))
        for suite, name in lm_eval_tasks(suites, recipe.leave_out)
    ]
    if not found:
        return []
    if recipe.model is None or recipe.model.server is not None:
        what = "saved completions" if recipe.model is None else "a server"
        named = ", ".join(one.where for one in found)
        raise RecipeError(
            f"{found[0].where}: lm-eval asks for the likelihoods of given answers, which {what} can't tell; give the "
            f"model's folder or hub id as model: path (without server), or leave_out: [{named}]"
        )
    need_lm_eval()
    for one in found:
        place = one.place
        try:
            known_task(one.name, with_data=(place.path or place.revision) is not None)
            if place.path is not None:
                builder_of(place.path)
        except (RecipeError, DataError) as error:
            raise type(error)(f"{one.where}: {error}") from None
    return found


def load_all(wanted: Sequence[Capability], folder: str) -> list[Any]:
    """Load tasks with their rows.

    Args:
        wanted: The tasks.
        folder: For files that are needed while they run.

    Raises:
        DataError: If rows can't be had; it names the local alternative.
    """
    loaded, lost = [], {}
    for one in wanted:
        try:
            loaded.append(load_task(one.name, Path(folder), path=one.place.path, revision=one.place.revision))
        except DataError as error:
            lost[one] = error
    if lost:
        told = "\n".join(f"{one.where}: {error}" for one, error in lost.items())
        files = ", ".join(f"{one.called}: {{path: FILE}}" for one in lost if one.called == one.name)
        local = f"data: {{{files}}}, local files with the sets' columns, or " if files else ""
        raise DataError(f"{told}\n  in the recipe: {local}leave_out: [{', '.join(one.where for one in lost)}]")
    return loaded


class Counted(NamedTuple):
    """Rows of a task.

    Args:
        what: The task.
        wanted: Rows that are asked.
        of: Rows that its set has.
        there: Rows of a result that is there already.
        place: Where they are read from.
    """

    what: str
    wanted: int
    of: int
    there: int
    place: str


def count_rows(recipe: EvalRecipe, wanted: Sequence[Capability]) -> list[Counted]:
    """Load tasks with their rows and count them; the model isn't loaded.

    Raises:
        DataError: If rows can't be had.
    """
    if not wanted or recipe.model is None:
        return []
    from bfpo.generation.in_process import checkpoint_identity

    identity = checkpoint_identity(recipe.model.path, recipe.model.revision)
    counted = []
    with TemporaryDirectory() as folder:
        for one, loaded in zip(wanted, load_all(wanted, folder), strict=True):
            asked, of, place = rows_of(loaded, recipe.limit)
            there = asked if kept_in(Path(recipe.out), one, recipe, identity).is_file() else 0
            counted.append(Counted(one.where, asked, of, there, one.place.path or place))
    return counted


def run_capabilities(recipe: EvalRecipe, wanted: Sequence[Capability], out: Path) -> list[Found]:
    """Run tasks that weren't run yet; a finished one is kept in the folder `lm_eval` and isn't run again.

    Args:
        recipe: Of the evaluation.
        wanted: From `capabilities_of`.
        out: Folder of the evaluation.

    Raises:
        DataError: If rows can't be had: before any task is run.
        ModelError: If the model can't be loaded.
    """
    from bfpo.generation.in_process import checkpoint_identity, load_checkpoint

    model = recipe.model
    if not wanted or model is None:
        return []
    identity = checkpoint_identity(model.path, model.revision)
    if not all(kept_in(out, one, recipe, identity).is_file() for one in wanted):
        with TemporaryDirectory() as folder:
            waiting = [one for one in wanted if not kept_in(out, one, recipe, identity).is_file()]
            loaded = load_all(waiting, folder)
            network, tokenizer, identity = load_checkpoint(model.path, dtype=model.dtype, revision=model.revision)
            # Detecting how much fits is lm-eval's own; on a CPU it would take longer than it saves.
            lm = open_lm(network, tokenizer, batch_size="auto" if network.device.type == "cuda" else 8)
            for number, (one, rows) in enumerate(zip(waiting, loaded, strict=True), start=1):
                path = kept_in(out, one, recipe, identity)
                if not path.is_file():
                    say(f"lm-eval: {one.where} ({number} of {len(waiting)})")
                    found = run_task(lm, rows, one.name, limit=recipe.limit, path=one.place.path)
                    write_json(path, found.to_json())
            del lm, network
    return [_read(kept_in(out, one, recipe, identity), one) for one in wanted]


def kept_in(out: Path, one: Capability, recipe: EvalRecipe, identity: str) -> Path:
    """Return the file of a task's result; its name tells all that the result depends on."""
    assert recipe.model is not None
    files = [one.place.path or "", *_files_of(one.name)]
    rows = [file_hash(Path(file)) for file in files if file and Path(file).is_file()]
    what = (identity, recipe.model.dtype, one.name, rows, one.place.revision, recipe.limit, lm_eval_version())
    return out / FOLDER / f"{one.called}-{content_hash(*what)}.json"


def _files_of(name: str) -> list[str]:
    """Return the YAML file of a task of one's own, and the files of rows that it names."""
    path = Path(name)
    if not path.is_file():
        return []
    words = re.findall(r"[^\s\"'{}\[\],]+", path.read_text(encoding="utf-8", errors="replace"))
    return [name, *words]


def _read(path: Path, one: Capability) -> Found:
    try:
        found = Found.from_json(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{path}: not what this program keeps of a task ({error}); remove it") from None
    return Found(found.numbers, {**found.facts, "kept_in": f"{FOLDER}/{path.name}"})


def task_data(wanted: Sequence[Capability], found: Sequence[Found]) -> list[TaskData]:
    """Return the data of tasks as results have it."""
    names = {"from": "origin", "of": "published"}
    return [
        TaskData(name=one.where, **{names.get(key, key): value for key, value in result.facts.items()})
        for one, result in zip(wanted, found, strict=True)
    ]


def capability_metrics(wanted: Sequence[Capability], found: Sequence[Found]) -> list[MetricResult]:
    """Return the numbers of tasks with intervals over rows; one that isn't a mean over rows has none."""
    metrics = []
    for one, result in zip(wanted, found, strict=True):
        for number in result.numbers:
            if number.values:
                metrics += to_metrics(one.suite, [_measured(one.called, number)])
            else:
                metrics.append(
                    MetricResult(
                        one.suite,
                        one.called,
                        number.metric,
                        number.value,
                        None,
                        None,
                        number.n,
                        number.unscored,
                        NO_INTERVAL if number.value is not None else NO_NUMBER,
                        number.higher_is_better,
                        category=number.category,
                    )
                )
    return metrics


def _measured(task: str, number: Number) -> PromptScores:
    is_rate = set(number.values.values()) <= {0.0, 1.0}
    measure = MetricSpec(
        number.metric, lambda judged: None, lambda judged: False, number.higher_is_better, is_rate, needs_judge=False
    )
    return PromptScores(task, measure, number.values, 0, 1, "", number.category)


def compare_capabilities(
    wanted: Sequence[Capability], found: Sequence[Found], folder: Path, base: Results
) -> tuple[list[MetricComparison], list[str]]:
    """Compare tasks with a base's, row by row: what alignment cost.

    Args:
        wanted: Tasks of this run.
        found: Their results.
        folder: Of the base.
        base: What its evaluation found.

    Returns:
        The comparisons, and what a reader must know of them.
    """
    comparisons, told = list[MetricComparison](), []
    theirs = {row.name: row for row in base.data if row.kept_in is not None}
    for one, result in zip(wanted, found, strict=True):
        data = theirs.get(one.where)
        if data is None:
            told.append(f"No comparison of {one.where} with {base.run}: it wasn't asked of that one.")
            continue
        alike = ("lm_eval", "version", "few_shot", "template_policy")
        if differing := [key for key in alike if getattr(data, key) != result.facts.get(key)]:
            told.append(f"No comparison of {one.where} with {base.run}: {', '.join(differing)} differ.")
            continue
        other = _read(folder / str(data.kept_in), one)
        comparisons += compare(
            one.suite,
            [_measured(one.called, number) for number in result.numbers if number.values],
            [_measured(one.called, number) for number in other.numbers if number.values],
            against=base,
        )
    return comparisons, told
