"""Win rates: comparing completions with reference outputs, and win rates at equal length."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import numpy as np

from bfpo.core.samples import Completion, Judge, PairJudge
from bfpo.data.stages import judge_completions
from bfpo.data.verdict_files import judge_file
from bfpo.errors import DataError, RecipeError
from bfpo.evaluation.judge_outputs import JudgeOutput
from bfpo.evaluation.preferences import RatingPairJudge, collect_preferences
from bfpo.evaluation.recipe import EvalRecipe
from bfpo.evaluation.results import MetricResult
from bfpo.evaluation.scoring import BY_BOOTSTRAP
from bfpo.evaluation.suite import Task
from bfpo.evaluation.suite_scores import LENGTH_CONTROLLED, WIN_RATE, score_preferences
from bfpo.judging.spec import JUDGES, parse_judge
from bfpo.stats.length_control import length_controlled_win_rate

COMPARING = tuple(kind for kind, properties in JUDGES.items() if properties.compares is not None)
"""Kinds of judges that compare completions."""


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
    """Check that a judge of a recipe compares completions if a task needs one.

    Raises:
        RecipeError: If none does.
    """
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
        preferences = collect_preferences(cast(PairJudge, judge), completions, references, path)
        return output._replace(preferences=preferences, sees_both=True)
    rated = {verdict.prompt_id for verdict in output.verdicts if verdict.helpfulness is not None}
    if not rated & references.keys():
        return output
    answered = {completion.prompt_id for completion in completions}
    compared = [reference for prompt_id, reference in references.items() if prompt_id in answered]
    reference_file = judge_file(folder, "references", output.name, output.revision)
    ratings = [*output.verdicts, *judge_completions(judge, compared, reference_file)]
    pair_judge = RatingPairJudge(ratings, output.name, output.revision)
    return output._replace(preferences=collect_preferences(pair_judge, completions, references, path))


def length_controlled_metrics(
    tasks: Sequence[Task], completions: Sequence[Completion], outputs: Sequence[JudgeOutput]
) -> list[MetricResult]:
    """Compute the win rate at equal length, in characters, of every task by every judge that compares."""
    texts = {completion.prompt_id: completion.text for completion in completions if completion.sample == 0}
    metrics = []
    for task in tasks:
        for output in outputs:
            scores = next((own for own in score_preferences(task, output) if own.spec is WIN_RATE), None)
            if scores is None:
                continue
            lengths = np.array([len(texts[prompt_id]) for prompt_id in scores.by_prompt], dtype=np.float64)
            reference_lengths = np.array(
                [len(task.references[prompt_id].text) for prompt_id in scores.by_prompt], dtype=np.float64
            )
            metrics.append(
                MetricResult(
                    task.suite,
                    task.name,
                    LENGTH_CONTROLLED,
                    *length_controlled_win_rate(scores.values, lengths, reference_lengths),
                    len(scores.by_prompt),
                    scores.unscored,
                    BY_BOOTSTRAP,
                    True,
                    output.label,
                )
            )
    return metrics
