"""Reading run folders: the evaluation, and the training record if `bfpo` trained the model."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bfpo.config.recipes import Source
from bfpo.core.certificate import FILE_NAME as CERTIFICATE_NAME
from bfpo.core.certificate import Certificate, read_certificate
from bfpo.core.files import parse_json
from bfpo.core.samples import Completion, Key, Prompt, Verdict
from bfpo.data.readings import part_in_name
from bfpo.data.rows import read_rows
from bfpo.data.stages import read_prompt_file
from bfpo.data.verdict_files import judge_files
from bfpo.data.verdict_scores import judges_safety
from bfpo.errors import DataError
from bfpo.evaluation.dominance import PooledScores, pool_scores
from bfpo.evaluation.metric_specs import JudgedCompletion
from bfpo.evaluation.results import (
    EVALUATION_FOLDER,
    FILE_NAME,
    MetricComparison,
    MetricResult,
    Results,
    read_results,
)
from bfpo.evaluation.scoring import score_prompts
from bfpo.evaluation.verdicts import completions_of_evaluation, verdicts_of_evaluation
from bfpo.generation.dialogues import AttackTurn, attack_folder, by_conversation, read_turns

FIRST_SAMPLE = 0

MetricKey = tuple[str, str, str]
"""Suite, task and name of a metric."""


@dataclass(frozen=True, slots=True)
class CompletionWithVerdicts:
    """A completion with the verdict of each judge.

    Args:
        completion: The completion.
        verdicts: At least one verdict.
        raters: Names of the judges that rate answers and don't judge their safety.
    """

    completion: Completion
    verdicts: tuple[Verdict, ...]
    raters: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class ShownConversation:
    """A conversation up to its first unsafe reply, or its last one.

    Args:
        prompt: The conversation, as a prompt.
        completion: The reply, with the verdict of each judge on it as an answer to the attacked prompt.
    """

    prompt: Prompt
    completion: CompletionWithVerdicts


@dataclass(frozen=True, slots=True)
class Run:
    """One run, as a report shows it; parts that are not in the run's folder are empty.

    Args:
        name: Name, unique on the page.
        results: Results of the evaluation.
        prompts: Prompt id → prompt.
        completions: Prompt id → first completion; empty unless prompts, completions and verdicts are all available.
        pooled_scores: Scores by each judge with a verdict on every completion, first judge first.
        record: Content of `run.json`.
        log: Lines of `metrics.jsonl`, in order.
        recipe: Content of `recipe.resolved.yaml`.
        conversations: Name of an attack → id of the attacked prompt → conversation.
        certificate: What is certified about a head on the model's hidden states.
    """

    name: str
    results: Results
    prompts: Mapping[str, Prompt]
    completions: Mapping[str, CompletionWithVerdicts]
    pooled_scores: Sequence[PooledScores]
    record: Mapping[str, Any]
    log: Sequence[Mapping[str, Any]]
    recipe: str
    conversations: Mapping[str, Mapping[str, ShownConversation]] = field(default_factory=dict)
    certificate: Certificate | None = None

    def metric(self, key: MetricKey) -> MetricResult | None:
        """Return a metric over all categories by the first judge; None when it was not measured."""
        for metric in self.results.metrics:
            if (metric.suite, metric.task, metric.metric) == key and metric.category is None:
                return metric
        return None

    def comparison(self, baseline: "Run", key: MetricKey) -> MetricComparison | None:
        """Return the comparison of a metric with a baseline by the judge of both runs' values; None without one."""
        judges = {metric.judge for run in (self, baseline) if (metric := run.metric(key)) is not None}
        for comparison in self.results.comparisons:
            is_same = (comparison.suite, comparison.task, comparison.metric) == key and comparison.category is None
            if is_same and comparison.is_against(baseline.results) and {comparison.judge} == judges:
                return comparison
        return None

    def section(self, *path: str) -> Mapping[str, Any]:
        """Return a section of the record by its path; empty when there is none."""
        content: object = self.record
        for name in path:
            content = content.get(name) if isinstance(content, Mapping) else None
        return content if isinstance(content, Mapping) else {}


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read the runs of a page.

    Args:
        folders: Run folders, baseline first.

    Raises:
        DataError: If there are no folders, a file is missing or malformed, or the runs are not comparable.
    """
    if not folders:
        raise DataError("a report needs at least one run; name the folder of an evaluation")
    results = [_read_results(folder) for folder in folders]
    names = _unique_names([run_results.run for run_results in results], folders)
    runs = [
        _read_run(folder, run_results, name)
        for folder, run_results, name in zip(folders, results, names, strict=True)
    ]
    _check_comparable(runs, folders)
    return runs


def _evaluation_folder(folder: Path) -> Path:
    inner = folder / EVALUATION_FOLDER
    return inner if (inner / FILE_NAME).is_file() else folder


def _read_results(folder: Path) -> Results:
    evaluation = _evaluation_folder(folder)
    path = evaluation / FILE_NAME
    if not path.is_file():
        raise DataError(f"{folder}: neither evaluation/{FILE_NAME} nor {FILE_NAME}; evaluate the run first")
    results = read_results(evaluation)
    for metric in results.metrics:
        bounds = [value for value in (metric.value, metric.low, metric.high) if value is not None]
        _check_finite(path, metric, (*bounds, metric.n, metric.unscored))
    for comparison in results.comparisons:
        numbers = (comparison.difference, comparison.low, comparison.high, comparison.n)
        _check_finite(path, comparison, numbers)
    return results


def _check_finite(path: Path, row: MetricResult | MetricComparison, numbers: Sequence[float]) -> None:
    for number in numbers:
        if not math.isfinite(number):
            raise DataError(
                f"{path}: {row.task}, {row.metric} is {number!r}; expected a finite number; evaluate the run again"
            )


def _unique_names(run_names: Sequence[str], folders: Sequence[Path]) -> list[str]:
    """Return distinct names: duplicates get their folder's name, then a number."""
    names: list[str] = []
    for name, folder in zip(run_names, folders, strict=True):
        candidate = name if run_names.count(name) == 1 else f"{name} ({folder.resolve().name})"
        number = 2
        unique = candidate
        while unique in names:
            unique, number = f"{candidate} #{number}", number + 1
        names.append(unique)
    return names


