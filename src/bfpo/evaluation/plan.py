"""`bfpo eval --dry-run`: the prompts of an evaluation, its tokens, time and cost."""

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from bfpo.core.files import file_name
from bfpo.core.samples import Completion, Judge, Prompt
from bfpo.core.terminal import say, show_table
from bfpo.data.readings import is_unread, judge_readings
from bfpo.data.verdict_files import judge_file
from bfpo.errors import Unanswered
from bfpo.evaluation.attacks import attacked_prompts
from bfpo.evaluation.correction import read_calibration
from bfpo.evaluation.lm_eval.requests import MAX_ROWS
from bfpo.evaluation.lm_eval.suite import PlannedTask, find_lm_eval_tasks, plan_lm_eval_tasks
from bfpo.evaluation.lm_eval.tasks import UNKNOWN_LICENSE
from bfpo.evaluation.pipeline import read_suites, release_memory, unique_prompts
from bfpo.evaluation.recipe import EvalRecipe, Price
from bfpo.evaluation.subject import open_model, open_recipe_judge
from bfpo.evaluation.suite import Task
from bfpo.evaluation.win_rates import check_judges, collect_references
from bfpo.generation.attacks import AttackSection
from bfpo.judging.guarded_engine import FirstSafeSection
from bfpo.judging.spec import JudgePart, JudgeSpec, parse_judge

# Prompts that a model in this process answers, and its judges read, to estimate the time.
_PROBE = 8
# Characters of English per token; tokens of a judge's own instructions, and of its verdict.
_CHARACTERS, _INSTRUCTIONS, _VERDICT = 4, 400, 40


class PlannedStage(NamedTuple):
    """A stage of the plan.

    Args:
        name: Output of the stage.
        total: Number of outputs.
        existing: Number of outputs that the folder holds.
        tokens_read: Tokens that are read for the missing outputs.
        tokens_written: Maximum number of tokens that are written.
        seconds: Estimated time; None if unknown.
        cost: Maximum cost; None without a price.
    """

    name: str
    total: int
    existing: int
    tokens_read: int
    tokens_written: int
    seconds: float | None
    cost: float | None = None


def show_plan(recipe: EvalRecipe) -> list[PlannedStage]:
    """Print the plan of an evaluation, and return its stages; nothing is written.

    A model in this process answers a few prompts and its judges read them, to estimate the time. Servers aren't
    queried.
    """
    suites, tasks = read_suites(recipe)
    lm_eval_tasks = find_lm_eval_tasks(recipe, suites)
    check_judges(recipe, tasks)
    planned_tasks = plan_lm_eval_tasks(recipe, lm_eval_tasks)
    release_memory()
    prompts = unique_prompts(tasks)
    _show_tasks(f"{len(prompts):,} prompts, answers to each: {recipe.sampling.samples}", tasks, planned_tasks)
    stages = _plan_stages(recipe, prompts, collect_references(tasks)) if prompts else []
    stages += [_plan_attack(recipe, attack, prompts) for attack, prompts in attacked_prompts(tasks).items()]
    stages += [stage for planned in planned_tasks for stage in _lm_eval_stages(planned)]
    _show_stages(stages)
    if unread := [planned for planned in planned_tasks if planned.rows is None]:
        say(f"not counted above, because their rows can't be read here: {', '.join(task.name for task in unread)}")
    if recipe.calibration is not None:
        labeled = read_calibration(recipe.calibration).answers
        say(f"not counted above: each judge reads up to {len(labeled):,} answers with human labels (calibration)")
    say("dry run: nothing was written. Tokens are estimated at 4 characters each; the time of a server is unknown.")
    if (draws := _max_draws(recipe)) > 1:
        say(f"The guard draws up to {draws} samples for a completion, and its judge reads each.")
    if planned_tasks:
        say(
            f"Tokens of lm-eval's requests are the model's own, for a task of more than {MAX_ROWS} rows those of a "
            "sample, scaled up."
        )
    return stages


def _lm_eval_stages(planned: PlannedTask) -> list[PlannedStage]:
    """Return the stages of a task of lm-eval: forward passes for likelihoods, and generated texts."""
    return [
        PlannedStage(
            f"{planned.name}: {requests.kind}",
            requests.total,
            requests.total if planned.has_results else 0,
            0 if planned.has_results else requests.tokens_read,
            0 if planned.has_results else requests.tokens_written,
            requests.seconds,
        )
        for requests in planned.requests
    ]


