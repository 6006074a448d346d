"""`bfpo quickstart`: a model that answers harmful requests becomes one that refuses them and still helps.

Everything goes the product's own way: data files, recipes, `bfpo sft`, `bfpo train`, generation, judging, report.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bfpo.core.terminal import log_to_file, say, show_table
from bfpo.errors import RecipeError, Stopped, did_you_mean
from bfpo.evaluation.results import Results
from bfpo.evaluation.show import show_results
from bfpo.experiments.methods import METHODS, train_recipe
from bfpo.experiments.stages import evaluate_run, make_base, run_once, write_world
from bfpo.report.html import write_report
from bfpo.testbed.oracle import Oracle
from bfpo.testbed.world import WorldOptions

METHOD_STEPS = 100
NOTE = (
    "The world is a small language made for this page; its oracle reads every word. Intervals are over held-out "
    "prompts of one world and one training run: they say nothing about other seeds."
)


def quickstart(out: Path, *, method: str = "bfpo", seed: int = 0) -> list[Results]:
    """Build a world and a base model, train it, and write the report. Called again, it goes on where it was.

    Args:
        out: Folder for everything. One that another method was tried in gets this one's results beside them.
        method: A key of `METHODS`.
        seed: Of the world, the base model and the training.

    Returns:
        Results of the base and of every method tried in this folder.

    Raises:
        RecipeError: If the method is unknown, or the folder holds another world.
        Stopped: On Ctrl-C; what is finished is kept.
    """
    if method not in METHODS:
        raise RecipeError(f"--method '{method}'; {did_you_mean(method, list(METHODS))}")
    began, log = time.monotonic(), out / "quickstart.log"
    world, base = out / "world", out / "base"
    try:
        with _step(1, "the world: requests, answers, preferences", log):
            options = WorldOptions(seed=seed)
            write_world(options, world)
        with _step(2, "a base model that answers what it is asked", log):
            make_base(out, seed=seed)
        with _step(3, f"{METHODS[method].title}: preference training", log):
            run_once(
                train_recipe(METHODS[method], world=world, base=base, out=out / method, seed=seed, steps=METHOD_STEPS)
            )
        with _step(4, "answers before and after, on held-out prompts", log):
            tried = [out / name for name in METHODS if (out / name / "run.json").exists()]
            results = evaluate_against(base, tried, world / "prompts.jsonl", Oracle(options.skills))
        with _step(5, "the report", log):
            page = write_report(out, [base, *tried], title="BFPO quickstart", note=NOTE)
    except KeyboardInterrupt:
        raise Stopped(f"stopped; the same command goes on in {out}") from None
    show_results(results)
    show_differences(results)
    say(f"\n{page}  ({time.monotonic() - began:.0f} s; details in {log})")
    return results


def evaluate_against(base: Path, runs: list[Path], prompts_file: Path, oracle: Oracle) -> list[Results]:
    """Evaluate a base and what was made of it, each run against the base."""
    before = evaluate_run(base, prompts_file, oracle)
    return [before, *(evaluate_run(run, prompts_file, oracle, baseline=base) for run in runs)]


def show_differences(several: list[Results]) -> None:
    """Print what follows for each run, against the base."""
    rows = [
        (
            f"{results.run}, {one.task}: {one.metric}",
            f"{one.difference:+.2f} [{one.low:+.2f}, {one.high:+.2f}]",
            one.verdict,
        )
        for results in several
        for one in results.comparisons
        if one.metric in ("safety", "severity", "helpfulness", "over_refusal", "harmonic_mean")
    ]
    against = several[0].run
    show_table(f"Against {against}, paired over prompts", ("what", "difference", "that is"), rows)


@contextmanager
def _step(number: int, what: str, log: Path) -> Iterator[None]:
    # Only this line and the bars are seen; the commands' own lines go to the log.
    began = time.monotonic()
    say(f"{number}/5  {what} ...")
    with log_to_file(log):
        yield
    say(f"     done in {time.monotonic() - began:.0f} s")
