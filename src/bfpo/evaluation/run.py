"""An evaluation from prompts to `results.json`; every file on the way can be used again."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from bfpo.evaluation.results import Results
from bfpo.evaluation.scoring import Measured, compare, join, measure, to_metrics
from bfpo.files import write_jsonl
from bfpo.protocols import Engine, Judge, Prompt, Sampling
from bfpo.stages import generate_completions, judge_completions

TEMPLATE_POLICY = "the tokenizer's own chat template"


def evaluate(
    engine: Engine,
    judge: Judge,
    prompts: Sequence[Prompt],
    folder: Path,
    *,
    suite: str,
    run: str,
    model: str,
    sampling: Sampling,
    base: tuple[str, list[Measured]] | None = None,
) -> tuple[Results, list[Measured]]:
    """Generate, judge and score, into `prompts`, `completions`, `verdicts.jsonl` and `results.json` of a folder.

    Args:
        engine: What answers.
        judge: What judges the answers.
        prompts: What is asked.
        folder: Where the files stand; what is there already is not made again.
        suite: Name of the suite.
        run: Short name of the run.
        model: What is evaluated.
        sampling: As the engine samples.
        base: Name and measures of the run to compare with.

    Returns:
        The results, and the measures behind them.

    Raises:
        DataError: If files that stand in the folder are of another model, judge or prompt set.
    """
    write_jsonl(folder / Prompt.file_name, (prompt.to_row() for prompt in prompts))
    completions = generate_completions(engine, prompts, folder / "completions.jsonl", samples=sampling.samples)
    verdicts = judge_completions(judge, completions, folder / "verdicts.jsonl")
    measured = measure(prompts, join(prompts, completions, verdicts))
    results = Results(
        run=run,
        model=model,
        template_policy=TEMPLATE_POLICY,
        judges=[{"name": judge.name, "revision": judge.revision}],
        sampling=asdict(sampling),
        metrics=to_metrics(suite, measured),
        comparisons=compare(suite, measured, base[1], against=base[0]) if base else [],
    )
    results.write(folder)
    return results, measured
