"""The work of `bfpo sft`, and of fine-tuning a start model for a preference run (`model.sft`)."""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from accelerate import PartialState
from filelock import FileLock, Timeout
from transformers import PreTrainedTokenizerBase, TrainingArguments

from bfpo.config.recipes import ModelSection, SftRecipe, TrainRecipe
from bfpo.core.environment import versions
from bfpo.core.files import content_hash, file_hash, file_hashes
from bfpo.core.pairs import PreferencePair
from bfpo.core.terminal import progress, say, timed
from bfpo.data.decode import decoded_sample
from bfpo.data.demonstrations import DemonstrationPart, prepare_demonstrations
from bfpo.data.inspect import show_samples, show_sources
from bfpo.data.rows import local_files
from bfpo.data.table import Example, TokenTable, sampled_rows, token_table
from bfpo.data.template import chat_template
from bfpo.data.tokenize import Encoder, check_special_tokens
from bfpo.errors import RecipeError
from bfpo.model.gguf import gguf_metadata
from bfpo.model.load import add_shared
from bfpo.model.lora import CausalLM, add_adapter, lora_config
from bfpo.model.shared_adapter import find_shared
from bfpo.training.arguments import check_has_data, for_any_machine, launched_processes, training_arguments
from bfpo.training.checkpoints import check_marked, write_mark
from bfpo.training.clock import record_clock, template_clock
from bfpo.training.estimate import Arithmetic, footprint, max_micro_batch_tokens
from bfpo.training.micro_batch import fit_if_auto
from bfpo.training.output import (
    check_output,
    exclusive_output,
    rename_on_main_process,
    report_layout,
    save_final,
    start_run,
)
from bfpo.training.preflight import check_against_model
from bfpo.training.sft import SFTTrainer
from bfpo.training.start import check_vocabulary, demonstration_texts, load_start_model, load_start_tokenizer


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
        recipe: Recipe of the run.
        dry_run: Whether to stop before a model is loaded or trained; everything else is done and shown.
        limit: Maximum number of completions of each source.
        evaluated: Keys of prompts that must not be trained on.
        cache: Folder of data that later runs can reuse; by default `cache` beside the output folder.

    Returns:
        Content of `run.json`; empty for a dry run.
    """
    options = for_any_machine(recipe.trainer) if dry_run else dict(recipe.trainer)
    resume = options.pop("resume_from_checkpoint", None)
    args = training_arguments(options)
    check_against_model(recipe)
    check_output(Path(str(args.output_dir)), recipe.model.path)
    with nullcontext() if dry_run else exclusive_output(Path(str(args.output_dir))):
        return _run(recipe, args, resume, dry_run=dry_run, limit=limit, evaluated=evaluated, cache=cache)


def _run(
    recipe: SftRecipe,
    args: TrainingArguments,
    resume: str | bool | None,
    *,
    dry_run: bool,
    limit: int | None,
    evaluated: frozenset[str],
    cache: Path | None,
) -> dict[str, Any]:
    start_time, start_cpu_time = time.time(), time.process_time()
    parts = prepare_demonstrations(
        recipe.data,
        holdout=recipe.holdout,
        limit=limit,
        evaluated=evaluated,
        ignored_keys=recipe.text.ignore_message_keys,
    )
    tokenizer = load_start_tokenizer(
        recipe.model,
        recipe.text,
        lambda: demonstration_texts(demonstration for part in parts for demonstration in part.train),
    )
    check_vocabulary(recipe.model, tokenizer)
    cache = cache or Path(str(args.output_dir)).parent / "cache"
    clock = template_clock(tokenizer.chat_template, Path(str(args.output_dir)), resume)
    encoder = Encoder(tokenizer, recipe.text, None if dry_run else cache / "tokens", clock)
    train, held_out = _tokenize(recipe, parts, encoder)
    check_has_data(args, held_out)
    _check_best_metric(args)
    sources = [part.report for part in parts]
    show_sources(sources)
    show_samples([decoded_sample(train[row], tokenizer) for row in range(min(3, len(train)))])
    check_vocabulary(recipe.model, tokenizer, [train, *([held_out] if held_out else [])])
    _show_memory(recipe, args, tokenizer, train)
    if dry_run:
        say("dry run: nothing was trained")
        return {}

    model = _load_model(recipe, tokenizer, seed=args.seed)
    trainer = _make_trainer(recipe, args, model, tokenizer, train, held_out)
    micro_batch = fit_if_auto(trainer, recipe.trainer, resume)
    record, checkpoint = start_run("sft", recipe, trainer, resume)
    out = Path(str(args.output_dir))
    record_clock(clock, out)
    say(f"training {trainer.selection} on {len(train)} completions")
    report_layout(trainer)
    result = record.train(checkpoint)
    # First: evaluating may take long.
    save_final(trainer, out)
    with timed("evaluating the held-out completions"):
        metrics = trainer.evaluate() if held_out else {}
    if metrics:
        loss = metrics["eval_loss"]
        say(f"held-out completions: {loss:.3f} nats per token, perplexity {math.exp(min(loss, 700)):,.1f}")
    reports = [report.to_json() for report in sources]
    gguf = gguf_metadata(recipe.model.path, recipe.model.revision)
    return record.finish(
        reports,
        **({"model": {"path": recipe.model.path} | gguf} if gguf else {}),
        **micro_batch,
        data=reports,
        trained={"parameters": trainer.selection.trained, "of": trainer.selection.total},
        steps=result.global_step,
        train_loss=result.training_loss,
        evaluation={name: value for name, value in metrics.items() if name == "eval_loss"},
        wall_seconds=round(time.time() - start_time, 1),
        cpu_seconds=round(time.process_time() - start_cpu_time, 1),
    )


def _check_best_metric(args: TrainingArguments) -> None:
    metric = args.metric_for_best_model
    if args.eval_strategy != "no" and metric not in (None, "loss", "eval_loss"):
        raise RecipeError(
            f"trainer.metric_for_best_model is '{metric}'; expected eval_loss, the metric of held-out completions"
        )


def _load_model(recipe: SftRecipe, tokenizer: PreTrainedTokenizerBase, *, seed: int) -> CausalLM:
    """Return the start model with the recipe's new adapter, if there is one."""
    model = load_start_model(recipe.model, tokenizer)
    if recipe.lora is None:
        return model
    adapted = add_adapter(model, lora_config(recipe.lora, revision=recipe.model.revision), seed=seed)
    if recipe.shared_adapter is not None:
        add_shared(adapted, find_shared(recipe.shared_adapter))
    return adapted


