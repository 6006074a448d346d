"""Ask a pretrained model for at most so many unsafe answers, and measure what is achieved.

    python examples/real/thresholds.py [--data FOLDER] [--model FOLDER] [--out runs/head-to-head/units]

The fine-tuned model is that of `head_to_head.py`'s first seed, and is made here if it isn't there. A scorer, a reward
and a cost, is trained on the pairs that BFPO sees; `bfpo dual` computes multipliers from scored samples of the
fine-tuned model to training prompts. `refusal-rule` judges answers to held-out harmful prompts, and nothing sees it
before. What is sampled, scored and judged is the beginning of an answer, so the scorer learns from beginnings too.
First five thresholds with MoCAN, then other methods at one of them. The record of each policy is written as
it ends, without any text; the same command goes on.
"""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from head_to_head import RESULTS, Comparison, Unit, parse_and_open
from stages import pair_sources, score_recipe, train_recipe
from transformers import AutoTokenizer

from bfpo.config.recipes import TrainRecipe
from bfpo.constraints.samples import read_scored_samples
from bfpo.constraints.solve import ConstraintRequest, objective_of, solve_constraint
from bfpo.core.environment import hardware, versions
from bfpo.core.files import write_json, write_jsonl
from bfpo.core.samples import Completion, Judge, Prompt, Sampling, Verdict
from bfpo.core.terminal import log_to_file, say
from bfpo.data.prepare import prepare
from bfpo.data.stages import generate_completions, judge_completions, read_prompt_file
from bfpo.data.verdict_files import judge_file
from bfpo.errors import RecipeError
from bfpo.experiments.preparation import sample_pairs
from bfpo.experiments.stages import SamplesStage
from bfpo.experiments.steps import run_once
from bfpo.generation.in_process import load_engine
from bfpo.judging.open import open_judge
from bfpo.judging.refusal_rule import RefusalRule, kinds_of
from bfpo.judging.score_columns import apply_scores
from bfpo.judging.score_run import run_score
from bfpo.losses.dual import feasible_multiplier
from bfpo.stats.intervals import score_interval

SEED = 1
THRESHOLDS = (0.4, 0.3, 0.2, 0.1, 0.05)
ONE_THRESHOLD = 0.2
"""Threshold of the other methods with a constraint."""
ANSWER_TOKENS = 32
"""Maximum length of a sample, in tokens: what is measured is whether it refuses."""
PROMPTS = {"harmful": 60, "benign": 30}
"""Training prompts that the fine-tuned model is sampled on."""
SAMPLES, PAIRS_PER_PROMPT, TEMPERATURE = 16, 16, 1.0
HELD_OUT_ANSWERS = 2
"""Answers of a policy to each held-out harmful prompt."""
LEARNING_RATE, STEPS = 5e-4, 100
"""Of the trainings on samples."""
BASELINE_RATE = 2e-4
# As published. IPO's squared loss on the testbed is closer to what is asked, but with four pairs a step its own loss
# didn't fall here: 60 steps at 2e-4 leave it as it is, and 4e-4 and 1e-3 raise it.
MOCAN: dict[str, Any] = {"loss": {"name": "dpo", "beta": 0.5}, "labels": {"from": "scores"}}
METHODS: dict[str, dict[str, Any]] = {
    "bfpo_constrained": {"loss": {"name": "bfpo", "beta": 0.05}},
    "c_dpo": {
        "loss": {"name": "dpo", "beta": 0.5},
        "labels": {"from": "scores"},
        "outer": {"rounds": 3, "samples": 4},
    },
}
"""Methods with a constraint, besides MoCAN, which are trained on pairs of samples."""
BASELINES: dict[str, dict[str, Any]] = {
    "bfpo": {"loss": {"name": "bfpo", "beta": 0.05}},
    "dpo_safe_first": {"loss": {"name": "dpo", "beta": 0.1}, "labels": {"from": "safety"}},
    "bso": {"loss": {"name": "bso", "beta": 0.1}},
}
"""Methods on the pairs of the head-to-head, without a constraint."""


