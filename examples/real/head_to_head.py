"""Compare methods on a pretrained model by a protocol that is fixed before the runs.

    python examples/real/head_to_head.py [--protocol FILE] [--data FOLDER] [--model FOLDER] [--until HH:MM]

A unit is a training run with its evaluation. The record of each is written as it ends, without any text, so the work
can be stopped at any time and goes on with the same command; units that have a record aren't run again. The same
command in a second terminal takes other units. Then `summarize.py` makes the tables.
"""

import argparse
import gc
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from filelock import FileLock, Timeout
from held_out import score_pairs
from pretrained import import_model
from sources import Files
from split import write_splits
from stages import (
    eval_recipe,
    pair_sources,
    redteam_recipe,
    sft_recipe,
    train_recipe,
)

from bfpo.core.conversation import prompt_key
from bfpo.core.environment import hardware, versions
from bfpo.core.files import write_json
from bfpo.core.samples import Completion, Key, Prompt, Verdict
from bfpo.core.terminal import log_to_file, say
from bfpo.data.stages import read_completions, read_prompt_file, verdicts_by_judge
from bfpo.evaluation.attacks import AttackedSuite
from bfpo.evaluation.pipeline import run_eval
from bfpo.experiments.steps import run_once
from bfpo.generation.dialogues import read_turns
from bfpo.model.merge import merge_checkpoint
from bfpo.redteam.run import run_redteam
from bfpo.stats.intervals import harmonic_mean

HERE = Path(__file__).parent
RESULTS = HERE.parents[1] / "benchmarks" / "results" / "real"
BASES = ("original", "base")
"""Models that no method trained: the imported one, and the fine-tuned one that the methods start from."""
WAIT = 20
"""Seconds between two looks for units that wait for others."""


@dataclass(frozen=True)
class Unit:
    """A training run with its evaluation, or a model that no method trained.

    Args:
        method: A key of the protocol's methods, or of `BASES`.
        learning_rate: Peak learning rate; None for a model that no method trained.
        seed: Seed of the fine-tuned model, of its answers in red-teaming, and of the training.
        part: Prompts of the evaluation: `dev`, `test`, or `attacked`, harmful ones of `test` under attack.
    """

    method: str
    learning_rate: float | None
    seed: int
    part: str

    @property
    def name(self) -> str:
        """Name of the record."""
        rate = "" if self.learning_rate is None else f"-lr{self.learning_rate:g}"
        return f"{self.method}{rate}-seed{self.seed}-{self.part}"


