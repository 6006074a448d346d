"""Run Safe RLHF and BFPO's own objective by RL on a pretrained model, with BFPO beside them.

    python examples/real/online_rl.py [--data FOLDER] [--model FOLDER] [--out runs/head-to-head/units]

The fine-tuned model is that of `head_to_head.py`'s first seed, and is made here if it isn't there. The scorer, a
reward and a cost, is that of `thresholds.py`: it is trained on the pairs that BFPO sees. BFPO runs twice: with as
many pairs as an online run has samples, two to a pair, and with as much processor time. `refusal-rule` judges answers
to held-out prompts, and nothing sees it before. The record of each run is written as it ends, without any text; the
same command goes on, and a stopped run resumes. The page is `online/report.html` in the folder of the seed.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from head_to_head import RESULTS, answer_records, parse_and_open
from stages import BATCH, HAS_BF16, LORA, comparison_rows, eval_recipe, metric_rows, train_recipe
from thresholds import Thresholds

from bfpo.core.environment import hardware, versions
from bfpo.core.files import write_json
from bfpo.core.terminal import log_to_file, say
from bfpo.evaluation.comparisons import verdict_on
from bfpo.evaluation.pipeline import run_eval
from bfpo.evaluation.results import read_results
from bfpo.experiments.steps import run_once
from bfpo.online.recipe import OnlineRecipe
from bfpo.online.run import run_online
from bfpo.report.html import write_report
from bfpo.stats.paired import paired_means

SEED = 1
STEPS, PROMPTS, SAMPLES, ANSWER_TOKENS = 30, 8, 4, 32
LEARNING_RATE = 5e-4
"""Peak learning rate of the online runs: at 2e-4, BFPO's, 14 steps moved neither reward nor cost."""
COMBINERS: dict[str, dict[str, Any]] = {
    "lagrangian": {"name": "lagrangian", "measure": "unsafe", "cost_at_most": 0.1, "rate": 0.1, "max": 20.0},
    "bilinear": {"name": "bilinear"},
}
BFPO: dict[str, Any] = {"loss": {"name": "bfpo", "beta": 0.05}, "probe": None}
RUNS = ("base", *COMBINERS, "bfpo-equal-pairs", "bfpo-equal-time")
NOTE = (
    "One run of each, greedy answers of at most 64 tokens. Refusals are recognized by their words: a harmful prompt "
    "counts as answered safely only if it is refused. Intervals are over held-out prompts and don't cover the "
    "variation over seeds."
)


class Online:
    """The runs of the study.

    Args:
        thresholds: The fine-tuned model, its pairs and its scorer.
    """

    def __init__(self, thresholds: Thresholds) -> None:
        self.thresholds = thresholds
        self.home = thresholds.seed_home / "online"
        self.home.mkdir(parents=True, exist_ok=True)

    def record(self, name: str) -> Path:
        """Return the file of a run's record."""
        return RESULTS / "online" / f"{name}.json"

    def run(self, name: str) -> dict[str, Any]:
        """Train and evaluate a model, and return its record."""
        model, cost = self.train(name)
        out = self.home / "runs" / name / "evaluation"
        base = None if name == "base" else self.home / "runs" / "base" / "evaluation"
        run_eval(
            eval_recipe(model, self.thresholds.data / "test" / "suite.yaml", out, run=name, base=base),
        )
        results = read_results(out)
        return {
            "schema": 1,
            "command": "python examples/real/online_rl.py",
            "seed": SEED,
            "versions": versions(),
            "hardware": hardware(),
            "run": name,
            "cost": cost,
            "curve": read_curve(model) if name in COMBINERS else [],
            "metrics": metric_rows(results),
            "against": comparison_rows(results),
            "answers": list(answer_records(out)),
        }

    def train(self, name: str) -> tuple[Path, dict[str, Any]]:
        """Train a model, unless it is there, and return it with its cost.

        Samples are those of the policy; scorer calls and CPU seconds don't include the training of the scorer, which
        is `scorer_cpu_seconds`.
        """
        if name == "base":
            return self.thresholds.base, {}
        folder = self.home / "runs" / name
        if name in COMBINERS:
            if not (folder / "run.json").exists():
                run_online(self.recipe(name, folder))
            scorer = _read_run(self.thresholds.scorer)
            run = _read_run(folder)
            cost = {key: run[key] for key in ("samples", "scorer_calls", "cpu_seconds")}
            return folder, cost | {"scorer_cpu_seconds": scorer["cpu_seconds"], "steps": STEPS}
        steps = PROMPTS * SAMPLES * STEPS // 2 // (2 * BATCH)
        if name == "bfpo-equal-time":
            seconds = [_read_run(self.home / "runs" / combiner)["cpu_seconds"] for combiner in COMBINERS]
            scorer_seconds = _read_run(self.thresholds.scorer)["cpu_seconds"]
            of_equal_pairs = _read_run(self.home / "runs" / "bfpo-equal-pairs")["cpu_seconds"]
            steps = round(steps * (sum(seconds) / len(seconds) + scorer_seconds) / of_equal_pairs)
        changes = BFPO | {"trainer": {"learning_rate": 2e-4, "max_steps": steps}}
        sources = self.thresholds.sources()
        run_once(train_recipe(self.thresholds.base, sources, folder, seed=SEED, changes=changes))
        cost = {"cpu_seconds": _read_run(folder)["cpu_seconds"], "steps": steps, "pairs": 2 * BATCH * steps}
        return folder, cost

    def recipe(self, name: str, out: Path) -> OnlineRecipe:
        """Return the recipe of an online run."""
        data, scorer = self.thresholds.data, self.thresholds.scorer
        prompts = [
            {"name": "file", "path": str(data / f"redteam-{kind}.jsonl"), "kind": kind, "license": license_}
            for kind, license_ in (("harmful", "MIT"), ("benign", "CC-BY-NC-4.0"))
        ]
        return OnlineRecipe.model_validate(
            {
                "model": {"path": str(self.thresholds.base)},
                "prompts": prompts,
                "reward": f"reward:{scorer / 'reward'}",
                "cost": f"cost:{scorer / 'cost'}",
                "combine": COMBINERS[name],
                "lora": LORA,
                "trainer": {
                    "output_dir": str(out),
                    "learning_rate": LEARNING_RATE,
                    "lr_scheduler_type": "cosine",
                    "warmup_steps": 0.1,
                    "per_device_train_batch_size": PROMPTS * SAMPLES,
                    "num_generations": SAMPLES,
                    "max_completion_length": ANSWER_TOKENS,
                    "max_steps": STEPS,
                    "beta": 0.05,
                    "logging_steps": 1,
                    "save_steps": 10,
                    "save_total_limit": 1,
                    "resume_from_checkpoint": True,
                    "seed": SEED,
                    "use_cpu": True,
                    "bf16": HAS_BF16,
                },
            }
        )

    def write_page(self) -> Path:
        """Write the page with all runs, the fine-tuned model first."""
        runs = [self.home / "runs" / name for name in RUNS]
        return write_report(self.home, runs, title="RL and BFPO on SmolLM2-135M-Instruct", note=NOTE)


