"""Comparing an evaluation with an earlier one, prompt by prompt and judge by judge."""

import json
from collections.abc import Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from bfpo.core.files import read_repaired_jsonl
from bfpo.core.samples import Completion, Prompt
from bfpo.data.stages import read_prompt_file, verdicts_by_judge
from bfpo.data.verdict_files import judge_files
from bfpo.errors import DataError
from bfpo.evaluation.attacks import Attacks, read_attacks, read_verdicts_on_turns
from bfpo.evaluation.comparisons import ModelComparison
from bfpo.evaluation.dominance import PooledScores, compare_models, pool_scores
from bfpo.evaluation.judge_outputs import JudgeOutput
from bfpo.evaluation.preferences import PairwisePreference, pair_hash
from bfpo.evaluation.results import EVALUATION_FOLDER, FILE_NAME, MetricComparison, Results, read_results
from bfpo.evaluation.suite import Task, select_prompts
from bfpo.evaluation.suite_scores import SuiteScores, compare_suites, score_suites
from bfpo.evaluation.verdicts import completions_of_evaluation
from bfpo.evaluation.win_rates import collect_references


class Baseline(NamedTuple):
    """Evaluation to compare with.

    Args:
        folder: Folder of the evaluation.
        results: Its results.
    """

    folder: Path
    results: Results


def read_baseline(path: str, template_policy: str | None) -> Baseline:
    """Read the results of an evaluation to compare with.

    Args:
        path: Folder of the evaluation, or one with an `evaluation` folder in it.
        template_policy: Template policy of this run; None to compare tasks of lm-eval only, each of which has its
            own.

    Raises:
        DataError: If the results are missing, or of another template policy.
    """
    inner = Path(path) / EVALUATION_FOLDER
    folder = inner if (inner / FILE_NAME).is_file() else Path(path)
    results = read_results(folder)
    if template_policy is not None and results.template_policy != template_policy:
        raise DataError(
            f"base {folder}: its template policy is '{results.template_policy}', this run's is '{template_policy}'; "
            "such runs don't compare. If both put the same text to the model, set template_policy: "
            f"{json.dumps(results.template_policy)}; otherwise evaluate both under one policy"
        )
    return Baseline(folder, results)


def compare_with_baseline(
    baseline: Baseline,
    results: Results,
    tasks: Sequence[Task],
    suites: Sequence[SuiteScores],
    outputs: Sequence[JudgeOutput],
    attacks: Attacks = MappingProxyType({}),
) -> tuple[list[MetricComparison], list[ModelComparison], list[str]]:
    """Compare a run with a baseline.

    Args:
        baseline: The baseline.
        results: Results of this run; their metrics aren't used.
        tasks: Tasks of this run.
        suites: Scores of this run.
        outputs: Output of each judge of this run.
        attacks: Attacks on this run's model.

    Returns:
        Comparisons of metrics, comparisons of the two models by each judge, and notes for the reader.

    Raises:
        DataError: If the baseline is of other prompts, or has no judge in common.
    """
    folder, run, notes = baseline.folder, baseline.results.run, []
    sampling = baseline.results.sampling
    differing = sorted(key for key in results.sampling if sampling.get(key) != results.sampling[key])
    if differing:
        notes.append(f"The baseline {run} was sampled with another {', '.join(differing)}.")
    completions = completions_of_evaluation(folder, baseline.results)
    shared = _shared_tasks(folder, tasks, completions)
    num_prompts = sum(len(task.prompts) for task in tasks)
    num_shared = sum(len(task.prompts) for task in shared)
    if num_shared < num_prompts:
        notes.append(
            f"The comparison with {run} is over the {num_shared:,} of {num_prompts:,} prompts that both answered."
        )
    baseline_attacks = read_attacks(folder, attacks)
    if lacking := sorted({task.suite for task in shared if task.attack and task.attack not in baseline_attacks}):
        notes.append(f"No comparison of {', '.join(lacking)} with {run}: it wasn't attacked in the same way.")
        shared = [task for task in shared if task.suite not in lacking]
    if not shared:
        return [], [], notes
    baseline_outputs = _read_outputs(folder, outputs, baseline_attacks)
    if any(output.preferences for output in outputs) and (task_name := _other_references(baseline.results, tasks)):
        notes.append(f"No comparison of win rates with {run}: {task_name} was compared with other outputs there.")
        baseline_outputs = [output._replace(preferences=()) for output in baseline_outputs]
    baseline_outputs, num_other = _about_same_references(baseline_outputs, completions, tasks)
    if num_other:
        notes.append(
            f"The comparison of win rates with {run} is without {num_other:,} prompts, whose reference outputs are "
            "others there."
        )
    labels = [output.label for output in baseline_outputs]
    notes += [
        f"No comparison with {run} by {output.label}: it wasn't judged by that revision."
        for output in outputs
        if output.label not in labels
    ]
    if not labels:
        names = ", ".join(f"{output.name}@{output.revision}" for output in outputs)
        raise DataError(f"base {folder}: it was judged by none of {names}; evaluate it with the same judges")
    shared_ids = {prompt.prompt_id for task in shared for prompt in task.prompts}
    completions = [completion for completion in completions if completion.prompt_id in shared_ids]
    baseline_suites = score_suites(shared, completions, baseline_outputs, attacks=baseline_attacks)
    primary = outputs[0].label
    if labels[0] != primary:
        # Scores that need no judge are with the first judge of each run, and are compared although these differ.
        baseline_suites += [
            SuiteScores(suite.suite, primary, [scores for scores in suite.scores if not scores.spec.needs_judge])
            for suite in baseline_suites
            if suite.judge == labels[0]
        ]
    pairs = [(_pool(results.run, label, suites), _pool(run, label, baseline_suites)) for label in labels]
    comparisons = compare_suites(suites, baseline_suites, against=baseline.results)
    return comparisons, compare_models(pairs), notes