def _make_trainer(
    recipe: SftRecipe,
    args: TrainingArguments,
    model: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    train: TokenTable,
    held_out: TokenTable | None,
) -> SFTTrainer:
    return SFTTrainer(
        model,
        args,
        train,
        held_out,
        tokenizer,
        train_only=recipe.train_only,
        layout=recipe.layout,
        router_aux_loss_coef=recipe.router_aux_loss_coef,
    )


def _show_memory(
    recipe: SftRecipe, args: TrainingArguments, tokenizer: PreTrainedTokenizerBase, table: TokenTable
) -> None:
    memory = footprint(
        recipe.model,
        tokenizer,
        train_only=recipe.train_only,
        lora=recipe.lora,
        reference=None,
        arithmetic=Arithmetic.of(args),
    )
    if memory:
        tokens = max_micro_batch_tokens(table, args.per_device_train_batch_size, recipe.layout)
        say(str(memory.estimate(tokens)))


def load_or_train_sft(
    recipe: TrainRecipe, evaluated: Sequence[PreferencePair], cache: Path, *, limit: int | None = None
) -> ModelSection:
    """Return the model of a recipe's `model.sft` section, from the cache or trained now.

    The cache key is a hash of the section, the content of its local files and of a local start model, the prompts it
    must not see, the limit, the number of processes and the versions. Prompts that the recipe evaluates on are left
    out of the training, and counted.

    Args:
        recipe: Recipe with `model.sft`.
        evaluated: Pairs that the recipe evaluates on.
        cache: Folder of cached models.
        limit: Maximum number of completions of each source.
    """
    sft = nested_sft(recipe)
    prompt_keys = frozenset(pair.prompt_key for pair in evaluated)
    sources = [*sft.data, *((sft.model.new and sft.model.new.texts) or [])]
    file_hashes = [[file_hash(file) for file in local_files(source)] for source in sources]
    # A file with a chat template, a GGUF file and a local model are hashed like the data.
    template = chat_template(sft.text)
    templates = [] if template == sft.text.chat_template else [template]
    gguf = gguf_metadata(sft.model.path, sft.model.revision)
    cache_key = content_hash(
        sft.model_dump(mode="json"),
        file_hashes,
        sorted(prompt_keys),
        launched_processes(),
        versions(),
        *gguf.values(),
        *templates,
        *_model_hashes(sft.model.path),
        *([] if limit is None else [limit]),
    )
    folder = cache / f"sft-{cache_key}"
    if folder.exists():
        say(f"the fine-tuned model is in the cache: {folder}")
        check_marked(folder, remedy="delete that folder, and the model is fine-tuned again")
    else:
        say(f"fine-tuning the model to start from; it will be cached as {folder}")
        unfinished = folder.with_name(f"{folder.name}.unfinished")
        trainer = {**sft.trainer, "output_dir": str(unfinished), "resume_from_checkpoint": True}
        with _exclusive(folder):
            nested = sft.model_copy(update={"trainer": trainer})
            run_sft(nested, evaluated=prompt_keys, cache=cache, limit=limit)
            if PartialState().is_main_process:
                files = [file for file in sorted(unfinished.iterdir()) if file.is_file()]
                write_mark(unfinished, files, {})
            rename_on_main_process(unfinished, folder)
    return recipe.model.model_copy(update={"sft": None, "path": str(folder)})


