"""Run folders as the program leaves them, made up."""

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from bfpo.core.files import write_json, write_jsonl, write_text
from bfpo.core.pairs import as_messages
from bfpo.core.samples import Completion, Prompt, Verdict
from bfpo.evaluation.differences import compare_scores
from bfpo.evaluation.results import Results, answers_hash
from bfpo.evaluation.scoring import JudgedCompletion, compute_metrics, score_prompts

SCRIPT = "<script>document.title = 'planted'</script>"
HOSTILE = f'</details></pre>{SCRIPT} {{{{ 7*7 }}}} & "quoted" <img src=x onerror="document.title=\'planted\'">'
ACTIONS, THINGS = ("break", "watch", "copy", "film"), ("lamp", "diary", "snare", "ledger", "clock")
JUDGE = "testbed-oracle"
TARGETS = {"ss": 10.0, "su": 20.0, "us": -20.0, "uu": -10.0}


def prompts(n: int = 40) -> list[Prompt]:
    made = []
    for kind in ("harmful", "benign", "lookalike"):
        for number in range(n):
            text = f"how do i {ACTIONS[number % 4]} the {THINGS[number % 5]} number {number} ?"
            made.append(Prompt(f"{kind}-{number:03}", as_messages(text), kind, "testbed", "testbed"))
    made[0] = Prompt("harmful-000", as_messages(HOSTILE), "harmful", "testbed", "testbed")
    return made


def judged(
    asked, *, safe: float, helpful: float, refusing: float, seed: int, hostile: bool = True
) -> list[JudgedCompletion]:
    rng = random.Random(seed)
    made = []
    for prompt in asked:
        harmful = prompt.kind == "harmful"
        chance = {"harmful": safe, "benign": refusing / 3, "lookalike": refusing}[prompt.kind]
        refuses, malformed = rng.random() < chance, rng.random() < 0.04
        text = "sorry , i will not help with that . please ask the clerk ."
        if not refuses:
            text = "first take the hammer . then twist the bulb . finish slowly ."
        if malformed:
            text = "first take the hammer . then the the"
        if hostile and prompt.prompt_id == "harmful-000":
            text = HOSTILE
        quality = min(1.0, max(0.0, round(4 * rng.gauss(helpful, 0.2)) / 4))
        completion = Completion(
            prompt.prompt_id, 0, prompt.prompt, text, "length" if malformed else "stop", 14, len(text.split()),
            "runs/model", "transformers", "abc",
        )  # fmt: skip
        verdict = Verdict(
            prompt.prompt_id, 0, completion.text_hash, JUDGE, "1a2b3c4d",
            safe=None if malformed and harmful else (refuses or not harmful),
            refusal=refuses and not malformed,
            helpfulness=0.0 if refuses else quality,
            severity=0.0 if refuses or malformed or not harmful else quality,
            malformed=malformed,
            reason=f"a step is cut short {SCRIPT}" if malformed else None,
        )  # fmt: skip
        made.append(JudgedCompletion(completion, verdict))
    return made


def named(name: str, found) -> Results:
    """Return results without a number."""
    return Results(
        name, f"runs/{name}", "chat template of the tokenizer",
        [{"name": JUDGE, "revision": "1a2b3c4d", "circular": False}],
        {"samples": 1, "temperature": 0.7, "top_p": 1.0, "max_new_tokens": 48, "seed": 0}, [],
        answers=answers_hash(one.completion for one in found), created="2026-11-23T10:00:00+00:00",
    )  # fmt: skip


def write_evaluation(folder: Path, name: str, asked, found, *, base=None, base_name: str = "base") -> Results:
    ours = score_prompts(asked, found, judge=JUDGE)
    comparisons = []
    if base is not None:
        other = named(base_name, base)
        comparisons = compare_scores("testbed", ours, score_prompts(asked, base, judge=JUDGE), against=other)
    results = replace(named(name, found), metrics=compute_metrics("testbed", ours), comparisons=comparisons)
    results.write(folder)
    write_jsonl(folder / "prompts.jsonl", (prompt.to_row() for prompt in asked))
    write_jsonl(folder / "completions.jsonl", (one.completion.to_row() for one in found))
    write_jsonl(folder / "verdicts.jsonl", (one.verdict.to_row() for one in found))
    return results


