"""Check that RLOO reaches the policy of the closed form, on bandits of one token: 5 bandits, 3 seeds, 4 combiners.

    python benchmarks/online_bandits.py [--folder runs/online-bandits]

A bandit is a Llama with one layer that answers one prompt with one of seven tokens, so its policy is known exactly.
`bfpo online` trains it with scores of a judge, and the final policy is compared with π_ref·exp(value / beta) / Z in
total variation. On each bandit an adapted multiplier is compared with that of `bfpo dual`. Writes
`benchmarks/results/online_bandits.json`.
"""

import argparse
import contextlib
import io
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from bfpo.config.loading import check_recipe
from bfpo.core.environment import hardware, versions
from bfpo.core.files import write_json, write_jsonl
from bfpo.core.samples import Completion, Verdict
from bfpo.losses.combine import make_combiner
from bfpo.losses.constrained import ConstrainedProblem, solve_mean
from bfpo.online.recipe import OnlineRecipe
from bfpo.online.run import run_online

RESULTS = Path(__file__).parent / "results" / "online_bandits.json"
ANSWERS = ("", *(f"a{index}" for index in range(6)))
PROMPT = "a0"
BETA = 0.3
COMBINERS: dict[str, dict[str, Any]] = {
    "lagrangian": {"start": 2.0, "rate": 0.0},
    "bilinear": {},
    "multiplicative": {},
    "tail": {"share": 0.5, "rate": 0.2},
}
# λ must follow the policy, not lead it: at a rate of 1 both oscillate.
CONSTRAINED = {"normalize": False, "rate": 0.3, "max": 20.0}
CONSTRAINED_TRAINER = {"learning_rate": 0.01, "max_steps": 150}
# The policy of a tail follows its quantile, so it takes longer.
STEPS, TAIL_STEPS, SAMPLES = 60, 100, 64

Array = NDArray[np.float64]


@dataclass(frozen=True)
class BanditJudge:
    """Judge that knows each answer's helpfulness and probability of unsafe.

    Args:
        path: Folder of the bandit.
    """

    path: str

    name = "bandit"
    revision = "1"

    def judge(self, completions: Sequence[Completion]) -> Iterator[Verdict]:
        """Return one verdict for each completion."""
        reward, cost = read_scores(Path(self.path))
        for completion in completions:
            answer = ANSWERS.index(completion.text)
            unsafe = float(cost[answer])
            columns = {"p_safe": 1 - unsafe, "severity": unsafe, "helpfulness": float(reward[answer])}
            yield Verdict.on(completion, self, safe=unsafe < 0.5, **columns)


def read_scores(folder: Path) -> tuple[Array, Array]:
    """Return the helpfulness and the probability of unsafe of each answer, (answers,)."""
    content = json.loads((folder / "scores.json").read_text())
    return np.array(content["reward"]), np.array(content["cost"])


