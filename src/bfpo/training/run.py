"""The work of `bfpo train`: from a recipe to a checkpoint and its metadata."""

import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple, cast

from accelerate import PartialState
from transformers import PreTrainedTokenizerBase, TrainingArguments

from bfpo.config.recipes import LoraSection, ModelSection, TrainRecipe
from bfpo.core.files import write_json
from bfpo.core.pairs import CELLS, PreferencePair
from bfpo.core.terminal import say, show_table, timed
from bfpo.data.inspect import show_cells, show_samples, show_sources
from bfpo.data.prepare import PreparedData, prepare
from bfpo.data.scan import MAX_HELD
from bfpo.data.table import PairTable, TokenTable
from bfpo.errors import RecipeError
from bfpo.losses.build import make_loss
from bfpo.losses.pairwise import BFPO, PairLoss
from bfpo.model.gguf import gguf_metadata
from bfpo.model.lora import CausalLM, lora_config
from bfpo.training.arguments import check_has_data, for_any_machine, training_arguments
from bfpo.training.clock import record_clock, template_clock
from bfpo.training.estimate import Arithmetic, footprint, max_micro_batch_tokens
from bfpo.training.loss_files import build_loss, read_score_labels, resolve_loss_files
from bfpo.training.micro_batch import fit_if_auto
from bfpo.training.output import (
    check_output,
    exclusive_output,
    report_layout,
    save_final,
    start_run,
)
from bfpo.training.preflight import check_against_model
from bfpo.training.probe import Answers, Probe, show_probe
from bfpo.training.reference_pass import on_device
from bfpo.training.relabel import relabel
from bfpo.training.run_sft import load_or_train_sft
from bfpo.training.start import check_vocabulary, load_start_model, load_start_tokenizer
from bfpo.training.tables import Tables, remove_untrained, tokenize_pairs
from bfpo.training.trainer import BFPOTrainer, check_tail


class RunInputs(NamedTuple):
    """Everything a run needs before its model is loaded.

    Args:
        args: Training arguments.
        resume: Folder of a checkpoint to resume from, or True for the newest complete one.
        loss: Loss to train with.
        model_section: Start model, as a path or a new model.
        tokenizer: Tokenizer of the start model.
        tables: Tokenized data.
        manifest: Content of `data_manifest.json`.
        clock: Time that the chat template sees; None if it uses no clock.
        held_out: Held-out pairs.
    """

    args: TrainingArguments
    resume: str | bool | None
    loss: PairLoss
    model_section: ModelSection
    tokenizer: PreTrainedTokenizerBase
    tables: Tables
    manifest: dict[str, Any]
    clock: datetime | None
    held_out: Sequence[PreferencePair]


def run_training(
    recipe: TrainRecipe, *, dry_run: bool = False, limit: int | None = None, answers: Answers | None = None
) -> dict[str, Any]:
    """Train on preferences as a recipe says.

    Args:
        recipe: Recipe of the run.
        dry_run: Whether to stop before a model is loaded or trained; everything else is done and shown.
        limit: Maximum number of pairs of each source.
        answers: Function that lets the policy answer the prompts of `probe:`; None for no probe.

    Returns:
        Content of `run.json`; for a dry run, of `data_manifest.json`.

    Raises:
        RecipeError: If the recipe asks for several trainings (`outer`), which `bfpo train` runs.
    """
    if dry_run:
        manifest = read_inputs(recipe, limit=limit).manifest
        say("dry run: nothing was trained")
        return manifest
    recipe, args, resume = _check(recipe)
    with exclusive_output(Path(str(args.output_dir))):
        return _train(recipe, args, resume, limit=limit, answers=answers)


def read_inputs(recipe: TrainRecipe, *, limit: int | None = None) -> RunInputs:
    """Read, check and show everything of a run before its model is loaded, without writing anything.

    Args:
        recipe: Recipe of the run.
        limit: Maximum number of pairs of each source.

    Raises:
        RecipeError: If the recipe asks for several trainings (`outer`).
    """
    recipe, args, resume = _check(recipe.model_copy(update={"trainer": for_any_machine(recipe.trainer)}))
    return _prepare_inputs(recipe, args, resume, dry_run=True, limit=limit)


