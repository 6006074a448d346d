"""`bfpo quickstart`: a model that answers harmful requests becomes one that refuses them and still helps.

Everything goes the product's own way: data files, recipes, `bfpo sft`, `bfpo train`, generation, judging, report.
"""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bfpo.errors import RecipeError, Stopped, did_you_mean
from bfpo.evaluation.results import Results, show_results
from bfpo.evaluation.run import evaluate
from bfpo.evaluation.scoring import Measured
from bfpo.files import write_text
from bfpo.generation.in_process import load_engine
from bfpo.protocols import Sampling
from bfpo.recipe import SftRecipe, TrainRecipe
from bfpo.recipe_reading import dump_recipe
from bfpo.report.html import write_report
from bfpo.stages import read_prompt_file
from bfpo.terminal import lines_into, say, show_table
from bfpo.testbed.methods import METHODS, train_recipe
from bfpo.testbed.oracle import Oracle
from bfpo.testbed.world import World, WorldOptions
from bfpo.training.run import run_training
from bfpo.training.run_sft import run_sft

SUITE = "testbed"
BASE_STEPS = {"pretraining": 900, "base": 100}
METHOD_STEPS = 100
SAMPLING = Sampling(samples=1, temperature=0.7, max_new_tokens=48)
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
            folders = {"world": world, "base": base, "out": out / method}
            run_once(train_recipe(METHODS[method], **folders, seed=seed, steps=METHOD_STEPS))
        with _step(4, "answers before and after, on held-out prompts", log):
            runs = [base, *(out / name for name in METHODS if (out / name / "run.json").exists())]
            results = evaluate_runs(runs, world / "prompts.jsonl", Oracle(options.skills))
        with _step(5, "the report", log):
            page = write_report(out, runs, title="BFPO quickstart", note=NOTE)
    except KeyboardInterrupt:
        raise Stopped(f"stopped; the same command goes on in {out}") from None
    show_results(results)
    show_differences(results)
    say(f"\n{page}  ({time.monotonic() - began:.0f} s; details in {log})")
    return results


def write_world(options: WorldOptions, folder: Path) -> None:
    """Write a world's files, unless they are there.

    Raises:
        RecipeError: If the folder holds another world.
    """
    # It is written last, so where it stands the others do too.
    file = folder / "world.json"
    if not file.exists():
        World(options).write(folder)
        return
    there = json.loads(file.read_text(encoding="utf-8")).get("options")
    if there != options.model_dump():
        raise RecipeError(f"{folder} holds a world of other options ({there}); choose another --out, or remove it")


def make_base(out: Path, *, seed: int) -> None:
    """Make the base model in `out/base`: taught on clean demonstrations, then fine-tuned on imperfect ones."""
    world = out / "world"
    trainer = {
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.05,
        "per_device_train_batch_size": 32,
        "save_steps": 100,
        "save_total_limit": 1,
        "logging_steps": 25,
        "seed": seed,
        "use_cpu": True,
        "resume_from_checkpoint": True,
    }
    new = {"new": {"shape": "nano", "vocab_size": 2048, "seed": seed}}
    stages = (
        ("pretraining", "pretraining", new, 4e-3),
        ("base", "fine_tuning", {"path": str(out / "pretraining")}, 1e-3),
    )
    for name, data, model, learning_rate in stages:
        recipe = SftRecipe.model_validate(
            {
                "model": model,
                "data": [{"adapter": "demonstrations", "path": str(world / f"{data}.jsonl")}],
                "text": {"max_length": 128},
                "trainer": trainer
                | {"output_dir": str(out / name), "learning_rate": learning_rate, "max_steps": BASE_STEPS[name]},
            }
        )
        run_once(recipe)


def run_once(recipe: SftRecipe | TrainRecipe) -> None:
    """Run a recipe, unless its output folder holds its finished run; the recipe stands beside the folder.

    Raises:
        RecipeError: If the folder holds a finished run of another recipe.
    """
    out = Path(recipe.trainer["output_dir"])
    file, text = out.with_name(f"{out.name}.yaml"), dump_recipe(recipe)
    if (out / "run.json").exists():
        if file.exists() and file.read_text(encoding="utf-8") == text:
            return
        raise RecipeError(f"{out} holds a run of another recipe; choose another --out, or remove it")
    write_text(file, text)
    run_sft(recipe) if isinstance(recipe, SftRecipe) else run_training(recipe)


def evaluate_runs(runs: list[Path], prompts_file: Path, oracle: Oracle) -> list[Results]:
    """Evaluate checkpoints on held-out prompts, each against the first."""
    prompts = read_prompt_file(str(prompts_file))
    base: tuple[str, list[Measured]] | None = None
    found = []
    for folder in runs:
        results, measured = evaluate(
            load_engine(str(folder), SAMPLING),
            oracle,
            prompts,
            folder / "evaluation",
            suite=SUITE,
            run=folder.name,
            model=str(folder),
            sampling=SAMPLING,
            base=base,
        )
        base = base or (folder.name, measured)
        found.append(results)
    return found


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
    with lines_into(log):
        yield
    say(f"     done in {time.monotonic() - began:.0f} s")
