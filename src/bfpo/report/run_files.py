"""Reading what a run left: its evaluation, and how it was trained if `bfpo` trained it."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bfpo.config.recipes import Source
from bfpo.core.samples import Completion, Key, Prompt, Verdict
from bfpo.data.rows import read_rows
from bfpo.data.stages import read_completions, read_prompt_file
from bfpo.data.verdict_files import judge_files
from bfpo.errors import DataError
from bfpo.evaluation.dominance import PooledScores, pool_scores
from bfpo.evaluation.results import FILE_NAME, MetricComparison, MetricResult, Results, read_results
from bfpo.evaluation.scoring import JudgedCompletion, score_prompts
from bfpo.evaluation.verdicts import verdicts_of_evaluation

FIRST_SAMPLE = 0


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer with what each judge says about it.

    Args:
        completion: The answer.
        verdicts: Of one judge or several.
    """

    completion: Completion
    verdicts: tuple[Verdict, ...]


@dataclass(frozen=True, slots=True)
class Run:
    """All that a report shows of one run; a part that the folder doesn't hold is empty.

    Args:
        name: Unlike every other run's on the page.
        results: What its evaluation found.
        prompts: Prompt id → prompt.
        answers: Prompt id → first answer; empty unless prompts, completions and verdicts are all there.
        measurements: What each judge that read all answers measured on them, the first judge before the others.
        record: `run.json`.
        log: Lines of `metrics.jsonl`, in order.
        recipe: `recipe.resolved.yaml`.
    """

    name: str
    results: Results
    prompts: Mapping[str, Prompt]
    answers: Mapping[str, Answer]
    measurements: Sequence[PooledScores]
    record: Mapping[str, Any]
    log: Sequence[Mapping[str, Any]]
    recipe: str

    def metric(self, key: tuple[str, str, str]) -> MetricResult | None:
        """Return the metric of a suite, a task and a name by the primary judge; None when it wasn't measured."""
        wanted = *key, None
        every = self.results.metrics
        return next((one for one in every if (one.suite, one.task, one.metric, one.category) == wanted), None)

    def versus(self, base: "Run", key: tuple[str, str, str]) -> MetricComparison | None:
        """Return the comparison of a metric with another run's; None when there is none."""
        wanted = *key, None
        for one in self.results.comparisons:
            if one.is_against(base.results) and (one.suite, one.task, one.metric, one.category) == wanted:
                return one
        return None

    def section(self, *names: str) -> Mapping[str, Any]:
        """Return a section of the record by its path; empty when there is none."""
        found: object = self.record
        for name in names:
            found = found.get(name) if isinstance(found, Mapping) else None
        return found if isinstance(found, Mapping) else {}


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read the runs of a page, the base first.

    Raises:
        DataError: If there is none, a file is missing or malformed, or the runs don't compare.
    """
    if not folders:
        raise DataError("a report needs at least one run; name the folder of an evaluation")
    results = [_results(folder) for folder in folders]
    names = _names([one.run for one in results], folders)
    runs = [_read_run(*one) for one in zip(folders, results, names, strict=True)]
    _check_comparable(runs, folders)
    return runs


def _evaluation_folder(folder: Path) -> Path:
    inner = folder / "evaluation"
    return inner if (inner / FILE_NAME).is_file() else folder


def _results(folder: Path) -> Results:
    where = _evaluation_folder(folder)
    if not (where / FILE_NAME).is_file():
        raise DataError(f"{folder}: neither evaluation/{FILE_NAME} nor {FILE_NAME}; evaluate the run first")
    results = read_results(where)
    path = where / FILE_NAME
    for one in results.metrics:
        bounds = [value for value in (one.value, one.low, one.high) if value is not None]
        _check_row(path, one, (*bounds, one.n, one.unscored))
    for other in results.comparisons:
        _check_row(path, other, (other.difference, other.low, other.high, other.n))
    return results


def _check_row(path: Path, of: MetricResult | MetricComparison, numbers: Sequence[float]) -> None:
    for value in numbers:
        if not math.isfinite(value):
            raise DataError(
                f"{path}: {of.task}, {of.metric} holds {value!r}; expected a finite number; evaluate the run again"
            )


def _names(given: Sequence[str], folders: Sequence[Path]) -> list[str]:
    """Return names that tell the runs apart."""
    names: list[str] = []
    for name, folder in zip(given, folders, strict=True):
        candidate = name if given.count(name) == 1 else f"{name} ({folder.resolve().name})"
        number = 2
        unique = candidate
        while unique in names:
            unique, number = f"{candidate} #{number}", number + 1
        names.append(unique)
    return names


def _read_run(folder: Path, results: Results, name: str) -> Run:
    where = _evaluation_folder(folder)
    prompts, answers, measurements = _answers(where, name, results.judges)
    log, recipe = folder / "metrics.jsonl", folder / "recipe.resolved.yaml"
    return Run(
        name=name,
        results=results,
        prompts=prompts,
        answers=answers,
        measurements=measurements,
        record=_record(folder / "run.json"),
        log=[_log_line(row.values, row.where) for row in read_rows(Source(path=str(log)))] if log.is_file() else [],
        recipe=_text(recipe) if recipe.is_file() else "",
    )


def _answers(
    folder: Path, run: str, judges: Sequence[Mapping[str, Any]]
) -> tuple[dict[str, Prompt], dict[str, Answer], list[PooledScores]]:
    files = [folder / kind.file_name for kind in (Prompt, Completion)]
    if not all(file.is_file() for file in files) or not judge_files(folder, "verdicts"):
        return {}, {}, []
    prompts = {prompt.prompt_id: prompt for prompt in read_prompt_file(str(files[0]))}
    verdicts: dict[str, list[Verdict]] = {}
    by_judge: dict[str, dict[Key, Verdict]] = {}
    for verdict in verdicts_of_evaluation(folder, judges):
        by_judge.setdefault(f"{verdict.judge}@{verdict.revision}", {})[verdict.key] = verdict
        if verdict.sample == FIRST_SAMPLE:
            verdicts.setdefault(verdict.prompt_id, []).append(verdict)
    answers = {}
    completions = [one for one in read_completions(files[1]) if one.prompt_id in prompts]
    for completion in completions:
        if completion.sample != FIRST_SAMPLE:
            continue
        about = tuple(verdicts.get(completion.prompt_id, ()))
        if not about or any(verdict.text_hash != completion.text_hash for verdict in about):
            found = "about another text" if about else "missing"
            raise DataError(f"{folder}: the verdict on '{completion.prompt_id}' is {found}; judge the answers again")
        answers[completion.prompt_id] = Answer(completion, about)
    measurements = []
    for judge, said in by_judge.items():
        judged = [JudgedCompletion(one, said[one.key]) for one in completions if one.key in said]
        if len(judged) == len(completions) and all(_is_about(one) for one in judged):
            measurements.append(pool_scores(run, judge, score_prompts(prompts.values(), judged)))
    return prompts, answers, measurements


def _is_about(judged: JudgedCompletion) -> bool:
    return judged.verdict.text_hash == judged.completion.text_hash


def _log_line(values: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    if not isinstance(values.get("step"), int):
        raise DataError(f"{where}: no step; expected a line that bfpo logged")
    for name, value in values.items():
        if value is not None and not isinstance(value, int | float):
            raise DataError(f"{where}: {name} is {value!r}; expected a number or null")
    return values


def _record(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(_text(path))
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error}); it is what training leaves, train again or remove it") from None
    if not isinstance(content, dict):
        raise DataError(f"{path}: {type(content).__name__}; expected the object that training leaves")
    return content


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: can't be read ({error})") from None


def _check_comparable(runs: Sequence[Run], folders: Sequence[Path]) -> None:
    """Refuse runs whose numbers don't mean the same."""
    base = runs[0]
    for run, folder in zip(runs[1:], folders[1:], strict=True):
        ours, theirs = run.results.template_policy, base.results.template_policy
        if ours != theirs:
            raise DataError(
                f"{folder}: its prompts were put to the model under the policy '{ours}', those of {folders[0]} under "
                f"'{theirs}'; such runs don't compare, evaluate them under one policy"
            )
        for key, prompt in run.prompts.items():
            if key in base.prompts and base.prompts[key].prompt != prompt.prompt:
                raise DataError(
                    f"{folder}: prompt '{key}' isn't the prompt of that id in {folders[0]}; evaluate both runs on "
                    "one file of prompts"
                )
