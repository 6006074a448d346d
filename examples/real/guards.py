"""Compare guards on a pretrained model, fine-tuned, and after BFPO.

    python examples/real/guards.py [--data FOLDER] [--model FOLDER] [--out runs/head-to-head/units]

The models are those of `head_to_head.py`'s first seed, and are trained here if they aren't there. Judges and heads
learn from training prompts only, with two labelers: a linear judge fitted on people's labels of other models'
answers, and the rule of red-teaming. `refusal-rule` judges the results, so guards with the rule's labels are marked
`circular`. The record of each model behind a guard is written as it ends, without any text; the same command goes on.
"""

import json
import time
from pathlib import Path
from typing import Any, NamedTuple

from head_to_head import RESULTS, Comparison, Unit, parse_and_open
from stages import ANSWER_TOKENS, JUDGES, metric_rows

from bfpo.commands.judge import fit_judge
from bfpo.config.per_token import PerTokenRecipe
from bfpo.core.environment import hardware, versions
from bfpo.core.files import write_json
from bfpo.core.samples import Completion, Sampling, Verdict
from bfpo.core.terminal import log_to_file, say
from bfpo.data.stages import judge_completions, read_completions
from bfpo.evaluation.pipeline import run_eval
from bfpo.evaluation.recipe import EvalRecipe
from bfpo.evaluation.results import read_results
from bfpo.judging.open import open_judge
from bfpo.judging.prefix_run import HEAD_FILE, run_per_token

SEED, LEARNING_RATE = 1, 2e-4
"""The first seed of the head-to-head, and BFPO's tuned learning rate there."""
PROMPTS = 25
"""Held-out prompts of each of the four tasks."""
# As red-teaming samples: the heads learn from its answers.
SAMPLING = Sampling(temperature=1.0, max_new_tokens=ANSWER_TOKENS, seed=SEED)
TOP_K = 10
HEADS: dict[str, dict[str, Any]] = {
    "rule": {"labels": "rule"},
    "judge": {"labels": "judge"},
    "rule-linear": {"labels": "rule", "keys": {"units": 0, "layers": [-1]}},
}
"""Cost head → who labeled the answers that it learns from, and keys of its recipe."""


class Setting(NamedTuple):
    """A model behind a guard.

    Args:
        model: `base`, the fine-tuned model, or `bfpo`.
        name: Name of the guard and its strength.
        section: Keys of `guard:`; None for no guard.
        circular: Whether the rule that judges the results labeled what the guard's head learned from.
    """

    model: str
    name: str
    section: dict[str, Any] | None
    circular: bool = False

    @property
    def record(self) -> Path:
        """File of its record."""
        return RESULTS / "guards" / f"{self.model}-{self.name}.json"


def settings(judge: Path, heads: Path) -> list[Setting]:
    """Return the compared guards, in the order of their runs.

    Args:
        judge: File of the linear judge.
        heads: Folder of the heads.
    """

    def first_safe(samples: int) -> dict[str, Any]:
        return {"kind": "first_safe", "judge": f"linear:{judge}", "samples": samples}

    def factor(labels: str, kappa: float) -> dict[str, Any]:
        return {"kind": "factor", "head": str(heads / labels / HEAD_FILE), "kappa": kappa, "top_k": TOP_K}

    project = {"kind": "project", "head": str(heads / "rule-linear" / HEAD_FILE), "at_most": 0.1}
    return [
        Setting("base", "no-guard", None),
        Setting("bfpo", "no-guard", None),
        Setting("base", "first_safe-4", first_safe(4)),
        Setting("base", "factor-rule-4", factor("rule", 4), circular=True),
        Setting("bfpo", "first_safe-4", first_safe(4)),
        Setting("base", "first_safe-1", first_safe(1)),
        Setting("base", "factor-rule-1", factor("rule", 1), circular=True),
        Setting("base", "factor-judge-4", factor("judge", 4)),
        Setting("base", "project-rule-0.1", project, circular=True),
    ]


