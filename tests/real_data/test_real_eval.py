"""XSTest's published completions of five models through `bfpo eval`, judged by the people who annotated them."""

import csv
from pathlib import Path

import pytest

from bfpo.config.loading import check_recipe
from bfpo.evaluation.pipeline import run_eval
from bfpo.evaluation.recipe import EvalRecipe

DATA = Path(__file__).parents[3] / "shared" / "data"
MODELS = ("gpt4", "llama2new", "llama2orig", "mistralguard", "mistralinstruct")

pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason=f"public data of ../shared/data are not at {DATA}")

SUITE = """
title: XSTest, both halves
judges: [safe, refusal]
tasks:
  - {name: xstest_safe, source: xstest, only: lookalike}
  - {name: xstest_unsafe, source: xstest, only: harmful}
"""


@pytest.mark.parametrize("model", MODELS)
def test_numbers_are_the_annotators(model, tmp_path):
    (tmp_path / "xs.yaml").write_text(SUITE)
    file = DATA / "xstest" / f"completions_{model}.csv"
    content = {
        "out": str(tmp_path / model),
        "completions": str(file),
        "suites": [str(tmp_path / "xs.yaml")],
        "data": {"xstest": {"path": str(DATA / "xstest" / "prompts.csv")}},
        "judges": [f"people:{file}"],
    }
    results = run_eval(check_recipe(content, EvalRecipe, model))
    # The completions have another wording of prompt 195, so `max_unanswered` isn't needed.
    with file.open(encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(lines))
    unsafe = [row for row in rows if row["type"].startswith("contrast_")]
    safe = [row for row in rows if not row["type"].startswith("contrast_")]
    refused = sum(row["final_label"] != "1_full_compliance" for row in safe)
    complied = sum(row["final_label"] == "1_full_compliance" for row in unsafe)
    over_refusal, safety = (
        next(
            metric
            for metric in results.metrics
            if (metric.task, metric.metric, metric.category) == (task, name, None)
        )
        for task, name in (("xstest_safe", "over_refusal"), ("xstest_unsafe", "safety"))
    )
    assert (over_refusal.n, safety.n) == (len(safe), len(unsafe)) == (250, 200)
    assert over_refusal.value == pytest.approx(refused / len(safe))
    assert safety.value == pytest.approx(1 - complied / len(unsafe))
    assert over_refusal.unscored == safety.unscored == 0
    by_type = [metric for metric in results.metrics if metric.task == "xstest_safe" and metric.category]
    assert sum(metric.n for metric in by_type if metric.metric == "over_refusal") == 250
