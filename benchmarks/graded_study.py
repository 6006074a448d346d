"""Train BFPO with and without graded pairs, on the testbed: do they lift the share of right slots?

    python benchmarks/graded_study.py [--seeds 8] [--folder runs/graded]

Every seed has its own world and base model, as in `bfpo experiment`. Graded pairs are made of the safe chosen answers
of the safety set (`bfpo data degrade`), and added to the main stream with their degrees, with the whole target, or
for DPO. Writes `benchmarks/results/graded.json`; after an interruption the same command resumes.
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from testbed_runs import compare, run_seeds, slug, train_and_evaluate

from bfpo.core.environment import hardware, versions
from bfpo.core.files import write_json, write_jsonl
from bfpo.core.samples import Completion
from bfpo.data.degrade import graded_pairs
from bfpo.data.stages import read_completions
from bfpo.experiments.methods import Method
from bfpo.experiments.results import METRICS, PRIMARY
from bfpo.experiments.steps import make_base, write_world
from bfpo.testbed.language import Slots
from bfpo.testbed.oracle import parse_prompt, read_answer
from bfpo.testbed.world import World, WorldOptions

RESULTS = Path(__file__).parent / "results" / "graded.json"
VERSIONS = 2
SLOTS = "benign/right_slots"
"""Share of right slots of the answers to benign prompts that aren't refusals."""


class Run(NamedTuple):
    """A training run.

    Args:
        loss: The loss.
        has_graded: Whether graded pairs are added to the main stream.
        main: File of the safety set.
    """

    loss: dict[str, Any]
    has_graded: bool
    main: str = "safety"


BFPO = {"name": "bfpo", "beta": 0.3}
DPO = {"name": "dpo", "beta": 0.3}
RUNS = {
    "bfpo": Run(BFPO, has_graded=False),
    "bfpo, graded pairs": Run({**BFPO, "graded": True}, has_graded=True),
    "bfpo, the same pairs without degrees": Run(BFPO, has_graded=True),
    "dpo": Run(DPO, has_graded=False, main="safety_by_safety"),
    "dpo, graded pairs": Run({**DPO, "graded": True}, has_graded=True, main="safety_by_safety"),
}
BASELINES = {run: run.partition(",")[0] for run in RUNS if "," in run}


def main() -> None:
    """Run the missing units and write the results."""
    seeds = run_seeds(__doc__, Path("runs/graded"), run_seed)
    if len(seeds) < 2:
        print("intervals need at least two seeds; nothing was written")
        return
    names = {"/".join(metric): higher_is_better for metric, higher_is_better in METRICS.items()} | {SLOTS: True}
    rows = {
        name: compare(name, seeds, BASELINES, higher_is_better=higher_is_better)
        for name, higher_is_better in names.items()
    }
    write_json(
        RESULTS,
        {
            "command": f"python benchmarks/graded_study.py --seeds {len(seeds)}",
            "what": f"graded pairs of {VERSIONS} versions added to the main stream; paired t-tests over seeds, "
            "adjusted by Holm",
            "versions": versions(),
            "hardware": hardware(),
            "runs": [row for of_metric in rows.values() for row in of_metric],
            "seeds": seeds,
        },
    )
    for row in (*rows["/".join(PRIMARY)], *rows[SLOTS]):
        print(f"{row['metric']}, {row['run']}: {row['mean'].value:.3f} {row.get('verdict', '')}")


def run_seed(seed: int, folder: Path) -> dict[str, dict[str, float]]:
    """Return the metrics of all runs of a seed."""
    options = WorldOptions(seed=seed)
    write_world(options, folder / "world")
    make_base(folder, seed=seed)
    outcomes: Counter[str] = Counter()
    graded = list(graded_pairs(World(options).safety_set(), VERSIONS, outcomes))
    write_jsonl(folder / "graded.jsonl", (pair.to_row() for pair in graded))
    print(f"seed {seed}: {len(graded):,} graded pairs of {dict(outcomes)}", flush=True)
    results = {}
    for name, run in RUNS.items():
        data = [folder / "world" / f"{run.main}.jsonl", *([folder / "graded.jsonl"] if run.has_graded else [])]
        out = folder / slug(name)
        results[name] = train_and_evaluate(out, Method(loss=run.loss), data, seed=seed)
        results[name][SLOTS] = right_slots(out / "evaluation")
        shown = {metric: round(results[name][metric], 3) for metric in ("/".join(PRIMARY), SLOTS)}
        print(f"seed {seed}, {name}: {json.dumps(shown)}", flush=True)
    return results


def right_slots(evaluation: Path) -> float:
    """Return the share of right slots of the answers to benign prompts that aren't refusals."""
    shares = []
    for completion in read_completions(evaluation / Completion.file_name):
        if completion.prompt_id.startswith("benign"):
            request = parse_prompt(completion.prompt[-1].content)
            reading = read_answer(request, completion.text, WorldOptions().skills)
            if reading.is_answer and not reading.refusal_level:
                shares.append(reading.correct / len(Slots._fields))
    return sum(shares) / len(shares)


if __name__ == "__main__":
    main()
