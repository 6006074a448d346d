"""The work of `bfpo sft`, and models fine-tuned on the spot for a preference run."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import PartialState
from filelock import FileLock, Timeout
from transformers import PreTrainedTokenizerBase

from bfpo.config.recipes import ModelSection, SftRecipe, Source, TrainRecipe
from bfpo.core.files import content_hash, file_hash
from bfpo.core.pairs import PreferencePair
from bfpo.core.terminal import progress, say
from bfpo.data.demonstrations import DemonstrationPart, prepare_demonstrations
from bfpo.data.inspect import show_samples, show_sources
from bfpo.data.rows import local_files
from bfpo.data.table import Example, TokenTable, sampled_rows, token_table
from bfpo.data.tokenize import Encoder, check_special_tokens, decoded_sample
from bfpo.errors import RecipeError
from bfpo.model.lora import add_adapter, lora_config
from bfpo.training.arguments import launched_processes, training_arguments
from bfpo.training.estimate import estimate, most_tokens
from bfpo.training.manifest import versions
from bfpo.training.output import RunRecord, begin_output, main_process_renames, save_final, say_layout
from bfpo.training.sft import SFTTrainer
from bfpo.training.start import demonstration_texts, start_model, start_tokenizer


def run_sft(
    recipe: SftRecipe,
    *,
    dry_run: bool = False,
    limit: int | None = None,
    evaluated: frozenset[str] = frozenset(),
    cache: Path | None = None,
) -> dict[str, Any]:
    """Fine-tune on completions as a recipe says.

    Args:
        recipe: What to do.
        dry_run: Stop before any model is loaded or trained; everything else is done and shown.
        limit: Take at most so many completions of each source.
        evaluated: Keys of prompts that must not be trained on.
        cache: Folder for what later runs may use again; default `cache` beside the output folder.

    Returns:
        What `run.json` holds; empty for a dry run.
    """
    began, cpu_began = time.time(), time.process_time()
    options = dict(recipe.trainer)
    resume = options.pop("resume_from_checkpoint", None)
    args = training_arguments(options)
    parts = prepare_demonstrations(recipe.data, holdout=recipe.holdout, limit=limit, evaluated=evaluated)
    tokenizer = start_tokenizer(
        recipe.model, recipe.text, lambda: demonstration_texts(item for part in parts for item in part.train)
    )
    cache = cache or Path(str(args.output_dir)).parent / "cache"
    train, held_out = _tokenize(recipe, parts, tokenizer, None if dry_run else cache / "tokens")
    show_sources(part.report for part in parts)
    show_samples([decoded_sample(train[row], tokenizer) for row in range(min(3, len(train)))])
    needed = estimate(
        recipe.model,
        tokenizer,
        train_only=recipe.train_only,
        lora=recipe.lora,
        reference=None,
        micro_batch_tokens=most_tokens(train, args.per_device_train_batch_size, recipe.layout),
    )
    if needed:
        say(str(needed))
    if dry_run:
        say("dry run: nothing was trained")
        return {}

    # A model that can't be loaded leaves an earlier run where it is.
    model = start_model(recipe.model, tokenizer)
    out = begin_output(Path(str(args.output_dir)), recipe, resuming=bool(resume))
    if recipe.lora is not None:
        adapter = lora_config(recipe.lora, revision=recipe.model.revision)
        model = add_adapter(model, adapter, seed=args.seed)
    trainer = SFTTrainer(
        model,
        args,
        train,
        held_out,
        tokenizer,
        train_only=recipe.train_only,
        layout=recipe.layout,
    )
    record = RunRecord("sft", recipe, out, trainer)
    say(f"training {trainer.selection} on {len(train)} completions")
    say_layout(trainer)
    result = record.train(resume)
    evaluation = trainer.evaluate() if held_out else {}
    save_final(trainer, out)
    if evaluation:
        loss = evaluation["eval_loss"]
        say(f"held-out completions: {loss:.3f} nats per token, perplexity {math.exp(min(loss, 700)):,.1f}")
    sources = [part.report.to_json() for part in parts]
    return record.finish(
        sources,
        data=sources,
        trained={"parameters": trainer.selection.trained, "of": trainer.selection.total},
        steps=result.global_step,
        train_loss=result.training_loss,
        evaluation={name: value for name, value in evaluation.items() if name == "eval_loss"},
        wall_seconds=round(time.time() - began, 1),
        cpu_seconds=round(time.process_time() - cpu_began, 1),
    )


def fine_tuned_on_the_spot(recipe: TrainRecipe, evaluated: list[PreferencePair], cache: Path) -> ModelSection:
    """Return the model of a recipe's `model.sft` section, made now or found in the cache.

    The cache key is the content: the section, the bytes of its local files, the prompts it must not see, the number
    of processes and the versions. Prompts that the recipe evaluates on are left out of the training, and counted.

    Args:
        recipe: With `model.sft`.
        evaluated: Pairs the recipe will evaluate on.
        cache: Folder of such models.
    """
    sft = nested_sft(recipe)
    keys = frozenset(pair.prompt_key for pair in evaluated)
    sources = [*sft.data, *((sft.model.new and sft.model.new.texts) or [])]
    bytes_of = [_bytes_of(source) for source in sources]
    cache_key = content_hash(sft.model_dump(mode="json"), bytes_of, sorted(keys), launched_processes(), versions())
    folder = cache / f"sft-{cache_key}"
    if folder.exists():
        say(f"the fine-tuned model is in the cache: {folder}")
    else:
        say(f"fine-tuning the model to start from; it will be cached as {folder}")
        unfinished = folder.with_name(f"{folder.name}.unfinished")
        trainer = {**sft.trainer, "output_dir": str(unfinished), "resume_from_checkpoint": True}
        with _alone(folder):
            run_sft(sft.model_copy(update={"trainer": trainer}), evaluated=keys, cache=cache)
            main_process_renames(unfinished, folder)
    return recipe.model.model_copy(update={"sft": None, "path": str(folder)})


def nested_sft(recipe: TrainRecipe) -> SftRecipe:
    """Return the recipe's `model.sft`, holding out at least what the recipe holds out."""
    sft = recipe.model.sft
    assert sft is not None
    return sft.model_copy(update={"holdout": max(sft.holdout, recipe.holdout)})


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Make a folder of the cache while no other run does; of a run's processes the main one sees to it."""
    if not PartialState().is_main_process:
        yield
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder.with_name(f".{folder.name}.lock"), timeout=0):
            if folder.exists():
                raise RecipeError(f"model.sft: another run has just made {folder}; start again, and it is taken")
            yield
    except Timeout:
        raise RecipeError(
            f"model.sft: another run is making {folder}; wait for it, or fine-tune once with `bfpo sft` and name the "
            "result as model.path"
        ) from None


