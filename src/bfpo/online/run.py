"""The work of `bfpo online`: from a recipe to a checkpoint and its metadata."""

import logging
import time
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from bfpo.core.environment import installed_version, versions
from bfpo.core.files import content_hash, write_json
from bfpo.core.samples import Judge
from bfpo.core.terminal import say, warn
from bfpo.errors import MissingExtra
from bfpo.judging.open import open_judge
from bfpo.judging.refusal_rule import kinds_of
from bfpo.model.lora import CausalLM, lora_config, without_checkpointing_warning
from bfpo.model.selective import select_parameters
from bfpo.online.callbacks import HackingStop, StateFile, format_online_metrics
from bfpo.online.prompts import prompt_table
from bfpo.online.recipe import OnlineRecipe
from bfpo.online.scores import Scorers
from bfpo.online.start import check_reference, check_start
from bfpo.online.state import RunState, read_state
from bfpo.online.telemetry import without_telemetry
from bfpo.online.value import CombinedValue
from bfpo.training.checkpoints import (
    CompletionMark,
    check_same_run,
    check_state,
    find_checkpoint,
    optimizer_settings,
    read_mark,
    say_resuming,
    start_fingerprint,
    unmark_after,
)
from bfpo.training.output import (
    RunRecord,
    check_output,
    exclusive_output,
    goes_on,
    prepare_output,
    save_final,
)
from bfpo.training.reference_pass import on_device
from bfpo.training.start import load_start_model

if TYPE_CHECKING:
    from trl import RLOOTrainer  # type: ignore[attr-defined]

    from bfpo.online.plan import OnlineInputs


class RunJudges(NamedTuple):
    """The judges of a run.

    Args:
        reward: Scorer of helpfulness.
        cost: Scorer of safety; the same object as `reward` if their specs are equal.
        watch: Held-out judge; None without one.
    """

    reward: Judge
    cost: Judge
    watch: Judge | None

    @property
    def scorers(self) -> dict[str, str]:
        """Name and revision of the scorers, by role."""
        return {"reward": _full_name(self.reward), "cost": _full_name(self.cost)}


def run_online(recipe: OnlineRecipe, *, dry_run: bool = False) -> dict[str, Any]:
    """Train a policy on scores of its own samples, as a recipe says.

    Args:
        recipe: Recipe of the run.
        dry_run: Whether to stop before a model or a judge is loaded; everything else is done and shown.

    Returns:
        Content of `run.json`; empty for a dry run.

    Raises:
        MissingExtra: If TRL isn't installed.
        TrainingError: If too many samples have no score, or there is nothing to learn.
    """
    if find_spec("trl") is None:
        raise MissingExtra("bfpo online", "trl", "online")
    from bfpo.online.plan import check_online, prepare_inputs

    recipe, args, resume = check_online(recipe)
    out = Path(str(args.output_dir))
    check_output(out, recipe.model.path)
    with nullcontext() if dry_run else exclusive_output(out), without_telemetry(), without_checkpointing_warning():
        inputs = prepare_inputs(recipe, args, resume)
        if dry_run:
            say("dry run: nothing was sampled or trained")
            return {}
        return _train(inputs, out)


def _train(inputs: "OnlineInputs", out: Path) -> dict[str, Any]:
    start_time, start_cpu_time = time.time(), time.process_time()
    recipe = inputs.recipe
    judges = _open_judges(inputs)
    scorers = Scorers(judges.reward, judges.cost, inputs.combiner.reads)
    model = load_start_model(recipe.model, inputs.tokenizer)
    selection = select_parameters(model, None)
    settings = _resume_settings(inputs, judges, model)
    checkpoint = find_checkpoint(out, inputs.resume)
    start, state = None, RunState()
    if checkpoint is None:
        with on_device(model, inputs.args.device):
            start = check_start(
                model,
                inputs.tokenizer,
                inputs.prompts,
                scorers,
                inputs.combiner,
                inputs.sampling,
                max_missing=recipe.max_missing,
            )
    else:
        check_same_run(checkpoint, settings)
        check_state(checkpoint)
        state = read_state(checkpoint)
        say_resuming(checkpoint)
    prepare_output(out, recipe, resuming=goes_on(out, inputs.resume, checkpoint))
    unmark_after(out, 0 if checkpoint is None else read_mark(checkpoint)["step"])
    sources = [_as_data_source(source) for source in inputs.sources]
    if inputs.args.process_index == 0:
        # Evaluations read here which judges are circular.
        label_sources = dict.fromkeys(judges.scorers.values(), len(inputs.prompts))
        write_json(out / "data_manifest.json", {"sources": sources, "label_sources": label_sources})
    value = _make_value(inputs, judges, scorers, state, model)
    trainer = _make_trainer(inputs, value, model)
    policy = cast(CausalLM, trainer.accelerator.unwrap_model(trainer.model))
    if recipe.lora is not None:
        selection = select_parameters(policy, None)
    say(f"training {selection} on scores of {' and '.join(dict.fromkeys(judges.scorers.values()))}")
    record = RunRecord("online", recipe, out, trainer, show=format_online_metrics)
    for callback in (
        HackingStop(value),
        StateFile(value),
        CompletionMark(lambda: settings, keep=inputs.args.save_total_limit),
    ):
        trainer.add_callback(callback)
    inputs.args.save_total_limit = None
    result = record.train(checkpoint)
    if "ref" in getattr(policy, "peft_config", {}):
        # TRL's copy of an adapter that is trained further; it would be saved with the adapter.
        policy.delete_adapter("ref")
    save_final(trainer, out)
    run = record.finish(
        sources,
        versions=versions() | {"trl": installed_version("trl")},
        scorers=judges.scorers,
        watch=None if judges.watch is None else _full_name(judges.watch),
        start_check=None if start is None else start._asdict(),
        trained={"parameters": selection.trained, "of": selection.total},
        steps=result.global_step,
        train_loss=result.training_loss,
        combiner=state.combiner,
        samples=state.samples,
        scorer_calls=state.scorer_calls,
        missing=state.missing,
        stopped_early=value.hacking,
        wall_seconds=round(time.time() - start_time, 1),
        cpu_seconds=round(time.process_time() - start_cpu_time, 1),
    )
    if value.hacking is not None:
        warn(f"stopped at step {result.global_step}: {value.hacking}. Evaluate a checkpoint from before it")
    for reason, count in sorted(state.missing.items()):
        say(f"{count:,} of {state.samples:,} samples were left out: {reason}")
    say(f"\nsaved to {out}")
    return run


