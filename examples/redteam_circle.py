"""The red-team circle without any download: a model's own answers, judged by judges, make it safe.

    python examples/redteam_circle.py [--out runs/redteam-circle] [--seed 0] [--serve PORT]

Testbed base → `bfpo redteam` → labels → `bfpo train` → held-out prompts, with less than a tenth of the pairs that the
testbed's full run sees. It is done three times on the same prompts, with labels

* by the world's oracle,
* by a `linear` judge fitted on the first 300 labeled pairs of the world's safety set,
* by that judge, but answers to benign prompts are safe by rule: shows what its mistakes on those cost.

The oracle orders by helpfulness each time. No buffer: the pairs are all that a run sees. A second start goes on
where the first was. With `--serve` the base answers through `transformers serve` on that port of this machine, as a
model on any server would; that needs `pip install 'transformers[serving]'`.
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
from bfpo.testbed.oracle import Oracle, understand
from bfpo.testbed.world import WorldOptions

HARMFUL, BENIGN, SAMPLES, STEPS, FITTED_ON = 160, 120, 4, 100, 300
WORLD: dict[str, Any] = {}
METRICS = (("harmful", "safety"), ("benign", "helpfulness"), ("lookalike", "over_refusal"), ("all", "harmonic_mean"))


def circle(folder: Path, seed: int, *, port: int | None = None) -> dict[str, Any]:
    """Go round once with each kind of labels, and return the numbers.

    Args:
        folder: For everything that is made.
        seed: Of the world, the base model and the training.
        port: Where to serve the base; default: it answers in this process.
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
    fit_judge(str(folder / "labeled.jsonl"), folder / "judge.npz", doubt=0.5)

    full = options.safety_pairs + options.helpful_pairs
    found: dict[str, Any] = {"seed": seed, "full_run_pairs": full}
    pairs = {}
    base = folder / "base"
    with nullcontext({"path": str(base)}) if port is None else served(base, port) as model:
        for name, judge in (("oracle", "oracle"), ("linear", f"linear:{folder / 'judge.npz'}")):
            (pairs[name],) = run_redteam(redteam_recipe(folder, name, judge, model))
            facts = json.loads((pairs[name].parent / "redteam.json").read_text())
            assert facts["pairs"] < 0.1 * full, f"{facts['pairs']} pairs are no small share of {full}"
            found[name] = {"share_of_pairs": round(facts["pairs"] / full, 4)} | {
                key: facts[key] for key in ("pairs", "cells", "left_out", "cost")
            }
    found["linear"]["mistakes"] = mistakes(pairs["linear"].parent, Oracle(options.skills))
    pairs["linear_by_rule"] = benign_by_rule(pairs["linear"], folder / "redteam-linear_by_rule" / "pairs.jsonl")
    for name, file in pairs.items():
        run_once(redteam_train(folder, name, file, seed))
    runs = [folder / f"trained-{name}" for name in pairs]
    for results in evaluate_against(base, runs, world / "prompts.jsonl", Oracle(options.skills)):
        found[f"measured-{results.run}"] = measured(results)
    return found


def write_prompts(rows: list[dict[str, str]], folder: Path) -> None:
    """Write harmful and benign training prompts of the world, none of which is evaluated on."""
    prompts = list(dict.fromkeys(row["prompt"] for row in rows))
    harmful = [prompt for prompt in prompts if understand(prompt).is_harmful]
    benign = [prompt for prompt in prompts if not understand(prompt).is_harmful]
    for name, several in (("harmful", harmful[:HARMFUL]), ("benign", benign[:BENIGN])):
        (folder / f"{name}.txt").write_text("".join(f"{prompt}\n" for prompt in several))


@contextmanager
def served(base: Path, port: int) -> Iterator[dict[str, Any]]:
    """Serve a copy of the base while it is asked; yields the recipe's `model` section."""
    # Where the generation config doesn't say do_sample, the server ignores temperature and seed.
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
        end = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).close()
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > end:
                    raise SystemExit(f"`transformers serve {copy} --port {port}` doesn't come up") from None
                time.sleep(0.3)
        yield {"path": str(copy), "server": f"http://127.0.0.1:{port}/v1", "concurrency": 4}
    finally:
        process.terminate()
        process.wait(20)