def _show_tasks(title: str, tasks: Sequence[Task], planned_tasks: Sequence[PlannedTask]) -> None:
    rows: list[tuple[object, ...]] = [
        (
            task.data.name,
            task.kind,
            len(task.prompts),
            task.data.published,
            task.data.license or UNKNOWN_LICENSE,
            task.data.origin,
        )
        for task in tasks
        if task.data is not None
    ]
    for planned in planned_tasks:
        counts, origin = ("?", "?"), f"not here: {planned.problem}"
        if planned.rows is not None:
            counts, origin = (str(planned.rows.selected), str(planned.rows.total)), planned.rows.origin
        rows.append((planned.name, "lm-eval", *counts, planned.license, origin))
    show_table(title, ("task", "kind", "prompts", "of", "license", "from"), rows)


def _show_stages(stages: Sequence[PlannedStage]) -> None:
    heads = ("stage", "total", "existing", "tokens read", "tokens written, at most", "minutes", "cost, at most")
    rows = [
        (
            stage.name,
            f"{stage.total:,}",
            f"{stage.existing:,}",
            f"{stage.tokens_read:,}" if stage.tokens_read else "-",
            f"{stage.tokens_written:,}" if stage.tokens_written else "-",
            "-" if stage.seconds is None else f"{stage.seconds / 60:.1f}",
            "-" if stage.cost is None else f"{stage.cost:.2f}",
        )
        for stage in stages
    ]
    show_table("Stages", heads, rows)