def _check(recipe: TrainRecipe) -> tuple[TrainRecipe, TrainingArguments, str | bool | None]:
    """Return the recipe with the numbers of its files, its arguments, and what to resume from."""
    if recipe.outer is not None:
        raise RecipeError(
            "outer is several trainings, and this is one; start them with `bfpo train`, or leave it out"
        )
    # A multiplier that doesn't fit is refused before anything is read or trained.
    recipe = resolve_loss_files(recipe)
    read_score_labels(recipe)
    options = dict(recipe.trainer)
    resume = options.pop("resume_from_checkpoint", None)
    args = training_arguments(options)
    check_tail(make_loss(recipe.loss.model_dump()), args)
    check_against_model(recipe)
    check_output(Path(str(args.output_dir)), recipe.model.path)
    return recipe, args, resume


def _train(
    recipe: TrainRecipe,
    args: TrainingArguments,
    resume: str | bool | None,
    *,
    limit: int | None,
    answers: Answers | None,
) -> dict[str, Any]:
    start_time, start_cpu_time = time.time(), time.process_time()
    inputs = _prepare_inputs(recipe, args, resume, dry_run=False, limit=limit)
    trainer = _make_trainer(recipe, inputs)
    micro_batch = fit_if_auto(trainer, recipe.trainer, inputs.resume)
    record, checkpoint = start_run("train", recipe, trainer, inputs.resume)
    out = Path(str(inputs.args.output_dir))
    if PartialState().is_main_process:
        write_json(out / "data_manifest.json", inputs.manifest)
    record_clock(inputs.clock, out)
    start_check = _check_start(trainer)
    probe = None
    # A model that is spread over processes can't be asked here.
    if answers is not None and recipe.probe is not None and inputs.held_out and PartialState().num_processes == 1:
        policy = _policy(trainer)
        with timed("asked the policy before training"), on_device(policy, args.device):
            probe = Probe(inputs.held_out, recipe.probe, answers, policy, inputs.tokenizer)
    result = record.train(checkpoint)
    # First: evaluating may take longer than training did.
    save_final(trainer, out)
    with timed("evaluating the held-out pairs"):
        metrics = trainer.evaluate() if inputs.tables.eval else {}
    probed = None
    if probe is not None:
        policy = _policy(trainer)
        with timed("asked the policy after training"), on_device(policy, args.device):
            probed = probe.finish(policy)
    run = record.finish(
        inputs.manifest["sources"],
        model=inputs.model_section.model_dump(exclude_defaults=True)
        | gguf_metadata(inputs.model_section.path, inputs.model_section.revision),
        data={"train": inputs.manifest["train"], "eval": inputs.manifest["eval"]},
        start_check=start_check,
        trained={"parameters": trainer.selection.trained, "of": trainer.selection.total},
        steps=result.global_step,
        train_loss=result.training_loss,
        evaluation={name: held_out_results(metrics, name, table) for name, table in inputs.tables.eval.items()},
        **({} if probed is None else {"probe": probed.to_json()}),
        **micro_batch,
        wall_seconds=round(time.time() - start_time, 1),
        cpu_seconds=round(time.process_time() - start_cpu_time, 1),
    )
    for name, results in run["evaluation"].items():
        show_evaluation(name, results)
    if probed is not None:
        show_probe(probed, run["evaluation"].get("main", {}).get("sign_agreement"))
    say(f"\nsaved to {out}")
    return run


