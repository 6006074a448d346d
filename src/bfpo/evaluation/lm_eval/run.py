"""Running one task of lm-evaluation-harness on a model in this process, through lm-eval's public API."""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bfpo.core.files import content_hash, file_hash
from bfpo.errors import DataError
from bfpo.evaluation.lm_eval.tasks import count_task_rows, find_license, lm_eval_version, sample_rows


@dataclass(frozen=True, slots=True)
class TaskMetric:
    """One metric of a task.

    Args:
        metric: lm-eval's name, with its filter in parentheses if it has one.
        category: Member of a group; None for the task or group itself.
        value: Value; None if it isn't finite, as when all likelihoods of a row underflow.
        higher_is_better: Whether higher is better; None when neither is.
        n: Number of rows.
        unscored: Number of rows without a finite value.
        values: Row → value, if the metric is the mean over rows; else empty.
    """

    metric: str
    category: str | None
    value: float | None
    higher_is_better: bool | None
    n: int
    unscored: int
    values: dict[str, float]


@dataclass(frozen=True, slots=True)
class TaskResults:
    """Results of one task of lm-eval.

    Args:
        metrics: Metrics of the task and, for a group, of its members.
        metadata: Provenance: data, versions, number of examples in the prompt, template policy.
    """

    metrics: list[TaskMetric]
    metadata: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object that `from_json` reads."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "TaskResults":
        """Return the results of a JSON object; files of earlier versions have the keys `numbers` and `facts`."""
        metrics = content["metrics"] if "metrics" in content else content["numbers"]
        metadata = content["metadata"] if "metadata" in content else content["facts"]
        return cls([TaskMetric(**metric) for metric in metrics], dict(metadata))


def open_lm(model: Any, tokenizer: Any, *, batch_size: int | str) -> Any:
    """Wrap a model and its tokenizer for lm-eval."""
    from lm_eval.models.huggingface import HFLM

    # HFLM warns that loading options are ignored for a model object, although none is passed.
    logger = logging.getLogger("lm_eval.models.huggingface")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    finally:
        logger.setLevel(level)


def prepare_task(lm: Any, loaded: Any) -> dict[str, bool]:
    """Set the examples in the prompts of a loaded task, and return lm-eval's options of the template policy.

    Prompts of tasks that generate text are put in the tokenizer's chat template if it has one; likelihoods are of
    plain text, as in lm-eval's published numbers.
    """
    tasks = loaded["tasks"].values()
    for task in tasks:
        # The command of lm-eval sets this default too.
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=1234)
    generates = all(task.get_config("output_type") == "generate_until" for task in tasks)
    templated = generates and getattr(lm.tokenizer, "chat_template", None) is not None
    return {"apply_chat_template": templated, "fewshot_as_multiturn": templated}


def run_task(lm: Any, loaded: Any, name: str, *, limit: int | None = None, path: str | None = None) -> TaskResults:
    """Run a task or a group, with the template policy of `prepare_task`.

    Args:
        lm: Output of `open_lm`.
        loaded: Output of `load_task`.
        name: Name of the task.
        limit: Maximum number of rows of a task, and of each task of a group; the sample is the same in every run.
        path: File that the rows were read from, for the metadata.

    Raises:
        DataError: If a row lacks a column that the task reads.
    """
    from jinja2 import UndefinedError
    from lm_eval import evaluate

    tasks, options = loaded["tasks"], prepare_task(lm, loaded)
    templated = options["apply_chat_template"]
    rows = count_task_rows(loaded, limit)
    try:
        output = evaluate(
            lm=lm,
            task_dict=loaded,
            samples={key: sample_rows(len(task.eval_docs), limit) for key, task in tasks.items()},
            bootstrap_iters=0,
            **options,
        )
    except (KeyError, UndefinedError, IndexError) as error:
        raise DataError(f"lm-eval: a row of '{name}' lacks what the task reads: {error}") from None
    root = _root(loaded, name)
    metadata = {
        "source": "lm-eval",
        "from": path or rows.origin,
        "license": find_license(name, loaded),
        "hash": content_hash(
            sorted(sample["doc_hash"] for samples in output["samples"].values() for sample in samples)
        ),
        "file_sha256": file_hash(Path(path)) if path else None,
        "prompts": rows.selected,
        "of": rows.total,
        "lm_eval": lm_eval_version(),
        "version": output["versions"].get(root),
        "few_shot": max(output["n-shot"].get(key, 0) for key in tasks),
        "template_policy": "the tokenizer's own chat template" if templated else "plain text",
    }
    return TaskResults(list(_read_metrics(output, root)), metadata)


def _root(loaded: Any, name: str) -> str:
    """Return lm-eval's name of a loaded task; a YAML file is loaded by its path, but names its task itself."""
    if name in loaded["tasks"] or name in loaded["groups"]:
        return name
    children = {child for members in loaded.get("group_map", {}).values() for child in members}
    return str(next(key for key in (*loaded["groups"], *loaded["tasks"]) if key not in children))


def _read_metrics(output: Mapping[str, Any], root: str) -> Iterator[TaskMetric]:
    """Yield the metrics of lm-eval's output."""
    subtasks: Mapping[str, Sequence[str]] = output.get("group_subtasks", {})

    def leaves(name: str) -> list[str]:
        return [leaf for child in subtasks[name] for leaf in leaves(child)] if name in subtasks else [name]

    for name, results in output["results"].items():
        samples = [(leaf, sample) for leaf in leaves(name) for sample in output["samples"].get(leaf, ())]
        for key, value in results.items():
            metric, _, filter_name = key.partition(",")
            is_number = isinstance(value, int | float | np.number)
            if not filter_name or metric.endswith("_stderr") or not is_number:
                continue
            by_row = {
                f"{leaf}/{sample['doc_id']}-{sample['doc_hash'][:8]}": sample[metric]
                for leaf, sample in samples
                if sample.get("filter", filter_name) == filter_name and metric in sample
            }
            values = {row: float(own) for row, own in by_row.items() if isinstance(own, int | float | np.number)}
            is_mean = values and len(values) == len(by_row) and np.isclose(np.mean(list(values.values())), value)
            yield TaskMetric(
                metric=metric if filter_name == "none" else f"{metric} ({filter_name})",
                category=None if name == root else name,
                value=float(value) if math.isfinite(value) else None,
                higher_is_better=output["higher_is_better"].get(name, {}).get(metric),
                n=len(by_row),
                unscored=sum(not math.isfinite(own) for own in values.values()),
                values=values if is_mean else {},
            )
