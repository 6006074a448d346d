"""From verdicts of several judges to numbers: by suite, kind, task and category, and how far the judges agree."""

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np

from bfpo.core.samples import KINDS, Completion, Key, Prompt, Verdict
from bfpo.evaluation.differences import compare
from bfpo.evaluation.preferences import PairwisePreference, order_decides, preferences
from bfpo.evaluation.results import AgreementResult, MetricComparison, MetricResult, Results
from bfpo.evaluation.scoring import JudgedCompletion, MetricSpec, PromptScores, join, measure, to_metrics
from bfpo.evaluation.suite import Task
from bfpo.stats.agreement import kappa
from bfpo.stats.intervals import Values, bootstrap


class JudgeOutput(NamedTuple):
    """A judge with what it said.

    Args:
        label: Its name, unlike every other judge's of the evaluation.
        name: Its own name.
        revision: Of the judge.
        verdicts: On every completion.
        on_labeled: On the answers that people labeled; empty where it isn't calibrated.
        compared: What it prefers beside given outputs; empty where it compares none.
        sees_both: Whether it sees both answers at once, so that their order may sway it.
    """

    label: str
    name: str
    revision: str
    verdicts: list[Verdict]
    on_labeled: Sequence[Verdict] = ()
    compared: Sequence[PairwisePreference] = ()
    sees_both: bool = False


LENGTH_CONTROLLED = "win_rate_length_controlled"
LENGTH_CONTROLLED_APPROXIMATE = "win_rate_length_controlled_approximate"
WIN_RATE = MetricSpec("win_rate", lambda judged: None, lambda judged: False, True, False)
ORDER_DECIDES = MetricSpec("order_decides", lambda judged: None, lambda judged: False, False, True)

Measures = dict[tuple[str, str], list[PromptScores]]
"""Suite and judge → what was measured."""


def measure_all(
    tasks: Sequence[Task],
    completions: Sequence[Completion],
    panel: Sequence[JudgeOutput],
    *,
    by_category: bool = True,
) -> Measures:
    """Measure every suite by every judge: over all prompts of a kind, over each task, and over its categories.

    What needs no judge (tokens, cut answers) is measured beside the first judge alone.
    """
    found: Measures = {}
    asked = {prompt.prompt_id: prompt for task in tasks for prompt in task.prompts}
    for number, judge in enumerate(panel):
        judged: dict[str, list[JudgedCompletion]] = {}
        for one in join(asked.values(), completions, judge.verdicts):
            judged.setdefault(one.completion.prompt_id, []).append(one)
        for suite in dict.fromkeys(task.suite for task in tasks):
            own = [task for task in tasks if task.suite == suite]
            measured = _measure({prompt.prompt_id: prompt for task in own for prompt in task.prompts}, judged, judge)
            for task in own:
                measured += _of_task(task, judged, judge, by_category=by_category)
                measured += wins(task, judge)
            found[suite, judge.label] = [one for one in measured if number == 0 or one.measure.needs_judge]
    return found


def _of_task(
    task: Task, judged: Mapping[str, list[JudgedCompletion]], judge: JudgeOutput, *, by_category: bool
) -> list[PromptScores]:
    found = []
    if task.name not in KINDS:
        found += _measure({prompt.prompt_id: prompt for prompt in task.prompts}, judged, judge, task=task.name)
    categories = {prompt.category for prompt in task.prompts if prompt.category} if by_category else set()
    for category in sorted(categories):
        those = {prompt.prompt_id: prompt for prompt in task.prompts if prompt.category == category}
        measured = _measure(those, judged, judge, task=task.name, category=category)
        found += [one for one in measured if one.measure.needs_judge]
    return found


