"""Runs on the testbed whose data aren't those of a world: what the studies of labels and of graded pairs share."""

import argparse
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from bfpo.config.recipes import Source
from bfpo.evaluation.comparisons import verdict_on
from bfpo.evaluation.results import FILE_NAME, read_results
from bfpo.experiments.methods import Method, train_recipe
from bfpo.experiments.results import METRICS
from bfpo.experiments.steps import evaluate_run, run_once
from bfpo.stats.intervals import holm, paired_p_value, t_interval
from bfpo.testbed.oracle import Oracle
from bfpo.testbed.world import WorldOptions

Seed = TypeVar("Seed")


def run_seeds(description: str | None, folder: Path, run_seed: Callable[[int, Path], Seed]) -> list[Seed]:
    """Read `--seeds` and `--folder` from the command line, and return what each seed's runs gave.

    Args:
        description: Text of `--help`.
        folder: Default folder.
        run_seed: Function from a seed and its folder to the results of its runs.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--folder", type=Path, default=folder)
    options = parser.parse_args()
    return [run_seed(seed, options.folder / f"seed-{seed}") for seed in range(options.seeds)]


def train_and_evaluate(out: Path, method: Method, data: list[Path], *, seed: int) -> dict[str, float]:
    """Train a method on files of pairs and evaluate it, unless it is done, and return its metrics by `task/metric`.

    Args:
        out: Folder of the run, in a folder with `world` and `base`.
        method: The method; its data are replaced.
        data: Files of the main stream.
        seed: Seed of the training.
    """
    folder = out.parent
    if not (out / "evaluation" / FILE_NAME).exists():
        recipe = train_recipe(method, world=folder / "world", base=folder / "base", out=out, seed=seed, save=False)
        # A killed run is short enough to start again.
        shutil.rmtree(out, ignore_errors=True)
        run_once(recipe.model_copy(update={"data": [Source(path=str(file)) for file in data]}))
        evaluate_run(out, folder / "world" / "prompts.jsonl", Oracle(WorldOptions().skills))
        for file in out.glob("*.safetensors"):
            file.unlink()
    return {
        f"{metric.task}/{metric.metric}": metric.value
        for metric in read_results(out / "evaluation").metrics
        if metric.value is not None and (metric.task, metric.metric) in METRICS
    }


def compare(
    metric: str,
    seeds: list[Mapping[str, Mapping[str, float]]],
    baselines: Mapping[str, str],
    *,
    higher_is_better: bool,
) -> list[dict[str, Any]]:
    """Return a metric of all runs over seeds, with the differences from their baselines.

    Args:
        metric: Name of the metric.
        seeds: Run → metric → value, of each seed.
        baselines: Run → the run that it is compared with.
        higher_is_better: Whether higher is better.
    """
    values = {run: np.array([seed[run][metric] for seed in seeds]) for run in seeds[0]}
    p_values = holm([paired_p_value(values[run], values[baseline]) for run, baseline in baselines.items()])
    adjusted = dict(zip(baselines, p_values, strict=True))
    rows = []
    for run, of_run in values.items():
        row: dict[str, Any] = {"run": run, "metric": metric, "mean": t_interval(of_run)}
        if run in baselines:
            difference = t_interval(of_run - values[baselines[run]])
            verdict = verdict_on(difference, higher_is_better=higher_is_better, p_value=adjusted[run])
            row |= {"against": baselines[run], "difference": difference, "p_value": adjusted[run], "verdict": verdict}
        rows.append(row)
    return rows


def slug(name: str) -> str:
    """Return a name for a file."""
    return "-".join("".join(letter if letter.isalnum() or letter in ".-" else " " for letter in name).split())
