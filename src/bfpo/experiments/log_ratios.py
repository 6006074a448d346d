"""PeCAN's scores: log-ratios of a model trained for helpfulness and of one trained for safety to the base model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bfpo.core.files import content_hash, write_jsonl
from bfpo.core.samples import Completion, Prompt
from bfpo.data.stages import read_completions, read_prompt_file
from bfpo.experiments.methods import train_recipe
from bfpo.experiments.stages import LogRatioStage, Stage
from bfpo.experiments.steps import run_once
from bfpo.generation.given_completions import logps_of

_MODELS: Mapping[str, dict[str, Any]] = {
    "helpful": {"main": "safety", "buffer": True},
    "safe": {"main": "safety_by_safety", "buffer": False},
}
"""Name of a model → the pairs that DPO trains it on."""
_MAX_LENGTH = 128


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
    base_logps = logps_of(base, completions, max_length=_MAX_LENGTH)
    helpful, safe = (logps_of(models / name, completions, max_length=_MAX_LENGTH) for name in _MODELS)
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
