"""The work of `bfpo train`: from a recipe to a checkpoint and a record of how it was made."""

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import PartialState
from transformers import PreTrainedTokenizerBase

from bfpo.config.recipes import ModelSection, TrainRecipe
from bfpo.core.files import write_json
from bfpo.core.pairs import CELLS, PreferencePair
from bfpo.core.terminal import progress, say, show_table
from bfpo.data.inspect import show_cells, show_samples, show_sources
from bfpo.data.load import Reason
from bfpo.data.prepare import PreparedData, prepare, require_labels
from bfpo.data.table import Example, PairTable, pair_table, sampled_rows
from bfpo.data.tokenize import Encoder, check_special_tokens, decoded_sample
from bfpo.errors import DataError, RecipeError
from bfpo.losses.build import make_loss
from bfpo.losses.pairwise import BFPO, PairLoss
from bfpo.model.lora import lora_config
from bfpo.training.arguments import training_arguments
from bfpo.training.estimate import estimate, most_tokens
from bfpo.training.output import RunRecord, begin_output, save_final, say_layout
from bfpo.training.run_sft import fine_tuned_on_the_spot
from bfpo.training.start import start_model, start_tokenizer
from bfpo.training.trainer import BFPOTrainer, require_signals


class Tables(NamedTuple):
    """Tokenized data of a run."""

    train: PairTable
    eval: dict[str, PairTable]
    samples: list[dict[str, str]]


def run_training(recipe: TrainRecipe, *, dry_run: bool = False, limit: int | None = None) -> dict[str, Any]:
    """Train on preferences as a recipe says.

    Args:
        recipe: What to do.
        dry_run: Stop before any model is loaded or trained; everything else is done and shown.
        limit: Take at most so many pairs of each source.

    Returns:
        What `run.json` holds; for a dry run, the data manifest.
    """
    began, cpu_began = time.time(), time.process_time()
    options = dict(recipe.trainer)
    resume = options.pop("resume_from_checkpoint", None)
    args = training_arguments(options)
    loss = make_loss(recipe.loss.model_dump())
    prepared = prepare(recipe, limit=limit, log=say)
    select_for(loss, prepared)
    model_section: ModelSection = recipe.model
    cache = Path(str(args.output_dir)).parent / "cache"
    if recipe.model.sft is not None and dry_run:
        model_section = recipe.model.sft.model
    elif recipe.model.sft is not None:
        model_section = fine_tuned_on_the_spot(recipe, prepared.eval, cache)
    tokenizer = start_tokenizer(model_section, recipe.text, lambda: texts_of(prepared.train))
    tables = tokenize(recipe, prepared, tokenizer, loss, cache=None if dry_run else cache / "tokens")
    show_data(prepared, tables, loss)
    manifest = prepared.manifest()
    if args.load_best_model_at_end and args.metric_for_best_model == "loss" and tables.eval:
        args.metric_for_best_model = f"eval_{next(iter(tables.eval))}_loss"
    if args.eval_strategy != "no" and not tables.eval:
        raise RecipeError(
            "trainer.eval_strategy asks for evaluation, and there is nothing to evaluate on; set holdout"
        )
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    n_main, n_buffer = len(tables.train.main_rows), len(tables.train.buffer_rows)
    show_plan(n_main, n_buffer, batch, args.max_steps, args.num_train_epochs)
    needed = estimate(
        model_section,
        tokenizer,
        train_only=recipe.train_only,
        lora=recipe.lora,
        reference=recipe.reference,
        micro_batch_tokens=most_tokens(
            tables.train, (2 if n_buffer else 1) * args.per_device_train_batch_size, recipe.layout
        ),
    )
    if needed:
        say(str(needed))
    if dry_run:
        say("dry run: nothing was trained")
        return manifest

    # A model that can't be loaded leaves an earlier run where it is.
    model = start_model(model_section, tokenizer)
    out = begin_output(Path(str(args.output_dir)), recipe, resuming=bool(resume))
    if PartialState().is_main_process:
        write_json(out / "data_manifest.json", manifest)
    trainer = BFPOTrainer(
        model,
        args,
        tables.train,
        eval_dataset=tables.eval or None,
        processing_class=tokenizer,
        loss=loss,
        buffer_weight=recipe.buffer_weight,
        peft_config=lora_config(recipe.lora, revision=model_section.revision) if recipe.lora else None,
        train_only=recipe.train_only,
        layout=recipe.layout,
        reference=recipe.reference,
        cache_dir=recipe.cache_dir,
    )
    record = RunRecord("train", recipe, out, trainer)
    copied = f"copies {trainer.reference.bytes / 2**20:,.1f} MiB" if trainer.reference else "is in the cache"
    say(f"training {trainer.selection}; the reference {copied}")
    trainer.start_check = trainer.check_start()
    say_layout(trainer)
    say(
        f"start check: largest margin {trainer.start_check.largest_margin:g} nats (expected 0), typical completion "
        f"{trainer.start_check.typical_logp:,.0f} nats"
    )
    if trainer.start_check.advice:
        say(f"warning: {trainer.start_check.advice}")
    result = record.train(resume)
    evaluation = trainer.evaluate() if tables.eval else {}
    save_final(trainer, out)
    run = record.finish(
        manifest["sources"],
        model=model_section.model_dump(exclude_defaults=True),
        data={"train": manifest["train"], "eval": manifest["eval"]},
        start_check=trainer.start_check._asdict(),
        trained={"parameters": trainer.selection.trained, "of": trainer.selection.total},
        steps=result.global_step,
        train_loss=result.training_loss,
        evaluation={name: held_out(evaluation, name, table) for name, table in tables.eval.items()},
        wall_seconds=round(time.time() - began, 1),
        cpu_seconds=round(time.process_time() - cpu_began, 1),
    )
    for name, numbers in run["evaluation"].items():
        show_evaluation(name, numbers)
    say(f"\nsaved to {out}")
    return run


