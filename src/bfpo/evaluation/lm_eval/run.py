"""One task of lm-evaluation-harness run on a model in this process, through lm-eval's public API."""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bfpo.core.files import content_hash, file_hash
from bfpo.errors import DataError
from bfpo.evaluation.lm_eval.tasks import lm_eval_version, rows_of, sample_of


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
    chosen = {key: sample_of(len(task.eval_docs), limit) for key, task in tasks.items()}
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
        "license": None,
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


def _root(loaded: Any, name: str) -> str:
    if name in loaded["tasks"] or name in loaded["groups"]:
        return name
    # A YAML file is named by its path, its task by what the file says.
    children = {child for members in loaded.get("group_map", {}).values() for child in members}
    return str(next(key for key in (*loaded["groups"], *loaded["tasks"]) if key not in children))


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
