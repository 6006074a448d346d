"""Win rates: comparing completions with reference outputs, and win rates at equal length."""

from collections import Counter
from collections.abc import Mapping, Sequence
from glob import glob
from pathlib import Path
from typing import cast

import numpy as np

from bfpo.core.samples import Completion, Judge, PairJudge
from bfpo.data.readings import read_part
from bfpo.data.stages import judge_completions
from bfpo.data.verdict_files import judge_file
from bfpo.errors import DataError, RecipeError
from bfpo.evaluation.alpaca_eval import LengthControl, read_length_control
from bfpo.evaluation.judge_outputs import JudgeOutput
from bfpo.evaluation.preferences import RatingPairJudge, collect_preferences
from bfpo.evaluation.recipe import EvalRecipe
from bfpo.evaluation.results import MetricResult
from bfpo.evaluation.scoring import BY_BOOTSTRAP
from bfpo.evaluation.suite import Task
from bfpo.evaluation.suite_scores import LENGTH_CONTROLLED, LENGTH_CONTROLLED_APPROXIMATE, WIN_RATE, score_preferences
from bfpo.judging.spec import JUDGES, parse_judge
from bfpo.stats.intervals import Values
from bfpo.stats.length_control import FOLDS, MIN_LENGTH_RATIO, alpaca_eval_win_rate, length_controlled_win_rate

COMPARING = tuple(kind for kind, properties in JUDGES.items() if properties.compares is not None)
"""Kinds of judges that compare completions."""


# Judges that are made from a local file.
_OF_FILES = ("linear", "people", "refusal-rule")


def collect_references(tasks: Sequence[Task]) -> dict[str, Completion]:
    """Return the reference outputs of all tasks by prompt id.

    Raises:
        DataError: If two tasks have different references for one prompt.
    """
    references: dict[str, Completion] = {}
    for task in tasks:
        for prompt_id, output in task.references.items():
            if references.setdefault(prompt_id, output).text != output.text:
                raise DataError(
                    f"{task.suite}/{task.name}: prompt '{prompt_id}' is compared with another output elsewhere"
                )
    return references


def check_judges(recipe: EvalRecipe, tasks: Sequence[Task]) -> None:
    """Check the judges of a recipe before a model answers: their files, and whether one compares if a task needs it.

    Raises:
        RecipeError: If a judge is listed twice, a file is missing, or none compares completions.
    """
    if len(set(recipe.judges)) < len(recipe.judges):
        raise RecipeError(f"judges: {Counter(recipe.judges).most_common(1)[0][0]} is listed twice")
    comparing = next((task for task in tasks if task.references), None)
    specs = [parse_judge(spec) for spec in recipe.judges]
    # Whether a custom judge compares shows only when it is opened.
    may_compare = [spec for spec in specs if spec.compares is not None or any(part.is_custom for part in spec.parts)]
    if comparing is not None and not may_compare:
        name = f"{comparing.suite}/{comparing.name}"
        raise RecipeError(
            f"judges: none of {', '.join(recipe.judges)} compares answers, which {name} needs; add one of "
            f"{', '.join(COMPARING)} (as rubric:MODEL@http://host:port/v1), or leave_out: [{name}]"
        )
    for part in (part for spec in specs for part in spec.parts if part.kind in _OF_FILES):
        # The answers to annotations may follow an @, and labels may be in all files of a pattern.
        paths = (part.path, part.path.rpartition("@")[0])
        if part.path not in ("", "harmful") and not any(path and glob(path) for path in paths):
            raise RecipeError(f"judges: {part.text}: there is no file {part.path}")


def compare_with_references(
    judge: Judge,
    output: JudgeOutput,
    completions: Sequence[Completion],
    references: Mapping[str, Completion],
    folder: Path,
) -> JudgeOutput:
    """Return a judge's output with its preferences; unchanged if the judge compares nothing.

    A judge that sees both answers is asked in both orders. One that rates helpfulness rates the reference outputs
    too; the ratings of the completions are in its verdicts.

    Args:
        judge: The judge.
        output: Its output, with its verdicts on the completions.
        completions: Completions of the evaluated model.
        references: Prompt id → reference output.
        folder: Folder of the evaluation.
    """
    path = judge_file(folder, "comparisons", output.name, output.revision)
    if hasattr(judge, "prefer"):
        read_references = {prompt_id: read_part(reference) for prompt_id, reference in references.items()}
        preferences = collect_preferences(cast(PairJudge, judge), map(read_part, completions), read_references, path)
        return output._replace(preferences=preferences, sees_both=True)
    # A rule's helpfulness of 0 or 1 orders no two answers that it finds helpful.
    kinds = [JUDGES.get(name) for name in output.members]
    if all(kind is not None and kind.compares is None for kind in kinds):
        return output
    rated = {verdict.prompt_id for verdict in output.verdicts if verdict.helpfulness is not None}
    if not rated & references.keys():
        return output
    answered = {completion.prompt_id for completion in completions}
    compared = [reference for prompt_id, reference in references.items() if prompt_id in answered]
    reference_file = judge_file(folder, "references", output.name, output.revision)
    ratings = [*output.verdicts, *judge_completions(judge, compared, reference_file)]
    pair_judge = RatingPairJudge(ratings, output.name, output.revision)
    return output._replace(preferences=collect_preferences(pair_judge, completions, references, path))


