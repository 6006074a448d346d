"""`bfpo eval --dry-run`: what an evaluation would ask, how long it would take, what it would cost."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from bfpo.core.samples import Completion, Judge, Prompt
from bfpo.core.terminal import say, show_table
from bfpo.data.verdict_files import judge_file
from bfpo.evaluation.correction import read_calibration
from bfpo.evaluation.lm_eval.suite import find_lm_eval_tasks, plan_lm_eval_tasks
from bfpo.evaluation.pipeline import read_suites, release_memory, unique_prompts
from bfpo.evaluation.recipe import EvalRecipe, Price
from bfpo.evaluation.subject import open_model, open_recipe_judge
from bfpo.evaluation.win_rates import check_judges, references_of
from bfpo.judging.spec import JudgePart, JudgeSpec, parse_judge

# Prompts that a model in this process answers, and its judges read, to tell how long all would take.
_PROBE = 8
# Characters of English per token; tokens of a judge's own instructions, and of its verdict.
_CHARACTERS, _INSTRUCTIONS, _VERDICT = 4, 400, 40


class Stage(NamedTuple):
    """A stage of the plan.

    Args:
        what: What is made.
        wanted: How many.
        there: How many the folder holds.
        read: Tokens of what isn't there, read.
        written: And written, at most.
        seconds: How long that takes; None where it can't be told.
        cost: Maximum cost of what is missing; None without a price.
    """

    what: str
    wanted: int
    there: int
    read: int
    written: int
    seconds: float | None
    cost: float | None = None


def show_plan(recipe: EvalRecipe) -> list[Stage]:
    """Print the plan of an evaluation, and return its stages; nothing of it is kept.

    A model in this process answers a few prompts and its judges read them, to tell the time. No server is asked.
    """
    suites, tasks = read_suites(recipe)
    planned_rows = plan_lm_eval_tasks(recipe, find_lm_eval_tasks(recipe, suites))
    prompts = unique_prompts(tasks)
    show_table(
        f"{len(prompts):,} prompts, answers to each: {recipe.sampling.samples}",
        ("task", "kind", "prompts", "of", "license", "from"),
        [
            (task.data.name, task.kind, len(task.prompts), task.data.published, task.data.license, task.data.origin)
            for task in tasks
            if task.data is not None
        ]
        + [
            (planned.task, "lm-eval", planned.rows.selected, planned.rows.total, None, planned.rows.origin)
            for planned in planned_rows
        ],
    )
    check_judges(recipe, tasks)
    stages = _stages(recipe, prompts, references_of(tasks)) if prompts else []
    stages += [
        Stage(f"rows of {planned.task}", planned.rows.selected, planned.existing, 0, 0, None)
        for planned in planned_rows
    ]
    show_table(
        "What is asked",
        ("what", "wanted", "there", "tokens read", "written, at most", "minutes", "cost, at most"),
        [
            (
                one.what,
                f"{one.wanted:,}",
                f"{one.there:,}",
                f"{one.read:,}" if one.read else "-",
                f"{one.written:,}" if one.written else "-",
                "-" if one.seconds is None else f"{one.seconds / 60:.1f}",
                "-" if one.cost is None else f"{one.cost:.2f}",
            )
            for one in stages
        ],
    )
    if recipe.calibration is not None:
        labeled = read_calibration(recipe.calibration).answers
        say(f"not counted above: each judge reads up to {len(labeled):,} answers that people labeled (calibration)")
    say("dry run: nothing was kept. Tokens are estimated, 4 characters each; what a server takes isn't known.")
    return stages


def _stages(recipe: EvalRecipe, prompts: Sequence[Prompt], references: Mapping[str, Completion]) -> list[Stage]:
    samples, longest, out = recipe.sampling.samples, recipe.sampling.max_new_tokens, Path(recipe.out)
    answers = len(prompts) * samples
    asked = samples * sum(_tokens(prompt) for prompt in prompts)
    there = min(_lines(out / "completions.jsonl"), answers)
    served = recipe.model is None or recipe.model.server is not None
    probe = [] if served else prompts[:: max(1, len(prompts) // _PROBE)][:_PROBE]
    left = (answers - there) / answers
    seconds, made = _answering(recipe, probe)
    read, written = (round(left * asked), (answers - there) * longest) if recipe.model is not None else (0, 0)
    price = recipe.price if recipe.model is not None and recipe.model.server else None
    stages = [
        Stage(
            "answers",
            answers,
            there,
            read,
            written,
            None if seconds is None else seconds * (answers - there),
            _cost(price, read, written),
        )
    ]
    for spec in map(parse_judge, recipe.judges):
        judge = open_recipe_judge(recipe, spec)
        there = min(_lines(judge_file(out, "verdicts", judge.name, judge.revision)), answers)
        left, seconds = (answers - there) / answers, None
        if made and not spec.is_remote:
            began = time.monotonic()
            list(judge.judge(made))
            seconds = (time.monotonic() - began) / len(made) * (answers - there)
        each = round(left * (asked + answers * (longest + _INSTRUCTIONS)))
        stages.append(_judging(recipe, spec, f"verdicts of {spec.text}", answers, there, each, seconds))
        compares = "both" if hasattr(judge, "prefer") else spec.compares
        if references and compares is not None:
            stages.append(_comparing(recipe, spec, judge, references, sees_both=compares == "both"))
        del judge
        release_memory()
    return stages


def _judging(
    recipe: EvalRecipe, spec: JudgeSpec, what: str, expected: int, existing: int, each: int, seconds: float | None
) -> Stage:
    """Return the stage of a judge in which each language model of its spec reads `each` tokens."""

    def tokens(parts: Sequence[JudgePart]) -> tuple[int, int]:
        # Only a rubric judge writes its verdict out.
        writers = sum(part.kind == "rubric" for part in parts)
        return each * len(parts), (expected - existing) * _VERDICT * writers

    served = [part for part in spec.token_readers if part.is_remote]
    cost = _cost(recipe.judge_price, *tokens(served)) if served else None
    return Stage(what, expected, existing, *tokens(spec.token_readers), seconds, cost)


def _cost(price: Price | None, read: int, written: int) -> float | None:
    return None if price is None else (read * price.prompt + written * price.completion) / 1e6


def _comparing(
    recipe: EvalRecipe, spec: JudgeSpec, judge: Judge, references: Mapping[str, Completion], *, sees_both: bool
) -> Stage:
    """Return the stage of a judge that sees both answers, in two orders, or that rates the given outputs."""
    name, times = ("comparisons", 2) if sees_both else ("references", 1)
    wanted = times * len(references)
    there = min(_lines(judge_file(Path(recipe.out), name, judge.name, judge.revision)), wanted)
    texts = (text for one in references.values() for text in (one.text, *(said.content for said in one.prompt)))
    given = times * sum(len(text) // _CHARACTERS for text in texts)
    answers = wanted * recipe.sampling.max_new_tokens if sees_both else 0
    each = round((wanted - there) / wanted * (given + answers + wanted * _INSTRUCTIONS))
    what = f"comparisons by {spec.text}, both orders" if sees_both else f"ratings of given outputs by {spec.text}"
    return _judging(recipe, spec, what, wanted, there, each, None)


def _answering(recipe: EvalRecipe, probe: Sequence[Prompt]) -> tuple[float | None, list[Completion]]:
    """Return the seconds of an answer and a few answers; nothing where there is nothing to probe."""
    if not probe:
        return None, []
    engine = open_model(recipe)
    began = time.monotonic()
    made = [one for batch in engine.generate([(prompt, 0) for prompt in probe]) for one in batch]
    seconds = (time.monotonic() - began) / len(made)
    del engine
    release_memory()
    return seconds, made


def _tokens(prompt: Prompt) -> int:
    return sum(len(message.content) for message in prompt.prompt) // _CHARACTERS + 1


def _lines(path: Path) -> int:
    """Count what a stage has made, finished or not."""
    files = (path, path.with_name(f"{path.name}.unfinished"))
    return sum(file.read_bytes().count(b"\n") for file in files if file.is_file())
