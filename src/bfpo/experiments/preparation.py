"""Stages before the training of a method: a scorer, scored samples of the base model, and a multiplier.

They learn from the world's pairs and from samples on the prompts of these pairs. Nothing here knows the oracle that
evaluates the method, and no prompt is held out. Scorers and samples are in folders that are named by a hash of
their content, so methods with one base share them; their cost counts for each of these methods.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from itertools import groupby
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from filelock import FileLock

from bfpo.config.recipes import ScoreRecipe, Source, TrainRecipe
from bfpo.constraints.samples import read_scored_samples
from bfpo.constraints.solve import ConstraintRequest, objective_of, solve_constraint
from bfpo.core.conversation import Conversation
from bfpo.core.files import content_hash, read_repaired_jsonl, write_jsonl
from bfpo.core.pairs import PairSignals, PreferencePair, Provenance, SafetyLabels, StreamName
from bfpo.core.samples import Completion, Kind, Prompt, Sampling
from bfpo.data.load import load_pairs
from bfpo.data.stages import generate_completions
from bfpo.errors import DataError
from bfpo.experiments.costs import Cost, measured, read_cost
from bfpo.experiments.log_ratios import score_by_log_ratios, train_models
from bfpo.experiments.methods import FRESH_PROMPTS, HEADS, online_recipe, samples_folder, score_recipe
from bfpo.experiments.stages import LogRatioStage, Method, OnlineStage, SamplesStage, ScorerStage
from bfpo.experiments.steps import write_annotations
from bfpo.generation.in_process import load_engine
from bfpo.judging.score_columns import apply_scores
from bfpo.judging.score_run import run_score
from bfpo.losses.dual import feasible_multiplier
from bfpo.report.dual import write_dual_page
from bfpo.testbed.world import WorldOptions

_SCORED = "scored.jsonl"


def prepare_method(method: Method, recipe: TrainRecipe, *, home: Path, world: Path, options: WorldOptions) -> Cost:
    """Run the stages before the trainings of a method; finished ones of the same content are reused.

    Args:
        method: The method.
        recipe: Recipe of its last training; its pairs and its multiplier are written beside its output folder.
        home: Folder with the base model, for scorers and samples.
        world: Folder of the world's data.
        options: Options of the world.

    Returns:
        The cost of all stages, that of reused ones included.

    Raises:
        DataError: If the samples can't be used to compute a multiplier.
        RecipeError: If no policy over the samples meets `max_unsafe`.
    """
    write_annotations(method.files, options, world)
    if method.scorer is None and method.log_ratios is None:
        return Cost()
    scorer, cost = _prepare_scorer(method, home=home, world=world, options=options)
    stage = method.samples
    if stage is None:
        return cost
    sampling = stage.model_dump(exclude={"pairs_per_prompt"})
    samples = stage_folder(home, "samples", sampling, options.model_dump())
    cost += _run_once(samples, lambda: _draw_samples(stage, samples, home / "base", world, options.seed))
    scores = stage_folder(home, "scores", scorer.name, samples.name)
    cost += _run_once(scores, lambda: _score(method, samples, scorer, scores, base=home / "base"))
    out = samples_folder(Path(recipe.trainer["output_dir"]))

    def use_samples() -> tuple[int, int]:
        if method.outer is not None:
            fresh = fresh_prompts(stage, method.outer.harmful_prompts, world, options.seed)
            write_jsonl(out / FRESH_PROMPTS, (prompt.to_row() for prompt in fresh))
            (out / HEADS).symlink_to((scorer / HEADS).resolve())
        return _use_samples(method, stage, recipe, scores / _SCORED, out, options.seed)

    return cost + _run_once(out, use_samples)


def _prepare_scorer(method: Method, *, home: Path, world: Path, options: WorldOptions) -> tuple[Path, Cost]:
    """Train the scorer of a method, or the models of its log-ratios, and return their folder and the cost."""
    if method.scorer is not None:
        heads, cost = train_scorer(method.scorer, home=home, world=world, options=options)
        return heads.parent, cost
    stage, beta = method.log_ratios, method.loss["beta"]
    assert stage is not None
    folder = stage_folder(home, "log-ratios", stage.model_dump(), beta, options.model_dump())
    return folder, _run_once(folder, lambda: _train_models(stage, folder, beta, home / "base", world, options.seed))


def _train_models(
    stage: LogRatioStage, folder: Path, beta: float, base: Path, world: Path, seed: int
) -> tuple[int, int]:
    train_models(stage, folder, beta=beta, world=world, base=base, seed=seed)
    return 0, 0


def train_scorer(stage: ScorerStage, *, home: Path, world: Path, options: WorldOptions) -> tuple[Path, Cost]:
    """Train a scorer, unless it exists.

    Args:
        stage: The scorer.
        home: Folder with the base model, for scorers.
        world: Folder of the world's data.
        options: Options of the world.

    Returns:
        The folder with its heads, `reward` and `cost`, and its cost.
    """
    folder = stage_folder(home, "scorer", stage.model_dump(), options.model_dump())
    heads = folder / HEADS
    recipe = score_recipe(stage, world=world, base=home / "base", out=heads, seed=options.seed)
    return heads, _run_once(folder, lambda: _train_scorer(recipe))


def run_online_stage(
    method: Method, stage: OnlineStage, *, home: Path, world: Path, out: Path, options: WorldOptions
) -> Cost:
    """Train a method's scorer, and the policy on it; a finished training isn't repeated, a killed one starts again.

    Args:
        method: The method.
        stage: Its reinforcement learning.
        home: Folder with the base model, for scorers.
        world: Folder of the world's data.
        out: Output folder of the policy.
        options: Options of the world.

    Returns:
        The cost of both.
    """
    from bfpo.online.run import run_online

    assert method.scorer is not None
    write_annotations(method.files, options, world)
    heads, cost = train_scorer(method.scorer, home=home, world=world, options=options)
    prompts = out.parent / f"{out.name}-prompts.jsonl"
    write_jsonl(prompts, (prompt.to_row() for prompt in training_prompts(stage, world, options.seed)))
    recipe = online_recipe(stage, prompts=prompts, heads=heads, base=home / "base", out=out, seed=options.seed)

    record = out / "run.json"
    if not record.exists():
        shutil.rmtree(out, ignore_errors=True)
        run_online(recipe)
    run = json.loads(record.read_text(encoding="utf-8"))
    return cost + Cost(run["samples"], run["scorer_calls"], run["cpu_seconds"])


def stage_folder(home: Path, name: str, *content: object) -> Path:
    """Return the folder of a stage that methods share, named by a hash of its content."""
    return home / f"{name}-{content_hash(*content)[:12]}"


def _run_once(folder: Path, work: Callable[[], tuple[int, int]]) -> Cost:
    """Run a stage unless its folder has its cost, which is written last; another process waits for it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        cost = read_cost(folder)
        if cost is None:
            # A killed stage is short enough to start again, and its cost is then complete.
            shutil.rmtree(folder, ignore_errors=True)
            cost = measured(work)
            cost.write(folder)
    return cost


