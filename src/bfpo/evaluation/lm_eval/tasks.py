"""Tasks of lm-evaluation-harness: looking them up, and reading their rows from the hub or a local file.

Only this module and `run` import lm-eval; names are checked against 0.4.13. Tasks with remote code are not run.
"""

import re
from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from bfpo.core.files import content_hash
from bfpo.errors import DataError, MissingExtra, RecipeError

_BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
_YAML = (".yaml", ".yml")
UNKNOWN_LICENSE = "unknown"
# Licenses of the suites' data sets, as their pages on the hub or their source repositories state them. The pages of
# the ethics sets and of ToxiGen name none that can be used.
_LICENSES = {
    "allenai/ai2_arc": "CC-BY-SA-4.0",
    "allenai/winogrande": "CC-BY",
    "cais/mmlu": "MIT",
    "google/IFEval": "Apache-2.0",
    "hails/bigbench": "Apache-2.0",
    "jannalu/crows_pairs_multilingual": "CC-BY-SA-4.0",
    "openai/gsm8k": "MIT",
    "Rowan/hellaswag": "MIT",
    "truthfulqa/truthful_qa": "Apache-2.0",
}


class RowCount(NamedTuple):
    """Number of rows of a task, or of all tasks of a group.

    Args:
        selected: Rows that are evaluated.
        total: Rows of the data.
        origin: Data set or files that they are read from.
    """

    selected: int
    total: int
    origin: str


def require_lm_eval() -> None:
    """Check that lm-eval is installed.

    Raises:
        MissingExtra: If it isn't.
    """
    if find_spec("lm_eval") is None:
        raise MissingExtra("a suite with lm_eval:", "lm-eval", "lm-eval")


def lm_eval_version() -> str:
    """Return the installed version of lm-eval."""
    return version("lm_eval")


@cache
def task_manager() -> Any:
    """Return lm-eval's index of its tasks. Reading its 14,000 files takes many seconds, so it is read once."""
    require_lm_eval()
    from lm_eval.tasks import TaskManager

    return TaskManager()


def check_task(name: str, *, with_data: bool) -> None:
    """Check that a task can be run.

    Args:
        name: Name of a task or a group, or path of a YAML task.
        with_data: Whether its rows are read from another file or revision than it names.

    Raises:
        RecipeError: If lm-eval has no such task, or its rows can't be read from elsewhere.
    """
    if name.endswith(_YAML):
        _check_task_file(name, with_data=with_data)
        return
    index = task_manager().task_index
    if name not in index:
        from difflib import get_close_matches

        matches = get_close_matches(name, list(index), n=1, cutoff=0.6)
        guess = f"did you mean '{matches[0]}'? " if matches else ""
        raise RecipeError(f"lm-eval {lm_eval_version()} has no task '{name}'; {guess}`lm-eval ls tasks` lists them")
    kind = index[name].kind.name
    if kind == "TAG":
        members = ", ".join(sorted(index[name].tags))
        raise RecipeError(f"lm_eval: '{name}' is a tag, not a task; name its tasks: {members}")
    if with_data and kind != "TASK":
        raise RecipeError(f"data: '{name}' of lm-eval is a group or a program; name its subtasks one by one")


def _check_task_file(name: str, *, with_data: bool) -> None:
    if not Path(name).is_file():
        raise RecipeError(f"lm_eval: no file {name}")
    if with_data:
        raise RecipeError(f"data: {name} names its own rows (dataset_path); change them there")
    if re.search(r"^group:", Path(name).read_text(encoding="utf-8", errors="replace"), flags=re.MULTILINE):
        raise RecipeError(f"lm_eval: {name} is a group, which lm-eval takes by its name only; name its tasks' files")


def listed_metrics(name: str) -> set[str]:
    """Return the metrics that the definition of a task lists; empty for a group and for a YAML file."""
    entry = task_manager().task_index.get(name)
    metrics = (entry.cfg or {}).get("metric_list") if entry is not None else None
    return {str(metric["metric"]) for metric in metrics or ()}