class Comparison:
    """The units of a protocol, and how they are run.

    Args:
        protocol: Content of `protocol.yaml`.
        model: The imported model.
        data: Folder of the splits.
        out: Folder of models and answers.
    """

    def __init__(self, protocol: dict[str, Any], model: Path, data: Path, out: Path) -> None:
        self.protocol, self.model, self.data, self.out = protocol, model, data, out
        self.records = RESULTS / protocol["records"]
        self.dtype = protocol.get("dtype", "float32")

    def record(self, unit: Unit) -> Path:
        """Return the file of a unit's record."""
        return self.records / f"{unit.name}.json"

    def units(self) -> Iterator[Unit]:
        """Yield the units in the order of their runs: the test of tuned methods, seed by seed, and what is left.

        The test of the others follows when their trials have ended, so the units are to be listed again then.
        """
        methods, tuning_seed = self.protocol["methods"], self.protocol["tuning_seed"]
        rates = {method: rate for method in methods if (rate := self.tuned(method)) is not None}
        more_seeds = self.protocol.get("more_seeds", {})
        seeds = {method: [*self.protocol["seeds"], *more_seeds.get(method, ())] for method in rates}
        attacked = self.protocol.get("attacked", {"methods": []})["methods"]
        yield Unit("original", None, self.protocol["seeds"][0], "test")
        for seed in sorted(set(chain(*seeds.values()))):
            yield Unit("base", None, seed, "test")
            yield from (Unit(method, rates[method], seed, "test") for method in rates if seed in seeds[method])
            if seed in self.protocol["seeds"]:
                yield from (Unit(method, rates.get(method), seed, "attacked") for method in attacked)
        for method in (method for method in methods if method not in rates):
            yield Unit("base", None, tuning_seed, "dev")
            yield from (Unit(method, rate, tuning_seed, "dev") for rate in self.protocol["learning_rates"])
        if self.protocol["against"] in rates:
            for name, variant in self.protocol.get("variants", {}).items():
                rate = variant.get("learning_rate", rates[self.protocol["against"]])
                yield Unit(name, rate, tuning_seed, "dev")

    def tuned(self, method: str) -> float | None:
        """Return the learning rate of a method: the given one, or that of the better trial, None before both end."""
        if "learning_rate" in self.protocol["methods"][method]:
            return float(self.protocol["methods"][method]["learning_rate"])
        seed = self.protocol["tuning_seed"]
        trials = {rate: self.record(Unit(method, rate, seed, "dev")) for rate in self.protocol["learning_rates"]}
        if not all(record.exists() for record in trials.values()):
            return None
        scores = {rate: tuning_score(json.loads(record.read_text())) for rate, record in trials.items()}
        best: float = max(scores, key=lambda rate: scores[rate])
        return best

    def run(self, unit: Unit) -> dict[str, Any]:
        """Run a unit and return its record."""
        start, cpu = time.monotonic(), time.process_time()
        path, training = self.train(unit)
        folder = self.out / f"seed-{unit.seed}" / f"{unit.name}-evaluation"
        held_out = []
        if unit.part == "attacked":
            answers = self.answers_under_attack(path, folder, unit.name)
        else:
            suite = self.data / unit.part / "suite.yaml"
            run_eval(eval_recipe(path, suite, folder, run=unit.name, dtype=self.dtype))
            answers = list(answer_records(folder))
        if unit.part == "test":
            held_out = [row.to_row() for row in score_pairs(path, self.data / "held-out-pairs.jsonl")]
        gc.collect()
        return {
            "schema": 1,
            "unit": {
                "method": unit.method,
                "learning_rate": unit.learning_rate,
                "seed": unit.seed,
                "part": unit.part,
            },
            "created": datetime.now().astimezone().isoformat(timespec="seconds"),
            "versions": versions(),
            "hardware": hardware(),
            "minutes": round((time.monotonic() - start) / 60, 1),
            "cpu_minutes": round((time.process_time() - cpu) / 60, 1),
            "training": training,
            "answers": answers,
            "held_out": held_out,
        }

    def train(self, unit: Unit) -> tuple[Path, dict[str, Any]]:
        """Train the model of a unit unless it exists, and return it with the record of its training."""
        if unit.method == "original":
            return self.model, {}
        home = self.out / f"seed-{unit.seed}"
        base = self.make_base(home, unit.seed)
        if unit.method == "base":
            return base, {}
        # The attacks are on the model of the test.
        folder = home / replace(unit, part="test" if unit.part == "attacked" else unit.part).name
        method = (self.protocol["methods"] | self.protocol.get("variants", {}))[unit.method]
        recipe = train_recipe(
            self.model if method.get("start") == "original" else base,
            pair_sources(self.data, home / "redteam" if method.get("own_answers", True) else None),
            folder,
            seed=unit.seed,
            # The methods of a seed share the reference's log-probabilities; held-out pairs are scored below.
            changes=method["changes"]
            | {"reference": "cache", "cache_dir": str(home / "reference"), "eval": [], "probe": None}
            | {"trainer": {"learning_rate": unit.learning_rate, **method["changes"].get("trainer", {})}},
        )
        run_once(recipe)
        # Checkpoints, which would fill the disk.
        for checkpoint in folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
        run = json.loads((folder / "run.json").read_text())
        keys = ("data", "evaluation", "train_loss", "start_check", "cpu_seconds")
        return folder, {key: run[key] for key in keys} | {"changes": method["changes"]}

    def answers_under_attack(self, path: Path, folder: Path, name: str) -> list[dict[str, Any]]:
        """Attack a model, and return what the judges say about each reply, without texts."""
        attacked = self.protocol["attacked"]
        suite = str(self.data / "test" / "suite.yaml")
        recipe = eval_recipe(path, suite, folder, run=name, dtype=self.dtype)
        suites = [AttackedSuite(suite=suite, attack=attack) for attack in attacked["attacks"]]
        changes = {
            "suites": [suite, *suites],
            "limit": attacked["prompts"],
            "leave_out": ["xstest_safe", "alpaca_eval"],
        }
        run_eval(recipe.model_copy(update=changes))
        records = [{"attack": None, **record} for record in answer_records(folder)]
        for attack_folder in sorted(folder.glob("attack-*")):
            verdicts = rule_verdicts(attack_folder)
            label = attack_folder.name.removeprefix("attack-").split("@")[0]
            for turn in read_turns(attack_folder):
                verdict = verdicts[turn.completion.key]
                records.append(
                    {
                        "attack": label,
                        "prompt_id": turn.original_id,
                        "kind": "harmful",
                        **outcome(turn.completion, verdict),
                    }
                )
        return records

    def make_base(self, home: Path, seed: int) -> Path:
        """Return the fine-tuned model of a seed; its own answers are sampled and labeled too."""
        base = self.fine_tune(home, seed)
        with FileLock(home / "redteam.lock"):
            if not (home / "redteam" / "pairs.jsonl").exists():
                run_redteam(redteam_recipe(base, self.data, home / "redteam", seed=seed, dtype=self.dtype))
        return base

    def fine_tune(self, home: Path, seed: int) -> Path:
        """Return the fine-tuned model of a seed."""
        base = home / "base"
        home.mkdir(parents=True, exist_ok=True)
        with FileLock(home / "base.lock"):
            if not (base / "config.json").exists():
                run_once(sft_recipe(self.model, self.data, home / "sft", seed=seed))
                merge_checkpoint(home / "sft", base)
        return base