def _read_run(folder: Path, results: Results, name: str) -> Run:
    prompts, completions, pooled_scores = _read_completions(_evaluation_folder(folder), name, results)
    log, recipe = folder / "metrics.jsonl", folder / "recipe.resolved.yaml"
    certificate = folder / "certificate" / CERTIFICATE_NAME
    return Run(
        name=name,
        results=results,
        prompts=prompts,
        completions=completions,
        pooled_scores=pooled_scores,
        record=_read_record(folder / "run.json"),
        log=_read_log(log) if log.is_file() else [],
        recipe=_read_text(recipe) if recipe.is_file() else "",
        conversations=_read_conversations(_evaluation_folder(folder), results, prompts),
        certificate=read_certificate(certificate) if certificate.is_file() else None,
    )


def _read_completions(
    folder: Path, run: str, results: Results
) -> tuple[dict[str, Prompt], dict[str, CompletionWithVerdicts], list[PooledScores]]:
    """Return the prompts, the first completion of each, and the scores by each judge of all completions."""
    files = [folder / row.file_name for row in (Prompt, Completion)]
    if not (all(file.is_file() for file in files) and judge_files(folder, "verdicts")):
        return {}, {}, []
    prompts = {prompt.prompt_id: prompt for prompt in read_prompt_file(str(files[0]))}
    completions = [row for row in completions_of_evaluation(folder, results) if row.prompt_id in prompts]
    verdicts = verdicts_of_evaluation(folder, results.judges)
    return (
        prompts,
        _first_completions(completions, verdicts, folder),
        _pool(run, prompts, completions, verdicts),
    )


def _first_completions(
    completions: Sequence[Completion], verdicts: Sequence[Verdict], folder: Path
) -> dict[str, CompletionWithVerdicts]:
    by_prompt: dict[str, list[Verdict]] = {}
    for verdict in verdicts:
        if verdict.sample == FIRST_SAMPLE:
            by_prompt.setdefault(verdict.prompt_id, []).append(verdict)
    first, raters = {}, _raters(verdicts)
    for completion in completions:
        if completion.sample != FIRST_SAMPLE:
            continue
        of_prompt = tuple(by_prompt.get(completion.prompt_id, ()))
        if not of_prompt or any(verdict.text_hash != completion.text_hash for verdict in of_prompt):
            state = "about another text" if of_prompt else "missing"
            raise DataError(
                f"{folder}: the verdict on '{completion.prompt_id}' is {state}; judge the completions again"
            )
        first[completion.prompt_id] = CompletionWithVerdicts(completion, of_prompt, raters)
    return first


def _raters(verdicts: Iterable[Verdict]) -> frozenset[str]:
    """Return the names of the judges that rate answers and don't judge their safety."""
    by_judge: dict[str, list[Verdict]] = {}
    for verdict in verdicts:
        by_judge.setdefault(verdict.judge, []).append(verdict)
    return frozenset(judge for judge, of_judge in by_judge.items() if not judges_safety(of_judge))


