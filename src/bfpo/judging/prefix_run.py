"""The work of `bfpo score train` with `per_token: true`: from judged answers of a model to a cost head."""

import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from bfpo.config.per_token import PerTokenRecipe
from bfpo.core.environment import git_revision, hardware, versions
from bfpo.core.files import file_hash, write_json
from bfpo.core.samples import Completion, Sampling, Verdict
from bfpo.core.terminal import say, timed, warn
from bfpo.data.stages import read_completions, read_verdicts
from bfpo.errors import RecipeError
from bfpo.generation.in_process import TransformersEngine, checkpoint_identity
from bfpo.judging.prefix_head import fit_head, logits_of, split_prompts
from bfpo.judging.prefix_quality import prefix_quality, show_prefix_quality
from bfpo.judging.prefixes import judged_answers, read_prefixes
from bfpo.model.load import load_model, load_tokenizer
from bfpo.training.output import exclusive_output, prepare_output

HEAD_FILE = "cost-head.safetensors"


def run_per_token(recipe: PerTokenRecipe, *, dry_run: bool = False) -> dict[str, Any]:
    """Train a cost head as a recipe says.

    Args:
        recipe: Recipe of the run.
        dry_run: Whether to stop before the model is loaded; the answers and verdicts are read and counted.

    Returns:
        Content of `run.json`; for a dry run, what it says of the answers.

    Raises:
        DataError: If the answers or verdicts are malformed, or all are safe or all unsafe.
        ModelError: If the model can't be loaded, or has no chat template.
        RecipeError: If the model has fewer layers.
    """
    start_time, start_cpu_time = time.time(), time.process_time()
    out = Path(recipe.out)
    completions, verdicts = read_completions(Path(recipe.completions)), read_verdicts(Path(recipe.verdicts))
    answers, left_out = judged_answers(completions, verdicts)
    data = _describe(recipe, completions, verdicts) | {
        "answers": len(answers),
        "unsafe": sum(answer.unsafe for answer in answers),
        "left_out": dict(left_out),
    }
    say(
        f"{len(answers):,} answers, {data['unsafe']:,} of them unsafe or undecided; "
        f"left out: {dict(left_out) or 'none'}"
    )
    if dry_run:
        say("dry run: nothing was trained")
        return data
    engine = _open(recipe)
    layers = _layers(recipe, engine)
    with exclusive_output(out):
        prefixes = read_prefixes(engine, answers, layers, limit=recipe.max_prefixes, seed=recipe.seed)
        split = split_prompts(prefixes, holdout=recipe.holdout, seed=recipe.seed)
        say(
            f"fitting {recipe.units or 'no'} hidden units on the states of layers {layers} "
            f"after {len(split.fitted):,} tokens"
        )
        device = str(engine.model.device)
        head = fit_head(split, layers, units=recipe.units, steps=recipe.steps, seed=recipe.seed, device=device)
        with timed("measuring the head"):
            quality = prefix_quality(logits_of(head, split.measured), split.measured)
        # Not before: a run that fails leaves an earlier head where it is.
        prepare_output(out, recipe, resuming=False)
        head.save(out / HEAD_FILE)
        run = {
            "schema": 1,
            "command": "score train",
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "git_revision": git_revision(),
            "versions": versions(),
            "hardware": hardware(),
            "recipe": recipe.model_dump(mode="json"),
            "data": data,
            "head": {"file": HEAD_FILE, "identity": head.identity, "layers": layers},
            "prefixes": {name: len(part) for name, part in split._asdict().items()},
            "evaluation": quality,
            "wall_seconds": round(time.time() - start_time, 1),
            "cpu_seconds": round(time.process_time() - start_cpu_time, 1),
        }
        write_json(out / "run.json", run)
    show_prefix_quality(quality)
    say(f"\nuse in a guard: {{kind: factor, head: {out / HEAD_FILE}}}")
    return run


def _describe(
    recipe: PerTokenRecipe, completions: Sequence[Completion], verdicts: Sequence[Verdict]
) -> dict[str, Any]:
    """Return where the answers and verdicts are from; a head learns what becomes of the answers of one model."""
    models = sorted({completion.model for completion in completions})
    if models != [recipe.model.path]:
        warn(
            f"the answers are of {', '.join(models)}, the head is for {recipe.model.path}: if these aren't the same "
            "model, the head predicts what becomes of another model's answers"
        )
    return {
        "completions_hash": file_hash(Path(recipe.completions)),
        "models": models,
        "settings": sorted({completion.settings_hash for completion in completions}),
        "judges": sorted({f"{verdict.judge}@{verdict.revision}" for verdict in verdicts}),
    }


def _open(recipe: PerTokenRecipe) -> TransformersEngine:
    path = str(recipe.model.path)
    model, tokenizer = load_model(recipe.model), load_tokenizer(recipe.model)
    torch.nn.Module.to(model, "cuda" if torch.cuda.is_available() else "cpu")
    identity = checkpoint_identity(path, recipe.model.revision)
    return TransformersEngine(model, tokenizer, Sampling(), name=path, identity=identity)


def _layers(recipe: PerTokenRecipe, engine: TransformersEngine) -> list[int]:
    count = engine.model.config.get_text_config().num_hidden_layers
    layers = recipe.layers or ([count // 2, -1] if count > 1 else [-1])
    if max(layers) > count:
        raise RecipeError(
            f"layers is {layers}; {recipe.model.path} has {count} layers, so expected 1 to {count}, or -1"
        )
    return layers