def tuning_score(record: dict[str, Any]) -> float:
    """Return the harmonic mean of the shares of refused harmful prompts and of answered benign ones."""
    harmful = [answer["refusal"] is True for answer in record["answers"] if answer["kind"] == "harmful"]
    benign = [answer["refusal"] is False for answer in record["answers"] if answer["kind"] != "harmful"]
    return float(harmonic_mean(np.array(np.mean(harmful)), np.array(np.mean(benign))))


def answer_records(evaluation: Path) -> Iterator[dict[str, Any]]:
    """Yield what the judges say about each answer, without texts."""
    prompts = {prompt.prompt_id: prompt for prompt in read_prompt_file(str(evaluation / Prompt.file_name))}
    verdicts = rule_verdicts(evaluation)
    for completion in read_completions(evaluation / Completion.file_name):
        known = {"prompt_id": completion.prompt_id, "kind": prompts[completion.prompt_id].kind}
        yield known | outcome(completion, verdicts[completion.key])


def rule_verdicts(folder: Path) -> dict[Key, Verdict]:
    """Return the verdicts of `refusal-rule` in a folder."""
    by_name = {name: rows for (name, _), rows in verdicts_by_judge(folder).items()}
    return {verdict.key: verdict for verdict in by_name["refusal-rule"]}


def outcome(completion: Completion, verdict: Verdict) -> dict[str, Any]:
    """Return an answer's hash, and what a judge says about it."""
    return {
        "answer": completion.text_hash,
        "refusal": verdict.refusal,
        "degenerate": bool(verdict.malformed),
        "cut": completion.finish_reason == "length",
    }


def open_comparison(protocol_file: Path, data: Path | None, model: Path | None, out: Path | None) -> Comparison:
    """Return the comparison of a protocol; its model and its splits are made if they aren't there.

    Args:
        protocol_file: The protocol.
        data: Folder of the published files; None downloads them.
        model: The imported model; None downloads and imports it.
        out: Folder of models and answers; None for the protocol's in `runs/head-to-head`.
    """
    protocol = yaml.safe_load(protocol_file.read_text())
    out = out or Path("runs/head-to-head") / protocol["records"]
    model = model or out / "model"
    import_model(model, protocol["model"])
    write_splits(Files(data, out / "downloads").paths, out / "data")
    write_tasks(out / "data")
    return Comparison(protocol, model, out / "data", out)


def write_tasks(data: Path) -> None:
    """Write which task each prompt of the test is of, for `summarize.py`: ids, which are hashes, and no texts."""
    suite = yaml.safe_load((data / "test" / "suite.yaml").read_text(encoding="utf-8"))
    tasks = {
        f"file-{prompt_key(json.loads(line)['prompt'])[:12]}": task["name"]
        for task in suite["tasks"]
        for line in Path(task["path"]).read_text(encoding="utf-8").splitlines()
    }
    write_json(RESULTS / "test-tasks.json", tasks)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say where data, model and results are."""
    parser.add_argument("--data", type=Path, help="folder of the published files; default: they are downloaded")
    parser.add_argument("--model", type=Path, help="imported model; default: it is downloaded and imported")
    parser.add_argument("--out", type=Path, help="folder of models and answers; default: runs/head-to-head/RECORDS")


def parse_and_open(description: str | None) -> Comparison:
    """Read the command line of a study that uses the models of `protocol.yaml`, and return the comparison."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    options = parser.parse_args()
    return open_comparison(HERE / "protocol.yaml", options.data, options.model, options.out)


def main() -> None:
    """Run the units that have no record yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--protocol", type=Path, default=HERE / "protocol.yaml")
    add_options(parser)
    parser.add_argument("--until", help="start no unit after this time, HH:MM")
    options = parser.parse_args()
    comparison = open_comparison(options.protocol, options.data, options.model, options.out)
    while units := [unit for unit in comparison.units() if not comparison.record(unit).exists()]:
        if options.until and f"{datetime.now():%H:%M}" > options.until:
            say(f"stopped before {units[0].name}; the same command goes on")
            return
        if not run_next(comparison, units):
            # The others are running in other processes; the next units may depend on them.
            time.sleep(WAIT)


def run_next(comparison: Comparison, units: Sequence[Unit]) -> bool:
    """Run the first unit that no other process runs, and write its record; return whether there was one."""
    for unit in units:
        # Without the record of another process, which may have ended since the units were listed.
        with suppress(Timeout), FileLock(comparison.out / f"{unit.name}.lock", timeout=0):
            if comparison.record(unit).exists():
                continue
            with log_to_file(comparison.out / f"{unit.name}.log", bars=False):
                record = comparison.run(unit)
            write_json(comparison.record(unit), record)
            say(f"{datetime.now():%H:%M} {unit.name}: {record['minutes']} min")
            return True
    return False


if __name__ == "__main__":
    main()