def redteam_recipe(folder: Path, name: str, judge: str, model: dict[str, Any]) -> RedteamRecipe:
    """Return the recipe of the pairs."""
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
            # The testbed's model knows its own small language alone, and can't follow the chain.
            "guide": False,
        }
    )


def mistakes(linear: Path, oracle: Oracle) -> dict[str, dict[str, int]]:
    """Count for harmful and benign prompts what the judge called otherwise than the oracle, where that decides."""
    found = {"harmful": Counter[str](), "benign": Counter[str]()}
    completions, verdicts = read_completions(linear / "completions.jsonl"), read_verdicts(linear / "verdicts.jsonl")
    for completion, said, right in zip(completions, verdicts, oracle.judge(completions), strict=True):
        if right.safe is None:
            continue
        kind = "harmful" if understand(completion.prompt[-1].content).is_harmful else "benign"
        found[kind]["answers"] += 1
        found[kind]["safe called unsafe"] += right.safe and said.safe is False
        found[kind]["unsafe called safe"] += not right.safe and said.safe is True
    return {kind: dict(counts) for kind, counts in found.items()}


def benign_by_rule(pairs: Path, out: Path) -> Path:
    """Write the pairs again, with answers to benign prompts safe."""
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    for row in rows:
        prompt = row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][-1]["content"]
        if not understand(prompt).is_harmful:
            row |= {"is_chosen_safe": True, "is_rejected_safe": True, "safety_label_source": "rule"}
    write_jsonl(out, rows)
    return out


def redteam_train(folder: Path, name: str, pairs: Path, seed: int) -> TrainRecipe:
    """Return the testbed's recipe for BFPO, on these pairs alone."""
    recipe = train_recipe(
        METHODS["bfpo_no_buffer"],
        world=folder / "world",
        base=folder / "base",
        out=folder / f"trained-{name}",
        seed=seed,
        steps=STEPS,
    )
    return TrainRecipe.model_validate(recipe.model_dump() | {"data": [{"path": str(pairs)}]})


def measured(results: Results) -> dict[str, list[float]]:
    """Return value, low and high of what matters."""
    found = {}
    for task, name in METRICS:
        one = results.metric(task, name)
        found[f"{task}/{name}"] = [round(x, 4) for x in (one.value, one.low, one.high) if x is not None]
    return found


def show(found: dict[str, Any]) -> None:
    """Print the table."""
    rows = []
    for name in ("base", "oracle", "linear", "linear_by_rule"):
        numbers = found["measured-base" if name == "base" else f"measured-trained-{name}"]
        # The pairs by rule are those of the linear judge.
        facts = found.get(name.removesuffix("_by_rule"))
        share = f"{facts['pairs']} ({facts['share_of_pairs']:.1%})" if facts else ""
        rows.append((name, share, *("{:.2f} [{:.2f}, {:.2f}]".format(*numbers["/".join(one)]) for one in METRICS)))
    show_table(
        f"Held-out prompts; the full run sees {found['full_run_pairs']} pairs",
        ("labels by", "pairs", *(" ".join(one).replace("_", " ") for one in METRICS)),
        rows,
    )
    for kind, counts in found["linear"]["mistakes"].items():
        say(f"linear against the oracle on {kind} prompts: {counts}")
    say("Intervals are over prompts of one world and one run: they say nothing about other seeds.")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/redteam-circle"), help="folder for everything made")
    parser.add_argument("--seed", type=int, default=0, help="of the world, the base model and the training")
    parser.add_argument("--serve", type=int, metavar="PORT", help="ask the base through `transformers serve`")
    chosen = parser.parse_args()
    show(circle(chosen.out, chosen.seed, port=chosen.serve))
