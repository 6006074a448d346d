"""Comparing an evaluation with an earlier one, prompt by prompt and judge by judge."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from bfpo.core.files import read_repaired_jsonl
from bfpo.core.samples import Prompt
from bfpo.data.stages import read_completions, read_prompt_file
from bfpo.data.verdict_files import judge_files
from bfpo.errors import DataError
from bfpo.evaluation.comparisons import ModelComparison
from bfpo.evaluation.dominance import PooledScores, pair_verdicts, pooled
from bfpo.evaluation.panel import JudgeOutput, Measures, all_comparisons, measure_all
from bfpo.evaluation.preferences import PairwisePreference
from bfpo.evaluation.results import FILE_NAME, MetricComparison, Results, read_results
from bfpo.evaluation.suite import Task, with_prompts_of
from bfpo.evaluation.verdicts import verdicts_by_judge


class Baseline(NamedTuple):
    """The evaluation to compare with.

    Args:
        folder: Its folder.
        results: Its results.
    """

    folder: Path
    results: Results


def read_baseline(path: str, template_policy: str | None) -> Baseline:
    """Read the results of an evaluation to compare with.

    Args:
        path: Folder of the base; an `evaluation` folder in it is taken.
        template_policy: Of this run; None where its tasks are lm-eval's alone, each with its own.

    Raises:
        DataError: If there is none, or its prompts were put to the model under another policy.
    """
    inner = Path(path) / "evaluation"
    folder = inner if (inner / FILE_NAME).is_file() else Path(path)
    base = read_results(folder)
    if template_policy is not None and base.template_policy != template_policy:
        raise DataError(
            f"base {folder}: its prompts were put to the model under the policy '{base.template_policy}', this run's "
            f"under '{template_policy}'; such runs don't compare, evaluate both under one policy"
        )
    return Baseline(folder, base)


def compare_with_baseline(
    folder: Path,
    base: Results,
    results: Results,
    tasks: Sequence[Task],
    measures: Measures,
    panel: Sequence[JudgeOutput],
) -> tuple[list[MetricComparison], list[ModelComparison], list[str]]:
    """Compare with the evaluation of a folder.

    Args:
        folder: Of the base.
        base: What its evaluation found.
        results: Of this run; its numbers aren't needed.
        tasks: What was asked.
        measures: Of this run.
        panel: Its judges.

    Returns:
        The comparisons, what the two are to each other by each judge, and what a reader must know of them.

    Raises:
        DataError: If the base is of other prompts, or has no judge in common.
    """
    told = []
    differing = sorted(key for key in results.sampling if base.sampling.get(key) != results.sampling[key])
    if differing:
        told.append(f"The base {base.run} was sampled otherwise: {', '.join(differing)}.")
    shared = _shared_tasks(folder, tasks)
    asked = sum(len(task.prompts) for task in tasks)
    if (both := sum(len(task.prompts) for task in shared)) < asked:
        told.append(f"The comparison with {base.run} is over the {both:,} of {asked:,} prompts that both answered.")
    completions = read_completions(folder / "completions.jsonl")
    theirs, missing = _panel_of(folder, panel)
    if any(one.compared for one in panel) and (other := _other_references(base, tasks)):
        told.append(f"No comparison of win rates with {base.run}: {other} was set beside other outputs there.")
        theirs = [one._replace(compared=()) for one in theirs]
    told += [f"No comparison with {base.run} by {one}: it wasn't judged by that revision." for one in missing]
    if not theirs:
        names = ", ".join(f"{one.name}@{one.revision}" for one in panel)
        raise DataError(f"base {folder}: it was judged by none of {names}; evaluate it with the same judges")
    first = theirs[0].label == panel[0].label
    of_base = measure_all(shared, completions, theirs)
    if not first:
        # What needs no judge is measured beside the first there is, and compared without the primary judge too.
        of_base |= {
            (suite, panel[0].label): [one for one in measured if not one.measure.needs_judge]
            for (suite, judge), measured in of_base.items()
            if judge == theirs[0].label
        }
    pairs = [
        (_pooled(results.run, judge.label, measures), _pooled(base.run, judge.label, of_base)) for judge in theirs
    ]
    return all_comparisons(measures, of_base, base), pair_verdicts(pairs), told


def _other_references(base: Results, tasks: Sequence[Task]) -> str | None:
    """Return a task whose answers were set beside the outputs of another generator in the base."""
    theirs = {row.name: row.compared_with for row in base.data}
    own = [task.data for task in tasks if task.data is not None and task.references]
    return next((row.name for row in own if theirs.get(row.name) != row.compared_with), None)


def _pooled(run: str, judge: str, measures: Measures) -> PooledScores:
    return pooled(run, judge, [one for (_, by), measured in measures.items() if by == judge for one in measured])


def _shared_tasks(folder: Path, tasks: Sequence[Task]) -> list[Task]:
    """Return the tasks with the prompts that the base answered too."""
    there = {prompt.prompt_id: prompt for prompt in read_prompt_file(str(folder / Prompt.file_name))}
    for task in tasks:
        for prompt in task.prompts:
            if there.get(prompt.prompt_id, prompt).prompt != prompt.prompt:
                raise DataError(f"base {folder}: its prompt '{prompt.prompt_id}' is another than this run's")
    shared = with_prompts_of(tasks, there)
    if not shared:
        raise DataError(f"base {folder}: it answered none of this run's prompts; evaluate it with the same suites")
    return shared


def _panel_of(folder: Path, panel: Sequence[JudgeOutput]) -> tuple[list[JudgeOutput], list[str]]:
    """Return the judges that the base has in common, with their verdicts on it, and the labels of the others."""
    there = verdicts_by_judge(folder)
    beside: dict[tuple[str, str], list[PairwisePreference]] = {}
    for file in judge_files(folder, "comparisons"):
        for compared in map(PairwisePreference.from_row, read_repaired_jsonl(file)):
            beside.setdefault((compared.judge, compared.revision), []).append(compared)
    found = [
        one._replace(verdicts=there[name], compared=beside.get(name, []))
        for one in panel
        if (name := (one.name, one.revision)) in there
    ]
    return found, [one.label for one in panel if (one.name, one.revision) not in there]