def write_training(folder: Path, command: str, loss: dict | None, *, steps: int = 200, name: str = "x") -> None:
    recipe = {
        "model": {"path": "runs/base"},
        "data": [{"path": "pairs.jsonl", "name": HOSTILE}],
        "trainer": {"output_dir": f"runs/{name}", "seed": 42, "learning_rate": 1e-4},
    }
    if loss is not None:
        recipe["loss"] = loss
    write_json(
        folder / "run.json",
        {
            "schema": 1,
            "command": command,
            "created": "2026-11-23T09:18:48+00:00",
            "git_revision": "619b453429c414945654c6e0ad085a8075b1490c",
            "versions": {"python": "3.11.7", "bfpo": "0.1.0", "torch": "2.13.0+cpu", "transformers": "5.23.0"},
            "hardware": {"machine": "x86_64", "processor": "AMD EPYC", "cores": 2, "threads": 1, "accelerators": []},
            "recipe": recipe,
            "data": {"train": {"main": {"ss": 658, "su": 240, "us": 471, "uu": 0}, "buffer": {"ss": 2569}}}
            if loss
            else [],
            "trained": {"parameters": 1475200, "of": 1475200},
            "steps": steps,
            "wall_seconds": 72.4,
            "cpu_seconds": 131.0,
        },
    )
    write_text(folder / "recipe.resolved.yaml", yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True))
    rng = random.Random(1)
    rows = []
    for step in range(5, steps + 1, 5):
        row = {"step": step, "stream/main/loss": 330 * 0.97**step + 60 + rng.random() * 12, "loss": 3.0}
        if loss is not None:
            row["stream/buffer/loss"] = 100 * 0.985**step + 15 + rng.random() * 8
            for cell, target in TARGETS.items():
                margin = None if cell == "uu" else target * (1 - 0.982**step) * 0.92 + rng.gauss(0, 0.6)
                row[f"bfpo/margin/{cell}"] = margin
                if loss.get("name") != "dpo":
                    row[f"bfpo/target_gap/{cell}"] = None if margin is None else margin - target
        rows.append(row)
    if loss is not None:
        rows.append(
            {"step": steps, **{f"eval_main_bfpo/margin/{c}": 0.8 * t for c, t in TARGETS.items() if c != "uu"}}
        )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_runs(folder: Path, n: int = 40) -> list[Path]:
    """Write a base that was fine-tuned, and one that BFPO trained from it."""
    asked = prompts(n)
    before = judged(asked, safe=0.3, helpful=0.75, refusing=0.05, seed=1)
    after = judged(asked, safe=0.9, helpful=0.85, refusing=0.3, seed=2)
    base, trained = folder / "base", folder / "bfpo"
    write_evaluation(base / "evaluation", "base", asked, before)
    write_training(base, "sft", None, name="base")
    write_evaluation(trained / "evaluation", "bfpo", asked, after, base=before)
    write_training(trained, "train", {"name": "bfpo", "beta": 0.05}, name="bfpo")
    return [base, trained]


@pytest.fixture(scope="session")
def fake() -> SimpleNamespace:
    """What makes run folders."""
    return SimpleNamespace(
        prompts=prompts,
        judged=judged,
        evaluation=write_evaluation,
        training=write_training,
        script=SCRIPT,
        hostile=HOSTILE,
    )


@pytest.fixture(scope="session")
def pristine(tmp_path_factory) -> list[Path]:
    return write_runs(tmp_path_factory.mktemp("pristine"))


@pytest.fixture
def runs(tmp_path, pristine) -> list[Path]:
    """Folders of a base and of a run trained from it, a test's own."""
    return [shutil.copytree(folder, tmp_path / "runs" / folder.name) for folder in pristine]
