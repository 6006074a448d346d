"""The work of `bfpo score train`: from a recipe to a score model, one checkpoint for each head."""

import shutil
import time
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from accelerate import PartialState
from peft import PeftModel
from transformers import PreTrainedTokenizerBase, TrainingArguments

from bfpo.config.recipes import ScoreRecipe
from bfpo.core.files import write_json
from bfpo.core.pairs import PreferencePair
from bfpo.core.terminal import progress, say, timed
from bfpo.data.decode import decoded_sample
from bfpo.data.inspect import show_cells, show_samples, show_sources
from bfpo.data.prepare import PreparedData, prepare, require_labels
from bfpo.data.table import Example, ScoreTable, sampled_rows, score_table
from bfpo.errors import DataError
from bfpo.judging.score_quality import cost_quality, reward_quality, show_quality
from bfpo.judging.score_texts import encode_scored
from bfpo.judging.score_trainer import ScoreTrainer
from bfpo.model.load import empty_model
from bfpo.model.lora import CausalLM, add_adapter, lora_config, unwrap_adapter
from bfpo.model.score_heads import add_score_heads, padding_id, save_score_head, with_heads
from bfpo.training.arguments import for_any_machine, training_arguments
from bfpo.training.clock import record_clock, template_clock
from bfpo.training.estimate import Arithmetic, footprint, max_micro_batch_tokens
from bfpo.training.micro_batch import fit_if_auto
from bfpo.training.output import check_output, exclusive_output, report_layout, start_run
from bfpo.training.preflight import check_against_model
from bfpo.training.run import check_evaluation, count_steps, show_plan, texts_of
from bfpo.training.start import check_vocabulary, load_start_model, load_start_tokenizer


class _HeldOut(NamedTuple):
    """Held-out pairs of a stream, and their tokens."""

    table: ScoreTable
    prompts: list[str]


def run_score(recipe: ScoreRecipe, *, dry_run: bool = False, limit: int | None = None) -> dict[str, Any]:
    """Train score heads as a recipe says.

    Args:
        recipe: Recipe of the run.
        dry_run: Whether to stop before weights are loaded or trained; everything else is done and shown.
        limit: Maximum number of pairs of each source.

    Returns:
        Content of `run.json`; for a dry run, of `data_manifest.json`.

    Raises:
        DataError: If the data are malformed, or have no labels that a cost could learn from.
        ModelError: If the model can't be loaded, or can't have score heads.
        RecipeError: If a value of the recipe can't be used.
    """
    options = for_any_machine(recipe.trainer) if dry_run else dict(recipe.trainer)
    resume = options.pop("resume_from_checkpoint", None)
    args = training_arguments(options)
    check_against_model(recipe)
    add_score_heads(empty_model(recipe.model), len(recipe.heads.names), pad_id=None, seed=0)
    out = Path(str(args.output_dir))
    check_output(out, recipe.model.path)
    with nullcontext() if dry_run else exclusive_output(out):
        return _run(recipe, args, resume, out, dry_run=dry_run, limit=limit)


def _run(
    recipe: ScoreRecipe,
    args: TrainingArguments,
    resume: str | bool | None,
    out: Path,
    *,
    dry_run: bool,
    limit: int | None,
) -> dict[str, Any]:
    start_time, start_cpu_time = time.time(), time.process_time()
    prepared = prepare(recipe, limit=limit, log=say)
    _check_labels(recipe, prepared)
    tokenizer = load_start_tokenizer(recipe.model, recipe.text, lambda: texts_of(prepared.train))
    check_vocabulary(recipe.model, tokenizer)
    clock = template_clock(tokenizer.chat_template, out, resume)
    examples = _encode(recipe, prepared, tokenizer, clock)
    show_sources(part.report for part in prepared.parts)
    show_cells(prepared.train, None, 1.0)
    show_samples([decoded_sample(example, tokenizer) for example in examples[0][:3]])
    table = score_table(examples[0], prepared.train)
    held = _held_out(recipe, prepared.eval, examples[1])
    eval_tables = {name: part.table for name, part in held.items()}
    check_evaluation(args, eval_tables)
    check_vocabulary(recipe.model, tokenizer, [table, *eval_tables.values()])
    _show_plan(recipe, args, tokenizer, table)
    manifest = prepared.manifest()
    if dry_run:
        say("dry run: nothing was trained")
        return manifest

    scorer = add_score_heads(
        load_start_model(recipe.model, tokenizer),
        len(recipe.heads.names),
        pad_id=padding_id(tokenizer),
        seed=args.seed,
    )
    trainer = ScoreTrainer(
        _with_adapter(scorer, recipe, args),
        args,
        table,
        eval_tables,
        tokenizer,
        heads=recipe.heads.names,
        regularization=recipe.regularization,
        center_rewards_coefficient=recipe.center_rewards_coefficient,
        buffer_weight=recipe.buffer_weight,
        train_only=recipe.train_only,
        layout=recipe.layout,
    )
    micro_batch = fit_if_auto(trainer, recipe.trainer, resume)
    record, checkpoint = start_run("score train", recipe, trainer, resume)
    if PartialState().is_main_process:
        write_json(out / "data_manifest.json", manifest)
    record_clock(clock, out)
    say(f"training {trainer.selection} for {' and '.join(recipe.heads.names)}")
    report_layout(trainer)
    result = record.train(checkpoint)
    with timed("evaluating the held-out pairs"):
        evaluation = _evaluate(trainer, held)
    # After the evaluation, because it merges the adapter.
    _save_heads(trainer, tokenizer, out)
    run = record.finish(
        manifest["sources"],
        data={"train": manifest["train"], "eval": manifest["eval"]},
        trained={"parameters": trainer.selection.trained, "of": trainer.selection.total},
        steps=result.global_step,
        train_loss=result.training_loss,
        evaluation=evaluation,
        **micro_batch,
        wall_seconds=round(time.time() - start_time, 1),
        cpu_seconds=round(time.process_time() - start_cpu_time, 1),
    )
    for name, results in evaluation.items():
        show_quality(name, results)
    say("\nuse as judges, for example in `bfpo score apply`:")
    for name in recipe.heads.names:
        say(f"  --{name} {name}:{out / name}")
    return run