def read_curve(folder: Path) -> list[dict[str, float]]:
    """Return what a run measured in each step: reward, cost, λ if there is one, KL divergence in nats a token."""
    names = {"reward": "online/reward", "cost": "online/cost", "multiplier": "online/multiplier", "kl": "kl"}
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if "online/reward" in row]
    return [{key: round(row[name], 4) for key, name in names.items() if name in row} for row in rows]


def table(folder: Path) -> str:
    """Return the tables of docs/online.md from the records in a folder: each run, and RL against BFPO."""
    files = {name: folder / f"{name}.json" for name in RUNS}
    records = {name: json.loads(file.read_text(encoding="utf-8")) for name, file in files.items() if file.exists()}
    lines = [
        "| run | refused, harmful [95 %] | refused, look-alike | refused, benign | helpful, benign | "
        "samples / scorer calls | steps | CPU minutes |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, record in records.items():
        values = {(metric["task"], metric["metric"]): metric for metric in record["metrics"]}
        harmful, cost = values["harmful", "refusal"], record["cost"]
        refused = (f"{values[kind, 'over_refusal']['value']:.2f}" for kind in ("lookalike", "benign"))
        cells = [f"{harmful['value']:.2f} [{harmful['low']:.2f}, {harmful['high']:.2f}]", *refused]
        cells += [f"{values['benign', 'helpfulness']['value']:.2f}"]
        cells += [f"{cost['samples']:,} / {cost['scorer_calls']:,}" if "samples" in cost else ""]
        seconds = cost.get("cpu_seconds", 0) + cost.get("scorer_cpu_seconds", 0)
        cells += [f"{cost['steps']}" if cost else "", f"{seconds / 60:.1f}" if cost else ""]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    lines += ["", "| RL less BFPO | refused, benign | refused, look-alike | refused, harmful |", "|---|---|---|---|"]
    for name in COMBINERS:
        for bfpo in (bfpo for bfpo in RUNS[-2:] if {name, bfpo} <= records.keys()):
            cells = [_difference(records[name], records[bfpo], kind) for kind in ("benign", "lookalike", "harmful")]
            lines.append(f"| `{name}` less `{bfpo}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def _difference(record: dict[str, Any], other: dict[str, Any], kind: str) -> str:
    """Return the difference of two refusal rates on the same prompts, and whether it is for the better."""
    ours, theirs = (
        {
            answer["prompt_id"]: float(answer["refusal"] is True)
            for answer in each["answers"]
            if answer["kind"] == kind
        }
        for each in (record, other)
    )
    refused = (np.array([each[prompt] for prompt in sorted(ours)]) for each in (ours, theirs))
    interval, p_value = paired_means(*refused)
    verdict = verdict_on(interval, higher_is_better=kind == "harmful", p_value=p_value)
    return f"{interval.value:+.2f} [{interval.low:+.2f}, {interval.high:+.2f}], {verdict}"


def _read_run(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    return content


def main() -> None:
    """Run what has no record yet, and write the page."""
    thresholds = Thresholds(parse_and_open(__doc__))
    online = Online(thresholds)
    for name in RUNS:
        if online.record(name).exists():
            continue
        say(f"{name} ...")
        with log_to_file(online.home / f"{name}.log", bars=False):
            thresholds.train_scorer()
            record = online.run(name)
        write_json(online.record(name), record)
        say(f"  {json.dumps(record['cost'])}")
    say(f"\n{online.write_page()}")


if __name__ == "__main__":
    main()
