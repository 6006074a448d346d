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
from bfpo.evaluation.alpaca_eval import LengthControl, read_length_control
from bfpo.evaluation.panel import LENGTH_CONTROLLED, LENGTH_CONTROLLED_APPROXIMATE, WIN_RATE, JudgeOutput, wins
from bfpo.evaluation.preferences import ByRating, PairwisePreference, compare_with_references, preferences
from bfpo.evaluation.recipe import EvalRecipe
from bfpo.evaluation.results import MetricResult
from bfpo.evaluation.scoring import BY_BOOTSTRAP
from bfpo.evaluation.suite import Task
from bfpo.judging.spec import JUDGES, parse_judge
from bfpo.stats.length_control import FOLDS, MIN_LENGTH_RATIO, alpaca_eval_win_rate, length_controlled_win_rate

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
    tasks: Sequence[Task],
    completions: Sequence[Completion],
    panel: Sequence[JudgeOutput],
    control: LengthControl | None = None,
) -> tuple[list[MetricResult], list[str]]:
    """Return the win rates at equal lengths, in characters, of every task by every judge that compares, and notes.

    Args:
        tasks: Tasks; those that compare have such rates.
        completions: Completions of the evaluated model.
        panel: Output of each judge.
        control: Data of AlpacaEval's regression, for its instructions. For other tasks, and without it, the rate is
            an approximation under another name, and missing where it would be an extrapolation.
    """
    answers = _first_answers(completions)
    metrics, notes = list[MetricResult](), list[str]()
    for task in tasks:
        rates = [(judge, scores) for judge in panel for scores in wins(task, judge) if scores.measure is WIN_RATE]
        prompts = [prompt.prompt_id for prompt in task.prompts if prompt.prompt_id in task.references]
        if not rates or not prompts:
            continue
        ours, theirs = (
            np.array([len(outputs[prompt].text) for prompt in prompts], dtype=np.float64)
            for outputs in (answers, task.references)
        )
        is_published = control is not None and is_alpaca_eval(task)
        ratio = ours.mean() / max(theirs.mean(), 1.0)
        if not is_published and ratio < MIN_LENGTH_RATIO:
            notes.append(
                f"{task.suite}/{task.name}: no length-controlled win rate: the answers have {ours.mean():,.0f} "
                f"characters on average, the reference outputs {theirs.mean():,.0f}. Below {MIN_LENGTH_RATIO:.0%} of "
                "their length it would be an extrapolation that rewards short answers."
                + ("" if control else _ABOUT_FILES)
            )
            continue
        for judge, scores in rates:
            preference = np.array([scores.by_prompt.get(prompt, np.nan) for prompt in prompts])
            decided = ~np.isnan(preference)
            if control is not None and is_published:
                if decided.sum() < FOLDS:
                    continue
                places = [task.positions[prompt] for prompt in prompts]
                interval = alpaca_eval_win_rate(preference, ours, theirs, control.difficulties[places], control.gamed)
                name = LENGTH_CONTROLLED
            else:
                interval = length_controlled_win_rate(preference[decided], ours[decided], theirs[decided])
                name = LENGTH_CONTROLLED_APPROXIMATE
            n = len(scores.by_prompt)
            metrics.append(
                MetricResult(
                    task.suite, task.name, name, *interval, n, scores.unscored, BY_BOOTSTRAP, True, judge.label
                )
            )
    return metrics, notes


_ABOUT_FILES = " With the files of `length_control:` AlpacaEval's own regression is used on its instructions."


def is_alpaca_eval(task: Task) -> bool:
    """Return whether a task compares answers to AlpacaEval's instructions."""
    return bool(task.references) and task.data is not None and task.data.source == "alpaca_eval"


def load_length_control(recipe: EvalRecipe, tasks: Sequence[Task]) -> LengthControl | None:
    """Return the data of AlpacaEval's regression; None if the recipe names no files.

    Raises:
        RecipeError: If no task compares answers to AlpacaEval's instructions.
        DataError: If the files can't be read, or are about another number of instructions than a task.
    """
    if recipe.length_control is None:
        return None
    control = read_length_control(recipe.length_control.gamed, recipe.length_control.difficulty)
    compared = [task for task in tasks if is_alpaca_eval(task)]
    if not compared:
        raise RecipeError("length_control: no task compares answers to the instructions of alpaca_eval")
    for task in compared:
        if task.data is not None and task.data.published != len(control.difficulties):
            raise DataError(
                f"length_control: {recipe.length_control.gamed} is about {len(control.difficulties):,} instructions, "
                f"{task.data.origin} has {task.data.published:,}; expected AlpacaEval's whole set in its own order"
            )
    return control


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
