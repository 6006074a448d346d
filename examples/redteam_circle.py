"""Run the red-team circle offline: label a model's own answers by judges and train on them for safety.

    python examples/redteam_circle.py [--out runs/redteam-circle] [--seed 0] [--serve PORT]

Testbed base → `bfpo redteam` → labels → `bfpo train` → held-out prompts, with less than a tenth of the pairs of the
testbed's full run. It runs three times on the same prompts, with labels

* by the world's oracle,
* by a `linear` judge fitted on the first 300 labeled pairs of the world's safety set,
* by that judge, except that answers to benign prompts are safe by rule: this shows the effect of its errors on those.

The oracle orders by helpfulness each time. There is no buffer: a run trains on these pairs only. An interrupted run
resumes with the same command. With `--serve` the base generates through `transformers serve` on that local port, like
a model on any server; this needs `pip install 'transformers[serving]'`.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from bfpo.commands.judge import fit_judge
from bfpo.config.recipes import TrainRecipe
from bfpo.core.files import write_jsonl
from bfpo.core.terminal import say, show_table
from bfpo.data.stages import read_completions, read_verdicts
from bfpo.evaluation.results import Results
from bfpo.experiments.methods import METHODS, train_recipe
from bfpo.experiments.quickstart import evaluate_against
from bfpo.experiments.steps import make_base, run_once, write_world
from bfpo.redteam.recipe import RedteamRecipe
from bfpo.redteam.run import run_redteam
from bfpo.testbed.oracle import Oracle, parse_prompt
from bfpo.testbed.world import WorldOptions

HARMFUL, BENIGN, SAMPLES, STEPS, FITTED_ON = 160, 120, 4, 100, 300
WORLD: dict[str, Any] = {}
METRICS = (("harmful", "safety"), ("benign", "helpfulness"), ("lookalike", "over_refusal"), ("all", "harmonic_mean"))


def circle(folder: Path, seed: int, *, port: int | None = None) -> dict[str, Any]:
    """Run the circle with each kind of labels and return the results.

    Args:
        folder: Output folder.
        seed: Seed of the world, the base model and the training.
        port: Port to serve the base on; by default it generates in this process.
    """
    world = folder / "world"
    options = WorldOptions(seed=seed, **WORLD)
    write_world(options, world)
    make_base(folder, seed=seed)
    rows = [json.loads(line) for line in (world / "safety.jsonl").read_text().splitlines()]
    write_prompts(rows, folder)
    labeled = (
        {"prompt": row["prompt"], "text": row[side], "safe": row[f"is_{side}_safe"]}
        for row in rows[:FITTED_ON]
        for side in ("chosen", "rejected")
    )
    write_jsonl(folder / "labeled.jsonl", labeled)
    fit_judge([str(folder / "labeled.jsonl")], folder / "judge.npz", abstain_threshold=0.5)

    full = options.safety_pairs + options.helpful_pairs
    summary: dict[str, Any] = {"seed": seed, "full_run_pairs": full}
    pairs = {}
    base = folder / "base"
    with nullcontext({"path": str(base)}) if port is None else served(base, port) as model:
        for name, judge in (("oracle", "oracle"), ("linear", f"linear:{folder / 'judge.npz'}")):
            (pairs[name],) = run_redteam(redteam_recipe(folder, name, judge, model))
            metadata = json.loads((pairs[name].parent / "redteam.json").read_text())
            assert metadata["pairs"] < 0.1 * full, f"{metadata['pairs']} pairs are no small share of {full}"
            summary[name] = {"share_of_pairs": round(metadata["pairs"] / full, 4)} | {
                key: metadata[key] for key in ("pairs", "cells", "left_out", "cost")
            }
    summary["linear"]["mistakes"] = count_mistakes(pairs["linear"].parent, Oracle(options.skills))
    pairs["linear_by_rule"] = label_benign_by_rule(pairs["linear"], folder / "redteam-linear_by_rule" / "pairs.jsonl")
    for name, file in pairs.items():
        run_once(redteam_train(folder, name, file, seed))
    runs = [folder / f"trained-{name}" for name in pairs]
    for results in evaluate_against(base, runs, world / "prompts.jsonl", Oracle(options.skills)):
        summary[f"measured-{results.run}"] = metric_intervals(results)
    return summary


def write_prompts(rows: list[dict[str, str]], folder: Path) -> None:
    """Write harmful and benign training prompts of the world; none is used in the evaluation."""
    prompts = list(dict.fromkeys(row["prompt"] for row in rows))
    harmful = [prompt for prompt in prompts if parse_prompt(prompt).is_harmful]
    benign = [prompt for prompt in prompts if not parse_prompt(prompt).is_harmful]
    for name, selected in (("harmful", harmful[:HARMFUL]), ("benign", benign[:BENIGN])):
        (folder / f"{name}.txt").write_text("".join(f"{prompt}\n" for prompt in selected))


@contextmanager
def served(base: Path, port: int) -> Iterator[dict[str, Any]]:
    """Serve a copy of the base in this context; yields the recipe's `model` section."""
    # Unless the generation config sets do_sample, the server ignores temperature and seed.
    copy = base.with_name("base-served")
    shutil.copytree(base, copy, dirs_exist_ok=True, ignore=shutil.ignore_patterns("checkpoint-*", "evaluation"))
    config = json.loads((base / "generation_config.json").read_text())
    (copy / "generation_config.json").write_text(json.dumps(config | {"do_sample": True}))
    script = Path(sys.executable).with_name("transformers")
    process = subprocess.Popen(
        [str(script), "serve", str(copy), "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).close()
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit(f"`transformers serve {copy} --port {port}` did not start") from None
                time.sleep(0.3)
        yield {"path": str(copy), "server": f"http://127.0.0.1:{port}/v1", "concurrency": 4}
    finally:
        process.terminate()
        process.wait(20)


def redteam_recipe(folder: Path, name: str, judge: str, model: dict[str, Any]) -> RedteamRecipe:
    """Return the recipe that makes the pairs."""
    return RedteamRecipe.model_validate(
        {
            "out": str(folder / f"redteam-{name}"),
            "model": model,
            "prompts": [
                {"name": "file", "path": str(folder / f"{kind}.txt"), "kind": kind} for kind in ("harmful", "benign")
            ],
            "judge": judge,
            "helpfulness": "oracle",
            "samples": SAMPLES,
            "max_new_tokens": 48,
            # The testbed's model generates its small language only, and can't follow the guided chain.
            "guide": False,
        }
    )


def count_mistakes(linear: Path, oracle: Oracle) -> dict[str, dict[str, int]]:
    """Count the judge's wrong verdicts on harmful and benign prompts, where the oracle decides."""
    mistakes = {"harmful": Counter[str](), "benign": Counter[str]()}
    (path,) = linear.glob("verdicts-linear@*.jsonl")
    completions, verdicts = read_completions(linear / "completions.jsonl"), read_verdicts(path)
    for completion, verdict, correct in zip(completions, verdicts, oracle.judge(completions), strict=True):
        if correct.safe is None:
            continue
        kind = "harmful" if parse_prompt(completion.prompt[-1].content).is_harmful else "benign"
        mistakes[kind]["answers"] += 1
        mistakes[kind]["safe called unsafe"] += correct.safe and verdict.safe is False
        mistakes[kind]["unsafe called safe"] += not correct.safe and verdict.safe is True
    return {kind: dict(counts) for kind, counts in mistakes.items()}


def label_benign_by_rule(pairs: Path, out: Path) -> Path:
    """Write a copy of the pairs in which answers to benign prompts are safe."""
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    for row in rows:
        prompt = row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][-1]["content"]
        if not parse_prompt(prompt).is_harmful:
            row |= {"is_chosen_safe": True, "is_rejected_safe": True, "safety_label_source": "rule"}
    write_jsonl(out, rows)
    return out


def redteam_train(folder: Path, name: str, pairs: Path, seed: int) -> TrainRecipe:
    """Return the testbed's recipe for BFPO on these pairs only."""
    recipe = train_recipe(
        METHODS["bfpo_no_buffer"],
        world=folder / "world",
        base=folder / "base",
        out=folder / f"trained-{name}",
        seed=seed,
        steps=STEPS,
    )
    return TrainRecipe.model_validate(recipe.model_dump() | {"data": [{"path": str(pairs)}]})


def metric_intervals(results: Results) -> dict[str, list[float]]:
    """Return value, low and high of each of `METRICS`."""
    intervals = {}
    for task, name in METRICS:
        metric = results.metric(task, name)
        numbers = (metric.value, metric.low, metric.high)
        intervals[f"{task}/{name}"] = [round(number, 4) for number in numbers if number is not None]
    return intervals


def show(summary: dict[str, Any]) -> None:
    """Print a table of the results."""
    rows = []
    for name in ("base", "oracle", "linear", "linear_by_rule"):
        intervals = summary["measured-base" if name == "base" else f"measured-trained-{name}"]
        # The pairs labeled by rule are those of the linear judge.
        pairs = summary.get(name.removesuffix("_by_rule"))
        share = f"{pairs['pairs']} ({pairs['share_of_pairs']:.1%})" if pairs else ""
        cells = ("{:.2f} [{:.2f}, {:.2f}]".format(*intervals["/".join(metric)]) for metric in METRICS)
        rows.append((name, share, *cells))
    show_table(
        f"Held-out prompts; the full run trains on {summary['full_run_pairs']} pairs",
        ("labels by", "pairs", *(" ".join(metric).replace("_", " ") for metric in METRICS)),
        rows,
    )
    for kind, counts in summary["linear"]["mistakes"].items():
        say(f"linear against the oracle on {kind} prompts: {counts}")
    say("Intervals are over the prompts of one world and one run; they don't cover other seeds.")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/redteam-circle"), help="output folder")
    parser.add_argument("--seed", type=int, default=0, help="seed of the world, the base model and the training")
    parser.add_argument(
        "--serve", type=int, metavar="PORT", help="generate through `transformers serve` on this port"
    )
    options = parser.parse_args()
    show(circle(options.out, options.seed, port=options.serve))