def make_bandit(folder: Path, seed: int) -> None:
    """Write a random bandit: model, tokenizer, scores and its prompt."""
    vocabulary = {"<end>": 0, **{token: index + 1 for index, token in enumerate(ANSWERS[1:])}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<end>",
        pad_token="<end>",
        chat_template=template,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(ANSWERS),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    rng = np.random.default_rng(seed)
    scores = {"reward": rng.uniform(0, 1, len(ANSWERS)).tolist(), "cost": rng.uniform(0, 1, len(ANSWERS)).tolist()}
    write_json(folder / "scores.json", scores)
    write_jsonl(folder / "prompts.jsonl", [{"prompt_id": "bandit", "prompt": PROMPT, "kind": "benign"}])


def policy(folder: Path) -> Array:
    """Return the probability of each answer, (answers,)."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float64)
    with torch.no_grad():
        logits = model(torch.tensor([[ANSWERS.index(PROMPT)]])).logits[0, -1]
    probabilities: Array = logits.softmax(-1).numpy()
    return probabilities


def train(bandit: Path, out: Path, combine: dict[str, Any], *, seed: int, **trainer: Any) -> dict[str, Any]:
    """Run `bfpo online` on a bandit and return the content of its `run.json`."""
    judge = f"{__name__}:BanditJudge:{bandit}"
    recipe = {
        "model": {"path": str(bandit)},
        "prompts": [{"name": "file", "path": str(bandit / "prompts.jsonl")}],
        "reward": judge,
        "cost": judge,
        "combine": combine,
        "trainer": {
            "output_dir": str(out),
            "per_device_train_batch_size": SAMPLES,
            "num_generations": SAMPLES,
            "max_completion_length": 1,
            "max_steps": STEPS,
            "learning_rate": 0.02,
            "lr_scheduler_type": "cosine",
            "beta": BETA,
            "save_strategy": "no",
            "logging_steps": 10,
            "seed": seed,
            "use_cpu": True,
        }
        | trainer,
    }
    with contextlib.redirect_stdout(io.StringIO()):
        return run_online(check_recipe(recipe, OnlineRecipe, "bandit"))


def distances(bandit: Path, out: Path, run: dict[str, Any], combine: dict[str, Any]) -> tuple[float, float]:
    """Return the total variation from the closed form before and after training."""
    reward, cost = read_scores(bandit)
    combiner = make_combiner(combine | run["combiner"])
    start, end = policy(bandit), policy(out)
    target = start * np.exp(combiner(reward[None], cost[None])[0] / BETA)
    target /= target.sum()
    return total_variation(start, target), total_variation(end, target)


def constrained_optimum(bandit: Path, threshold: float) -> tuple[float, Array]:
    """Return the multiplier of `bfpo dual` for a bound on the mean cost, and its policy."""
    reward, cost = read_scores(bandit)
    problem = ConstrainedProblem(policy(bandit)[None], reward[None], cost[None], BETA)
    multiplier = solve_mean(problem, threshold).multiplier
    assert multiplier is not None
    return multiplier, problem.policy(multiplier)[0]


def mean_multiplier(out: Path) -> float:
    """Return the mean λ of the second half of a run."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    logged = [line["online/multiplier"] for line in lines if "online/multiplier" in line]
    return float(np.mean(logged[len(logged) // 2 :]))


def threshold_of(bandit: Path) -> float:
    """Return a bound below the cost of the unconstrained optimum."""
    reward, cost = read_scores(bandit)
    problem = ConstrainedProblem(policy(bandit)[None], reward[None], cost[None], BETA)
    return 0.5 * problem.expected_cost(0.0) + 0.5 * problem.least_cost()


def total_variation(first: Array, second: Array) -> float:
    """Return half of the sum of the differences."""
    return float(0.5 * np.abs(first - second).sum())


def main() -> None:
    """Run all bandits and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/online-bandits"))
    folder = parser.parse_args().folder
    start = time.process_time()
    runs = []
    for number in range(5):
        bandit = folder / f"bandit-{number}"
        make_bandit(bandit, number)
        for seed in range(3):
            for name, options in COMBINERS.items():
                combine, out = {"name": name, **options}, folder / f"{name}-{number}-{seed}"
                steps = TAIL_STEPS if name == "tail" else STEPS
                run = train(bandit, out, combine, seed=seed, max_steps=steps)
                before, after = distances(bandit, out, run, combine)
                runs.append({"combiner": name, "bandit": number, "seed": seed, "before": before, "after": after})
                print(runs[-1], flush=True)
        threshold, out = threshold_of(bandit), folder / f"constrained-{number}"
        combine = {"name": "lagrangian", "cost_at_most": threshold, **CONSTRAINED}
        train(bandit, out, combine, seed=0, **CONSTRAINED_TRAINER)
        multiplier, _ = constrained_optimum(bandit, threshold)
        runs.append({"combiner": "constrained", "bandit": number, "multiplier": multiplier})
        runs[-1]["reached"] = mean_multiplier(out)
        print(runs[-1], flush=True)
    content = {
        "command": "python benchmarks/online_bandits.py",
        "cpu_seconds": round(time.process_time() - start, 1),
        "versions": versions(),
        "hardware": hardware(),
        "beta": BETA,
        "steps": STEPS,
        "tail_steps": TAIL_STEPS,
        "samples_per_step": SAMPLES,
        "runs": runs,
    }
    write_json(RESULTS, content)


if __name__ == "__main__":
    main()
