"""Running the units of an experiment (methods × seeds × worlds) in parallel. A stopped experiment resumes.

A *unit* is one training run with its evaluation. Base models are trained once per world and seed. Units depend only
on their base, so they run in persistent worker processes of one thread each. A unit that has its results isn't run
again; if its oracle has changed since, its completions are judged again.
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
from bfpo.config.recipes import TrainRecipe
from bfpo.core.files import content_hash
from bfpo.core.terminal import log_to_file, progress
from bfpo.errors import BfpoError, DataError, RecipeError, Stopped, TrainingError, did_you_mean
from bfpo.evaluation.results import EVALUATION_FOLDER, FILE_NAME, read_results
from bfpo.experiments.costs import COST_FILE, Cost, measured
from bfpo.experiments.methods import samples_folder, train_recipes
from bfpo.experiments.recipe import COMPARISON, DATA_DIALS, ExperimentRecipe, all_settings
from bfpo.experiments.stages import Method
from bfpo.testbed.oracle import Oracle
from bfpo.testbed.world import WorldOptions


@dataclass(frozen=True, slots=True)
class Unit:
    """One training run with its evaluation; without a method, the base model that others start from.

    Args:
        world: Name of the world.
        variant: Name of the setting; `base` for the base model.
        options: Options of the world, seed included.
        base_options: Options of the world of the base model.
        method: The method; None for the base model.
        steps: Number of optimizer steps.
        home: Folder of the world and seed: data, base, runs.
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
        """Folder of the run, named by a hash of its settings: equal runs share it, changed ones don't reuse it."""
        if self.method is None:
            return self.home / "base"
        cache_key = content_hash(self.method.model_dump(exclude={"title"}), self.options.model_dump(), self.steps)
        return self.home / f"run-{cache_key[:12]}"

    @property
    def evaluation(self) -> Path:
        """Folder of the evaluation."""
        return self.folder / EVALUATION_FOLDER

    @property
    def has_results(self) -> bool:
        """Whether the unit was evaluated, by any revision of the oracle."""
        return (self.evaluation / FILE_NAME).exists()

    @property
    def is_done(self) -> bool:
        """Whether the unit was evaluated by the current revision of the oracle."""
        oracle = Oracle(self.options.skills)
        if not self.has_results:
            return False
        try:
            judges = read_results(self.evaluation).judges
        except DataError:
            # Results of an unknown schema are judged and scored again.
            return False
        return [(judge["name"], judge["revision"]) for judge in judges] == [(oracle.name, oracle.revision)]


def make_units(recipe: ExperimentRecipe) -> list[Unit]:
    """Return the units of a recipe, seed by seed, each base before the units that start from it.

    Raises:
        RecipeError: If a variant isn't possible.
    """
    settings = all_settings(recipe)
    for key in ("out", "results"):
        if (folder := getattr(recipe, key)) and Path(folder).is_file():
            raise RecipeError(f"{key}: {folder} is a file; name a folder")
    written = Path(recipe.results or recipe.out) / COMPARISON
    if recipe.tuning and Path(recipe.tuning).resolve() == written.resolve():
        raise RecipeError(f"results: the comparison would replace {written}, which is `tuning`; name another folder")
    if len(set(recipe.seeds)) < len(recipe.seeds):
        raise RecipeError(f"seeds: {recipe.seeds} has a duplicate; each seed is one observation")
    if "base" in recipe.variants:
        raise RecipeError("variants.base: `base` is the name of the base model; choose another")
    for name, variant in recipe.variants.items():
        if unknown := next((dial for dial in variant.dials if dial not in DATA_DIALS), None):
            raise RecipeError(f"variants.{name}.dials: '{unknown}'; {did_you_mean(unknown, [*DATA_DIALS])}")
    units = []
    for world, options in recipe.worlds.items():
        world_settings = [setting for of_variant in settings[world].values() for setting in of_variant]
        names = [setting.name for setting in world_settings]
        if duplicate := next((name for name in names if names.count(name) > 1), None):
            raise RecipeError(f"variants: two are called '{duplicate}'; rename one of them")
        if recipe.against not in names:
            raise RecipeError(f"against: '{recipe.against}'; {did_you_mean(recipe.against, names)}")
        for seed in recipe.seeds:
            base_options = options.model_copy(update={"seed": seed})
            home = Path(recipe.out) / f"{world}-{content_hash(options.model_dump())[:8]}" / f"seed-{seed}"
            units.append(Unit(world, "base", base_options, base_options, None, recipe.steps, home))
            for setting in world_settings:
                changed_options = check_recipe(
                    base_options.model_dump() | setting.dials, WorldOptions, f"variants.{setting.name}.dials"
                )
                units.append(
                    Unit(world, setting.name, changed_options, base_options, setting.method, recipe.steps, home)
                )
    return units


