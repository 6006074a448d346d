"""Train BFPO on labels of a judge that errs, plain and corrected, on the testbed.

    python benchmarks/label_noise_study.py [--seeds 8] [--folder runs/label-noise]

Every seed has its own world and base model, as in `bfpo experiment`, and the preference data of the quickstart with
labels that a judge of known errors gives: independent errors, errors that depend on the class of the action, and
errors that both answers of a pair share. Corrections use the true rates, rates estimated from 200 labeled answers, or
rates that are wrong by 0.1. Writes `benchmarks/results/label_noise.json`; after an interruption the same command
resumes.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from testbed_runs import compare, run_seeds, slug, train_and_evaluate

from bfpo.core.environment import hardware, versions
from bfpo.core.files import write_json, write_jsonl
from bfpo.core.pairs import PreferencePair, SafetyLabels
from bfpo.experiments.methods import Method
from bfpo.experiments.results import METRICS, PRIMARY
from bfpo.experiments.steps import make_base, write_world
from bfpo.losses.label_errors import LabelErrors
from bfpo.stats.judge_error import judge_errors
from bfpo.testbed.language import ACTION_CLASS
from bfpo.testbed.oracle import parse_prompt
from bfpo.testbed.world import World, WorldOptions

RESULTS = Path(__file__).parent / "results" / "label_noise.json"
LABELED = 200
CLASS_RATES = {"break": 0.05, "watch": 0.2, "make": 0.35}
"""Share of flipped labels by the class of the action; 20 % on average."""

Flips = tuple[bool, bool]
Judge = Callable[[PreferencePair, Random], Flips]
"""Returns whether the labels of the chosen and the rejected answer are wrong."""


class Run(NamedTuple):
    """A training run.

    Args:
        judge: Key of `JUDGES`.
        rates: How the rates of the correction are found, a key of `rates_of`; None for no correction.
        table: Name of a table of labels; None for the paper's.
    """

    judge: str
    rates: str | None = None
    table: str | None = None

    @property
    def name(self) -> str:
        """Name of the run."""
        table = f", {self.table}" if self.table else ""
        return f"{self.judge}: {self.rates or 'plain'}{table}"


def independent(rate: float) -> Judge:
    """Return a judge that flips each label with the same probability."""
    return lambda pair, rng: (rng.random() < rate, rng.random() < rate)


def by_class(pair: PreferencePair, rng: Random) -> Flips:
    """Flip each label with a probability that depends on the class of the action."""
    rate = CLASS_RATES[ACTION_CLASS[parse_prompt(pair.prompt[0].content).action]]
    return rng.random() < rate, rng.random() < rate


def shared(pair: PreferencePair, rng: Random) -> Flips:
    """Flip both labels of a pair together, with probability 20 %."""
    flip = rng.random() < 0.2
    return flip, flip


JUDGES: dict[str, Judge] = {
    "no errors": independent(0.0),
    "20%": independent(0.2),
    "30%": independent(0.3),
    "20% by class": by_class,
    "20% shared": shared,
}
RATES = ("true", "estimated", "0.1 too low", "0.1 too high")
TIES = "helpful_ties"
RUNS = [
    Run("no errors"),
    *(Run(judge, rates) for judge in ("20%", "30%") for rates in (None, *RATES)),
    *(Run("20% by class", rates) for rates in (None, "true", "estimated")),
    *(Run("20% shared", rates) for rates in (None, "true")),
    # A table with an interaction, which errors that both answers share bias.
    Run("no errors", None, TIES),
    *(Run(judge, "true", TIES) for judge in ("20%", "20% shared")),
]


def main() -> None:
    """Run the missing units and write the results."""
    seeds = run_seeds(__doc__, Path("runs/label-noise"), run_seed)
    if len(seeds) < 2:
        print("intervals need at least two seeds; nothing was written")
        return
    values = [{run: result["metrics"] for run, result in seed["runs"].items()} for seed in seeds]
    plain = {run.name: Run(run.judge).name for run in RUNS if run.rates is not None and run.table is None}
    rows = {
        metric: compare("/".join(metric), values, plain, higher_is_better=higher_is_better)
        for metric, higher_is_better in METRICS.items()
    }
    write_json(
        RESULTS,
        {
            "command": f"python benchmarks/label_noise_study.py --seeds {len(seeds)}",
            "what": "BFPO at the setting of the quickstart on labels of a judge that errs, plain and corrected; each "
            "run against the plain one on labels of the same judge; paired t-tests over seeds, adjusted by Holm",
            "versions": versions(),
            "hardware": hardware(),
            "labeled_answers": LABELED,
            "runs": [row for of_metric in rows.values() for row in of_metric],
            "seeds": seeds,
        },
    )
    for row in rows[PRIMARY]:
        print(f"{row['run']}: {row['mean'].value:.3f} {row.get('verdict', '')}")


def run_seed(seed: int, folder: Path) -> dict[str, Any]:
    """Return the metrics and the rates of all runs of a seed."""
    options = WorldOptions(seed=seed)
    write_world(options, folder / "world")
    make_base(folder, seed=seed)
    pairs = list(World(options).safety_set())
    labels = {name: verdicts(pairs, judge, Random(f"{seed} {name}")) for name, judge in JUDGES.items()}
    for name, of_pairs in labels.items():
        judged = (replace(pair, labels=verdict) for pair, verdict in zip(pairs, of_pairs, strict=True))
        write_jsonl(folder / f"{slug(name)}.jsonl", (pair.to_row() for pair in judged))
    results: dict[str, Any] = {"seed": seed, "runs": {}}
    for run in RUNS:
        errors = (
            None if run.rates is None else rates_of(run.rates, pairs, labels[run.judge], Random(f"{seed} sample"))
        )
        data = [folder / f"{slug(run.judge)}.jsonl"]
        metrics = train_and_evaluate(folder / slug(run.name), method_of(run, errors), data, seed=seed)
        results["runs"][run.name] = {"rates": None if errors is None else asdict(errors), "metrics": metrics}
        shown = {name: round(metrics[name], 3) for name in ("all/harmonic_mean", "harmful/safety")}
        print(f"seed {seed}, {run.name}: {json.dumps(shown)}", flush=True)
    return results


def verdicts(pairs: Iterable[PreferencePair], judge: Judge, rng: Random) -> list[SafetyLabels]:
    """Return the labels that a judge gives to pairs with true labels."""
    labels = []
    for pair in pairs:
        assert pair.labels is not None
        labels.append(
            SafetyLabels(*(safe != wrong for safe, wrong in zip(pair.labels, judge(pair, rng), strict=True)))
        )
    return labels


def rates_of(kind: str, pairs: list[PreferencePair], labels: list[SafetyLabels], rng: Random) -> LabelErrors:
    """Return the rates of a correction: those over all answers, of a sample, or wrong ones."""
    answers = [
        (str(index), true, verdict)
        for index, (pair, of_pair) in enumerate(zip(pairs, labels, strict=True))
        for true, verdict in zip(pair.labels or (), of_pair, strict=True)
    ]
    errors = judge_errors(rng.sample(answers, LABELED) if kind == "estimated" else answers)
    shift = {"0.1 too low": -0.1, "0.1 too high": 0.1}.get(kind, 0.0)
    return LabelErrors(errors.sensitivity + shift, errors.specificity + shift)


def method_of(run: Run, errors: LabelErrors | None) -> Method:
    """Return the method of a run."""
    loss: dict[str, Any] = {"name": "bfpo", "beta": 0.3}
    loss |= {} if errors is None else {"label_errors": asdict(errors)}
    return Method(loss=loss | ({} if run.table is None else {"table": run.table}))


if __name__ == "__main__":
    main()
