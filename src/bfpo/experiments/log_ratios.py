"""PeCAN's scores: log-ratios of a model trained for helpfulness and of one trained for safety to the base model."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bfpo.config.recipes import Source, TextSection
from bfpo.core.files import content_hash, write_jsonl
from bfpo.core.pairs import Demonstration
from bfpo.core.samples import Completion, Prompt
from bfpo.core.terminal import progress
from bfpo.data.load import SourceReport
from bfpo.data.stages import read_completions, read_prompt_file
from bfpo.data.tokenize import Encoder
from bfpo.errors import DataError
from bfpo.experiments.methods import train_recipe
from bfpo.experiments.stages import LogRatioStage, Stage
from bfpo.experiments.steps import run_once
from bfpo.generation.in_process import load_checkpoint
from bfpo.model.layout import packed_layout, packs
from bfpo.model.logps import add_layout_forward

_MODELS: Mapping[str, dict[str, Any]] = {
    "helpful": {"main": "safety", "buffer": True},
    "safe": {"main": "safety_by_safety", "buffer": False},
}
"""Name of a model → the pairs that DPO trains it on."""
_MAX_LENGTH, _TOKENS_PER_PACK = 128, 8192


def train_models(stage: LogRatioStage, folder: Path, *, beta: float, world: Path, base: Path, seed: int) -> None:
    """Train both models into a folder, with DPO on the base model.

    Args:
        stage: The stage.
        folder: Folder that gets `helpful` and `safe`.
        beta: Beta of DPO, by which log-ratios are multiplied.
        world: Folder that `World.write` filled.
        base: Checkpoint to start from.
        seed: Seed of the trainings.
    """
    for name, data in _MODELS.items():
        training = Stage(
            loss={"name": "dpo", "beta": beta},
            learning_rate=stage.learning_rate,
            pairs_per_step=stage.pairs_per_step,
            **data,
        )
        run_once(
            train_recipe(
                training, world=world, base=base, out=folder / name, seed=seed, steps=stage.steps, save=False
            )
        )


def score_by_log_ratios(samples: Path, models: Path, out: Path, *, base: Path, beta: float) -> int:
    """Write samples with beta times their log-ratios as scores, with the columns that `bfpo dual --pecan` reads, too.

    Args:
        samples: Folder with prompts and completions.
        models: Folder that `train_models` filled.
        out: File to write.
        base: The base model.
        beta: Factor of the log-ratios.

    Returns:
        The number of samples.
    """
    completions = read_completions(samples / Completion.file_name)
    kinds = {prompt.prompt_id: prompt.kind for prompt in read_prompt_file(str(samples / Prompt.file_name))}
    base_logps = completion_logps(base, completions)
    helpful, safe = (completion_logps(models / name, completions) for name in _MODELS)
    scorers = {f"{name}_scorer": f"log-ratio@{content_hash(models.name, name)[:12]}" for name in ("reward", "cost")}
    columns = {
        "reward": beta * (helpful - base_logps),
        "cost": -beta * (safe - base_logps),
        "base_logp": base_logps,
        "helpful_logp": helpful,
        "safe_logp": safe,
    }
    write_jsonl(
        out,
        (
            completion.to_row()
            | {"kind": kinds[completion.prompt_id], **scorers}
            | {name: float(values[index]) for name, values in columns.items()}
            for index, completion in enumerate(completions)
        ),
    )
    return len(completions)


def completion_logps(model_path: Path, completions: Sequence[Completion]) -> NDArray[np.float64]:
    """Return the log-probability of each completion under a model, nats, summed over its tokens and the end, (N,).

    Raises:
        DataError: If a completion is empty or too long.
    """
    model, tokenizer, _ = load_checkpoint(str(model_path), dtype="float32", revision=None)
    add_layout_forward(model)
    model.eval()
    report = SourceReport("completions", Source(path=str(model_path)))
    demonstrations = [Demonstration(completion.prompt, completion.text) for completion in completions]
    _, examples = Encoder(tokenizer, TextSection(max_length=_MAX_LENGTH)).encode(demonstrations, report)
    if report.dropped:
        raise DataError(f"{model_path}: completions without a log-probability: {dict(report.dropped)}")
    logps = []
    with torch.no_grad(), progress("log-probabilities", len(examples)) as advance:
        for part in packs(examples, _TOKENS_PER_PACK):
            logps.append(model(layout=packed_layout(examples[part])).double().numpy())
            advance(len(logps[-1]))
    return np.concatenate(logps)