def _pool(run: str, judge: str, suites: Sequence[SuiteScores]) -> PooledScores:
    return pool_scores(run, judge, [scores for suite in suites if suite.judge == judge for scores in suite.scores])


def _other_references(baseline: Results, tasks: Sequence[Task]) -> str | None:
    """Return the name of a task whose references are of another generator in the baseline."""
    generators = {data.name: data.compared_with for data in baseline.data}
    own = [task.data for task in tasks if task.data is not None and task.references]
    return next((data.name for data in own if generators.get(data.name) != data.compared_with), None)


def _about_same_references(
    outputs: Sequence[JudgeOutput], completions: Sequence[Completion], tasks: Sequence[Task]
) -> tuple[list[JudgeOutput], int]:
    """Return outputs with the preferences about this run's references only, and the number of prompts left out."""
    references = collect_references(tasks)
    hashes = {
        completion.prompt_id: pair_hash(completion, references[completion.prompt_id])
        for completion in completions
        if completion.sample == 0 and completion.prompt_id in references
    }
    same, others = list[JudgeOutput](), set[str]()
    for output in outputs:
        own = [row for row in output.preferences if hashes.get(row.prompt_id, row.pair_hash) == row.pair_hash]
        others |= {row.prompt_id for row in output.preferences} - {row.prompt_id for row in own}
        same.append(output._replace(preferences=own))
    return same, len(others)


def _shared_tasks(folder: Path, tasks: Sequence[Task], completions: Sequence[Completion]) -> list[Task]:
    """Return tasks with the prompts that have completions in the baseline too."""
    prompts = {prompt.prompt_id: prompt.prompt for prompt in read_prompt_file(str(folder / Prompt.file_name))}
    for task in tasks:
        for prompt in task.prompts:
            if prompts.get(prompt.prompt_id, prompt.prompt) != prompt.prompt:
                raise DataError(f"base {folder}: its prompt '{prompt.prompt_id}' is not this run's prompt of that id")
    shared = select_prompts(tasks, prompts.keys() & {completion.prompt_id for completion in completions})
    if not shared:
        raise DataError(f"base {folder}: it answered none of this run's prompts; evaluate it with the same suites")
    return shared


def _read_outputs(folder: Path, outputs: Sequence[JudgeOutput], attacks: Attacks) -> list[JudgeOutput]:
    """Return the output on the baseline of each judge that judged both, and every reply of the baseline's attacks."""
    verdicts, on_turns = verdicts_by_judge(folder), read_verdicts_on_turns(attacks)
    replies = {(*turn.completion.key, turn.completion.text_hash) for run in attacks.values() for turn in run.turns}
    judged_replies = {
        judge: {(*verdict.key, verdict.text_hash) for verdict in of_judge} for judge, of_judge in on_turns.items()
    }
    preferences: dict[tuple[str, str], list[PairwisePreference]] = {}
    for path in judge_files(folder, "comparisons"):
        for preference in map(PairwisePreference.from_row, read_repaired_jsonl(path)):
            preferences.setdefault((preference.judge, preference.revision), []).append(preference)
    return [
        output._replace(
            verdicts=verdicts[judge], preferences=preferences.get(judge, []), on_turns=on_turns.get(judge, [])
        )
        for output in outputs
        if (judge := (output.name, output.revision)) in verdicts
        # Judges of reasoning don't read the replies of attacks.
        and (replies <= judged_replies.get(judge, set()) or output.reads == "reasoning")
    ]
