"""`bfpo experiment`: methods × seeds × worlds through the product's own commands, in parallel, resumable.

A *unit* is one training run with its evaluation. Base models are made once per world and seed, and units need nothing
but their base, so they run in persistent worker processes of one thread each. A unit that has its results isn't
made again; one whose oracle has changed since has its answers judged again.
"""

import os
import shutil
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread

from filelock import FileLock, Timeout

from bfpo.config.loading import check_recipe
from bfpo.core.files import content_hash
from bfpo.core.terminal import log_to_file, progress
from bfpo.errors import BfpoError, DataError, RecipeError, Stopped, TrainingError, did_you_mean
from bfpo.evaluation.results import FILE_NAME, read_results
from bfpo.experiments.methods import Method, train_recipe
from bfpo.experiments.recipe import DATA_DIALS, CompareRecipe, all_tried
from bfpo.testbed.oracle import Oracle
from bfpo.testbed.world import WorldOptions


@dataclass(frozen=True, slots=True)
class Unit:
    """One training run with its evaluation; or, without a method, the base that others start from.

    Args:
        world: Name of the world.
        variant: Name of the variant; `base` for the model before.
        options: Dials of the world, seed included.
        base_options: Those that the base was made with.
        method: How to train; None for the base.
        steps: Optimizer steps.
        home: Folder of the world's seed: data, base, runs.
    """

    world: str
    variant: str
    options: WorldOptions
    base_options: WorldOptions
    method: Method | None
    steps: int
    home: Path

    @property
    def folder(self) -> Path:
        """Folder of this run, named by content: a changed recipe never reads old results, another one shares them."""
        if self.method is None:
            return self.home / "base"
        cache_key = content_hash(self.method.model_dump(exclude={"title"}), self.options.model_dump(), self.steps)
        return self.home / f"run-{cache_key[:12]}"

    @property
    def evaluation(self) -> Path:
        """Folder of its results."""
        return self.folder / "evaluation"

    @property
    def has_results(self) -> bool:
        """Whether it was evaluated, by whatever revision of the oracle."""
        return (self.evaluation / FILE_NAME).exists()

    @property
    def is_done(self) -> bool:
        """Whether its results are there, by this revision of the oracle."""
        oracle = Oracle(self.options.skills)
        if not self.has_results:
            return False
        try:
            judges = read_results(self.evaluation).judges
        except DataError:
            # Of an older version: judged and scored again.
            return False
        return [(judge["name"], judge["revision"]) for judge in judges] == [(oracle.name, oracle.revision)]


def units_of(recipe: CompareRecipe) -> list[Unit]:
    """Return everything that a recipe runs, seed by seed, each base before what starts from it.

    Raises:
        RecipeError: If a variant isn't possible.
    """
    ways = all_tried(recipe)
    if len(set(recipe.seeds)) < len(recipe.seeds):
        raise RecipeError(f"seeds: {recipe.seeds} names a seed twice; each is one observation")
    if "base" in recipe.variants:
        raise RecipeError("variants.base: that is the name of the model before; choose another")
    for name, variant in recipe.variants.items():
        if wrong := next((dial for dial in variant.dials if dial not in DATA_DIALS), None):
            raise RecipeError(f"variants.{name}.dials: '{wrong}'; {did_you_mean(wrong, [*DATA_DIALS])}")
    units = []
    for world, options in recipe.worlds.items():
        names = [one.name for variant in ways[world].values() for one in variant]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise RecipeError(f"variants: two are called '{twice}'; name one of them otherwise")
        if recipe.against not in names:
            raise RecipeError(f"against: '{recipe.against}'; {did_you_mean(recipe.against, names)}")
        for seed in recipe.seeds:
            own = options.model_copy(update={"seed": seed})
            home = Path(recipe.out) / f"{world}-{content_hash(options.model_dump())[:8]}" / f"seed-{seed}"
            units.append(Unit(world, "base", own, own, None, recipe.steps, home))
            for one in (one for variant in ways[world].values() for one in variant):
                dialed = check_recipe(own.model_dump() | one.dials, WorldOptions, f"variants.{one.name}.dials")
                units.append(Unit(world, one.name, dialed, own, one.method, recipe.steps, home))
    return units