def texts_of(pairs: Iterable[PreferencePair]) -> Iterable[str]:
    """Return all texts of pairs."""
    for pair in pairs:
        yield from (message.content for message in pair.prompt)
        yield from (pair.chosen, pair.rejected)


def select_for(loss: PairLoss, prepared: PreparedData) -> None:
    """Take out the pairs that a loss doesn't train on, and count them.

    Raises:
        DataError: If pairs are unlabeled, or none is left.
    """
    require_labels([*prepared.train, *prepared.eval])
    for part in prepared.parts:
        for pairs in (part.train, part.eval):
            for pair in pairs:
                if pair.labels is not None and not loss.keeps(pair.labels):
                    part.report.removed[Reason(f"{type(loss).__name__} doesn't train on this cell", pair.cell)] += 1
            pairs[:] = [pair for pair in pairs if pair.labels is not None and loss.keeps(pair.labels)]
    if not any(pair.provenance.stream == "main" for pair in prepared.train):
        raise DataError("no pairs of the main stream are left to train on")


def tokenize(
    recipe: TrainRecipe,
    prepared: PreparedData,
    tokenizer: PreTrainedTokenizerBase,
    loss: PairLoss,
    *,
    cache: Path | None,
) -> Tables:
    """Tokenize all pairs, or find them in the cache; what doesn't fit is dropped and counted, up to the recipe's cap.

    Returns:
        Tables; evaluation pairs of the two streams apart, named `main` and `buffer`.
    """
    encoder = Encoder(tokenizer, recipe.text, cache)
    train: tuple[list[PreferencePair], list[Example]] = ([], [])
    held_out: tuple[list[PreferencePair], list[Example]] = ([], [])
    with progress("tokenizing", len(prepared.train) + len(prepared.eval)) as advance:
        for part in prepared.parts:
            for pairs, (kept, examples) in ((part.train, train), (part.eval, held_out)):
                more_pairs, more_examples = encoder.encode(pairs, part.report, advance)
                pairs[:] = more_pairs
                kept += more_pairs
                examples += more_examples
            part.report.check_cap(recipe.max_dropped)
    check_special_tokens(train[1], tokenizer)
    samples = [decoded_sample(example, tokenizer) for example in train[1][:3]]
    use_scores = recipe.safety == "scores"
    if use_scores and any(pair.signals.chosen_safety_score is None for pair in (*train[0], *held_out[0])):
        raise DataError("safety: scores needs chosen_safety_score and rejected_safety_score for every pair")
    table = pair_table(train[1], train[0], use_scores=use_scores)
    evals = {}
    for stream in ("main", "buffer"):
        of_stream = [index for index, pair in enumerate(held_out[0]) if pair.provenance.stream == stream]
        rows = sampled_rows(of_stream, recipe.max_eval)
        if len(rows) < len(of_stream):
            say(f"evaluating on a sample of {len(rows):,} of {len(of_stream):,} {stream} pairs (max_eval)")
        if rows:
            chosen = [held_out[1][row] for row in rows], [held_out[0][row] for row in rows]
            evals[stream] = pair_table(*chosen, use_scores=use_scores)
    for one in (table, *evals.values()):
        require_signals(one, loss)
    return Tables(table, evals, samples)