def run_units(units: Sequence[Unit], out: Path, *, jobs: int) -> int:
    """Run the units that aren't done in worker processes; a unit starts when its base is done.

    Args:
        units: All units of the experiment.
        out: Folder of all runs; only one experiment at a time runs in it.
        jobs: Number of worker processes.

    Returns:
        Number of units that were run; those whose completions were only judged again don't count.

    Raises:
        TrainingError: If a unit fails; finished units are kept.
        RecipeError: If another experiment is running in the folder.
        Stopped: On Ctrl-C.
    """
    out.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(out / ".lock", timeout=0):
            waiting = list({unit.folder: unit for unit in units if not unit.is_done}.values())
            count = sum(not unit.has_results for unit in waiting)
            if waiting:
                ready = {unit.home for unit in units if unit.method is None and unit.is_done}
                _run_all(waiting, ready, jobs)
            return count
    except Timeout:
        raise RecipeError(
            f"out: another experiment is running in {out}; wait for it, or choose another folder"
        ) from None


def _run_all(waiting: list[Unit], ready: set[Path], jobs: int) -> None:
    """Run units in a pool; `ready` are the homes whose base is done."""
    running: dict[Future[None], Unit] = {}
    pool = ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=_start_worker)
    try:
        with progress("training and evaluating", len(waiting)) as advance:
            while waiting or running:
                # Bases first: others wait for them.
                waiting.sort(key=lambda unit: unit.method is not None)
                while len(running) < jobs and (unit := _next_unit(waiting, ready)):
                    waiting.remove(unit)
                    running[pool.submit(run_unit, unit)] = unit
                finished, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in finished:
                    unit = running.pop(future)
                    _raise_errors(future, unit)
                    if unit.method is None:
                        ready.add(unit.home)
                    advance(1)
    except KeyboardInterrupt:
        raise Stopped("stopped; the same command resumes with the missing units") from None
    except BrokenProcessPool:
        raise TrainingError(
            "a worker process was killed, often for lack of memory; the same command resumes with the missing units, "
            "`jobs=1` needs less memory"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def run_unit(unit: Unit) -> None:
    """Run a unit: its world, its base or its stages, its evaluation. Of policies only the weights of bases are kept.

    The completions of a unit that was evaluated by another revision of the oracle are judged again.
    """
    from bfpo.experiments.steps import can_judge_again, evaluate_run, judge_again, make_base, write_world

    oracle = Oracle(unit.options.skills)
    if unit.has_results and can_judge_again(unit.evaluation):
        judge_again(unit.evaluation, oracle)
        return
    log = unit.home / "log.txt" if unit.method is None else unit.folder.with_suffix(".log")
    # A world with other dials has other preference data, but the same base and prompts.
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
            _run_method(unit, unit.method, data).write(unit.folder)
        evaluate_run(unit.folder, world / "prompts.jsonl", oracle)
    if unit.method is not None:
        _remove_weights(unit.folder)
        # They are made of shared samples within a second; without its cost, their stage runs again.
        for name in (COST_FILE, "pairs.jsonl"):
            (samples_folder(unit.folder) / name).unlink(missing_ok=True)


def _run_method(unit: Unit, method: Method, world: Path) -> Cost:
    """Run all stages of a method, and return their cost."""
    from bfpo.experiments.preparation import prepare_method, run_online_stage

    if method.online is not None:
        return run_online_stage(
            method, method.online, home=unit.home, world=world, out=unit.folder, options=unit.options
        )
    recipes = train_recipes(
        method,
        world=world,
        base=unit.home / "base",
        out=unit.folder,
        seed=unit.options.seed,
        steps=unit.steps,
        save=False,
    )
    prepared = prepare_method(method, recipes[-1], home=unit.home, world=world, options=unit.options)
    return prepared + measured(lambda: _train(recipes))


def _train(recipes: Sequence[TrainRecipe]) -> tuple[int, int]:
    """Run the trainings of a method, and keep the weights of the last one, which is evaluated.

    Returns:
        The numbers of samples and of judged answers of a training in rounds; 0 without one.
    """
    from bfpo.experiments.steps import run_once

    rounds = []
    for recipe in recipes:
        # A killed run is short enough to start again.
        shutil.rmtree(str(recipe.trainer["output_dir"]), ignore_errors=True)
        rounds += run_once(recipe)
    for recipe in recipes[:-1]:
        _remove_weights(Path(recipe.trainer["output_dir"]))
    return sum(done.samples for done in rounds), sum(done.judge_calls for done in rounds)


def _remove_weights(folder: Path) -> None:
    for file in folder.rglob("*.safetensors"):
        file.unlink()


def _start_worker() -> None:
    # Set before torch is loaded: two processes with two threads each on two cores would slow each other down.
    os.environ["OMP_NUM_THREADS"] = "1"
    Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    # The workers of a killed parent would wait for work forever.
    if (parent := parent_process()) is not None:
        parent.join()
        os._exit(1)


def _next_unit(waiting: Sequence[Unit], ready: set[Path]) -> Unit | None:
    return next((unit for unit in waiting if unit.method is None or unit.home in ready), None)


def _raise_errors(future: Future[None], unit: Unit) -> None:
    try:
        future.result()
    except BfpoError as error:
        name = f"{unit.variant} in world {unit.world}, seed {unit.options.seed}"
        raise TrainingError(f"{name}: {error}; the same command resumes with the missing units") from error