def run_units(units: Sequence[Unit], out: Path, *, jobs: int) -> int:
    """Run what isn't done, in worker processes; a unit begins when its base is done.

    Args:
        units: All that is wanted.
        out: Folder of all runs; one comparison works in it at a time.
        jobs: Worker processes.

    Returns:
        How many were run; those whose answers were only judged again don't count.

    Raises:
        TrainingError: If a unit fails; what is done stays.
        RecipeError: If another comparison works in the folder.
        Stopped: On Ctrl-C.
    """
    out.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(out / ".lock", timeout=0):
            waiting = list({unit.folder: unit for unit in units if not unit.is_done}.values())
            count = sum(not unit.has_results for unit in waiting)
            if waiting:
                ready = {unit.home for unit in units if unit.method is None and unit.is_done}
                _run_all(list(waiting), ready, jobs)
            return count
    except Timeout:
        raise RecipeError(f"out: another comparison works in {out}; wait for it, or name another folder") from None


def _run_all(waiting: list[Unit], ready: set[Path], jobs: int) -> None:
    """Run units in a pool; `ready` are the homes whose base is done."""
    running: dict[Future[None], Unit] = {}
    pool = ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=_begin_worker)
    try:
        with progress("training and evaluating", len(waiting)) as advance:
            while waiting or running:
                # Bases first: others wait for them.
                waiting.sort(key=lambda unit: unit.method is not None)
                while len(running) < jobs and (unit := _next(waiting, ready)):
                    waiting.remove(unit)
                    running[pool.submit(run_unit, unit)] = unit
                finished, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in finished:
                    unit = running.pop(future)
                    _raise_clearly(future, unit)
                    if unit.method is None:
                        ready.add(unit.home)
                    advance(1)
    except KeyboardInterrupt:
        raise Stopped("stopped; the same command goes on with what is missing") from None
    except BrokenProcessPool:
        raise TrainingError(
            "a worker process was ended from outside, often for want of memory; the same command goes on with what "
            "is missing, `jobs=1` with less memory"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def run_unit(unit: Unit) -> None:
    """Make a unit: its world, its base or its training, its evaluation. Weights other than a base's aren't kept.

    Of one that only another revision of the oracle judged, the answers are judged again.
    """
    from bfpo.experiments.stages import can_judge_again, evaluate_run, judge_again, make_base, run_once, write_world

    if unit.has_results and can_judge_again(unit.evaluation):
        judge_again(unit.evaluation, Oracle(unit.options.skills))
        return
    log = unit.home / "log.txt" if unit.method is None else unit.folder.with_suffix(".log")
    # A world of other dials has other preference data; base and prompts are those of the world.
    world = unit.home / "world"
    with log_to_file(log, bars=False):
        if unit.method is None:
            write_world(unit.options, world)
            make_base(unit.home, seed=unit.options.seed)
        else:
            data = world
            if unit.options != unit.base_options:
                data = unit.home / f"world-{content_hash(unit.options.model_dump())[:8]}"
                write_world(unit.options, data)
            # A run that was begun and killed is short enough to begin again.
            shutil.rmtree(unit.folder, ignore_errors=True)
            recipe = train_recipe(
                unit.method,
                world=data,
                base=unit.home / "base",
                out=unit.folder,
                seed=unit.options.seed,
                steps=unit.steps,
                save=False,
            )
            run_once(recipe)
        evaluate_run(unit.folder, world / "prompts.jsonl", Oracle(unit.options.skills))
    if unit.method is not None:
        for file in unit.folder.glob("*.safetensors"):
            file.unlink()


def _begin_worker() -> None:
    # Set before torch is loaded: two processes with two threads each on two cores would spin against each other.
    os.environ["OMP_NUM_THREADS"] = "1"
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    # A killed parent leaves its workers waiting for work for ever.
    if (parent := parent_process()) is not None:
        parent.join()
        os._exit(1)


def _next(waiting: Sequence[Unit], ready: set[Path]) -> Unit | None:
    return next((unit for unit in waiting if unit.method is None or unit.home in ready), None)


def _raise_clearly(future: Future[None], unit: Unit) -> None:
    try:
        future.result()
    except BfpoError as error:
        what = f"{unit.variant} in world {unit.world}, seed {unit.options.seed}"
        raise TrainingError(f"{what}: {error}; the same command goes on with what is missing") from error