def show_data(prepared: PreparedData, tables: Tables, loss: PairLoss) -> None:
    """Print what a run trains on."""
    show_sources(part.report for part in prepared.parts)
    show_cells(prepared.train, loss.labeling if isinstance(loss, BFPO) else None, loss.beta)
    show_samples(tables.samples)


def show_plan(n_main: int, n_buffer: int, batch: int, max_steps: int, epochs: float) -> None:
    """Print what every step uses and how often each pair will be seen."""
    steps = max_steps if max_steps > 0 else int(-(-epochs * -(-n_main // batch) // 1))
    rows = [("main", n_main, batch, f"{steps * batch / n_main:.2f}")]
    if n_buffer:
        rows.append(("buffer", n_buffer, batch, f"{steps * batch / n_buffer:.2f}"))
    show_table(f"Plan: {steps} steps", ("stream", "pairs", "pairs per step", "times each pair is seen"), rows)


def held_out(metrics: dict[str, Any], name: str, table: PairTable) -> dict[str, Any]:
    """Return the held-out numbers of one stream, with each cell's count; a cell without pairs has None."""
    prefix = f"eval_{name}_"
    return {
        "pairs": len(table),
        "loss": metrics[f"{prefix}loss"],
        "sign_agreement": metrics[f"{prefix}bfpo/sign_agreement"],
        "cells": {
            cell: {
                "pairs": int((table.cells == index).sum()),
                "margin": metrics[f"{prefix}bfpo/margin/{cell}"],
                "target_gap": metrics.get(f"{prefix}bfpo/target_gap/{cell}"),
                "sign_agreement": metrics[f"{prefix}bfpo/sign_agreement/{cell}"],
            }
            for index, cell in enumerate(CELLS)
        },
    }


def show_evaluation(name: str, numbers: dict[str, Any]) -> None:
    """Print a stream's held-out numbers by cell."""

    def shown(value: float | None, style: str) -> str:
        return "" if value is None else f"{value:{style}}"

    rows = [
        (
            cell,
            of_cell["pairs"] or "empty",
            shown(of_cell["margin"], "+.2f"),
            shown(of_cell["target_gap"], "+.2f"),
            shown(of_cell["sign_agreement"], ".1%"),
        )
        for cell, of_cell in numbers["cells"].items()
    ]
    columns = ("cell", "pairs", "mean margin (nats)", "margin - target", "sign agreement")
    show_table(f"Held-out {name} pairs: {numbers['pairs']}, loss {numbers['loss']:.4g}", columns, rows)