def _check_labels(recipe: ScoreRecipe, prepared: PreparedData) -> None:
    """Check that a cost has labels to learn from."""
    if not recipe.heads.cost:
        return
    pairs = [pair for pair in (*prepared.train, *prepared.eval) if pair.provenance.stream != "buffer"]
    require_labels(pairs)
    labels = {label for pair in pairs for label in pair.labels or ()}
    if len(labels) == 1:
        raise DataError(
            f"all answers of the main stream are labeled {'safe' if True in labels else 'unsafe'}, so a cost has "
            "nothing to learn; add pairs with other labels, or set heads.cost to false"
        )


def _encode(
    recipe: ScoreRecipe, prepared: PreparedData, tokenizer: PreTrainedTokenizerBase, clock: Any
) -> tuple[list[Example], list[Example]]:
    """Return the token ids of the pairs to train and to evaluate on; pairs that don't fit are dropped and counted."""
    train: list[Example] = []
    held_out: list[Example] = []
    with progress("tokenizing", len(prepared.train) + len(prepared.eval)) as advance:
        for part in prepared.parts:
            encode = partial(
                encode_scored,
                tokenizer=tokenizer,
                report=part.report,
                max_length=recipe.text.max_length,
                clock=clock,
                advance=advance,
            )
            part.train, examples = encode(part.train)
            train += examples
            part.eval, examples = encode(part.eval)
            held_out += examples
            part.report.check_cap(recipe.max_dropped)
    if not any(pair.provenance.stream == "main" for pair in prepared.train):
        raise DataError("no pairs of the main stream are left to train on")
    return train, held_out


def _held_out(recipe: ScoreRecipe, pairs: Sequence[PreferencePair], examples: list[Example]) -> dict[str, _HeldOut]:
    held = {}
    for stream in ("main", "buffer"):
        in_stream = [row for row, pair in enumerate(pairs) if pair.provenance.stream == stream]
        rows = sampled_rows(in_stream, recipe.max_eval)
        if len(rows) < len(in_stream):
            say(f"evaluating on a sample of {len(rows):,} of {len(in_stream):,} {stream} pairs (max_eval)")
        if rows and (stream == "main" or recipe.heads.reward):
            chosen = [pairs[row] for row in rows]
            table = score_table([examples[row] for row in rows], chosen)
            held[stream] = _HeldOut(table, [pair.prompt_key for pair in chosen])
    return held


def _show_plan(
    recipe: ScoreRecipe, args: TrainingArguments, tokenizer: PreTrainedTokenizerBase, table: ScoreTable
) -> None:
    num_buffer = int(table.is_buffer.sum())
    batch_size = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    num_main = len(table) - num_buffer
    show_plan(num_main, num_buffer, batch_size, count_steps(args, num_main, batch_size))
    micro_batch_pairs = (2 if num_buffer else 1) * args.per_device_train_batch_size
    memory = footprint(
        recipe.model,
        tokenizer,
        train_only=with_heads(recipe.train_only),
        lora=recipe.lora,
        reference=None,
        arithmetic=Arithmetic.of(args),
        heads=len(recipe.heads.names),
    )
    if memory:
        say(str(memory.estimate(max_micro_batch_tokens(table, micro_batch_pairs, recipe.layout))))


def _with_adapter(scorer: CausalLM, recipe: ScoreRecipe, args: TrainingArguments) -> CausalLM:
    if recipe.lora is None:
        return scorer
    return add_adapter(scorer, lora_config(recipe.lora, task_type="SEQ_CLS"), seed=args.seed)


def _evaluate(trainer: ScoreTrainer, held: dict[str, _HeldOut]) -> dict[str, Any]:
    metrics = trainer.evaluate() if held else {}
    evaluation: dict[str, Any] = {}
    for stream, (table, prompts) in held.items():
        scores = dict(zip(trainer.heads, np.moveaxis(trainer.scores(table), -1, 0), strict=True))
        results: dict[str, Any] = {"pairs": len(table), "loss": metrics[f"eval_{stream}_loss"]}
        if "reward" in scores:
            results["reward"] = reward_quality(scores["reward"], prompts)
        if "cost" in scores and stream == "main":
            results["cost"] = cost_quality(scores["cost"], table.signs, prompts)
        evaluation[stream] = results
    return evaluation


def _save_heads(trainer: ScoreTrainer, tokenizer: PreTrainedTokenizerBase, out: Path) -> None:
    """Save each head as a checkpoint of its own; the folder of a head never contains an incomplete file."""
    state = PartialState()
    model = trainer.accelerator.unwrap_model(trainer.model)
    if state.is_main_process:
        scorer = model.merge_and_unload() if isinstance(model, PeftModel) else unwrap_adapter(model)
        for index, name in enumerate(trainer.heads):
            with timed(f"saving the {name} head in {out / name}"):
                temporary = out / f".{name}"
                shutil.rmtree(temporary, ignore_errors=True)
                save_score_head(scorer, index, name, tokenizer, temporary)
                # A resumed run may have saved it before.
                shutil.rmtree(out / name, ignore_errors=True)
                temporary.rename(out / name)
    state.wait_for_everyone()