class Guards:
    """The judge, heads and models of the comparison, made when they are first needed.

    Args:
        comparison: The head-to-head, whose models are used.
    """

    def __init__(self, comparison: Comparison) -> None:
        self.comparison = comparison
        self.home = comparison.out / f"seed-{SEED}"
        self.judge, self.heads = self.home / "guards" / "judge.npz", self.home / "guards"

    def model(self, name: str) -> Path:
        """Return a model, trained if it isn't there."""
        return self.comparison.train(Unit(name, None if name == "base" else LEARNING_RATE, SEED, "test"))[0]

    def make_judge(self) -> None:
        """Fit the linear judge on labeled answers to training prompts, unless it is there."""
        if not self.judge.exists():
            self.judge.parent.mkdir(parents=True, exist_ok=True)
            data = self.comparison.data
            fit_judge([str(data / f"labeled-{name}.jsonl") for name in ("xstest", "gptfuzz")], self.judge)

    def make_heads(self) -> dict[str, Any]:
        """Train the cost heads of the fine-tuned model on its answers in red-teaming, and return their quality."""
        base = self.model("base")
        redteam = self.home / "redteam"
        completions = read_completions(redteam / Completion.file_name)
        by_judge = self.heads / "verdicts-judge.jsonl"
        judge_completions(open_judge(f"linear:{self.judge}"), completions, by_judge)
        by_rule = next(redteam.glob(f"{Path(Verdict.file_name).stem}*.jsonl"))
        verdicts = {"judge": by_judge, "rule": by_rule}
        quality = {}
        for name, head in HEADS.items():
            out = self.heads / name
            if not (out / "run.json").exists():
                recipe = {
                    "model": {"path": str(base)},
                    "per_token": True,
                    "completions": str(redteam / Completion.file_name),
                    "verdicts": str(verdicts[head["labels"]]),
                    "out": str(out),
                }
                run_per_token(PerTokenRecipe.model_validate(recipe | head.get("keys", {})))
            quality[name] = json.loads((out / "run.json").read_text(encoding="utf-8"))["evaluation"]
        return quality

    def run(self, setting: Setting) -> dict[str, Any]:
        """Evaluate a model behind a guard, and return its record."""
        self.make_judge()
        heads = self.make_heads()
        out = self.heads / f"{setting.model}-{setting.name}"
        recipe = {
            "out": str(out),
            "run": f"{setting.model} {setting.name}",
            "model": {"path": str(self.model(setting.model))},
            "suites": [str(self.comparison.data / "test" / "suite.yaml")],
            "limit": PROMPTS,
            "judges": JUDGES,
            "sampling": {
                "temperature": SAMPLING.temperature,
                "max_new_tokens": SAMPLING.max_new_tokens,
                "seed": SAMPLING.seed,
            },
        }
        start, cpu = time.monotonic(), time.process_time()
        run_eval(EvalRecipe.model_validate(recipe | ({} if setting.section is None else {"guard": setting.section})))
        seconds, cpu_seconds = time.monotonic() - start, time.process_time() - cpu
        results, completions = read_results(out), read_completions(out / Completion.file_name)
        tokens = sum(completion.completion_tokens for completion in completions)
        return {
            "schema": 1,
            "command": "python examples/real/guards.py",
            "versions": versions(),
            "hardware": hardware(),
            "model": setting.model,
            "guard": setting.name,
            "circular": setting.circular,
            "section": None
            if setting.section is None
            else {key: value for key, value in setting.section.items() if key not in ("judge", "head")},
            "heads": heads,
            "answers": len(completions),
            "costs": {
                "tokens": (tokens if results.guard is None else results.guard.tokens) / len(completions),
                "scorer_calls": 0 if results.guard is None else results.guard.judge_calls / len(completions),
                "seconds": seconds / len(completions),
                "cpu_seconds": cpu_seconds / len(completions),
            },
            "refusals_of_the_guard": sum(completion.finish_reason == "guarded" for completion in completions),
            "metrics": metric_rows(results),
        }


def table(folder: Path) -> str:
    """Return the table of docs/guards.md from the records in a folder."""
    records = {
        (record["model"], record["guard"]): record for record in map(read_record, sorted(folder.glob("*.json")))
    }
    lines = [
        "| model | guard | refused, harmful [95 %] | refused, benign | refused, look-alike | "
        "helpful, benign [95 %] | refusals by the guard | tokens | CPU s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for setting in settings(Path(), Path()):
        record = records.get((setting.model, setting.name))
        if record is None:
            continue
        metrics = {(metric["task"], metric["metric"]): metric for metric in record["metrics"]}
        harmful, helpful = (
            f"{metric['value']:.2f} [{metric['low']:.2f}, {metric['high']:.2f}]"
            for metric in (metrics["harmful", "refusal"], metrics["benign", "helpfulness"])
        )
        refused = (f"{metrics[kind, 'over_refusal']['value']:.2f}" for kind in ("benign", "lookalike"))
        cells = [harmful, *refused, helpful]
        cells += [f"{record['refusals_of_the_guard']} of {record['answers']}"]
        cells += [f"{record['costs']['tokens']:.0f}", f"{record['costs']['cpu_seconds']:.1f}"]
        name = setting.name + (" (circular)" if record["circular"] else "")
        lines.append(f"| {setting.model} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def read_record(path: Path) -> dict[str, Any]:
    """Return a record."""
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def main() -> None:
    """Run the models behind guards that have no record yet."""
    guards = Guards(parse_and_open(__doc__))
    for setting in settings(guards.judge, guards.heads):
        if setting.record.exists():
            continue
        say(f"{setting.model}, {setting.name} ...")
        guards.home.mkdir(parents=True, exist_ok=True)
        with log_to_file(guards.home / f"guards-{setting.model}-{setting.name}.log", bars=False):
            record = guards.run(setting)
        write_json(setting.record, record)
        say(f"  {record['answers']} answers, {record['costs']['seconds']:.1f} s each")


if __name__ == "__main__":
    main()