def is_alpaca_eval(task: Task) -> bool:
    """Return whether a task compares completions for AlpacaEval's instructions."""
    return bool(task.references) and task.data is not None and task.data.source == "alpaca_eval"


def load_length_control(recipe: EvalRecipe, tasks: Sequence[Task]) -> LengthControl | None:
    """Return the data of AlpacaEval's regression; None if the recipe names no files.

    Raises:
        RecipeError: If no task compares completions for AlpacaEval's instructions.
        DataError: If the files can't be read, or have another number of instructions than a task.
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
                f"length_control: {recipe.length_control.gamed} has {len(control.difficulties):,} instructions, "
                f"{task.data.origin} {task.data.published:,}; expected AlpacaEval's whole set in its own order"
            )
    return control


def length_controlled_metrics(
    tasks: Sequence[Task],
    completions: Sequence[Completion],
    outputs: Sequence[JudgeOutput],
    control: LengthControl | None = None,
) -> tuple[list[MetricResult], list[str]]:
    """Compute the win rate at equal length, in characters, of every task by every judge that compares.

    Args:
        tasks: The tasks.
        completions: Completions of their prompts.
        outputs: Output of each judge.
        control: Data of AlpacaEval's regression, for its instructions. For other tasks, and without it, the metric is
            an approximation with another name, and missing where it would be an extrapolation.

    Returns:
        The metrics, and a warning for each task without one.
    """
    texts = {completion.prompt_id: read_part(completion).text for completion in completions if completion.sample == 0}
    metrics, warnings = list[MetricResult](), list[str]()
    for task in tasks:
        prompt_ids = [prompt.prompt_id for prompt in task.prompts if prompt.prompt_id in task.references]
        win_rates = [
            (output, scores)
            for output in outputs
            for scores in score_preferences(task, output)
            if scores.spec is WIN_RATE
        ]
        if not win_rates:
            continue
        lengths = np.array([len(texts[prompt_id]) for prompt_id in prompt_ids], dtype=np.float64)
        reference_lengths = np.array(
            [len(task.references[prompt_id].text) for prompt_id in prompt_ids], dtype=np.float64
        )
        task_control = control if is_alpaca_eval(task) else None
        if task_control is None and lengths.mean() < MIN_LENGTH_RATIO * reference_lengths.mean():
            warnings.append(_no_rate(task, lengths, reference_lengths))
            continue
        for output, scores in win_rates:
            preferences = np.array([scores.by_prompt.get(prompt_id, np.nan) for prompt_id in prompt_ids])
            is_decided = ~np.isnan(preferences)
            if task_control is None:
                name = LENGTH_CONTROLLED_APPROXIMATE
                interval = length_controlled_win_rate(
                    preferences[is_decided], lengths[is_decided], reference_lengths[is_decided]
                )
            elif is_decided.sum() < FOLDS:
                continue
            else:
                name = LENGTH_CONTROLLED
                difficulties = task_control.difficulties[[task.positions[prompt_id] for prompt_id in prompt_ids]]
                interval = alpaca_eval_win_rate(
                    preferences, lengths, reference_lengths, difficulties, task_control.gamed
                )
            metrics.append(
                MetricResult(
                    task.suite,
                    task.name,
                    name,
                    *interval,
                    len(scores.by_prompt),
                    scores.unscored,
                    BY_BOOTSTRAP,
                    True,
                    output.label,
                )
            )
    return metrics, warnings


def _no_rate(task: Task, lengths: Values, reference_lengths: Values) -> str:
    files = " Set `length_control:` for AlpacaEval's own regression." if is_alpaca_eval(task) else ""
    return (
        f"{task.suite}/{task.name}: no length-controlled win rate: the answers have {lengths.mean():,.0f} characters "
        f"on average, the reference outputs {reference_lengths.mean():,.0f}. Below {MIN_LENGTH_RATIO:.0%} of their "
        f"length it would be an extrapolation that rewards short answers.{files}"
    )
