"""An evaluation from prompts to `results.json`; every file on the way can be used again."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from bfpo.core.files import write_jsonl
from bfpo.core.samples import Completion, Engine, Judge, Prompt, Sampling
from bfpo.data.stages import generate_completions, judge_completions, read_completions, read_prompt_file
from bfpo.errors import DataError
from bfpo.evaluation.differences import compare
from bfpo.evaluation.dominance import pair_verdicts, pooled
from bfpo.evaluation.results import Results, answers_hash
from bfpo.evaluation.scoring import PromptScores, join, measure, to_metrics

TEMPLATE_POLICY = "the tokenizer's own chat template"


def evaluate(
    engine: Engine | None,
    judge: Judge,
    prompts: Sequence[Prompt],
    folder: Path,
    *,
    suite: str,
    run: str,
    model: str,
    sampling: Sampling,
    base: tuple[Results, list[PromptScores]] | None = None,
) -> tuple[Results, list[PromptScores]]:
    """Generate, judge and score, into `prompts`, `completions`, `verdicts.jsonl` and `results.json` of a folder.

    Args:
        engine: What answers; None where the folder holds the answers.
        judge: What judges the answers.
        prompts: What is asked.
        folder: Where the files stand; what is there already is not made again.
        suite: Name of the suite.
        run: Short name of the run.
        model: What is evaluated.
        sampling: As the engine samples.
        base: Results and measures of the run to compare with.

    Returns:
        The results, and the measures behind them.

    Raises:
        DataError: If files that stand in the folder are of another model, judge or prompt set.
    """
    write_prompts(folder, prompts)
    path = folder / Completion.file_name
    if engine is None:
        completions = read_completions(path)
    else:
        completions = generate_completions(engine, prompts, path, samples=sampling.samples)
    verdicts = judge_completions(judge, completions, folder / "verdicts.jsonl")
    measured = measure(prompts, join(prompts, completions, verdicts), judge=judge.name)
    results = Results(
        run=run,
        model=model,
        template_policy=TEMPLATE_POLICY,
        judges=[{"name": judge.name, "revision": judge.revision, "circular": False}],
        sampling=asdict(sampling),
        metrics=to_metrics(suite, measured),
        comparisons=compare(suite, measured, base[1], against=base[0]) if base else [],
        model_comparisons=pair_verdicts(
            [(pooled(run, judge.name, measured), pooled(base[0].run, judge.name, base[1]))]
        )
        if base
        else [],
        answers=answers_hash(completions),
    )
    results.write(folder)
    return results, measured


def write_prompts(folder: Path, prompts: Sequence[Prompt]) -> None:
    """Write `prompts.jsonl` into a folder, unless one of other prompts stands there.

    Raises:
        DataError: If one does. More of the same prompts, or fewer, are fine.
    """
    path = folder / Prompt.file_name
    if path.exists():
        # What is told of a prompt beside its text, such as its license, may be told better now.
        there = {prompt.prompt_id: prompt.prompt for prompt in read_prompt_file(str(path))}
        asked = {prompt.prompt_id: prompt.prompt for prompt in prompts}
        differing = next((key for key, prompt in asked.items() if there.get(key, prompt) != prompt), None)
        if differing is not None or not (there.keys() <= asked.keys() or asked.keys() <= there.keys()):
            said = f"'{differing}' isn't the prompt of that id" if differing else f"{len(there)} of another choice"
            raise DataError(f"{path} holds other prompts ({said}); choose another folder, or remove this one")
    write_jsonl(path, (prompt.to_row() for prompt in prompts))