def _plan_stages(
    recipe: EvalRecipe, prompts: Sequence[Prompt], references: Mapping[str, Completion]
) -> list[PlannedStage]:
    out, total = Path(recipe.out), len(prompts) * recipe.sampling.samples
    prompt_tokens = recipe.sampling.samples * sum(map(_count_tokens, prompts))
    is_local = recipe.model is not None and recipe.model.server is None
    probe = prompts[:: max(1, len(prompts) // _PROBE)][:_PROBE] if is_local else []
    seconds, completions = _time_completions(recipe, probe)
    existing = min(_count_lines(out / Completion.file_name), total)
    missing, tokens_read, tokens_written = total - existing, 0, 0
    if recipe.model is not None:
        draws = _max_draws(recipe)
        tokens_read = round(missing / total * prompt_tokens * draws)
        tokens_written = missing * recipe.sampling.max_new_tokens * draws
    price = recipe.price if recipe.model is not None and recipe.model.server else None
    stages = [
        PlannedStage(
            "completions",
            total,
            existing,
            tokens_read,
            tokens_written,
            None if seconds is None else seconds * missing,
            _cost(price, tokens_read, tokens_written),
        )
    ]
    for spec in map(parse_judge, recipe.judges):
        judge = open_recipe_judge(recipe, spec, prompts)
        existing = min(_count_lines(judge_file(out, "verdicts", judge.name, judge.revision)), total)
        missing, seconds = total - existing, None
        if completions and not spec.is_remote:
            start = time.monotonic()
            readable = [completion for completion in completions if not is_unread(completion, spec.reads)]
            list(judge_readings(judge, readable))
            seconds = (time.monotonic() - start) / len(completions) * missing
        judged_tokens = prompt_tokens + total * (recipe.sampling.max_new_tokens + _INSTRUCTIONS)
        each = round(missing / total * judged_tokens)
        stages.append(plan_judge(recipe, spec, f"verdicts of {spec.text}", total, existing, each, seconds))
        compares = "both" if spec.reads == "answer" and hasattr(judge, "prefer") else spec.compares
        if references and compares is not None:
            stages.append(_plan_comparisons(recipe, spec, judge, references, sees_both=compares == "both"))
        del judge
        release_memory()
    return stages


def _max_draws(recipe: EvalRecipe) -> int:
    """Return how many samples a guard draws at most for a completion; one without such a guard."""
    return recipe.guard.samples if isinstance(recipe.guard, FirstSafeSection) else 1


def _plan_attack(recipe: EvalRecipe, attack: AttackSection, prompts: Sequence[Prompt]) -> PlannedStage:
    """Return the stage of an attack: at most two replies for each turn, each after the replies before it."""
    samples, longest = recipe.sampling.samples, recipe.sampling.max_new_tokens
    total = 2 * attack.num_turns * len(prompts) * samples
    turn_files = Path(recipe.out).glob(f"attack-{file_name(attack.label)}@*/turn-*.jsonl*")
    existing = min(sum(file.read_bytes().count(b"\n") for file in turn_files), total)
    prompt_tokens = sum(map(_count_tokens, prompts)) * samples
    replies = longest * len(prompts) * samples * (attack.num_turns - 1) // 2
    missing = (total - existing) / total
    tokens_read = round(missing * 2 * attack.num_turns * (prompt_tokens + replies))
    tokens_written = round(missing * total * longest)
    price = recipe.price if recipe.model is not None and recipe.model.server else None
    name = f"replies under attack ({attack.label}), at most; each judge reads them too"
    return PlannedStage(
        name, total, existing, tokens_read, tokens_written, None, _cost(price, tokens_read, tokens_written)
    )


def plan_judge(
    recipe: EvalRecipe, spec: JudgeSpec, name: str, total: int, existing: int, each: int, seconds: float | None
) -> PlannedStage:
    """Return the stage of a judge in which each language model of its spec reads `each` tokens."""

    def tokens(parts: Sequence[JudgePart]) -> tuple[int, int]:
        # Only a rubric judge writes its verdict out.
        writers = sum(part.kind == "rubric" for part in parts)
        return each * len(parts), (total - existing) * _VERDICT * writers

    served = [part for part in spec.token_readers if part.is_remote]
    cost = _cost(recipe.judge_price, *tokens(served)) if served else None
    return PlannedStage(name, total, existing, *tokens(spec.token_readers), seconds, cost)


def _cost(price: Price | None, tokens_read: int, tokens_written: int) -> float | None:
    return None if price is None else (tokens_read * price.prompt + tokens_written * price.completion) / 1e6


def _plan_comparisons(
    recipe: EvalRecipe, spec: JudgeSpec, judge: Judge, references: Mapping[str, Completion], *, sees_both: bool
) -> PlannedStage:
    """Return the stage of a judge that sees both answers, in two orders, or that rates the reference outputs."""
    stem, times = ("comparisons", 2) if sees_both else ("references", 1)
    total = times * len(references)
    existing = min(_count_lines(judge_file(Path(recipe.out), stem, judge.name, judge.revision)), total)
    characters = [
        len(text) // _CHARACTERS
        for reference in references.values()
        for text in (reference.text, *(message.content for message in reference.prompt))
    ]
    completion_tokens = total * recipe.sampling.max_new_tokens if sees_both else 0
    tokens = times * sum(characters) + completion_tokens + total * _INSTRUCTIONS
    each = round((total - existing) / total * tokens)
    name = f"comparisons by {spec.text}, both orders" if sees_both else f"ratings of reference outputs by {spec.text}"
    return plan_judge(recipe, spec, name, total, existing, each, None)


def _time_completions(recipe: EvalRecipe, probe: Sequence[Prompt]) -> tuple[float | None, list[Completion]]:
    """Return the seconds per completion, and completions of a few prompts; None without prompts."""
    if not probe:
        return None, []
    engine = open_model(recipe)
    start = time.monotonic()
    batches = engine.generate([(prompt, 0) for prompt in probe])
    completions: list[Completion] = []
    # A prompt that can't be answered is reported by the run.
    with suppress(Unanswered):
        for batch in batches:
            completions += batch
    seconds = (time.monotonic() - start) / len(completions) if completions else None
    del engine
    release_memory()
    return seconds, completions


def _count_tokens(prompt: Prompt) -> int:
    characters = sum(len(text) for message in prompt.prompt for text in message.texts())
    return (characters + len(prompt.tools.text if prompt.tools else "")) // _CHARACTERS + 1


def _count_lines(path: Path) -> int:
    """Count the rows of a stage's file and its unfinished part."""
    files = (path, path.with_name(f"{path.name}.unfinished"))
    return sum(file.read_bytes().count(b"\n") for file in files if file.is_file())