def _model_hashes(path: str | None) -> list[dict[str, str]]:
    """Return the hashes of the files of a local model; a hub id is known by its revision."""
    if path is None or not Path(path).is_dir():
        return []
    files = (file for pattern in ("*.json", "*.safetensors", "*.bin") for file in Path(path).glob(pattern))
    return [file_hashes(Path(path), sorted(file.name for file in files))]


def nested_sft(recipe: TrainRecipe) -> SftRecipe:
    """Return the recipe's `model.sft`, with at least the recipe's own holdout."""
    sft = recipe.model.sft
    assert sft is not None
    return sft.model_copy(update={"holdout": max(sft.holdout, recipe.holdout)})


@contextmanager
def _exclusive(folder: Path) -> Iterator[None]:
    """Keep other runs from making the same folder of the cache; the main process holds the lock for the others."""
    if not PartialState().is_main_process:
        yield
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder.with_name(f".{folder.name}.lock"), timeout=0):
            if folder.exists():
                raise RecipeError(f"model.sft: another run has just made {folder}; start again to use it")
            yield
    except Timeout:
        raise RecipeError(
            f"model.sft: another run is making {folder}; wait for it, or fine-tune once with `bfpo sft` and set "
            "model.path to the result"
        ) from None


def _tokenize(
    recipe: SftRecipe, parts: list[DemonstrationPart], encoder: Encoder
) -> tuple[TokenTable, TokenTable | None]:
    """Return the tables of training and held-out completions; the latter is None if nothing is held out."""
    train: tuple[list[str], list[Example]] = ([], [])
    held_out: tuple[list[str], list[Example]] = ([], [])
    with progress("tokenizing", sum(len(part.train) + len(part.eval) for part in parts)) as advance:
        for part in parts:
            for demonstrations, (row_ids, all_examples) in ((part.train, train), (part.eval, held_out)):
                encoded, examples = encoder.encode(demonstrations, part.report, advance)
                row_ids += [demonstration.row_id for demonstration in encoded]
                all_examples += examples
            part.report.check_cap(recipe.max_dropped)
    train_ids, train_examples = train
    eval_ids, eval_examples = held_out
    check_special_tokens(train_examples, encoder.tokenizer)
    table = token_table(train_examples, train_ids)
    if not eval_examples:
        return table, None
    rows = sampled_rows(range(len(eval_examples)), recipe.max_eval)
    if len(rows) < len(eval_examples):
        say(f"evaluating on a sample of {len(rows):,} of {len(eval_examples):,} completions (max_eval)")
    return table, token_table([eval_examples[row] for row in rows], [eval_ids[row] for row in rows])
