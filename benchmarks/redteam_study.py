"""The red-team circle in the testbed: base → `bfpo redteam` → `bfpo train` → held-out prompts, over seeds.

    python benchmarks/redteam_study.py [--seeds 2] [--folder runs/redteam-study]

Each seed is labelled twice, by the oracle and by a `linear` judge fitted on the first 300 labelled pairs of the
world's safety set; the oracle orders by helpfulness in both. No buffer: the pairs are all that the run sees.
Writes `benchmarks/results/redteam.json`. A second start goes on where the first was.
"""

import argparse
import json
from pathlib import Path

from bfpo.evaluation.results import Results
from bfpo.files import write_json, write_jsonl
from bfpo.judging.commands import fit_judge
from bfpo.recipe import TrainRecipe
from bfpo.redteam.recipe import RedteamRecipe
from bfpo.redteam.run import run_redteam
from bfpo.testbed.methods import METHODS, train_recipe
from bfpo.testbed.oracle import Oracle, understand
from bfpo.testbed.quickstart import evaluate_against
from bfpo.testbed.runs import make_base, run_once, write_world
from bfpo.testbed.world import WorldOptions
from bfpo.training.manifest import hardware, versions

RESULTS = Path(__file__).parent / "results" / "redteam.json"
HARMFUL, BENIGN, SAMPLES, STEPS, FITTED_ON = 160, 120, 4, 100, 300
METRICS = (("harmful", "safety"), ("benign", "helpfulness"), ("lookalike", "over_refusal"), ("all", "harmonic_mean"))


def main() -> None:
    """Run the seeds and write what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path("runs/redteam-study"))
    options = parser.parse_args()
    write_json(
        RESULTS,
        {
            "command": f"python benchmarks/redteam_study.py --seeds {options.seeds}",
            "what": "intervals are over held-out prompts of one world and run each",
            "versions": versions(),
            "hardware": hardware(),
            "seeds": [run_seed(seed, options.folder / f"seed-{seed}") for seed in range(options.seeds)],
        },
    )


def run_seed(seed: int, folder: Path) -> dict[str, object]:
    """Run one seed and return its numbers."""
    world = folder / "world"
    options = WorldOptions(seed=seed)
    write_world(options, world)
    make_base(folder, seed=seed)
    rows = [json.loads(line) for line in (world / "safety.jsonl").read_text().splitlines()]
    write_prompts(rows, folder)
    write_jsonl(
        folder / "labelled.jsonl",
        (
            {"prompt": row["prompt"], "text": row[side], "safe": row[f"is_{side}_safe"]}
            for row in rows[:FITTED_ON]
            for side in ("chosen", "rejected")
        ),
    )
    fit_judge(str(folder / "labelled.jsonl"), folder / "judge.npz", doubt=0.5)
    full = options.safety_pairs + options.helpful_pairs
    found: dict[str, object] = {"seed": seed, "full_run_pairs": full}
    runs = []
    for name, judge in (("oracle", "oracle"), ("linear", f"linear:{folder / 'judge.npz'}")):
        (pairs,) = run_redteam(redteam_recipe(folder, name, judge))
        run_once(redteam_train(folder, name, pairs, seed))
        runs.append(folder / f"trained-{name}")
        facts = json.loads((pairs.parent / "redteam.json").read_text())
        share = facts["pairs"] / full
        assert share < 0.1, f"{share:.1%} of the full run's pairs"
        found[name] = {"share_of_pairs": round(share, 4)} | {
            key: facts[key] for key in ("pairs", "cells", "left_out", "cost")
        }
    for results in evaluate_against(folder / "base", runs, world / "prompts.jsonl", Oracle(options.skills)):
        found[f"measured-{results.run}"] = measured(results)
    print(json.dumps({key: value for key, value in found.items() if key.startswith("measured")}), flush=True)
    return found


def write_prompts(rows: list[dict[str, str]], folder: Path) -> None:
    """Write harmful and benign training prompts of the world, none of which is evaluated on."""
    prompts = list(dict.fromkeys(row["prompt"] for row in rows))
    harmful = [prompt for prompt in prompts if understand(prompt).is_harmful]
    benign = [prompt for prompt in prompts if not understand(prompt).is_harmful]
    for name, several in (("harmful", harmful[:HARMFUL]), ("benign", benign[:BENIGN])):
        (folder / f"{name}.txt").write_text("".join(f"{prompt}\n" for prompt in several))


def redteam_recipe(folder: Path, name: str, judge: str) -> RedteamRecipe:
    """Return the recipe of the pairs."""
    return RedteamRecipe.model_validate(
        {
            "out": str(folder / f"redteam-{name}"),
            "model": {"path": str(folder / "base")},
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


def redteam_train(folder: Path, name: str, pairs: Path, seed: int) -> TrainRecipe:
    """Return the testbed's recipe for BFPO, on these pairs alone."""
    method = METHODS["bfpo_no_buffer"]
    recipe = train_recipe(
        method, world=folder / "world", base=folder / "base", out=folder / f"trained-{name}", seed=seed, steps=STEPS
    )
    return TrainRecipe.model_validate(recipe.model_dump() | {"data": [{"path": str(pairs)}]})


def measured(results: Results) -> dict[str, list[float]]:
    """Return value, low and high of what matters."""
    found = {}
    for task, name in METRICS:
        one = results.metric(task, name)
        found[f"{task}/{name}"] = [round(x, 4) for x in (one.value, one.low, one.high) if x is not None]
    return found


if __name__ == "__main__":
    main()
