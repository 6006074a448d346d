"""Answers beside given outputs: which judge compares them, their win rates, and AlpacaEval's files of them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from bfpo.core.files import file_name, write_json
from bfpo.core.samples import Completion, Judge, PairJudge
from bfpo.data.stages import judge_completions
from bfpo.data.verdict_files import judge_file
from bfpo.errors import DataError, RecipeError
from bfpo.evaluation.panel import LENGTH_CONTROLLED, WIN_RATE, JudgeOutput, wins
from bfpo.evaluation.preferences import ByRating, PairwisePreference, compare_with_references, preferences
from bfpo.evaluation.recipe import EvalRecipe
from bfpo.evaluation.results import MetricResult
from bfpo.evaluation.scoring import BY_BOOTSTRAP
from bfpo.evaluation.suite import Task
from bfpo.judging.spec import JUDGES, parse_judge
from bfpo.stats.length_control import length_controlled_win_rate

COMPARING = tuple(kind for kind, properties in JUDGES.items() if properties.compares is not None)
"""Kinds of judges that compare completions."""
FOLDER = "alpaca_eval"


def references_of(tasks: Sequence[Task]) -> dict[str, Completion]:
    """Return the outputs that answers are compared with, by prompt.

    Raises:
        DataError: If two tasks compare one prompt's answer with two outputs.
    """
    found: dict[str, Completion] = {}
    for task in tasks:
        for prompt, output in task.references.items():
            if found.setdefault(prompt, output).text != output.text:
                raise DataError(
                    f"{task.suite}/{task.name}: prompt '{prompt}' is compared with another output elsewhere"
                )
    return found


def check_judges(recipe: EvalRecipe, tasks: Sequence[Task]) -> None:
    """Refuse judges of which none compares answers, where a task needs one.

    Raises:
        RecipeError: If that is so.
    """
    comparing = next((task for task in tasks if task.references), None)
    specs = [parse_judge(spec) for spec in recipe.judges]
    # Whether a custom judge compares shows only when it is opened.
    may_compare = [spec for spec in specs if spec.compares is not None or any(part.is_custom for part in spec.parts)]
    if comparing is not None and not may_compare:
        where = f"{comparing.suite}/{comparing.name}"
        raise RecipeError(
            f"judges: none of {', '.join(recipe.judges)} compares answers, which {where} needs; add one of "
            f"{', '.join(COMPARING)} (as rubric:MODEL@http://host:port/v1), or leave_out: [{where}]"
        )


def compare(
    judge: Judge,
    one: JudgeOutput,
    completions: Sequence[Completion],
    references: Mapping[str, Completion],
    out: Path,
) -> JudgeOutput:
    """Return a judge's place in the panel with what it prefers; unchanged where it compares nothing.

    A judge that sees both answers is asked in both orders. One that rates helpfulness rates the given outputs too;
    the ratings of the model's answers are those of its verdicts.

    Args:
        judge: Itself.
        one: Its place, with its verdicts on the completions.
        completions: The evaluated answers.
        references: Prompt → the given output.
        out: Folder of the evaluation.
    """
    path = judge_file(out, "comparisons", one.name, one.revision)
    if hasattr(judge, "prefer"):
        compared = compare_with_references(cast(PairJudge, judge), completions, references, path)
        return one._replace(compared=compared, sees_both=True)
    rated = {verdict.prompt_id for verdict in one.verdicts if verdict.helpfulness is not None}
    if not rated & references.keys():
        return one
    answered = {answer.prompt_id for answer in completions} & references.keys()
    given = [output for prompt, output in references.items() if prompt in answered]
    of_given = judge_completions(judge, given, judge_file(out, "references", one.name, one.revision))
    by_rating = ByRating([*one.verdicts, *of_given], one.name, one.revision)
    return one._replace(compared=compare_with_references(by_rating, completions, references, path))


def length_controlled(
    tasks: Sequence[Task], completions: Sequence[Completion], panel: Sequence[JudgeOutput]
) -> list[MetricResult]:
    """Return the win rates at equal lengths, in characters, of every task by every judge that compares."""
    answers = _first_answers(completions)
    found = []
    for task in tasks:
        for judge in panel:
            for one in wins(task, judge):
                if one.measure is not WIN_RATE:
                    continue
                prompts = list(one.by_prompt)
                ours, theirs = (
                    np.array([len(of[prompt].text) for prompt in prompts], dtype=np.float64)
                    for of in (answers, task.references)
                )
                interval = length_controlled_win_rate(one.values, ours, theirs)
                about = task.suite, task.name, LENGTH_CONTROLLED
                found.append(
                    MetricResult(*about, *interval, len(prompts), one.unscored, BY_BOOTSTRAP, True, judge.label)
                )
    return found


def export(
    tasks: Sequence[Task], completions: Sequence[Completion], panel: Sequence[JudgeOutput], run: str, out: Path
) -> None:
    """Write what was compared as AlpacaEval's files: `model_outputs.json` and, of each judge, `annotations.json`.

    Args:
        tasks: Those that compare are written.
        completions: The evaluated answers.
        panel: A judge's undecided prompts are left out of its annotations.
        run: What the model is called there.
        out: Folder of the evaluation; the files go to `alpaca_eval/TASK` and `alpaca_eval/TASK/JUDGE`.
    """
    answers = _first_answers(completions)
    for task in tasks:
        folder = out / FOLDER / file_name(task.name)
        rows = {
            prompt.prompt_id: {
                "dataset": prompt.category or prompt.source or task.name,
                "instruction": prompt.prompt[-1].content,
                "output": answers[prompt.prompt_id].text,
                "generator": run,
            }
            for prompt in task.prompts
            if prompt.prompt_id in task.references
        }
        if rows:
            write_json(folder / "model_outputs.json", list(rows.values()))
        for judge in panel:
            if annotations := _annotations(task, rows, judge.compared, f"{judge.label}@{judge.revision}"):
                write_json(folder / file_name(judge.label) / "annotations.json", annotations)


def _annotations(
    task: Task, rows: Mapping[str, Mapping[str, str]], compared: Sequence[PairwisePreference], annotator: str
) -> list[dict[str, Any]]:
    said = preferences(compared)
    return [
        {
            "dataset": row["dataset"],
            "instruction": row["instruction"],
            "output_1": task.references[prompt].text,
            "generator_1": task.references[prompt].model,
            "output_2": row["output"],
            "generator_2": row["generator"],
            "annotator": annotator,
            # AlpacaEval's 1 is the reference, 2 the model.
            "preference": 1 + preference,
        }
        for prompt, row in rows.items()
        if (preference := said.get(prompt)) is not None
    ]


def _first_answers(completions: Sequence[Completion]) -> dict[str, Completion]:
    return {one.prompt_id: one for one in completions if one.sample == 0}
