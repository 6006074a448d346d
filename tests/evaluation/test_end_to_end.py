"""Testbed models of four methods through `bfpo eval`: real answers, two judges, comparisons."""

import json
from pathlib import Path

import pytest

from bfpo.commands.judge import fit_judge
from bfpo.config.loading import check_recipe
from bfpo.config.recipes import Source
from bfpo.core.files import write_jsonl
from bfpo.data.rows import read_rows
from bfpo.evaluation.pipeline import run_eval
from bfpo.evaluation.recipe import EvalRecipe
from bfpo.experiments import steps
from bfpo.experiments.methods import METHODS, train_recipe
from bfpo.experiments.steps import make_base, run_once, write_world
from bfpo.report.html import write_report
from bfpo.testbed.oracle import Oracle
from bfpo.testbed.world import WorldOptions

SMALL = {
    "pretraining": 800,
    "fine_tuning": 200,
    "safety_pairs": 200,
    "helpful_pairs": 200,
    "harmful_prompts": 16,
    "benign_prompts": 16,
    "lookalike_prompts": 16,
}
TRIED = ("bfpo", "dpo_h", "dpo_s", "safe_dpo")


@pytest.mark.slow
def test_four_methods_two_judges_comparisons_and_a_page(tmp_path, monkeypatch):
    world, base = tmp_path / "world", tmp_path / "base"
    write_world(WorldOptions(seed=0, **SMALL), world)
    monkeypatch.setattr(steps, "BASE_STEPS", {"pretraining": 120, "base": 20})
    make_base(tmp_path, seed=0)
    for name in TRIED:
        run_once(train_recipe(METHODS[name], world=world, base=base, out=tmp_path / name, seed=0, steps=10))
    fit_linear(world, tmp_path / "judge.npz")

    def evaluated(name, against=None):
        content = {
            "out": str(tmp_path / name / "evaluation"),
            "run": name,
            "model": {"path": str(tmp_path / name)},
            "suites": ["testbed"],
            "data": {"testbed": {"path": str(world / "prompts.jsonl")}},
            "judges": ["oracle", f"linear:{tmp_path / 'judge.npz'}"],
            "sampling": {"max_new_tokens": 48},
            "base": against,
        }
        return run_eval(check_recipe(content, EvalRecipe, name))

    before = evaluated("base")
    # The quickstart's own evaluation asks the same prompts and gets the same answers.
    own = steps.evaluate_run(base, world / "prompts.jsonl", Oracle())
    assert own.answers == before.answers
    assert own.metric("harmful", "safety").value == before.metric("harmful", "safety").value
    assert before.metric("harmful", "safety").n == 16
    for name in TRIED:
        results = evaluated(name, str(tmp_path / "base"))
        assert [judge["name"] for judge in results.judges] == ["testbed-oracle", "linear"]
        assert {comparison.judge for comparison in results.comparisons} == {"testbed-oracle", "linear", ""}
        assert all(comparison.is_against(before) for comparison in results.comparisons)
        assert {row.question for row in results.agreement} == {"safe", "refusal"}
        (verdicts,) = (tmp_path / name / "evaluation").glob("verdicts-linear@*.jsonl")
        assert len(verdicts.read_text().splitlines()) == 48
        for metric in results.metrics:
            assert metric.low is None or metric.low <= metric.value <= metric.high
    page = write_report(tmp_path, [tmp_path / name for name in ("base", *TRIED)])
    assert page.stat().st_size > 10_000
    # Judged again, nothing is generated again.
    (tmp_path / "bfpo" / "model.safetensors").touch()
    stamp = (tmp_path / "bfpo" / "evaluation" / "completions.jsonl").stat().st_mtime_ns
    evaluated("bfpo", str(tmp_path / "base"))
    assert (tmp_path / "bfpo" / "evaluation" / "completions.jsonl").stat().st_mtime_ns == stamp


def fit_linear(world: Path, out: Path) -> None:
    """Fit the linear judge on the answers of the world's pairs."""
    rows = []
    for row in read_rows(Source(path=str(world / "safety.jsonl"))):
        for side in ("chosen", "rejected"):
            text = row.values[side] if isinstance(row.values[side], str) else row.values[side][-1]["content"]
            prompt = row.values["prompt"]
            safe = row.values[f"is_{side}_safe"]
            rows.append({"prompt": prompt, "text": text, "safe": safe, "refusal": text.startswith("sorry")})
    path = out.with_suffix(".jsonl")
    write_jsonl(path, rows)
    assert json.loads(path.read_text().splitlines()[0])["text"]
    fit_judge([str(path)], out)