def load_task(name: str, folder: Path, *, path: str | None = None, revision: str | None = None) -> Any:
    """Load a task or a group with its rows.

    Args:
        name: Name of a task or a group, or path of a YAML task.
        folder: Folder in which a YAML file with the changed data may be written.
        path: Local file with the columns of the task's data set. All its rows are evaluated, and examples in the
            prompt are other rows of it.
        revision: Commit of the data set on the hub.

    Returns:
        lm-eval's tasks, as `run_task` takes them.

    Raises:
        DataError: If the rows can't be read.
    """
    spec = name if path is None and revision is None else _write_changed_task(name, folder, path, revision)
    try:
        return task_manager().load([spec])
    except KeyError as error:
        raise DataError(f"lm-eval: the rows of '{name}' lack what the task reads: {error}") from None
    # A task may bring code of its own that reads its rows and raises anything; --debug shows where it failed.
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise DataError(f"lm-eval couldn't read the rows of '{name}': {lines[0][:300]}") from error


def _write_changed_task(name: str, folder: Path, path: str | None, revision: str | None) -> str:
    """Write a YAML file that is the task with its rows read from elsewhere; return its path."""
    entry = task_manager().task_index[name]
    if path is None:
        options = {key: value for key, value in (entry.cfg.get("dataset_kwargs") or {}).items() if value is not None}
        changes: dict[str, Any] = {"dataset_kwargs": {**options, "revision": revision}}
    else:
        key = "test_split" if entry.cfg.get("test_split") else "validation_split"
        split = entry.cfg.get(key) or "test"
        changes = {
            "dataset_path": find_builder(path),
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


def count_task_rows(loaded: Any, limit: int | None) -> RowCount:
    """Count the rows of a loaded task.

    Args:
        loaded: Output of `load_task`.
        limit: Maximum number of rows of a task, and of each task of a group.
    """
    sizes = [len(task.eval_docs) for task in loaded["tasks"].values()]
    origins = sorted({_origin(task.config) for task in loaded["tasks"].values()})
    selected = sum(len(sample_rows(size, limit)) for size in sizes)
    return RowCount(selected, sum(sizes), origins[0] if len(origins) == 1 else f"{len(origins)} sets")


def find_license(name: str, loaded: Any = None) -> str:
    """Return the license of a task's data: from the task's `metadata`, the data set or a table; else `unknown`.

    Args:
        name: Name of a task or a group, or path of a YAML task.
        loaded: Output of `load_task`; None if its rows couldn't be read.
    """
    # A local file has the rows of the data set that the task names.
    entry = None if name.endswith(_YAML) else task_manager().task_index.get(name)
    published = (entry.cfg or {}).get("dataset_path") if entry is not None else None
    if loaded is None:
        return _LICENSES.get(str(published), UNKNOWN_LICENSE)
    licenses = set()
    for task in loaded["tasks"].values():
        config = task.config
        in_table = _LICENSES.get(str(published or config.dataset_path))
        licenses.add((config.metadata or {}).get("license") or _stored_license(task) or in_table or UNKNOWN_LICENSE)
    return ", ".join(sorted(map(str, licenses)))


def _stored_license(task: Any) -> str:
    """Return the license that a loaded data set contains; empty if it has none."""
    splits = task.dataset.values() if isinstance(task.dataset, Mapping) else [task.dataset]
    infos = (getattr(split, "info", None) for split in splits)
    return next((info.license for info in infos if info is not None and info.license), "")


def find_builder(path: str) -> str:
    """Return the builder of `datasets` that reads a file.

    Raises:
        DataError: If the file is missing, or its suffix is unknown.
    """
    if not Path(path).is_file():
        raise DataError(f"no file {path}")
    suffix = Path(path.removesuffix(".gz").removesuffix(".xz")).suffix
    if suffix not in _BUILDERS:
        raise DataError(f"{path}: expected a file that ends in {', '.join(_BUILDERS)}")
    return _BUILDERS[suffix]


def sample_rows(size: int, limit: int | None) -> list[int]:
    """Return the indices of a sample that is the same in every run; a smaller sample is part of a larger one."""
    if limit is None or limit >= size:
        return list(range(size))
    return sorted(sorted(range(size), key=lambda row: content_hash("sample", row))[:limit])


def _origin(config: Any) -> str:
    files = (config.dataset_kwargs or {}).get("data_files")
    if isinstance(files, Mapping) and all(isinstance(file, str) for file in files.values()):
        return ", ".join(sorted(set(files.values())))
    revision = (config.dataset_kwargs or {}).get("revision")
    name = " ".join(filter(None, (config.dataset_path, config.dataset_name)))
    return (name or "the task's own program") + (f"@{revision}" if revision else "")
