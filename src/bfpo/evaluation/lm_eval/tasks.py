"""The tasks of lm-evaluation-harness: which there are, and their rows, from the hub or from a local file.

With `capabilities` this is all that knows lm-eval; names are held to 0.4.13. No task with remote code is run.
"""

import re
from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from bfpo.core.files import content_hash
from bfpo.errors import DataError, MissingExtra, RecipeError

_BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
_YAML = (".yaml", ".yml")


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
        if re.search(r"^group:", Path(name).read_text(encoding="utf-8", errors="replace"), flags=re.MULTILINE):
            raise RecipeError(
                f"lm_eval: {name} is a group, which lm-eval takes by its name alone; name its tasks' files"
            )
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
    except KeyError as error:
        raise DataError(f"lm-eval: the rows of '{name}' lack what the task reads: {error}") from None
    # Not only what `datasets` raises: a task brings code of its own that reads rows. --debug shows where it failed.
    except Exception as error:
        told = str(error).strip().splitlines() or [type(error).__name__]
        raise DataError(f"lm-eval couldn't read the rows of '{name}': {told[0][:300]}") from error


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
    asked = sum(len(sample_of(size, limit)) for size in sizes)
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


def sample_of(size: int, limit: int | None) -> list[int]:
    """Return rows, the same in every run; a smaller sample is a part of a larger one."""
    if limit is None or limit >= size:
        return list(range(size))
    return sorted(sorted(range(size), key=lambda row: content_hash("sample", row))[:limit])


def _place(config: Any) -> str:
    files = (config.dataset_kwargs or {}).get("data_files")
    if isinstance(files, Mapping) and all(isinstance(file, str) for file in files.values()):
        return ", ".join(sorted(set(files.values())))
    revision = (config.dataset_kwargs or {}).get("revision")
    named = " ".join(filter(None, (config.dataset_path, config.dataset_name)))
    return (named or "the task's own program") + (f"@{revision}" if revision else "")