def _train_scorer(recipe: ScoreRecipe) -> tuple[int, int]:
    run_score(recipe)
    return 0, 0


def _draw_samples(stage: SamplesStage, folder: Path, base: Path, world: Path, seed: int) -> tuple[int, int]:
    prompts = training_prompts(stage, world, seed)
    write_jsonl(folder / Prompt.file_name, (prompt.to_row() for prompt in prompts))
    sampling = Sampling(samples=stage.samples, temperature=stage.temperature, max_new_tokens=48)
    engine = load_engine(str(base), sampling)
    completions = generate_completions(engine, prompts, folder / Completion.file_name, samples=stage.samples)
    return len(completions), 0


def training_prompts(stage: SamplesStage | OnlineStage, world: Path, seed: int) -> list[Prompt]:
    """Return prompts of a world's pairs; those with an answer that is labeled unsafe count as harmful."""
    safety, helpful = (_read_pairs(world, *stream) for stream in (("safety", "main"), ("helpfulness", "buffer")))
    harmful = {pair.prompt_key: pair.prompt for pair in safety if pair.labels and not all(pair.labels)}
    benign = {pair.prompt_key: pair.prompt for pair in helpful if pair.prompt_key not in harmful}
    prompts = []
    kinds: tuple[tuple[Kind, dict[str, Conversation], int], ...]
    kinds = (("harmful", harmful, stage.harmful_prompts), ("benign", benign, stage.benign_prompts))
    for kind, conversations, max_count in kinds:
        drawn = sorted(conversations, key=lambda key: content_hash(seed, key))[:max_count]
        prompts += [Prompt(f"{kind}-{number:03}", conversations[key], kind) for number, key in enumerate(drawn)]
    return prompts