def _bytes_of(source: Source) -> list[str]:
    return [file_hash(file) for file in local_files(source)]


def _tokenize(
    recipe: SftRecipe, parts: list[DemonstrationPart], tokenizer: PreTrainedTokenizerBase, cache: Path | None
) -> tuple[TokenTable, TokenTable | None]:
    encoder = Encoder(tokenizer, recipe.text, cache)
    found: tuple[tuple[list[str], list[Example]], tuple[list[str], list[Example]]] = (([], []), ([], []))
    with progress("tokenizing", sum(len(part.train) + len(part.eval) for part in parts)) as advance:
        for part in parts:
            for items, (row_ids, examples) in zip((part.train, part.eval), found, strict=True):
                kept, more = encoder.encode(items, part.report, advance)
                row_ids += [item.row_id for item in kept]
                examples += more
            part.report.check_cap(recipe.max_dropped)
    (train_ids, train), (eval_ids, held_out) = found
    check_special_tokens(train, tokenizer)
    if not held_out:
        return token_table(train, train_ids), None
    rows = sampled_rows(range(len(held_out)), recipe.max_eval)
    if len(rows) < len(held_out):
        say(f"evaluating on a sample of {len(rows):,} of {len(held_out):,} completions (max_eval)")
    return token_table(train, train_ids), token_table(
        [held_out[row] for row in rows], [eval_ids[row] for row in rows]
    )
