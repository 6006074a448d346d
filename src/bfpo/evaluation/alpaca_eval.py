"""Reading and writing files in AlpacaEval's format."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bfpo.config.recipes import Source
from bfpo.core.files import file_name, write_json
from bfpo.core.samples import Completion
from bfpo.data.rows import read_rows
from bfpo.errors import DataError
from bfpo.evaluation.judge_outputs import JudgeOutput
from bfpo.evaluation.preferences import mean_preferences
from bfpo.evaluation.suite import Task
from bfpo.stats.intervals import Values

FOLDER = "alpaca_eval"
# AlpacaEval's columns for the instruction, the model's output and the reference's.
_TEXTS = ("instruction", "output_2", "output_1")


class Annotations(NamedTuple):
    """Pairwise annotations of N prompts.

    Args:
        preferences: Preferences for the model, (N,), in [0, 1]; 0.5 is a tie.
        prompts: Instructions.
        outputs: Outputs of the model.
        reference_outputs: Outputs that they are compared with.
    """

    preferences: Values
    prompts: list[str]
    outputs: list[str]
    reference_outputs: list[str]


def read_alpaca_annotations(path: Path) -> Annotations:
    """Read AlpacaEval annotations (`.json` or `.jsonl`, gzipped or not) in which the model is output 2.

    Raises:
        DataError: If the file can't be read, or a row lacks a field or a preference in [1, 2].
    """
    if not path.is_file():
        raise DataError(f"{path}: there is no such file of AlpacaEval annotations")
    rows = list(read_rows(Source(path=str(path))))
    for row in rows:
        if missing := next((name for name in ("preference", *_TEXTS) if name not in row.values), None):
            raise DataError(f"{row.where}: no column '{missing}'; expected AlpacaEval's annotations")
        preference = row.values["preference"]
        if not isinstance(preference, int | float) or not 1 <= preference <= 2:
            raise DataError(f"{row.where}: preference is {preference!r}; expected a number from 1 to 2")
    return Annotations(
        np.array([row.values["preference"] - 1 for row in rows], dtype=np.float64),
        *([row.values[name] for row in rows] for name in _TEXTS),
    )


def write_alpaca_eval(
    tasks: Sequence[Task], completions: Sequence[Completion], outputs: Sequence[JudgeOutput], run: str, folder: Path
) -> None:
    """Write completions as `model_outputs.json`, and the preferences of each judge as `annotations.json`.

    Args:
        tasks: Tasks; those without reference outputs are left out.
        completions: Completions of the evaluated model.
        outputs: Output of each judge; prompts on which a judge is undecided are left out of its annotations.
        run: Name of the model in the files.
        folder: Folder of the evaluation; the files are in `alpaca_eval/TASK` and `alpaca_eval/TASK/JUDGE`.
    """
    texts = {completion.prompt_id: completion.text for completion in completions if completion.sample == 0}
    for task in tasks:
        task_folder = folder / FOLDER / file_name(task.name)
        rows = {
            prompt.prompt_id: {
                "dataset": prompt.category or prompt.source or task.name,
                "instruction": prompt.prompt[-1].content,
                "output": texts[prompt.prompt_id],
                "generator": run,
            }
            for prompt in task.prompts
            if prompt.prompt_id in task.references
        }
        if rows:
            write_json(task_folder / "model_outputs.json", list(rows.values()))
        for output in outputs:
            if annotations := _annotations(task, rows, output):
                write_json(task_folder / file_name(output.label) / "annotations.json", annotations)


def _annotations(task: Task, rows: Mapping[str, Mapping[str, str]], output: JudgeOutput) -> list[dict[str, Any]]:
    means = mean_preferences(output.preferences)
    return [
        {
            "dataset": row["dataset"],
            "instruction": row["instruction"],
            "output_1": task.references[prompt_id].text,
            "generator_1": task.references[prompt_id].model,
            "output_2": row["output"],
            "generator_2": row["generator"],
            "annotator": f"{output.label}@{output.revision}",
            # AlpacaEval's 1 is the reference, 2 the model.
            "preference": 1 + preference,
        }
        for prompt_id, row in rows.items()
        if (preference := means.get(prompt_id)) is not None
    ]
