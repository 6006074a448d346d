"""Compare the testbed's base model with the same model behind guards, on held-out prompts.

    python benchmarks/guard_study.py            # about 4 CPU minutes; writes results/guards.json

The world and the base are the quickstart's. A linear judge is fitted on both completions of the world's safety pairs,
with their labels. Cost heads are fitted on two answers of the base to each of 1,000 prompts of the world's pairs,
with verdicts of the oracle; none of these prompts is held out. Rows whose guard uses the oracle, which also judges
the results, are marked `circular`: they show what a guard does whose judge, or whose head's labels, don't err.
"""

import argparse
import json
import random
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bfpo.generation.guards.fit_head import fit_cost_head

from bfpo.commands.judge import fit_judge
from bfpo.core.conversation import user_says
from bfpo.core.files import write_json, write_jsonl
from bfpo.core.samples import Prompt, Sampling, prompt_id
from bfpo.data.stages import generate_completions, judge_completions, read_prompt_file
from bfpo.evaluation.pipeline import evaluate
from bfpo.evaluation.results import Results
from bfpo.evaluation.suite import tasks_by_kind
from bfpo.experiments.steps import SAMPLING, make_base, write_world
from bfpo.generation.in_process import load_engine
from bfpo.judging.guarded_engine import GuardFile, guard_engine
from bfpo.testbed.oracle import Oracle
from bfpo.testbed.world import WorldOptions
from bfpo.training.manifest import hardware, versions

RESULT = Path(__file__).parent / "results" / "guards.json"
SEED, NUM_PROMPTS = 0, 1000
METRICS = (
    ("harmful", "safety"),
    ("benign", "helpfulness"),
    ("benign", "over_refusal"),
    ("lookalike", "helpfulness"),
    ("lookalike", "over_refusal"),
)


def pairs(world: Path, name: str) -> list[dict[str, Any]]:
    """Return the pairs of a file of the world."""
    return [json.loads(line) for line in (world / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def make_judge(world: Path, out: Path) -> None:
    """Fit a linear judge on the labeled completions of the world's safety pairs."""
    labeled = {
        (pair["prompt"], pair[side]): pair[f"is_{side}_safe"]
        for pair in pairs(world, "safety")
        for side in ("chosen", "rejected")
    }
    rows = ({"prompt": prompt, "text": text, "safe": safe} for (prompt, text), safe in labeled.items())
    write_jsonl(out.with_name("labeled.jsonl"), rows)
    fit_judge([str(out.with_name("labeled.jsonl"))], out, abstain_threshold=0.3)


def make_heads(folder: Path, oracle: Oracle) -> dict[str, dict[str, float]]:
    """Fit a head with a hidden layer and a linear one on answers of the base, and return their quality."""
    world = folder / "world"
    held_out = {prompt.prompt[-1].content for prompt in read_prompt_file(str(world / "prompts.jsonl"))}
    texts = dict.fromkeys(pair["prompt"] for name in ("safety", "helpfulness") for pair in pairs(world, name))
    known = [text for text in texts if text not in held_out]
    chosen = random.Random(SEED).sample(known, NUM_PROMPTS)
    prompts = [Prompt(prompt_id(user_says(text)), user_says(text)) for text in chosen]
    engine = load_engine(str(folder / "base"), Sampling(2, 1.0, 1.0, SAMPLING.max_new_tokens))
    completions = generate_completions(engine, prompts, folder / "own.jsonl", samples=2)
    verdicts = judge_completions(oracle, completions, folder / "own-verdicts.jsonl")
    quality = {}
    for name, units in (("hidden", 32), ("linear", 0)):
        fitted = fit_cost_head(engine, completions, verdicts, units=units, seed=SEED)
        fitted.head.save(folder / f"{name}.safetensors")
        quality[name] = {"loss": fitted.loss, "constant_loss": fitted.constant_loss, "held_out": fitted.held_out}
    return quality


def guards(folder: Path) -> dict[str, dict[str, Any] | None]:
    """Return the compared guards by name."""
    judge, hidden, linear = (str(folder / name) for name in ("judge.npz", "hidden.safetensors", "linear.safetensors"))
    first_safe = {"kind": "first_safe", "judge": "oracle:shared"}
    return {
        "base": None,
        **{f"first_safe, oracle, {n} samples": first_safe | {"samples": n} for n in (1, 4, 8)},
        "first_safe, oracle, 4 samples, by sentence": first_safe | {"samples": 4, "by": "sentence"},
        "first_safe, linear judge, 4 samples": first_safe | {"judge": f"linear:{judge}", "samples": 4},
        **{
            f"factor, kappa {kappa}": {"kind": "factor", "head": hidden, "kappa": kappa, "top_k": 8}
            for kappa in (0, 1, 4)
        },
        "factor, linear head, kappa 4": {"kind": "factor", "head": linear, "kappa": 4, "top_k": 8},
        "project, at most 0.02": {"kind": "project", "head": linear, "at_most": 0.02},
    }


def run(folder: Path, oracle: Oracle, number: int, guard: dict[str, Any] | None) -> tuple[Results, float]:
    """Evaluate the base behind a guard, and return the results and the CPU seconds."""
    section = None if guard is None else GuardFile.model_validate({"guard": guard}).guard
    tasks = tasks_by_kind("testbed", read_prompt_file(str(folder / "world" / "prompts.jsonl")))
    start = time.process_time()
    evaluation = evaluate(
        tasks,
        lambda: guard_engine(load_engine(str(folder / "base"), SAMPLING), SAMPLING, section),
        [oracle],
        folder / f"evaluation-{number}",
        run=f"{number}",
        model="base",
        sampling=SAMPLING,
        by_category=False,
    )
    return evaluation.results, time.process_time() - start


def main() -> None:
    """Run the study."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/guards"))
    folder, oracle = parser.parse_args().folder, Oracle("shared")
    write_world(WorldOptions(seed=SEED), folder / "world")
    make_base(folder, seed=SEED)
    make_judge(folder / "world", folder / "judge.npz")
    heads = make_heads(folder, oracle)
    rows = []
    for number, (name, guard) in enumerate(guards(folder).items()):
        results, seconds = run(folder, oracle, number, guard)
        values = {f"{task}/{metric}": results.metric(task, metric) for task, metric in METRICS}
        rows.append(
            {
                "guard": name,
                "circular": guard is not None and "linear:" not in str(guard.get("judge")),
                "metrics": {key: [value.value, value.low, value.high] for key, value in values.items() if value},
                "counts": None if results.guard is None else asdict(results.guard),
                "cpu_seconds": round(seconds, 2),
            }
        )
    command = "python benchmarks/guard_study.py"
    facts = {"command": command, "seed": SEED, "versions": versions(), "hardware": hardware()}
    write_json(RESULT, {**facts, "heads": heads, "rows": rows})


if __name__ == "__main__":
    main()