class Policy(NamedTuple):
    """A policy that is trained and measured.

    Args:
        method: `mocan`, or a key of `METHODS` or `BASELINES`; `base` is the fine-tuned model.
        threshold: The largest share of unsafe answers that is asked for; None for a method without a constraint.
    """

    method: str
    threshold: float | None

    @property
    def name(self) -> str:
        """Name of its record."""
        return self.method if self.threshold is None else f"{self.method}-{self.threshold:g}"

    @property
    def record(self) -> Path:
        """File of its record."""
        return RESULTS / "thresholds" / f"{self.name}.json"


def policies() -> list[Policy]:
    """Return the policies in the order of their runs."""
    return [
        Policy("base", None),
        *(Policy("mocan", threshold) for threshold in THRESHOLDS),
        *(Policy(method, ONE_THRESHOLD) for method in METHODS),
        *(Policy(method, None) for method in BASELINES),
    ]


class Thresholds:
    """The scorer, the samples and the policies, made when they are first needed.

    Args:
        comparison: The head-to-head, whose fine-tuned model and pairs are used.
    """

    def __init__(self, comparison: Comparison) -> None:
        self.data = comparison.data
        self.seed_home = comparison.out / f"seed-{SEED}"
        self.home = self.seed_home / "thresholds"
        self.base = comparison.train(Unit("base", None, SEED, "test"))[0]
        self.scorer = self.home / "scorer"
        self.home.mkdir(parents=True, exist_ok=True)

    def sources(self) -> dict[str, Any]:
        """Return the pairs that BFPO sees."""
        return pair_sources(self.data, self.seed_home / "redteam") | {"eval": []}

    def train_scorer(self) -> None:
        """Train the scorer, unless it is there."""
        if not (self.scorer / "run.json").exists():
            run_score(score_recipe(self.base, self.cut_sources(), self.scorer, seed=SEED))

    def cut_sources(self) -> dict[str, Any]:
        """Return the pairs that BFPO sees, with answers that are cut where samples are: those will be scored."""
        recipe = train_recipe(self.base, self.sources(), self.scorer, seed=SEED, changes={})
        tokenizer = AutoTokenizer.from_pretrained(self.base)
        rows: dict[str, list[dict[str, Any]]] = {"main": [], "buffer": []}
        for pair in prepare(recipe).train:
            row = pair.to_row()
            for side in ("chosen", "rejected"):
                ids = tokenizer(row[side], add_special_tokens=False)["input_ids"][:ANSWER_TOKENS]
                row[side] = tokenizer.decode(ids).strip()
            if row["chosen"] != row["rejected"]:
                rows[str(row.pop("stream"))].append(row)
        files = {stream: self.home / f"cut-{stream}.jsonl" for stream in rows}
        for stream, file in files.items():
            write_jsonl(file, rows[stream])
        return {"data": [{"path": str(files["main"])}], "buffer": [{"path": str(files["buffer"])}]}

    def prepare(self) -> Path:
        """Train the scorer and score samples of the fine-tuned model, unless it is done, and return the scores."""
        self.train_scorer()
        prompts = [
            prompt
            for kind, count in PROMPTS.items()
            for prompt in read_prompt_file(str(self.data / f"redteam-{kind}.jsonl"))[:count]
        ]
        samples, scored = self.home / "samples", self.home / "scored.jsonl"
        write_jsonl(samples / Prompt.file_name, (prompt.to_row() for prompt in prompts))
        self.sample(self.base, prompts, samples, samples_of_each=SAMPLES, seed=0)
        if not scored.exists():
            heads = {name: f"{name}:{self.scorer / name}" for name in ("reward", "cost")}
            apply_scores(str(samples / Completion.file_name), scored, **heads)
        return scored

    def run(self, policy: Policy) -> dict[str, Any]:
        """Train and measure a policy, and return its record."""
        scored = self.prepare()
        start, cpu = time.monotonic(), time.process_time()
        record: dict[str, Any] = {"schema": 1, "policy": policy._asdict()}
        folder = self.home / policy.name
        try:
            model, prediction = self.train(policy, scored, folder)
        except RecipeError as error:
            # The message has the path of the samples.
            record["infeasible"] = str(error).replace(str(self.home), "HOME")
        else:
            record |= prediction | self.measure(model, folder / "measured")
        return record | {
            "command": "python examples/real/thresholds.py",
            "minutes": round((time.monotonic() - start) / 60, 1),
            "cpu_minutes": round((time.process_time() - cpu) / 60, 1),
            "versions": versions(),
            "hardware": hardware(),
        }

    def train(self, policy: Policy, scored: Path, folder: Path) -> tuple[Path, dict[str, Any]]:
        """Train a policy, and return it with what was predicted.

        Raises:
            RecipeError: If no policy over the samples meets the threshold.
        """
        if policy.method == "base":
            return self.base, {}
        out = folder / "model"
        if policy.threshold is None:
            run_once(self._recipe(self.sources(), out, BASELINES[policy.method]))
            return out, {}
        changes = MOCAN if policy.method == "mocan" else METHODS[policy.method]
        pairs = folder / "pairs.jsonl"
        stage = SamplesStage(samples=SAMPLES, temperature=TEMPERATURE, pairs_per_prompt=PAIRS_PER_PROMPT)
        write_jsonl(pairs, (pair.to_row() for pair in sample_pairs(scored, stage, SEED)))
        sources = {"data": [{"path": str(pairs)}], "conflicts": "keep"}
        # Labels from scores need the multiplier, which isn't known yet.
        beta, labeling = objective_of(self._recipe(sources, out, {"loss": changes["loss"]}))
        request = ConstraintRequest(
            max=policy.threshold,
            kind="harmful",
            beta=beta,
            objective="reward" if labeling is None else "bfpo",
            labeling=labeling,
            temperature=TEMPERATURE,
        )
        dual = solve_constraint(read_scored_samples(scored), request)
        dual.write(folder)
        feasible_multiplier(dual, f"threshold {policy.threshold:g}")
        run_once(self._recipe(sources, out, self._with_multiplier(changes, folder)))
        return out, {
            "state": dual.state,
            "multiplier": dual.multiplier,
            "predicted": [dual.achieved, dual.achieved_low, dual.achieved_high],
            "warnings": list(dual.warnings),
        }

    def _recipe(self, sources: Mapping[str, Any], out: Path, changes: Mapping[str, Any]) -> TrainRecipe:
        trainer: dict[str, Any] = {"learning_rate": LEARNING_RATE, "max_steps": STEPS}
        if "buffer" in sources:
            trainer = {"learning_rate": BASELINE_RATE}
        common = {"probe": None, "trainer": trainer}
        return train_recipe(self.base, sources, out, seed=SEED, changes={**changes, **common})

    def _with_multiplier(self, changes: Mapping[str, Any], dual: Path) -> dict[str, Any]:
        key = "labels" if "labels" in changes else "loss"
        changed = {**changes, key: changes[key] | {"multiplier": str(dual)}}
        if "outer" in changes:
            # Training prompts that the samples don't have.
            prompts = read_prompt_file(str(self.data / "redteam-harmful.jsonl"))[PROMPTS["harmful"] :]
            write_jsonl(dual / "fresh-prompts.jsonl", (prompt.to_row() for prompt in prompts))
            changed["outer"] = changes["outer"] | {
                "prompts": str(dual / "fresh-prompts.jsonl"),
                "judge": f"cost:{self.scorer / 'cost'}",
                "reward": f"reward:{self.scorer / 'reward'}",
                "max_new_tokens": ANSWER_TOKENS,
                "seed": 1000,
            }
        return changed

    def measure(self, model: Path, folder: Path) -> dict[str, Any]:
        """Return the shares of unsafe answers to the sampled prompts and to held-out ones."""
        judge = open_judge(f"cost:{self.scorer / 'cost'}")
        same = [
            prompt
            for prompt in read_prompt_file(str(self.home / "samples" / Prompt.file_name))
            if prompt.kind == "harmful"
        ]
        test = [
            prompt for file in sorted((self.data / "test").glob("*.jsonl")) for prompt in read_prompt_file(str(file))
        ]
        held_out = [prompt for prompt in test if prompt.kind == "harmful"]
        benign = [prompt for prompt in test if prompt.kind != "harmful"]
        rule = RefusalRule(kinds_of(test))
        on_same = self.sample(model, same, folder / "same", samples_of_each=1, seed=100)
        on_held_out = self.sample(model, held_out, folder / "held-out", samples_of_each=HELD_OUT_ANSWERS, seed=100)
        on_benign = self.sample(model, benign, folder / "benign", samples_of_each=1, seed=100)
        by_rule = judged(rule, on_held_out, folder / "held-out")
        return {
            "scorer_on_same_prompts": unsafe(judged(judge, on_same, folder / "same"), 1),
            "scorer_on_held_out_prompts": unsafe(judged(judge, on_held_out, folder / "held-out"), HELD_OUT_ANSWERS),
            "achieved": unsafe(by_rule, HELD_OUT_ANSWERS),
            "malformed": float(np.mean([bool(verdict.malformed) for verdict in by_rule])),
            "refused_benign": share(
                [verdict.refusal is True for verdict in judged(rule, on_benign, folder / "benign")], 1
            ),
        }

    def sample(
        self, model: Path, prompts: list[Prompt], folder: Path, *, samples_of_each: int, seed: int
    ) -> list[Completion]:
        """Sample a model, and return the answers."""
        sampling = Sampling(samples=samples_of_each, temperature=TEMPERATURE, max_new_tokens=ANSWER_TOKENS, seed=seed)
        engine = load_engine(str(model), sampling)
        return generate_completions(engine, prompts, folder / Completion.file_name, samples=samples_of_each)


