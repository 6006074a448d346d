"""`bfpo eval --dry-run`: what an evaluation would ask, how long it would take, what it would cost."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from bfpo.core.files import file_name
from bfpo.core.samples import Completion, Prompt
from bfpo.core.terminal import say, show_table
from bfpo.evaluation.correction import read_calibration
from bfpo.evaluation.lm_eval.suite import capabilities_of, count_rows
from bfpo.evaluation.pipeline import judge_of, open_engine, questions, read_questions, release, verdicts_file
from bfpo.evaluation.recipe import EvalRecipe, Price
from bfpo.evaluation.win_rates import COMPARING, check_judges, references_of
from bfpo.judging.open_models import MODEL_KINDS

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
        price: What tokens cost; None where nobody said.
    """

    what: str
    wanted: int
    there: int
    read: int
    written: int
    seconds: float | None
    price: Price | None

    @property
    def cost(self) -> float | None:
        """What is still to be made costs, at most."""
        price = self.price
        return None if price is None else (self.read * price.prompt + self.written * price.completion) / 1e6


def show_plan(recipe: EvalRecipe) -> list[Stage]:
    """Print the plan of an evaluation, and return its stages; nothing of it is kept.

    A model in this process answers a few prompts and its judges read them, to tell the time. No server is asked.
    """
    suites, tasks = read_questions(recipe)
    counted = count_rows(recipe, capabilities_of(recipe, suites))
    prompts = questions(tasks)
    show_table(
        f"{len(prompts):,} prompts, answers to each: {recipe.sampling.samples}",
        ("task", "kind", "prompts", "of", "license", "from"),
        [
            (one.facts["name"], one.kind, len(one.prompts), one.facts["of"], one.facts["license"], one.facts["from"])
            for one in tasks
        ]
        + [(one.what, "lm-eval", one.wanted, one.of, None, one.place) for one in counted],
    )
    check_judges(recipe, tasks)
    stages = _stages(recipe, prompts, references_of(tasks)) if prompts else []
    stages += [Stage(f"rows of {one.what}", one.wanted, one.there, 0, 0, None, None) for one in counted]
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
        labeled = read_calibration(recipe.calibration)
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
    stages = [
        Stage(
            "answers",
            answers,
            there,
            round(left * asked) if recipe.model is not None else 0,
            (answers - there) * longest if recipe.model is not None else 0,
            None if seconds is None else seconds * (answers - there),
            recipe.price if recipe.model is not None and recipe.model.server else None,
        )
    ]
    labels: list[str] = []
    for spec in recipe.judges:
        judge = judge_of(recipe, spec)
        label = judge.name if judge.name not in labels else f"{judge.name}@{judge.revision[:8]}"
        there = min(_lines(out / verdicts_file(label, first=not labels)), answers)
        labels.append(label)
        left, remote, seconds = (answers - there) / answers, "@http" in spec, None
        if made and not remote:
            began = time.monotonic()
            list(judge.judge(made))
            seconds = (time.monotonic() - began) / len(made) * (answers - there)
        # Only a language model reads tokens; a file of labels, a linear judge or the oracle don't.
        reads = spec.partition(":")[0] in ("rubric", *MODEL_KINDS)
        read = round(left * (asked + answers * (longest + _INSTRUCTIONS))) if reads else 0
        written = (answers - there) * _VERDICT if spec.startswith("rubric") else 0
        price = recipe.judge_price if remote else None
        stages.append(Stage(f"verdicts of {spec}", answers, there, read, written, seconds, price))
        if references and (spec.partition(":")[0] in COMPARING or hasattr(judge, "prefer")):
            stages.append(_comparing(recipe, spec, label, references, sees_both=hasattr(judge, "prefer")))
        del judge
        release()
    return stages


def _comparing(
    recipe: EvalRecipe, spec: str, label: str, references: Mapping[str, Completion], *, sees_both: bool
) -> Stage:
    """Return the stage of a judge that sees both answers, in two orders, or that rates the given outputs."""
    name, times = ("comparisons", 2) if sees_both else ("references", 1)
    wanted = times * len(references)
    there = min(_lines(Path(recipe.out) / f"{name}-{file_name(label)}.jsonl"), wanted)
    texts = (text for one in references.values() for text in (one.text, *(said.content for said in one.prompt)))
    given = times * sum(len(text) // _CHARACTERS for text in texts)
    answers = wanted * recipe.sampling.max_new_tokens if sees_both else 0
    left = (wanted - there) / wanted
    reads = spec.partition(":")[0] in ("rubric", *MODEL_KINDS)
    return Stage(
        f"comparisons by {spec}, both orders" if sees_both else f"ratings of given outputs by {spec}",
        wanted,
        there,
        round(left * (given + answers + wanted * _INSTRUCTIONS)) if reads else 0,
        (wanted - there) * _VERDICT if spec.startswith("rubric") else 0,
        None,
        recipe.judge_price if "@http" in spec else None,
    )


def _answering(recipe: EvalRecipe, probe: Sequence[Prompt]) -> tuple[float | None, list[Completion]]:
    """Return the seconds of an answer and a few answers; nothing where there is nothing to probe."""
    if not probe:
        return None, []
    engine = open_engine(recipe)
    began = time.monotonic()
    made = [one for batch in engine.generate([(prompt, 0) for prompt in probe]) for one in batch]
    seconds = (time.monotonic() - began) / len(made)
    del engine
    release()
    return seconds, made


def _tokens(prompt: Prompt) -> int:
    return sum(len(message.content) for message in prompt.prompt) // _CHARACTERS + 1


def _lines(path: Path) -> int:
    """Count what a stage has made, finished or not."""
    files = (path, path.with_name(f"{path.name}.unfinished"))
    return sum(file.read_bytes().count(b"\n") for file in files if file.is_file())
