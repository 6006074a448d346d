"""`bfpo quickstart`: train a model that answers harmful requests to refuse them and stay helpful, in two minutes.

Every step is the product's own: data files, recipes, `bfpo sft`, `bfpo train`, generation, judging, report.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bfpo.config.recipes import SftRecipe, TrainRecipe
from bfpo.core.terminal import log_to_file, say, show_table
from bfpo.errors import RecipeError, Stopped, did_you_mean
from bfpo.evaluation.results import Results
from bfpo.evaluation.show import show_results
from bfpo.experiments.methods import METHODS, train_recipes
from bfpo.experiments.preparation import prepare_method, run_online_stage
from bfpo.experiments.steps import (
    base_recipes,
    evaluate_run,
    holds_world,
    is_finished,
    make_base,
    run_once,
    write_world,
)
from bfpo.report.html import check_ownership, write_report
from bfpo.testbed.oracle import Oracle
from bfpo.testbed.world import WorldOptions

METHOD_STEPS = 100
NOTE = (
    "The world is a small language made for this page; its oracle reads every word. Intervals are over held-out "
    "prompts of one world and one training run: they don't cover the variation over seeds."
)
_SHOWN_METRICS = ("safety", "severity", "helpfulness", "over_refusal", "harmonic_mean")


def quickstart(out: Path, *, method: str = "bfpo", seed: int = 0) -> list[Results]:
    """Build a world and a base model, train it, and write the report. A stopped quickstart resumes.

    Args:
        out: Output folder. In a folder where another method was run, the results of both are reported.
        method: A key of `METHODS`.
        seed: Seed of the world, the base model and the training.

    Returns:
        Results of the base, and of every method that was run in this folder.

    Raises:
        RecipeError: If the method is unknown, or the folder holds another world.
        Stopped: On Ctrl-C; finished steps are kept.
    """
    if method not in METHODS:
        raise RecipeError(f"method '{method}'; {did_you_mean(method, list(METHODS))}")
    start, log = time.monotonic(), out / "quickstart.log"
    world, base = out / "world", out / "base"
    trainings = train_recipes(
        METHODS[method], world=world, base=base, out=out / method, seed=seed, steps=METHOD_STEPS
    )
    options = WorldOptions(seed=seed)
    # A folder with something else is refused before anything is trained, not at the step that finds it.
    check_ownership(out)
    holds_world(options, world)
    planned: list[SftRecipe | TrainRecipe] = [*base_recipes(out, seed=seed), *trainings]
    for recipe in planned:
        is_finished(recipe)
    try:
        with _step(1, "the world: requests, answers, preferences", log):
            write_world(options, world)
        with _step(2, "a base model that answers most harmful requests", log):
            make_base(out, seed=seed)
        with _step(3, f"{METHODS[method].title}: preference training", log):
            if (online := METHODS[method].online) is not None:
                run_online_stage(METHODS[method], online, home=out, world=world, out=out / method, options=options)
            else:
                prepare_method(METHODS[method], trainings[-1], home=out, world=world, options=options)
            for training in trainings:
                run_once(training)
        with _step(4, "completions before and after, on held-out prompts", log):
            runs = [out / name for name in METHODS if (out / name / "run.json").exists()]
            results = evaluate_against(base, runs, world / "prompts.jsonl", Oracle(options.skills))
        with _step(5, "the report", log):
            page = write_report(out, [base, *runs], title="BFPO quickstart", note=NOTE)
    except KeyboardInterrupt:
        raise Stopped(f"stopped; the same command resumes in {out}") from None
    show_results(results)
    show_differences(results)
    say(f"\n{page}  ({time.monotonic() - start:.0f} s; details in {log})")
    return results


def evaluate_against(base: Path, runs: list[Path], prompts_file: Path, oracle: Oracle) -> list[Results]:
    """Evaluate a base and the runs trained from it, each run compared with the base."""
    base_results = evaluate_run(base, prompts_file, oracle)
    return [base_results, *(evaluate_run(run, prompts_file, oracle, baseline=base) for run in runs)]


def show_differences(runs: list[Results]) -> None:
    """Print the comparison of each run with the base, which is the first of them."""
    rows = [
        (
            f"{results.run}, {comparison.task}: {comparison.metric}",
            f"{comparison.difference:+.2f} [{comparison.low:+.2f}, {comparison.high:+.2f}]",
            comparison.verdict,
        )
        for results in runs
        for comparison in results.comparisons
        if comparison.metric in _SHOWN_METRICS
    ]
    show_table(f"Against {runs[0].run}, paired over prompts", ("metric", "difference", "verdict"), rows)


@contextmanager
def _step(number: int, name: str, log: Path) -> Iterator[None]:
    # The terminal shows only this line and the progress bars; the output of the commands is in the log.
    start = time.monotonic()
    say(f"{number}/5  {name} ...")
    with log_to_file(log):
        yield
    say(f"     done in {time.monotonic() - start:.0f} s")