def judged(judge: Judge, completions: list[Completion], folder: Path) -> list[Verdict]:
    """Return the verdicts of a judge, which are kept in a folder."""
    return judge_completions(judge, completions, judge_file(folder, "verdicts", judge.name, judge.revision))


def unsafe(verdicts: list[Verdict], samples: int) -> list[float]:
    """Return the share of answers that aren't judged safe, with its interval over prompts."""
    return share([verdict.safe is not True for verdict in verdicts], samples)


def share(values: list[bool], samples: int) -> list[float]:
    """Return the share of true values with its interval over prompts, of which each has so many values in a row."""
    array = np.array(values, dtype=np.float64)
    return [round(bound, 4) for bound in score_interval(array.reshape(-1, samples).mean(axis=1), most=array.size)]


def table(folder: Path) -> str:
    """Return the table of docs/constraints.md from the records in a folder."""
    lines = [
        "| policy | at most | λ | unsafe, predicted [95 %] | by the scorer, same prompts | "
        "by the scorer, new prompts | not refused, new prompts | refused, benign | CPU minutes |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for policy in policies():
        file = folder / policy.record.name
        if not file.exists():
            continue
        record = json.loads(file.read_text(encoding="utf-8"))
        cells = ["" if policy.threshold is None else f"{policy.threshold:.0%}"]
        if "infeasible" in record:
            cells += ["none", "infeasible", *[""] * 4]
        else:
            is_predicted = "predicted" in record
            cells += [f"{record['multiplier']:.3g}", _percent(record["predicted"])] if is_predicted else ["", ""]
            shares = ("scorer_on_same_prompts", "scorer_on_held_out_prompts", "achieved", "refused_benign")
            cells += [_percent(record[share]) for share in shares]
        lines.append(f"| `{policy.method}` | {' | '.join(cells)} | {record['cpu_minutes']:.1f} |")
    return "\n".join(lines)


def _percent(interval: list[float]) -> str:
    value, low, high = interval
    return f"{value:.0%} [{low:.0%}, {high:.0%}]"


def main() -> None:
    """Run the policies that have no record yet."""
    thresholds = Thresholds(parse_and_open(__doc__))
    for policy in policies():
        if policy.record.exists():
            continue
        say(f"{policy.name} ...")
        with log_to_file(thresholds.home / f"{policy.name}.log", bars=False):
            record = thresholds.run(policy)
        write_json(policy.record, record)
        say(json.dumps({key: record.get(key) for key in ("predicted", "achieved", "refused_benign", "infeasible")}))


if __name__ == "__main__":
    main()
