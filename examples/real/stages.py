"""The stages of the example: recipes of the product's own commands, each run once and resumed after a kill."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bfpo.config.recipes import ScoreRecipe, SftRecipe, TrainRecipe
from bfpo.evaluation.recipe import EvalRecipe
from bfpo.evaluation.results import Results
from bfpo.redteam.recipe import RedteamRecipe
from bfpo.training.processes import bf16_slowdown

MAX_LENGTH = 96
"""Prompt and answer in training, in tokens: what matters here is how an answer begins."""
ANSWER_TOKENS = 64
"""Maximum length of an answer in red-teaming and evaluation, in tokens."""
SFT_STEPS, STEPS, BATCH = 36, 60, 4
JUDGES = ["refusal-rule"]
"""Judges of the evaluations."""
TEXT = {"max_length": MAX_LENGTH}
LORA = {"r": 16}
# The committed results are of a processor that has instructions for bfloat16.
HAS_BF16 = bf16_slowdown() < 1
TRAINER = {
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,
    "logging_steps": 5,
    "save_steps": 20,
    "save_total_limit": 1,
    "use_cpu": True,
    "bf16": HAS_BF16,
    "resume_from_checkpoint": True,
}


def sft_recipe(model: Path, data: Path, out: Path, *, seed: int) -> SftRecipe:
    """Return the recipe of supervised fine-tuning on safe answers."""
    return SftRecipe.model_validate(
        {
            "model": {"path": str(model)},
            "data": [{"adapter": "demonstrations", "path": str(data / "demonstrations.jsonl")}],
            "text": TEXT,
            "lora": LORA,
            "trainer": TRAINER
            | {
                "output_dir": str(out),
                "learning_rate": 5e-4,
                "per_device_train_batch_size": 2 * BATCH,
                "max_steps": SFT_STEPS,
                "seed": seed,
            },
        }
    )


def redteam_recipe(model: Path, data: Path, out: Path, *, seed: int, dtype: str = "float32") -> RedteamRecipe:
    """Return the recipe of red-teaming: the model's own answers, labeled by `judge.RuleOnOwnAnswers`.

    Args:
        model: The model that answers.
        data: Folder of the splits.
        out: Output folder.
        seed: Seed of the samples.
        dtype: Data type of the weights that answer.
    """
    return RedteamRecipe.model_validate(
        {
            "out": str(out),
            "model": {"path": str(model), "dtype": dtype},
            "prompts": [
                {"name": "file", "path": str(data / f"redteam-{kind}.jsonl"), "kind": kind, "license": license_}
                for kind, license_ in (("harmful", "MIT"), ("benign", "CC-BY-NC-4.0"))
            ],
            "judge": f"judge:RuleOnOwnAnswers:{data / 'redteam-prompts.jsonl'}",
            "samples": 3,
            "max_new_tokens": ANSWER_TOKENS,
            "keep_cut": True,
            "guide": False,
            "quota": {"us": 60, "ss": 60, "uu": 0},
            "seed": seed,
        }
    )


def pair_sources(data: Path, redteam: Path | None) -> dict[str, Any]:
    """Return the training data: all four cells from four sources, and AlpacaEval's comparisons as the buffer.

    Args:
        data: Folder of the splits.
        redteam: Folder of the pairs of the model's own answers; None leaves them out.
    """
    return {
        "data": [
            {"adapter": "xstest_completions", "path": str(data / "xstest-ss.csv"), "limit": 40},
            {"adapter": "xstest_completions", "path": str(data / "xstest-us.csv"), "limit": 100},
            *([] if redteam is None else [{"path": str(redteam / "pairs.jsonl")}]),
            {"path": str(data / "pku-su.jsonl")},
            {"path": str(data / "gptfuzz-uu.jsonl")},
        ],
        "buffer": [{"adapter": "alpaca_eval", "path": str(data / "buffer.jsonl")}],
        # Pairs of XSTest are what `probe:` takes its prompts from.
        "eval": [
            {"adapter": "xstest_completions", "path": str(data / "held-out-xstest.csv"), "limit": 60},
            {"adapter": "alpaca_eval", "path": str(data / "held-out-pairs.jsonl")},
        ],
        "benchmarks": [str(path) for path in sorted(data.glob("*/*.jsonl"))],
        "leaks": "drop",
    }


def train_recipe(
    base: Path, sources: Mapping[str, Any], out: Path, *, seed: int, changes: Mapping[str, Any]
) -> TrainRecipe:
    """Return the recipe of preference training.

    Args:
        base: The fine-tuned model, which is the reference too.
        sources: Training data, as `pair_sources` returns them.
        out: Output folder.
        seed: Seed of the order of the pairs, and of the adapter.
        changes: Keys of the recipe that make up the method, `trainer` among them.
    """
    trainer = TRAINER | {
        "output_dir": str(out),
        "learning_rate": 4e-4,
        "per_device_train_batch_size": BATCH,
        "max_steps": STEPS,
        "seed": seed,
    }
    recipe = {"model": {"path": str(base)}, **sources, "text": TEXT, "lora": LORA, "max_dropped": 0.5}
    # `lora: null` in the changes trains weights of the model itself.
    content = {**recipe, **changes, "trainer": trainer | changes.get("trainer", {})}
    return TrainRecipe.model_validate({key: value for key, value in content.items() if value is not None})


def score_recipe(base: Path, sources: Mapping[str, Any], out: Path, *, seed: int) -> ScoreRecipe:
    """Return the recipe of a scorer, a reward and a cost, on the pairs of the preference training.

    Args:
        base: The model to start from.
        sources: Training data, as `pair_sources` returns them.
        out: Output folder.
        seed: Seed of the order of the pairs, and of the adapter.
    """
    trainer = TRAINER | {
        "output_dir": str(out),
        "learning_rate": 5e-4,
        "per_device_train_batch_size": BATCH,
        "max_steps": STEPS,
        "seed": seed,
    }
    recipe = {"model": {"path": str(base)}, **sources, "text": TEXT, "lora": LORA, "max_dropped": 0.5}
    return ScoreRecipe.model_validate({**recipe, "trainer": trainer})


def eval_recipe(
    model: Path, suite: Path, out: Path, *, run: str, base: Path | None = None, dtype: str = "float32"
) -> EvalRecipe:
    """Return the recipe of an evaluation: greedy answers to held-out prompts.

    Args:
        model: The model that answers.
        suite: The suite with the prompts.
        out: Output folder.
        run: Name of the run in the results.
        base: Evaluation that this one is compared with.
        dtype: Data type of the weights that answer.
    """
    return EvalRecipe.model_validate(
        {
            "out": str(out),
            "run": run,
            "model": {"path": str(model), "dtype": dtype},
            "suites": [str(suite)],
            "judges": JUDGES,
            "sampling": {"temperature": 0, "max_new_tokens": ANSWER_TOKENS},
            "base": None if base is None else str(base),
        }
    )


def metric_rows(results: Results) -> list[dict[str, Any]]:
    """Return the metrics of an evaluation for a record, without those of categories."""
    return [
        {"task": metric.task, "metric": metric.metric, "value": metric.value}
        | {"low": metric.low, "high": metric.high, "n": metric.n}
        for metric in results.metrics
        if metric.category is None
    ]


def comparison_rows(results: Results) -> list[dict[str, Any]]:
    """Return the comparisons of an evaluation with its baseline for a record."""
    return [
        {"run": other.against, "task": other.task, "metric": other.metric, "difference": other.difference}
        | {"low": other.low, "high": other.high, "verdict": other.verdict}
        for other in results.comparisons
    ]