def _open_judges(inputs: "OnlineInputs") -> RunJudges:
    recipe, kinds = inputs.recipe, kinds_of(inputs.prompts)

    def opened(spec: str) -> Judge:
        return open_judge(spec, server=recipe.judge_server, kinds=kinds)

    reward = opened(recipe.reward)
    cost = reward if recipe.cost == recipe.reward else opened(recipe.cost)
    return RunJudges(reward, cost, None if recipe.watch is None else opened(recipe.watch.judge))


def _full_name(judge: Judge) -> str:
    return f"{judge.name}@{judge.revision}"


def _resume_settings(inputs: "OnlineInputs", judges: RunJudges, model: CausalLM) -> dict[str, Any]:
    """Return the settings that must not change when a run is resumed."""
    args = inputs.args
    return {
        "world_size": args.world_size,
        "per_device_train_batch_size": args.per_device_train_batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "num_generations": args.num_generations,
        "seed": args.seed,
        "beta": args.beta,
        "temperature": args.temperature,
        "max_completion_length": args.max_completion_length,
        "prompts": content_hash([(prompt.prompt_id, prompt.prompt) for prompt in inputs.prompts]),
        "scorers": judges.scorers,
        "combine": inputs.recipe.combine.model_dump(mode="json"),
        "start model": start_fingerprint(model),
        "optimizer": optimizer_settings(args),
    }


def _make_value(
    inputs: "OnlineInputs", judges: RunJudges, scorers: Scorers, state: RunState, model: CausalLM
) -> CombinedValue:
    ends = model.generation_config.eos_token_id if model.generation_config is not None else None
    ids = {*(ends if isinstance(ends, list) else [ends]), inputs.tokenizer.eos_token_id}
    watch = None
    if inputs.recipe.watch is not None and judges.watch is not None:
        watch = (judges.watch, inputs.recipe.watch.every, inputs.recipe.watch.window)
    return CombinedValue(
        {prompt.prompt_id: prompt for prompt in inputs.prompts},
        scorers,
        state.restore(inputs.combiner),
        state,
        samples_per_prompt=inputs.sampling.samples,
        end_ids=sorted(int(token) for token in ids if token is not None),
        max_missing=inputs.recipe.max_missing,
        watch=watch,
    )


def _make_trainer(inputs: "OnlineInputs", value: CombinedValue, model: CausalLM) -> "RLOOTrainer":
    from trl import RLOOTrainer  # type: ignore[attr-defined]

    # It would print the prompts and answers without a score; they are counted.
    logging.getLogger(RLOOTrainer.__module__).addFilter(_is_not_about_missing_scores)
    recipe = inputs.recipe
    trainer = RLOOTrainer(
        model=model,
        reward_funcs=value,
        args=inputs.args,
        train_dataset=prompt_table(inputs.prompts),
        processing_class=inputs.tokenizer,
        peft_config=lora_config(recipe.lora, revision=recipe.model.revision) if recipe.lora else None,
    )
    if not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        reference = trainer.ref_model
        check_reference(model, None if reference is None else trainer.accelerator.unwrap_model(reference))
    return trainer


def _is_not_about_missing_scores(record: logging.LogRecord) -> bool:
    return "reward functions returned None" not in record.getMessage()


def _as_data_source(source: dict[str, Any]) -> dict[str, Any]:
    """Return the metadata of a set of prompts in the form of data manifests."""
    is_file = source["file_sha256"] is not None
    path = source["from"] if is_file else source["from"].partition("@")[0]
    return {
        "name": source["name"],
        "source": {"adapter": "prompts", "path": path},
        "files": {path: source["file_sha256"]} if is_file else {},
        "pairs_taken": source["prompts"],
        "license": source["license"],
        "prompts_hash": source["prompts_hash"],
    }