def wins(task: Task, judge: JudgeOutput) -> list[PromptScores]:
    """Return the preferences of a judge on the prompts of a task, and on which of them the order decides.

    A prompt that is undecided in one of the orders is left out, and counted; `if_no` takes it for lost, `if_yes` for
    won.
    """
    asked = {prompt.prompt_id for prompt in task.prompts} & task.references.keys()
    own = [one for one in judge.compared if one.prompt_id in asked]
    said = preferences(own)
    decided = {name: one for name, one in said.items() if one is not None}
    if not decided:
        return []
    if_no, if_yes = ({name: other if one is None else one for name, one in said.items()} for other in (0.0, 1.0))
    unscored = len(said) - len(decided)
    bounds = (if_no, if_yes) if unscored else (None, None)
    found = [PromptScores(task.name, WIN_RATE, decided, unscored, 1, judge.label, None, *bounds)]
    if judge.sees_both:
        swayed = {name: float(one) for name, one in order_decides(own).items()}
        found.append(PromptScores(task.name, ORDER_DECIDES, swayed, unscored, 1, judge.label))
    return found


def _measure(
    prompts: Mapping[str, Prompt], judged: Mapping[str, list[JudgedCompletion]], judge: JudgeOutput, **of: str
) -> list[PromptScores]:
    those = [one for key in prompts for one in judged.get(key, ())]
    return measure(prompts.values(), those, judge=judge.label, **of)


def all_metrics(measures: Measures) -> list[MetricResult]:
    """Return the numbers of all suites and judges with their intervals."""
    return [metric for (suite, _), measured in measures.items() for metric in to_metrics(suite, measured)]


def all_comparisons(ours: Measures, theirs: Measures, against: Results) -> list[MetricComparison]:
    """Compare with another run, suite by suite and judge by judge."""
    return [
        found
        for (suite, judge), measured in ours.items()
        if (suite, judge) in theirs
        for found in compare(suite, measured, theirs[suite, judge], against=against)
    ]


def agreement(tasks: Sequence[Task], panel: Sequence[JudgeOutput]) -> list[AgreementResult]:
    """Return Cohen's kappa of every two judges, with the bootstrap interval over prompts where there is one.

    Safety is asked about the answers to harmful prompts, refusals about all.
    """
    harmful = {prompt.prompt_id for task in tasks if task.kind == "harmful" for prompt in task.prompts}
    found = []
    for one, other in combinations(panel, 2):
        theirs = {verdict.key: verdict for verdict in other.verdicts}
        pairs = [(verdict, theirs[verdict.key]) for verdict in one.verdicts if verdict.key in theirs]
        for question in ("safe", "refusal"):
            both = [
                (verdict.key, getattr(verdict, question), getattr(their, question))
                for verdict, their in pairs
                if question == "refusal" or verdict.prompt_id in harmful
            ]
            decided = [(key, a, b) for key, a, b in both if a is not None and b is not None]
            value, low, high = _kappa(decided)
            # Where nearly all answers are of one kind, kappa is low or undefined however well judges agree.
            share = sum(a == b for _, a, b in decided) / len(decided) if decided else None
            found.append(AgreementResult([one.label, other.label], question, value, low, high, len(decided), share))
    return found


def _kappa(decided: Sequence[tuple[Key, bool, bool]]) -> tuple[float | None, float | None, float | None]:
    value = kappa([a for _, a, _ in decided], [b for _, _, b in decided])
    ours, theirs = (np.array([one[place] for one in decided], dtype=bool) for place in (1, 2))
    # One word throughout makes kappa 0, the same words throughout make it 1: resampling can't tell how surely.
    if value is None or len({*ours}) < 2 or len({*theirs}) < 2 or (ours == theirs).all():
        return value, None, None
    group = np.unique([key[0] for key, _, _ in decided], return_inverse=True)[1]
    cells = [ours & theirs, ours & ~theirs, ~ours & theirs, ~ours & ~theirs]
    interval = bootstrap(_kappa_of_counts, np.stack([np.bincount(group, weights=cell) for cell in cells]))
    return value, interval.low, interval.high


def _kappa_of_counts(counts: Values) -> Values:
    """Take (4, ..., n) counts by prompt: both yes, only ours, only theirs, both no."""
    yes, ours, theirs, no = counts.sum(axis=-1)
    total = yes + ours + theirs + no
    by_chance = ((yes + ours) * (yes + theirs) + (no + ours) * (no + theirs)) / total**2
    seen = (yes + no) / total
    # A resample in which both say the same word throughout agrees fully, chance or not.
    result: Values = np.where(by_chance < 1, (seen - by_chance) / np.where(by_chance < 1, 1 - by_chance, 1), 1.0)
    return result
