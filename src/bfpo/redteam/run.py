"""`bfpo redteam`: prompts → samples → verdicts → pairs, which `bfpo train` reads unchanged."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bfpo.config.loading import check_recipe, dump_recipe, holds_recipe
from bfpo.config.recipes import TrainRecipe
from bfpo.core.files import content_hash, write_json, write_jsonl, write_text
from bfpo.core.locks import exclusive_folder
from bfpo.core.pairs import PreferencePair
from bfpo.core.samples import Completion, Judge, Prompt, Sampling, Verdict
from bfpo.core.terminal import say, show_table
from bfpo.data.guard_summary import summarize_guard
from bfpo.data.prepare import cell_counts
from bfpo.data.prompts import distinct_prompts, read_prompt_source
from bfpo.data.stages import generate_most, judge_completions, show_faults, show_outcomes, show_unanswered
from bfpo.data.verdict_files import judge_file
from bfpo.errors import DataError, RecipeError
from bfpo.generation.open import EngineSection, open_engine
from bfpo.judging.guarded_engine import guard_engine
from bfpo.judging.open import open_judge
from bfpo.judging.refusal_rule import kinds_of
from bfpo.redteam.attack import sample_under_attack
from bfpo.redteam.cost import Meter
from bfpo.redteam.guide import GuidedSamples, guide
from bfpo.redteam.pairs import ScoredSample, fallback_helpfulness, make_pairs
from bfpo.redteam.recipe import RedteamRecipe

_FIRST_ANSWERS = 16
"""Number of ended answers from which the share of cut ones is told."""


def run_redteam(recipe: RedteamRecipe) -> list[Path]:
    """Make the pairs of every round; a second start resumes.

    Returns:
        One file of pairs per round.

    Raises:
        RecipeError: If the recipe is invalid, or the folder has the files of another recipe or another run.
        DataError: If prompts can't be read, or no pair could be made.
    """
    model = recipe.model
    if recipe.rounds > 1:
        from bfpo.training.preflight import check_training

        # Shows an error in `train` before the work of the first round.
        check_training(_train_recipe(recipe, model, [Path(recipe.out) / "pairs.jsonl"], Path(recipe.out) / "model"))
    message = f"out: another red-teaming is running in {recipe.out}; wait for it, or name another folder"
    with exclusive_folder(Path(recipe.out), message):
        return _run_rounds(recipe)


def _run_rounds(recipe: RedteamRecipe) -> list[Path]:
    out, model, paths = Path(recipe.out), recipe.model, []
    _write_recipe(out, recipe)
    for number in range(recipe.rounds):
        folder = out if recipe.rounds == 1 else out / f"round-{number + 1}"
        paths.append(_run_round(recipe, model, folder))
        # The pairs of the last round are for the user to train on.
        if number + 1 < recipe.rounds:
            model = EngineSection(path=_train(recipe, model, paths, folder / "model"), dtype=model.dtype)
    return paths


def _write_recipe(out: Path, recipe: RedteamRecipe) -> None:
    path = out / "redteam.yaml"
    has_completions = any(out.rglob("completions.jsonl*"))
    if has_completions and path.exists() and not holds_recipe(path, recipe):
        raise RecipeError(f"{out} has the files of another recipe; choose another out, or remove them")
    write_text(path, dump_recipe(recipe))


def _run_round(recipe: RedteamRecipe, model: EngineSection, out: Path) -> Path:
    meter = Meter(out / "cost.jsonl")
    try:
        return _make_pair_file(recipe, model, out, meter)
    finally:
        meter.write()
        show_faults(meter.faults)


def _make_pair_file(recipe: RedteamRecipe, model: EngineSection, out: Path, meter: Meter) -> Path:
    prompts, sources = _read_prompts(recipe)
    kinds = kinds_of(prompts)
    judge = meter.judge(open_judge(recipe.judge, server=recipe.judge_server, kinds=kinds))
    rater = None
    if recipe.helpfulness != "fallback":
        rater = meter.judge(open_judge(recipe.helpfulness, server=recipe.judge_server, kinds=kinds))
    sampling = Sampling(recipe.samples, recipe.temperature, recipe.top_p, recipe.max_new_tokens, recipe.seed)
    engine = meter.engine(guard_engine(open_engine(model, sampling), sampling, recipe.guard), CutWatch(recipe))
    completions, missing = generate_most(
        engine,
        prompts,
        out / "completions.jsonl",
        samples=recipe.samples,
        max_unanswered=recipe.max_unanswered * len(prompts) * recipe.samples,
    )
    show_unanswered(missing)
    show_outcomes(completions)
    _show_cut(completions, recipe)
    left_out = Counter(f"prompt unanswered: {reason}" for reason in missing.values())
    verdicts = judge_completions(judge, completions, judge_file(out, "verdicts", judge.name, judge.revision))
    num_prompts, originals, attack = len(prompts), dict[str, Prompt](), None
    if recipe.attack is not None:
        answered = [prompt for prompt in prompts if prompt.prompt_id not in missing]
        attacked = sample_under_attack(recipe, engine, judge, answered, verdicts, out)
        prompts, completions = prompts + attacked.prompts, completions + attacked.completions
        verdicts, originals, attack = verdicts + attacked.verdicts, attacked.originals, attacked.summary
        left_out.update(attacked.left_out)
    guided: GuidedSamples | None = None
    if recipe.guide and (unsafe := _prompts_without_a_safe_answer(prompts, completions, verdicts)):
        guided = guide(recipe, engine, judge, unsafe, originals, out)
        verdicts = verdicts + guided.verdicts
        left_out.update(guided.left_out)
    safe_answers = guided.completions if guided is not None else []
    samples = _rate(rater, judge, [*completions, *safe_answers], verdicts, out)
    pairs, pairs_left_out = make_pairs(
        samples,
        per_prompt=recipe.per_prompt,
        quota=recipe.quota,
        dataset_name=f"redteam-{Path(model.path).name}",
        keep_cut=recipe.keep_cut,
    )
    left_out += pairs_left_out
    if not pairs:
        hint = "; `keep_cut: true` uses cut answers" if left_out["answer cut"] else ""
        raise DataError(f"no pair could be made: {dict(left_out)}; try more samples or a higher temperature{hint}")
    path = out / "pairs.jsonl"
    write_jsonl(path, (pair.to_row() for pair in pairs))
    labeled = {(pair.prompt, text) for pair in pairs for text in pair.answers}
    replaced = {
        "human_promptings": len(completions),
        "human_safe_answers": len(safe_answers),
        "human_safety_labels": len(labeled),
        "human_orders": len(pairs),
    }
    cost = {"prompts": num_prompts, **_spent(meter), "replaced": replaced}
    write_json(
        out / "redteam.json",
        {
            "schema": 1,
            "model": model.path,
            "settings_hash": engine.settings_hash,
            "judge": f"{judge.name}@{judge.revision}",
            "helpfulness": f"{rater.name}@{rater.revision}" if rater else "fallback",
            "sources": sources,
            **({"attack": attack} if attack is not None else {}),
            **({"guided": guided.summary} if guided is not None else {}),
            **({"guard": asdict(guard)} if (guard := summarize_guard(completions)) is not None else {}),
            "pairs": len(pairs),
            "cells": cell_counts(pairs)["main"],
            "left_out": dict(left_out),
            "faults": dict(meter.faults),
            "cost": cost,
        },
    )
    _show(pairs, left_out, cost, path)
    return path


def _show_cut(completions: Sequence[Completion], recipe: RedteamRecipe) -> None:
    num_cut = sum(completion.finish_reason == "length" for completion in completions)
    if num_cut and not recipe.keep_cut:
        say(
            f"{num_cut} of {len(completions)} answers were cut at {recipe.max_new_tokens} tokens and make no pairs; "
            "raise `max_new_tokens`, or use them with `keep_cut: true`"
        )


class CutWatch:
    """Says once, early in a run, that most answers are cut and make no pairs."""

    def __init__(self, recipe: RedteamRecipe) -> None:
        self._recipe, self._ended, self._cut = recipe, 0, 0
        self._is_done = recipe.keep_cut

    def __call__(self, completions: Sequence[Completion]) -> None:
        """Count answers that ended."""
        self._ended += len(completions)
        self._cut += sum(completion.finish_reason == "length" for completion in completions)
        # Short answers end first, so the share of cut ones only rises.
        if not self._is_done and self._ended >= _FIRST_ANSWERS and self._cut > self._ended / 2:
            self._is_done = True
            say(
                f"note: {self._cut} of the first {self._ended} answers were cut at {self._recipe.max_new_tokens} "
                "tokens and make no pairs; stop and raise `max_new_tokens`, or set `keep_cut: true`"
            )


def _spent(meter: Meter) -> dict[str, float]:
    counts: dict[str, float] = {name: meter.count(name) for name in ("generations", "judge_calls")}
    return {**counts, "seconds": round(meter.seconds, 1)}


def _read_prompts(recipe: RedteamRecipe) -> tuple[list[Prompt], list[dict[str, Any]]]:
    """Return the prompts of all sources without duplicates, and the metadata of the sources."""
    sources = [read_prompt_source(source) for source in recipe.prompts]
    prompts = distinct_prompts(source for source, _ in sources)
    num_harmful = sum(prompt.kind == "harmful" for prompt in prompts)
    num_attacked = num_harmful if recipe.attack is not None else 0
    benign = (len(prompts) - num_harmful) / (len(prompts) + num_attacked)
    if benign < recipe.min_benign:
        raise RecipeError(
            f"prompts: {benign:.0%} are benign; harmful prompts only teach a model to refuse everything. Add benign "
            f"ones (or_bench, xstest, a file), or lower min_benign, which is {recipe.min_benign}"
        )
    return prompts, [metadata for _, metadata in sources]


def _prompts_without_a_safe_answer(
    prompts: Sequence[Prompt], completions: Sequence[Completion], verdicts: Sequence[Verdict]
) -> list[Prompt]:
    """Return the prompts whose samples are all unsafe, apart from those that a server blocked."""
    labels: dict[str, set[bool | None]] = {}
    for completion, verdict in zip(completions, verdicts, strict=True):
        if not completion.is_blocked:
            labels.setdefault(completion.prompt_id, set()).add(verdict.safe)
    return [prompt for prompt in prompts if labels.get(prompt.prompt_id) == {False}]


def _rate(
    rater: Judge | None, judge: Judge, completions: Sequence[Completion], verdicts: Sequence[Verdict], out: Path
) -> list[ScoredSample]:
    """Return the samples with their helpfulness, by the rater or the fallback.

    Args:
        rater: Judge of the helpfulness; None uses the fallback. If it is the safety judge, its verdicts are reused.
        judge: Safety judge.
        completions: The samples.
        verdicts: Verdicts of the safety judge on them.
        out: Folder of the run.
    """
    judged = list(zip(completions, verdicts, strict=True))
    if rater is None:
        return [
            ScoredSample(completion, verdict, fallback_helpfulness(completion, verdict))
            for completion, verdict in judged
        ]
    if (rater.name, rater.revision) == (judge.name, judge.revision):
        rated = list(verdicts)
    else:
        rated = judge_completions(rater, completions, judge_file(out, "verdicts", rater.name, rater.revision))
    ratings = [verdict.helpfulness for verdict in rated]
    if all(rating is None for rating in ratings):
        raise RecipeError(f"helpfulness: {rater.name} doesn't rate helpfulness; choose another judge, or fallback")
    return [
        ScoredSample(completion, verdict, None if rating is None else (rating,))
        for (completion, verdict), rating in zip(judged, ratings, strict=True)
    ]


def _train(recipe: RedteamRecipe, model: EngineSection, paths: Sequence[Path], out: Path) -> str:
    if not (out / "run.json").exists():
        from bfpo.generation.in_process import likeliest_answers
        from bfpo.training.run import run_training

        run_training(_train_recipe(recipe, model, paths, out), answers=likeliest_answers)
    return str(out)


def _train_recipe(recipe: RedteamRecipe, model: EngineSection, paths: Sequence[Path], out: Path) -> TrainRecipe:
    content = dict(recipe.train or {})
    given = {name: value for name, value in content.get("model", {}).items() if name != "revision"}
    content |= {
        # A model that an earlier round trained has no revision.
        "model": {**given, "path": model.path} | ({} if model.revision is None else {"revision": model.revision}),
        "data": [{"path": str(path)} for path in paths],
        # A round that is killed during training resumes the training too.
        "trainer": {"resume_from_checkpoint": True, **content.get("trainer", {}), "output_dir": str(out)},
    }
    return check_recipe(content, TrainRecipe, "redteam train")


def _show(pairs: Sequence[PreferencePair], left_out: Counter[str], cost: dict[str, Any], path: Path) -> None:
    show_table("Pairs by cell (chosen first)", ("cell", "pairs"), list(cell_counts(pairs)["main"].items()))
    if left_out:
        show_table("Left out", ("reason", "count"), left_out.most_common())
    replaced = cost["replaced"]
    say(
        f"{cost['prompts']} prompts, {cost['generations']} generations, {cost['judge_calls']} judge calls, "
        f"{cost['seconds']} s; in place of {replaced['human_promptings']} promptings, "
        f"{replaced['human_safe_answers']} written safe answers, {replaced['human_safety_labels']} safety labels and "
        f"{replaced['human_orders']} preferences by annotators"
    )
    say(f"{len(pairs)} pairs in {path} (hash {content_hash([pair.row_id for pair in pairs])})")