def fresh_prompts(stage: SamplesStage, count: int, world: Path, seed: int) -> list[Prompt]:
    """Return at most `count` harmful prompts of a world's pairs that `training_prompts` doesn't return.

    Raises:
        DataError: If there are none.
    """
    more = stage.model_copy(update={"harmful_prompts": stage.harmful_prompts + count})
    harmful = [prompt for prompt in training_prompts(more, world, seed) if prompt.kind == "harmful"]
    if not harmful[stage.harmful_prompts :]:
        raise DataError(
            f"the pairs of the world have {len(harmful)} harmful prompts, all of them in the samples; lower "
            "samples.harmful_prompts"
        )
    return harmful[stage.harmful_prompts :]


def _read_pairs(world: Path, name: str, stream: StreamName) -> list[PreferencePair]:
    return load_pairs(Source(path=str(world / f"{name}.jsonl")), stream)[1]


def _score(method: Method, samples: Path, scorer: Path, scores: Path, *, base: Path) -> tuple[int, int]:
    if method.scorer is None:
        beta = method.loss["beta"]
        return 0, 2 * score_by_log_ratios(samples, scorer, scores / _SCORED, base=base, beta=beta)
    num_scored = apply_scores(
        str(samples / Completion.file_name),
        scores / _SCORED,
        reward=f"reward:{scorer / HEADS / 'reward'}",
        cost=f"cost:{scorer / HEADS / 'cost'}",
    )
    return 0, 2 * num_scored


def _use_samples(
    method: Method, stage: SamplesStage, recipe: TrainRecipe, scored: Path, out: Path, seed: int
) -> tuple[int, int]:
    """Write the pairs and the multiplier of a method into the folder beside its output."""
    if method.main == "samples":
        write_jsonl(out / "pairs.jsonl", (pair.to_row() for pair in sample_pairs(scored, stage, seed)))
    if method.has_constraint:
        request = constraint_request(method, stage, recipe)
        log_ratio_beta = None if method.log_ratios is None else request.beta
        dual = solve_constraint(read_scored_samples(scored, log_ratio_beta=log_ratio_beta), request)
        write_dual_page(out, dual)
        dual.write(out)
        name = "min_gain" if method.max_unsafe is None else "max_unsafe"
        feasible_multiplier(dual, f"{name} {getattr(method, name):g}")
    return 0, 0


def constraint_request(method: Method, stage: SamplesStage, recipe: TrainRecipe) -> ConstraintRequest:
    """Return the constraint of a method, for the loss of a recipe."""
    beta, labeling = objective_of(recipe)
    if method.log_ratios is not None:
        return ConstraintRequest(
            measure="cost",
            gain=method.min_gain,
            kind="harmful",
            beta=beta,
            objective="log_ratios",
            temperature=stage.temperature,
        )
    return ConstraintRequest(
        max=method.max_unsafe,
        kind="harmful",
        beta=beta,
        objective="reward" if labeling is None else "bfpo",
        labeling=labeling,
        temperature=stage.temperature,
    )


def sample_pairs(scored: Path, stage: SamplesStage, seed: int) -> Iterator[PreferencePair]:
    """Yield random pairs of the samples of each prompt, labeled by their costs.

    The order is drawn with the probability σ(difference of the rewards), as the multiplier assumes.

    Args:
        scored: Samples with scores, prompt by prompt.
        stage: The samples.
        seed: Seed of the pairs.
    """
    for prompt_id, group in groupby(read_repaired_jsonl(scored), key=lambda row: row["prompt_id"]):
        rng, rows = Random(f"{seed} pairs {prompt_id}"), list(group)
        for _ in range(stage.pairs_per_prompt):
            first, second = (rows[int(rng.random() * len(rows))] for _ in range(2))
            is_reordered = rng.random() >= 0.5 * (1 + np.tanh(0.5 * (first["reward"] - second["reward"])))
            # Such pairs would be dropped in training, and counted as faults.
            if len({"", first["text"].strip(), second["text"].strip()}) == 3:
                pair = _pair(first, second)
                yield pair.swapped() if is_reordered else pair


def _pair(first: Mapping[str, Any], second: Mapping[str, Any]) -> PreferencePair:
    chosen, rejected = map(Completion.from_row, (first, second))
    return PreferencePair(
        chosen.prompt,
        chosen.text,
        rejected.text,
        SafetyLabels(first["cost"] <= 0, second["cost"] <= 0),
        PairSignals(
            chosen_reward=first["reward"],
            rejected_reward=second["reward"],
            chosen_cost=first["cost"],
            rejected_cost=second["cost"],
        ),
        provenance=Provenance(
            safety_label_source=first["cost_scorer"],
            reward_scorer=first["reward_scorer"],
            cost_scorer=first["cost_scorer"],
        ),
    )
