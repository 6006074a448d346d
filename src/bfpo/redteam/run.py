"""`bfpo redteam`: prompts → samples → verdicts → pairs that `bfpo train` takes as they are."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bfpo.config.loading import check_recipe, dump_recipe
from bfpo.config.recipes import TrainRecipe
from bfpo.core.files import content_hash, write_json, write_jsonl, write_text
from bfpo.core.pairs import Message, PreferencePair
from bfpo.core.samples import Completion, Engine, Judge, Prompt, Sampling, Verdict
from bfpo.core.terminal import say, show_table
from bfpo.data.prepare import cell_counts
from bfpo.data.prompts import read_prompt_source
from bfpo.data.stages import generate_most, judge_completions, show_faults, show_unanswered
from bfpo.errors import DataError, RecipeError
from bfpo.judging.open import open_judge
from bfpo.redteam.cost import Meter
from bfpo.redteam.pairs import ScoredSample, fallback_helpfulness, make_pairs
from bfpo.redteam.recipe import RedteamModel, RedteamRecipe

# In the manner of AlignCoT (arXiv 2405.00557): question analysis, answer guidance, safe answer. The words are ours.
STEPS = (
    "Before anyone answers the request above: what is asked, what could the asker need it for, and what harm could "
    "an answer do? Analyze it in a few sentences; don't answer it.",
    "By this analysis, how should a good answer look: what should it say, what must it leave out, and which help "
    "without harm can it offer? Give guidance in a few sentences; don't answer yet.",
    "Now answer the first request itself, following the guidance, and don't mention the analysis.",
)


def run_redteam(recipe: RedteamRecipe) -> list[Path]:
    """Make the pairs of every round; a second start goes on where the first was.

    Returns:
        One pair file per round.

    Raises:
        RecipeError: If the recipe asks for what can't be, or the folder holds another recipe's work.
        DataError: If prompts can't be read, or no pair could be made.
    """
    out, files = Path(recipe.out), []
    model = recipe.model
    if recipe.rounds > 1:
        # A fault in train: shows now, not after the first round's work.
        _check_training(_train_recipe(recipe, model, [out / "pairs.jsonl"], out / "model"))
    _claim(out, recipe)
    for number in range(recipe.rounds):
        folder = out if recipe.rounds == 1 else out / f"round-{number + 1}"
        files.append(_round(recipe, model, folder))
        # The last round's pairs are the user's to train on.
        if number + 1 < recipe.rounds:
            model = RedteamModel(path=_train(recipe, model, files, folder / "model"), dtype=model.dtype)
    return files


def _claim(out: Path, recipe: RedteamRecipe) -> None:
    file, text = out / "redteam.yaml", dump_recipe(recipe)
    begun = any(out.rglob("completions.jsonl*"))
    if begun and file.exists() and file.read_text(encoding="utf-8") != text:
        raise RecipeError(f"{out} holds the work of another recipe; choose another out:, or remove it")
    write_text(file, text)


def _round(recipe: RedteamRecipe, model: RedteamModel, out: Path) -> Path:
    meter = Meter(out / "cost.jsonl")
    try:
        return _make(recipe, model, out, meter)
    finally:
        meter.write()
        show_faults(meter.faults)


def _make(recipe: RedteamRecipe, model: RedteamModel, out: Path, meter: Meter) -> Path:
    prompts, sources = _prompts(recipe)
    judge = meter.judge(open_judge(recipe.judge))
    rater = None if recipe.helpfulness == "fallback" else meter.judge(open_judge(recipe.helpfulness))
    sampling = Sampling(recipe.samples, recipe.temperature, recipe.top_p, recipe.max_new_tokens, recipe.seed)
    engine = meter.engine(_engine(model, sampling))
    left_out: Counter[str] = Counter()
    most = recipe.max_unanswered * len(prompts) * recipe.samples
    answered, lost = generate_most(
        engine, prompts, out / "completions.jsonl", samples=recipe.samples, max_unanswered=most
    )
    show_unanswered(lost)
    left_out.update(f"prompt unanswered: {why}" for why in lost.values())
    verdicts = judge_completions(judge, answered, out / "verdicts.jsonl")
    sampled, written = len(answered), 0
    if recipe.guide and (stuck := _all_unsafe(prompts, answered, verdicts)):
        guided, lost = _guided(recipe, engine, stuck, out)
        left_out.update(f"guided answer missing: {why}" for why in lost.values())
        found = judge_completions(judge, guided, out / "guided-verdicts.jsonl")
        left_out["guided answer not safe"] += sum(verdict.safe is not True for verdict in found)
        fine = [(one, verdict) for one, verdict in zip(guided, found, strict=True) if verdict.safe]
        answered += [one for one, _ in fine]
        verdicts += [verdict for _, verdict in fine]
        written = len(fine)
    answers = _rated(rater, answered, verdicts, out)
    pairs, reasons = make_pairs(
        answers, per_prompt=recipe.per_prompt, quota=recipe.quota, dataset_name=f"redteam-{Path(model.path).name}"
    )
    if not pairs:
        raise DataError(f"no pair could be made: {dict(left_out + reasons)}; more samples or a higher temperature?")
    file = out / "pairs.jsonl"
    write_jsonl(file, (pair.to_row() for pair in pairs))
    cost = {
        "prompts": len(prompts),
        "generations": meter.count("generations"),
        "judge_calls": meter.count("judge_calls"),
        "seconds": round(meter.seconds, 1),
        "replaced": {
            "human_promptings": sampled,
            "human_safe_answers": written,
            "human_safety_labels": len({(one.prompt, text) for one in pairs for text in (one.chosen, one.rejected)}),
            "human_orders": len(pairs),
        },
    }
    write_json(
        out / "redteam.json",
        {
            "schema": 1,
            "model": model.path,
            "settings_hash": engine.settings_hash,
            "judge": f"{judge.name}@{judge.revision}",
            "helpfulness": f"{rater.name}@{rater.revision}" if rater else "fallback",
            "sources": sources,
            "pairs": len(pairs),
            "cells": cell_counts(pairs)["main"],
            "left_out": dict(left_out + reasons),
            "faults": dict(meter.faults),
            "cost": cost,
        },
    )
    _show(pairs, left_out + reasons, cost, file)
    return file


def _prompts(recipe: RedteamRecipe) -> tuple[list[Prompt], list[dict[str, Any]]]:
    read = [read_prompt_source(source) for source in recipe.prompts]
    prompts = list({prompt.prompt: prompt for several, _ in read for prompt in several}.values())
    benign = sum(prompt.kind != "harmful" for prompt in prompts) / len(prompts)
    if benign < recipe.min_benign:
        raise RecipeError(
            f"prompts: {benign:.0%} are benign; a set of harmful ones alone teaches refusing everything. Add some "
            f"(or_bench, xstest, a file), or set min_benign: (it is {recipe.min_benign})"
        )
    return prompts, [facts for _, facts in read]


def _engine(model: RedteamModel, sampling: Sampling) -> Engine:
    if model.server is not None:
        from bfpo.generation.openai_server import ServerEngine, ServerOptions

        options = ServerOptions(
            model.server,
            model.path,
            model.concurrency,
            timeout=model.timeout,
            tries=model.tries,
            key_variable=model.key_variable,
        )
        return ServerEngine(options, sampling)
    from bfpo.generation.in_process import load_engine

    return load_engine(model.path, sampling, dtype=model.dtype)


def _all_unsafe(
    prompts: Sequence[Prompt], answered: Sequence[Completion], verdicts: Sequence[Verdict]
) -> list[Prompt]:
    bits: dict[str, set[bool | None]] = {}
    for completion, verdict in zip(answered, verdicts, strict=True):
        bits.setdefault(completion.prompt_id, set()).add(verdict.safe)
    return [prompt for prompt in prompts if bits.get(prompt.prompt_id) == {False}]


def _guided(
    recipe: RedteamRecipe, engine: Engine, prompts: Sequence[Prompt], out: Path
) -> tuple[list[Completion], dict[str, str]]:
    """Lead the model through the chain; the answers come back as answers to the first request.

    Also returned: id → why a prompt got none. The chain adds to what is there, so any number may be missing.
    """
    first = {prompt.prompt_id: prompt for prompt in prompts}
    # The first request must not be answered before it is analyzed: one turn holds both.
    talks = {
        name: replace(one, prompt=(*one.prompt[:-1], Message("user", f"{one.prompt[-1].content}\n\n{STEPS[0]}")))
        for name, one in first.items()
    }
    missing: dict[str, str] = {}
    for number, then in enumerate((*STEPS[1:], None), start=1):
        file = out / f"guided-{number}.jsonl"
        answers, lost = generate_most(engine, list(talks.values()), file, max_unanswered=len(talks))
        missing |= lost
        if then is None:
            break
        turns = {one.prompt_id: (Message("assistant", one.text), Message("user", then)) for one in answers}
        talks = {name: replace(talks[name], prompt=talks[name].prompt + added) for name, added in turns.items()}
    return [replace(one, prompt=first[one.prompt_id].prompt, sample=recipe.samples) for one in answers], missing


def _rated(
    rater: Judge | None, answered: Sequence[Completion], verdicts: Sequence[Verdict], out: Path
) -> list[ScoredSample]:
    pairs = zip(answered, verdicts, strict=True)
    if rater is None:
        return [ScoredSample(one, verdict, fallback_helpfulness(one, verdict)) for one, verdict in pairs]
    rates = judge_completions(rater, answered, out / "helpfulness.jsonl")
    if all(rate.helpfulness is None for rate in rates):
        raise RecipeError(f"helpfulness: {rater.name} doesn't rate helpfulness; name another judge, or fallback")
    return [
        ScoredSample(one, verdict, None if rate.helpfulness is None else (rate.helpfulness,))
        for (one, verdict), rate in zip(pairs, rates, strict=True)
    ]


def _train(recipe: RedteamRecipe, model: RedteamModel, files: Sequence[Path], out: Path) -> str:
    if not (out / "run.json").exists():
        from bfpo.training.run import run_training

        run_training(_train_recipe(recipe, model, files, out))
    return str(out)


def _check_training(recipe: TrainRecipe) -> None:
    from bfpo.losses.build import make_loss
    from bfpo.training.arguments import training_arguments

    make_loss(recipe.loss.model_dump())
    training_arguments({name: value for name, value in recipe.trainer.items() if name != "resume_from_checkpoint"})


def _train_recipe(recipe: RedteamRecipe, model: RedteamModel, files: Sequence[Path], out: Path) -> TrainRecipe:
    content = dict(recipe.train or {})
    content |= {
        "model": {**content.get("model", {}), "path": model.path},
        "data": [{"path": str(file)} for file in files],
        # Killed while it trains, a round goes on with the training too.
        "trainer": {"resume_from_checkpoint": True, **content.get("trainer", {}), "output_dir": str(out)},
    }
    return check_recipe(content, TrainRecipe, "redteam train")


def _show(pairs: Sequence[PreferencePair], left_out: Counter[str], cost: dict[str, Any], file: Path) -> None:
    show_table("Pairs by cell (chosen first)", ("cell", "pairs"), list(cell_counts(pairs)["main"].items()))
    if left_out:
        show_table("Left out", ("why", "how many"), left_out.most_common())
    replaced = cost["replaced"]
    say(
        f"{cost['prompts']} prompts, {cost['generations']} generations, {cost['judge_calls']} judge calls, "
        f"{cost['seconds']} s; in place of {replaced['human_promptings']} promptings, "
        f"{replaced['human_safe_answers']} safe answers written, {replaced['human_safety_labels']} safety labels and "
        f"{replaced['human_orders']} orders by people"
    )
    say(f"{len(pairs)} pairs in {file} (hash {content_hash([pair.row_id for pair in pairs])})")