def _prepare_inputs(
    recipe: TrainRecipe, args: TrainingArguments, resume: str | bool | None, *, dry_run: bool, limit: int | None
) -> RunInputs:
    """Read, clean and tokenize the data, and show them with the plan and the memory that a run needs."""
    labels = read_score_labels(recipe)
    loss = build_loss(recipe, labels)
    cache = Path(str(args.output_dir)).parent / "cache"
    prepared = prepare(recipe, limit=limit, log=say, cache=None if dry_run else cache, max_held=MAX_HELD)
    label_metadata = relabel(recipe, prepared, labels)
    remove_untrained(prepared, loss)
    model_section = _resolve_model_section(recipe, prepared, cache, dry_run=dry_run, limit=limit)
    tokenizer = load_start_tokenizer(model_section, recipe.text, lambda: texts_of(prepared.train))
    check_vocabulary(model_section, tokenizer)
    clock = template_clock(tokenizer.chat_template, Path(str(args.output_dir)), resume)
    tokens = None if dry_run else cache / "tokens"
    dual = labels.dual if labels is not None else None
    tables = tokenize_pairs(recipe, prepared, tokenizer, loss, cache=tokens, clock=clock, dual=dual)
    show_data(prepared, tables, loss)
    check_evaluation(args, tables.eval)
    check_vocabulary(model_section, tokenizer, [tables.train, *tables.eval.values()])
    _show_plan_and_memory(recipe, args, model_section, tokenizer, tables.train)
    manifest = prepared.manifest() | label_metadata
    return RunInputs(args, resume, loss, model_section, tokenizer, tables, manifest, clock, prepared.eval)


def _resolve_model_section(
    recipe: TrainRecipe, prepared: PreparedData, cache: Path, *, dry_run: bool, limit: int | None
) -> ModelSection:
    if recipe.model.sft is None:
        return recipe.model
    if dry_run:
        # What will be trained is loaded as the recipe's own section says.
        loading = {name: getattr(recipe.model, name) for name in ("dtype", "load_in_4bit")}
        return recipe.model.sft.model.model_copy(update=loading)
    return load_or_train_sft(recipe, prepared.eval, cache, limit=limit)


def trained_adapter(recipe: TrainRecipe) -> LoraSection | None:
    """Return the adapter that a recipe trains: a new one, or that of `model.sft`, which is trained further."""
    return recipe.lora or (recipe.model.sft.lora if recipe.model.sft is not None else None)


def check_evaluation(args: TrainingArguments, tables: Mapping[str, TokenTable]) -> None:
    """Check that there are data to evaluate on if needed, and name the metric of the best model as it is logged."""
    check_has_data(args, tables)
    if args.eval_strategy == "no":
        return
    metric = args.metric_for_best_model
    logged = f"eval_{next(iter(tables))}_loss"
    if metric in ("loss", "eval_loss"):
        args.metric_for_best_model = logged
    elif metric is not None and not metric.removeprefix("eval_").startswith(tuple(f"{name}_" for name in tables)):
        raise RecipeError(
            f"trainer.metric_for_best_model is '{metric}'; expected loss, or the name of a metric that is logged for "
            f"one of {', '.join(tables)}, such as {logged}"
        )


def _show_plan_and_memory(
    recipe: TrainRecipe,
    args: TrainingArguments,
    model_section: ModelSection,
    tokenizer: PreTrainedTokenizerBase,
    table: PairTable,
) -> None:
    num_main, num_buffer = len(table.main_rows), len(table.buffer_rows)
    batch_size = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    show_plan(num_main, num_buffer, batch_size, count_steps(args, num_main, batch_size))
    micro_batch_pairs = (2 if num_buffer else 1) * args.per_device_train_batch_size
    memory = footprint(
        model_section,
        tokenizer,
        train_only=recipe.train_only,
        lora=trained_adapter(recipe),
        reference=recipe.reference,
        arithmetic=Arithmetic.of(args),
    )
    if memory:
        say(str(memory.estimate(max_micro_batch_tokens(table, micro_batch_pairs, recipe.layout))))


def _make_trainer(recipe: TrainRecipe, inputs: RunInputs) -> BFPOTrainer:
    return BFPOTrainer(
        load_start_model(inputs.model_section, inputs.tokenizer),
        inputs.args,
        inputs.tables.train,
        eval_dataset=inputs.tables.eval or None,
        processing_class=inputs.tokenizer,
        loss=inputs.loss,
        buffer_weight=recipe.buffer_weight,
        peft_config=lora_config(recipe.lora, revision=inputs.model_section.revision) if recipe.lora else None,
        train_only=recipe.train_only,
        layout=recipe.layout,
        router_aux_loss_coef=recipe.router_aux_loss_coef,
        reference=recipe.reference,
        cache_dir=recipe.cache_dir,
    )


