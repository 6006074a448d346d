"""One task of lm-evaluation-harness run on a model in this process, through lm-eval's public API.

Everything that knows lm-eval (names held to 0.4.13) is here. No task with remote code is run.
"""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from bfpo.errors import DataError, MissingExtra, RecipeError
from bfpo.files import content_hash, file_hash

_BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
_YAML = (".yaml", ".yml")


@dataclass(frozen=True, slots=True)
class Number:
    """A number that lm-eval found.

    Args:
        metric: As lm-eval calls it, with its filter in brackets where it has one.
        category: Member of a group; None for the task itself.
        value: The number; None where it isn't one, as when all likelihoods of a row are too small to tell apart.
        higher_is_better: Which way is good; None when neither is.
        n: Rows it rests on.
        unscored: Rows without a number.
        values: Row → value, where the number is their mean; else empty.
    """

    metric: str
    category: str | None
    value: float | None
    higher_is_better: bool | None
    n: int
    unscored: int
    values: dict[str, float]


@dataclass(frozen=True, slots=True)
class Found:
    """What a task of lm-eval found.

    Args:
        numbers: Its numbers.
        facts: What they rest on: data, versions, examples in the prompt, template policy.
    """

    numbers: list[Number]
    facts: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object; `from_json` reads it."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Found":
        """Return what `to_json` wrote."""
        return cls([Number(**one) for one in content["numbers"]], dict(content["facts"]))


def need_lm_eval() -> None:
    """Refuse to go on without lm-eval.

    Raises:
        MissingExtra: If it isn't installed.
    """
    if find_spec("lm_eval") is None:
        raise MissingExtra("a suite with lm_eval:", "lm-eval", "lm-eval")


def lm_eval_version() -> str:
    """Return the installed version."""
    return version("lm_eval")


@cache
def task_manager() -> Any:
    """Return lm-eval's index of its tasks, read once: some 14,000 files, many seconds."""
    need_lm_eval()
    from lm_eval.tasks import TaskManager

    return TaskManager()


def known_task(name: str, *, with_data: bool) -> None:
    """Refuse a task that can't be run.

    Args:
        name: Of a task or a group, or the path of a YAML task.
        with_data: Whether its rows are to be read from elsewhere.

    Raises:
        RecipeError: If lm-eval has no such task, or the rows of this one can't be read from elsewhere.
    """
    if name.endswith(_YAML):
        if not Path(name).is_file():
            raise RecipeError(f"lm_eval: no file {name}")
        if with_data:
            raise RecipeError(f"data: {name} says itself where its rows are (dataset_path)")
        return
    index = task_manager().task_index
    if name not in index:
        from difflib import get_close_matches

        near = get_close_matches(name, list(index), n=1, cutoff=0.6)
        guess = f"did you mean '{near[0]}'? " if near else ""
        raise RecipeError(f"lm-eval {lm_eval_version()} has no task '{name}'; {guess}`lm-eval ls tasks` lists them")
    kind = index[name].kind.name
    if kind == "TAG":
        members = ", ".join(sorted(index[name].tags))
        raise RecipeError(f"lm_eval: '{name}' is a tag, not a task; name its tasks: {members}")
    if with_data and kind != "TASK":
        raise RecipeError(f"data: '{name}' of lm-eval is a group or a program; name its subtasks one by one")


def metrics_of(name: str) -> set[str]:
    """Return the metrics that the definition of a task lists; none for a group, or a task of one's own."""
    entry = task_manager().task_index.get(name)
    listed = (entry.cfg or {}).get("metric_list") if entry is not None else None
    return {str(one["metric"]) for one in listed or ()}


def load_task(name: str, folder: Path, *, path: str | None = None, revision: str | None = None) -> Any:
    """Load a task or a group with its rows.

    Args:
        name: As for `known_task`.
        folder: Where a YAML file of the changed task may be written.
        path: Local file with rows as the task's set has them, taken for the rows that are asked; examples in the
            prompt are other rows of it.
        revision: Commit of the set on the hub.

    Returns:
        What `run_task` takes.

    Raises:
        DataError: If the rows can't be had.
    """
    spec = name if path is None and revision is None else _changed(name, folder, path, revision)
    try:
        return task_manager().load([spec])
    # What `datasets` raises for a set that can't be reached or read is of many kinds.
    except Exception as error:
        if isinstance(error, KeyError):
            raise DataError(f"lm-eval: the rows of '{name}' lack what the task reads: {error}") from None
        told = str(error).strip().splitlines() or [type(error).__name__]
        raise DataError(f"lm-eval couldn't read the rows of '{name}': {told[0][:300]}") from None


def _changed(name: str, folder: Path, path: str | None, revision: str | None) -> str:
    entry = task_manager().task_index[name]
    if path is None:
        kept = {key: value for key, value in (entry.cfg.get("dataset_kwargs") or {}).items() if value is not None}
        changes: dict[str, Any] = {"dataset_kwargs": {**kept, "revision": revision}}
    else:
        key = "test_split" if entry.cfg.get("test_split") else "validation_split"
        split = entry.cfg.get(key) or "test"
        changes = {
            "dataset_path": builder_of(path),
            "dataset_name": None,
            "dataset_kwargs": {"data_files": {split: str(Path(path).resolve())}},
            "custom_dataset": None,
            "training_split": None,
            "validation_split": None,
            key: split,
        }
        if path.endswith(".tsv"):
            changes["dataset_kwargs"]["sep"] = "\t"
        if not (entry.cfg.get("fewshot_config") or {}).get("samples"):
            changes["fewshot_split"] = split
    changed = folder / f"{name}.yaml"
    text = yaml.safe_dump({"include": str(entry.yaml_path), "task": name, **changes}, sort_keys=False)
    changed.write_text(text, encoding="utf-8")
    return str(changed)