def _read_conversations(
    folder: Path, results: Results, prompts: Mapping[str, Prompt]
) -> dict[str, dict[str, ShownConversation]]:
    """Read the first conversation about each attacked prompt of an evaluation.

    Args:
        folder: Folder of the evaluation.
        results: Its results, which name the attacks and the judges.
        prompts: Its prompts by id.

    Raises:
        DataError: If a reply has no verdict, or one on another text.
    """
    conversations: dict[str, dict[str, ShownConversation]] = {}
    for name in dict.fromkeys(data.attack for data in results.data if data.attack is not None):
        path = attack_folder(folder, name)
        turns = [turn for turn in read_turns(path) if turn.original_sample == FIRST_SAMPLE]
        on_turns = verdicts_of_evaluation(path, results.judges) if turns else []
        verdicts: dict[str, list[Verdict]] = {}
        for verdict in on_turns:
            verdicts.setdefault(verdict.prompt_id, []).append(verdict)
        shown, raters = conversations.setdefault(name, {}), _raters(on_turns)
        for (prompt_id, _), replies in by_conversation(turns).items():
            if prompt_id in prompts:
                shown[prompt_id] = _show_conversation(prompts[prompt_id], replies, verdicts, path, raters)
    return conversations


def _show_conversation(
    prompt: Prompt,
    replies: Sequence[AttackTurn],
    verdicts: Mapping[str, Sequence[Verdict]],
    folder: Path,
    raters: frozenset[str],
) -> ShownConversation:
    for reply in replies:
        own = verdicts.get(reply.completion.prompt_id, ())
        if not own or any(verdict.text_hash != reply.completion.text_hash for verdict in own):
            raise DataError(
                f"{folder}: the verdict on a reply about '{prompt.prompt_id}' is missing or about another text; "
                "evaluate the run again"
            )
    unsafe = [reply for reply in replies if verdicts[reply.completion.prompt_id][0].safe is False]
    reply = (unsafe or replies[-1:])[0]
    completion = reply.completion
    shown = Prompt(
        completion.prompt_id,
        completion.prompt,
        prompt.kind,
        prompt.category,
        prompt.source,
        prompt.license,
        completion.tools,
        completion.chat_template_kwargs,
        prompt.language,
    )
    own = tuple(verdicts[completion.prompt_id])
    return ShownConversation(shown, CompletionWithVerdicts(completion, own, raters))


def _pool(
    run: str, prompts: Mapping[str, Prompt], completions: Sequence[Completion], verdicts: Sequence[Verdict]
) -> list[PooledScores]:
    """Return the scores by each judge of the safety of answers with a verdict on every completion."""
    by_judge: dict[str, dict[Key, Verdict]] = {}
    for verdict in verdicts:
        if part_in_name(verdict.judge) == "reasoning":
            continue
        by_judge.setdefault(f"{verdict.judge}@{verdict.revision}", {})[verdict.key] = verdict
    pooled_scores = []
    for judge, by_completion in by_judge.items():
        judged = [
            JudgedCompletion(completion, by_completion[completion.key])
            for completion in completions
            if completion.key in by_completion and by_completion[completion.key].text_hash == completion.text_hash
        ]
        if len(judged) == len(completions) and judges_safety(by_completion.values()):
            pooled_scores.append(pool_scores(run, judge, score_prompts(prompts.values(), judged)))
    return pooled_scores


def _read_log(path: Path) -> list[Mapping[str, Any]]:
    lines = []
    for row in read_rows(Source(path=str(path))):
        if not isinstance(row.values.get("step"), int):
            raise DataError(f"{row.where}: no step; expected a line that bfpo logged")
        for name, value in row.values.items():
            if value is not None and not isinstance(value, int | float):
                raise DataError(f"{row.where}: {name} is {value!r}; expected a number or null")
        lines.append(row.values)
    return lines


def _read_record(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = parse_json(_read_text(path))
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error}); training writes this file, train again or remove it") from None
    if not isinstance(content, dict):
        raise DataError(f"{path}: {type(content).__name__}; expected the object that training writes")
    return content


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from None


def _check_comparable(runs: Sequence[Run], folders: Sequence[Path]) -> None:
    """Refuse runs with different prompt templates, or with different prompts under one id."""
    baseline = runs[0]
    for run, folder in zip(runs[1:], folders[1:], strict=True):
        policy, baseline_policy = run.results.template_policy, baseline.results.template_policy
        if policy != baseline_policy:
            raise DataError(
                f"{folder}: its template policy is '{policy}', that of {folders[0]} is '{baseline_policy}'; runs "
                "are comparable only under one policy, evaluate them under the same one"
            )
        for prompt_id, prompt in run.prompts.items():
            if prompt_id in baseline.prompts and baseline.prompts[prompt_id].prompt != prompt.prompt:
                raise DataError(
                    f"{folder}: prompt '{prompt_id}' differs from the prompt with that id in {folders[0]}; evaluate "
                    "both runs on one file of prompts"
                )
