"""Reading and writing files in AlpacaEval's format."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bfpo.config.recipes import Source
from bfpo.core.conversation import last_request
from bfpo.core.files import file_name, write_json
from bfpo.core.samples import Completion
from bfpo.data.readings import read_part
from bfpo.data.rows import SourceRow, read_rows
from bfpo.errors import DataError
from bfpo.evaluation.judge_outputs import JudgeOutput
from bfpo.evaluation.preferences import mean_preferences
from bfpo.evaluation.suite import Task
from bfpo.stats.intervals import Values
from bfpo.stats.length_control import GamedAnswers

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


class LengthControl(NamedTuple):
    """Data of AlpacaEval's length-controlled win rate.

    Args:
        difficulties: Difficulty of each of the N instructions, in the order of the set, (N,).
        gamed: Annotated answers of the gamed baselines.
    """

    difficulties: Values
    gamed: GamedAnswers


def read_length_control(gamed: str, difficulty: str | None = None) -> LengthControl:
    """Read `df_gamed.csv` and `instruction_difficulty.csv` of huggingface.co/datasets/tatsu-lab/alpaca_eval.

    Args:
        gamed: Path of `df_gamed.csv`, which contains the difficulties too.
        difficulty: Path of `instruction_difficulty.csv`; None if it needn't be compared with the difficulties there.

    Raises:
        DataError: If a file can't be read, lacks a column or a number, lists instructions in another order than 0, 1,
            ..., or the two disagree.
    """
    columns = ("index", "preference", "std_delta_len", "instruction_difficulty")
    rows = np.array([[_number(row, column) for column in columns] for row in _read_csv(gamed)]).reshape(-1, 4)
    indices, preferences, differences, difficulties = rows.T
    count = len(np.unique(indices))
    if not count or not np.array_equal(indices[:count], np.arange(count)):
        raise DataError(f"{gamed}: column 'index' doesn't start with each instruction once, 0, 1, ... in order")
    has_preference = ~np.isnan(preferences)
    if not ((preferences[has_preference] >= 0) & (preferences[has_preference] <= 1)).all():
        raise DataError(f"{gamed}: column 'preference' isn't from 0 to 1 throughout")
    if np.isnan(differences).any() or np.isnan(difficulties).any():
        raise DataError(f"{gamed}: a row has no number in 'std_delta_len' or 'instruction_difficulty'")
    if difficulty is not None:
        # Its first column, the number of the instruction, has no name.
        table = _read_csv(difficulty)
        values = {_number(row, next(iter(row.values))): _number(row, "instruction_difficulty") for row in table}
        same = [values.get(float(index)) for index in range(count)]
        if None in same or not np.allclose(np.array(same, dtype=np.float64), difficulties[:count], rtol=1e-6):
            raise DataError(f"{difficulty}: the difficulties aren't those of {gamed}; expected files of one version")
    answers = GamedAnswers(*(column[has_preference] for column in (preferences, differences, difficulties)))
    return LengthControl(difficulties[:count], answers)


def _read_csv(path: str) -> list[SourceRow]:
    if not Path(path).is_file():
        raise DataError(f"length_control: there is no file {path}")
    return list(read_rows(Source(path=path)))


def _number(row: SourceRow, column: str) -> float:
    """Return a column's number; NaN where it is empty."""
    text = row.value(column)
    try:
        return float(text) if text not in ("", None) else math.nan
    except ValueError:
        raise DataError(f"{row.where}: column '{column}' is {text!r}; expected a number") from None


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
    texts = {completion.prompt_id: read_part(completion).text for completion in completions if completion.sample == 0}
    for task in tasks:
        task_folder = folder / FOLDER / file_name(task.name)
        rows = {
            prompt.prompt_id: {
                "dataset": prompt.category or prompt.source or task.name,
                "instruction": last_request(prompt.prompt),
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
