"""Metrics by the language of prompts, where a suite has prompts in several languages."""

from collections import Counter
from collections.abc import Mapping, Sequence

from bfpo.core.conversation import last_request
from bfpo.core.languages import answer_language, can_guess, guess_language, normalize_code
from bfpo.core.samples import KINDS, Completion, Prompt
from bfpo.evaluation.attacks import SAFETY_UNDER_ATTACK, Attacks
from bfpo.evaluation.judge_outputs import JudgeOutput
from bfpo.evaluation.metric_specs import HELPFULNESS, OVER_REFUSAL, REFUSAL, SAFETY, MetricSpec
from bfpo.evaluation.results import LanguageResult, MetricResult
from bfpo.evaluation.scoring import PromptScores, compute_metrics, units_of
from bfpo.evaluation.suite import Task, select_prompts
from bfpo.evaluation.suite_scores import compute_suite_metrics, score_suites

METRICS = tuple(spec.name for spec in (SAFETY, REFUSAL, OVER_REFUSAL, HELPFULNESS, SAFETY_UNDER_ATTACK))
"""Metrics that are computed by language."""
SAME_LANGUAGE = MetricSpec("same_language", higher_is_better=True, is_rate=True, needs_judge=False)
# Prompts below which a language that was only guessed is taken for a wrong guess.
_MIN_GUESSED = 10


def prompt_languages(prompts: Sequence[Prompt]) -> tuple[dict[str, str], list[str]]:
    """Return the languages of prompts by id, and notes for the reader.

    The stated language of a prompt counts; a prompt without one is guessed. A guessed language with few prompts is
    left out.

    Args:
        prompts: Prompts of one evaluation.
    """
    stated = {prompt.prompt_id: prompt.language for prompt in prompts if prompt.language}
    guesses = {
        prompt.prompt_id: guess
        for prompt in prompts
        if prompt.prompt_id not in stated and (guess := guess_language(last_request(prompt.prompt))) is not None
    }
    counts = Counter(guesses.values())
    names = {*stated.values(), *(language for language, count in counts.items() if count >= _MIN_GUESSED)}
    guessed = {prompt_id: language for prompt_id, language in guesses.items() if language in names}
    notes = []
    if len(names) > 1:
        unknown = len(prompts) - len(stated) - len(guessed)
        if unknown:
            reason = "" if can_guess() else "; pip install 'bfpo[languages]' guesses it"
            notes.append(f"{unknown:,} prompts have no known language and are part of no metric by language{reason}.")
        if guessed:
            notes.append(f"The language of {len(guessed):,} prompts is a guess by py3langid.")
    return stated | guessed, notes


def results_by_language(
    tasks: Sequence[Task],
    completions: Sequence[Completion],
    outputs: Sequence[JudgeOutput],
    attacks: Attacks,
) -> tuple[list[LanguageResult], list[str]]:
    """Compute the metrics of each kind of prompts by language, where a suite has prompts in several languages.

    Args:
        tasks: Tasks with the prompts that have completions.
        completions: Completions of these prompts.
        outputs: Output of each judge.
        attacks: Attacks on the model.

    Returns:
        The results, and notes for the reader.
    """
    prompts = {prompt.prompt_id: prompt for task in tasks for prompt in task.prompts}
    languages, notes = prompt_languages(list(prompts.values()))
    names = sorted(set(languages.values()))
    if len(names) < 2:
        return [], []
    rows: list[tuple[str, MetricResult]] = []
    for language in names:
        ids = {prompt_id for prompt_id, other in languages.items() if other == language}
        own_tasks = select_prompts(tasks, ids)
        own = [completion for completion in completions if completion.prompt_id in ids]
        scores = score_suites(own_tasks, own, outputs, by_category=False, attacks=attacks)
        metrics = compute_suite_metrics(scores) + _same_language(own_tasks, own, language)
        names_of_metrics = (*METRICS, SAME_LANGUAGE.name)
        rows += [
            (language, metric)
            for metric in metrics
            if metric.task in KINDS and metric.category is None and metric.metric in names_of_metrics
        ]
    several = Counter((metric.suite, metric.task, metric.metric, metric.judge) for _, metric in rows)
    return [
        LanguageResult.of(language, metric)
        for language, metric in rows
        if several[metric.suite, metric.task, metric.metric, metric.judge] > 1
    ], notes


def _same_language(tasks: Sequence[Task], completions: Sequence[Completion], language: str) -> list[MetricResult]:
    """Return the share of answers in the language of their prompts, by suite and kind; none without guesses."""
    if not can_guess():
        return []
    prompts_of: dict[tuple[str, str], dict[str, Prompt]] = {}
    for task in tasks:
        if task.attack is None:
            own = {prompt.prompt_id: prompt for prompt in task.prompts}
            prompts_of.setdefault((task.suite, task.kind), {}).update(own)
    metrics = []
    for (suite, kind), prompts in prompts_of.items():
        unit_of = units_of(prompts.values())
        answers: dict[str, list[Completion]] = {unit_of[prompt_id]: [] for prompt_id in sorted(prompts)}
        for completion in completions:
            if completion.prompt_id in prompts:
                answers[unit_of[completion.prompt_id]].append(completion)
        values, unscored = _share_in(language, answers)
        if values:
            samples = max(len(answers[unit]) for unit in values)
            metrics += compute_metrics(suite, [PromptScores(kind, SAME_LANGUAGE, values, unscored, samples)])
    return metrics


def _share_in(language: str, answers: Mapping[str, Sequence[Completion]]) -> tuple[dict[str, float], int]:
    """Return the share of answers in a language by prompt or group, and the number of answers without a guess."""
    values, unscored = {}, 0
    for unit, completions in answers.items():
        guesses = [answer_language(completion.text, None) for completion in completions]
        flags = [guess == normalize_code(language) for guess in guesses if guess is not None]
        unscored += len(guesses) - len(flags)
        if flags:
            values[unit] = sum(flags) / len(flags)
    return values, unscored