def _policy(trainer: BFPOTrainer) -> CausalLM:
    return cast(CausalLM, trainer.accelerator.unwrap_model(trainer.model))


def _check_start(trainer: BFPOTrainer) -> dict[str, Any]:
    """Print what is trained, and check policy and reference before the first step."""
    copied = f"copies {trainer.reference.nbytes / 2**20:,.1f} MiB" if trainer.reference else "is in the cache"
    say(f"training {trainer.selection}; the reference {copied}")
    with timed("comparing policy and reference"):
        check = trainer.start_check = trainer.check_start()
    report_layout(trainer)
    say(
        f"start check: largest margin {check.largest_margin:g} nats (expected 0), typical completion "
        f"{check.typical_logp:,.0f} nats"
    )
    if check.advice:
        say(f"warning: {check.advice}")
    return check._asdict()


def texts_of(pairs: Iterable[PreferencePair]) -> Iterable[str]:
    """Return all texts of pairs."""
    for pair in pairs:
        yield from pair.texts()


def show_data(prepared: PreparedData, tables: Tables, loss: PairLoss) -> None:
    """Print the sources, cells and a few samples of the training data.

    Raises:
        RecipeError: If labels are to be corrected, and none are a judge's.
    """
    show_sources(part.report for part in prepared.parts)
    show_cells(prepared.train, loss.labeling if isinstance(loss, BFPO) else None, loss.beta)
    if isinstance(loss, BFPO) and loss.label_errors is not None:
        judged, corrected = tables.train.signals["judged"], loss.labeling.corrected(loss.label_errors)
        if not judged.any():
            raise RecipeError(
                "loss.label_errors corrects the labels of a judge, and all pairs have labels that are assumed or a "
                "person's (safety_label_source); leave it out"
            )
        labels = ", ".join(f"{cell} {getattr(corrected, cell):+.3g}" for cell in CELLS)
        say(f"labels of {int(judged.sum()):,} of {len(judged):,} pairs are a judge's, and corrected to {labels}")
    show_samples(tables.samples)


def count_steps(args: TrainingArguments, num_main: int, batch_size: int) -> int:
    """Return the number of optimizer steps of a run with this many main pairs, and this many in a step."""
    if args.max_steps > 0:
        return args.max_steps
    return int(-(-args.num_train_epochs * -(-num_main // batch_size) // 1))


def show_plan(num_main: int, num_buffer: int, batch_size: int, steps: int) -> None:
    """Print the pairs per step of each stream, and how often each pair is seen."""
    rows = [("main", num_main, batch_size, f"{steps * batch_size / num_main:.2f}")]
    if num_buffer:
        rows.append(("buffer", num_buffer, batch_size, f"{steps * batch_size / num_buffer:.2f}"))
    show_table(f"Plan: {steps} steps", ("stream", "pairs", "pairs per step", "times each pair is seen"), rows)


def held_out_results(metrics: dict[str, Any], name: str, table: PairTable) -> dict[str, Any]:
    """Return the results of one evaluation table by cell; the metrics of a cell without pairs are None."""
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


def show_evaluation(name: str, results: dict[str, Any]) -> None:
    """Print the held-out results of a stream by cell."""

    def formatted(value: float | None, spec: str) -> str:
        return "" if value is None else f"{value:{spec}}"

    rows = [
        (
            cell,
            metrics["pairs"] or "empty",
            formatted(metrics["margin"], "+.2f"),
            formatted(metrics["target_gap"], "+.2f"),
            formatted(metrics["sign_agreement"], ".1%"),
        )
        for cell, metrics in results["cells"].items()
    ]
    columns = ("cell", "pairs", "mean margin (nats)", "margin - target", "sign agreement")
    show_table(f"Held-out {name} pairs: {results['pairs']}, loss {results['loss']:.4g}", columns, rows)
