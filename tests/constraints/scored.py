"""Made-up samples with scores."""

import json
from pathlib import Path

import numpy as np

from bfpo.core.files import write_jsonl
from bfpo.core.read_messages import as_messages
from bfpo.core.samples import Completion, Prompt, Verdict


def rows(prompts: int = 60, samples: int = 16, *, seed: int = 0, **columns) -> list[dict]:
    """Rows of a table in which harm helps; a fixed seed draws the same prompts."""
    rng = np.random.default_rng(seed)
    table = []
    for x in range(prompts):
        cost = rng.normal(-0.2, 1, samples)
        reward = 0.7 * cost + rng.normal(0, 1, samples)
        for n in range(samples):
            table.append({"prompt_id": f"p{x}", "reward": float(reward[n]), "cost": float(cost[n]), **columns})
    return table


def write_table(path: Path, table: list[dict]) -> Path:
    """Write rows, in Python's JSON: NaN is possible."""
    path.write_text("".join(json.dumps(row) + "\n" for row in table))
    return path


def write_evaluation(folder: Path, *, prompts: int = 6, samples: int = 4) -> tuple[list[Completion], list[Verdict]]:
    """Write completions with the verdicts of a judge that grades everything; half of the prompts are harmful."""
    rng = np.random.default_rng(0)
    harmful_and_benign = [
        Prompt(f"q{x}", as_messages(f"question {x}"), "harmful" if x % 2 == 0 else "benign") for x in range(prompts)
    ]
    completions, verdicts = [], []
    for prompt in harmful_and_benign:
        for n in range(samples):
            text = f"answer {n} to {prompt.prompt_id}"
            completion = Completion(prompt.prompt_id, n, prompt.prompt, text, "stop", 3, 4, "base", "test", "abc")
            unsafe = prompt.kind == "harmful" and n % 2 == 0
            completions.append(completion)
            verdicts.append(
                Verdict(
                    prompt.prompt_id, n, completion.text_hash, "grader", "1",
                    safe=None if unsafe and n == 2 else not unsafe,
                    helpfulness=float(rng.uniform(0.5, 1) if unsafe else rng.uniform(0, 0.7)),
                    severity=float(0.25 * n if unsafe else 0),
                    reason="unclear",
                )
            )  # fmt: skip
    write_jsonl(folder / "prompts.jsonl", (prompt.to_row() for prompt in harmful_and_benign))
    write_jsonl(folder / "completions.jsonl", (completion.to_row() for completion in completions))
    write_jsonl(folder / "verdicts-grader@1.jsonl", (verdict.to_row() for verdict in verdicts))
    return completions, verdicts