def rows_of(loaded: Any, limit: int | None) -> tuple[int, int, str]:
    """Return how many rows of a loaded task are asked under a limit, how many there are, and where they are from."""
    sizes = [len(task.eval_docs) for task in loaded["tasks"].values()]
    places = sorted({_place(task.config) for task in loaded["tasks"].values()})
    asked = sum(len(_sample(size, limit)) for size in sizes)
    return asked, sum(sizes), places[0] if len(places) == 1 else f"{len(places)} sets"


def builder_of(path: str) -> str:
    """Return which builder of `datasets` reads a file.

    Raises:
        DataError: If there is no such file, or none reads it.
    """
    if not Path(path).is_file():
        raise DataError(f"no file {path}")
    suffix = Path(path.removesuffix(".gz").removesuffix(".xz")).suffix
    if suffix not in _BUILDERS:
        raise DataError(f"{path}: expected a file that ends in {', '.join(_BUILDERS)}")
    return _BUILDERS[suffix]


def open_lm(model: Any, tokenizer: Any, *, batch_size: int | str) -> Any:
    """Return a model as lm-eval takes it."""
    from lm_eval.models.huggingface import HFLM

    # It warns that options for loading are ignored; none is given.
    logger = logging.getLogger("lm_eval.models.huggingface")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    finally:
        logger.setLevel(level)


def run_task(lm: Any, loaded: Any, name: str, *, limit: int | None = None, path: str | None = None) -> Found:
    """Run a task or a group.

    Prompts of tasks that ask for an answer are put in the tokenizer's chat template where it has one; likelihoods
    are of plain text, as lm-eval's published numbers are.

    Args:
        lm: From `open_lm`.
        loaded: From `load_task`.
        name: Of the task.
        limit: Rows of a task at most (of each task of a group), a sample that is the same in every run.
        path: Where the rows were read from, for the facts.

    Raises:
        DataError: If a row lacks what the task reads.
    """
    from jinja2 import UndefinedError
    from lm_eval import evaluate

    tasks = loaded["tasks"]
    for task in tasks.values():
        # As lm-eval's own command does for tasks that don't say it.
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=1234)
    answers = all(task.get_config("output_type") == "generate_until" for task in tasks.values())
    templated = answers and getattr(lm.tokenizer, "chat_template", None) is not None
    chosen = {key: _sample(len(task.eval_docs), limit) for key, task in tasks.items()}
    asked, of, place = rows_of(loaded, limit)
    try:
        found = evaluate(
            lm=lm,
            task_dict=loaded,
            samples=chosen,
            bootstrap_iters=0,
            apply_chat_template=templated,
            fewshot_as_multiturn=templated,
        )
    except (KeyError, UndefinedError, IndexError) as error:
        raise DataError(f"lm-eval: a row of '{name}' lacks what the task reads: {error}") from None
    own = _root(loaded, name)
    facts = {
        "source": "lm-eval",
        "from": path or place,
        "licence": None,
        "hash": content_hash(sorted(one["doc_hash"] for rows in found["samples"].values() for one in rows)),
        "file_sha256": file_hash(Path(path)) if path else None,
        "prompts": asked,
        "of": of,
        "lm_eval": lm_eval_version(),
        "version": found["versions"].get(own),
        "few_shot": max(found["n-shot"].get(key, 0) for key in tasks),
        "template_policy": "the tokenizer's own chat template" if templated else "plain text",
    }
    return Found(list(_numbers(found, own)), facts)


def _sample(size: int, limit: int | None) -> list[int]:
    """Return rows, the same in every run; a smaller sample is a part of a larger one."""
    if limit is None or limit >= size:
        return list(range(size))
    return sorted(sorted(range(size), key=lambda row: content_hash("sample", row))[:limit])


def _root(loaded: Any, name: str) -> str:
    if name in loaded["tasks"] or name in loaded["groups"]:
        return name
    # A YAML file is named by its path, its task by what the file says.
    children = {child for members in loaded.get("group_map", {}).values() for child in members}
    return str(next(key for key in (*loaded["groups"], *loaded["tasks"]) if key not in children))


def _place(config: Any) -> str:
    revision = (config.dataset_kwargs or {}).get("revision")
    named = " ".join(filter(None, (config.dataset_path, config.dataset_name)))
    return (named or "the task's own program") + (f"@{revision}" if revision else "")


def _numbers(found: Mapping[str, Any], own: str) -> Iterator[Number]:
    children: Mapping[str, Sequence[str]] = found.get("group_subtasks", {})

    def leaves(name: str) -> list[str]:
        return [leaf for child in children[name] for leaf in leaves(child)] if name in children else [name]

    for name, values in found["results"].items():
        rows = [(leaf, row) for leaf in leaves(name) for row in found["samples"].get(leaf, ())]
        for key, value in values.items():
            metric, _, kept = key.partition(",")
            if not kept or metric.endswith("_stderr") or not isinstance(value, int | float | np.number):
                continue
            of = {
                f"{leaf}/{row['doc_id']}-{row['doc_hash'][:8]}": row[metric]
                for leaf, row in rows
                if row.get("filter", kept) == kept and metric in row
            }
            plain = {row: float(one) for row, one in of.items() if isinstance(one, int | float | np.number)}
            is_mean = plain and len(plain) == len(of) and np.isclose(np.mean(list(plain.values())), value)
            unscored = sum(not math.isfinite(one) for one in plain.values())
            yield Number(
                metric=metric if kept == "none" else f"{metric} ({kept})",
                category=None if name == own else name,
                value=float(value) if math.isfinite(value) else None,
                higher_is_better=found["higher_is_better"].get(name, {}).get(metric),
                n=len(of),
                unscored=unscored,
                values=plain if is_mean else {},
            )
