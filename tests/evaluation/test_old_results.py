"""Files of earlier versions: `results.json` of schemas 1 and 2, and a folder with the old names of files and keys."""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from bfpo.config.loading import check_recipe
from bfpo.errors import DataError
from bfpo.evaluation.pipeline import run_eval
from bfpo.evaluation.recipe import EvalRecipe
from bfpo.evaluation.results import CalibrationResult, TaskData, read_results
from bfpo.report.card import card_section
from bfpo.report.html import write_report

OLD = Path(__file__).parent / "old_results"


def evaluate(content):
    return run_eval(check_recipe(content, EvalRecipe, "recipe"))


def test_schema_1_is_read():
    results = read_results(OLD / "schema_1")
    assert results.schema == 3
    assert results.judges == [{"name": "testbed-oracle", "revision": "5a1c9e20", "circular": False}]
    assert results.metric("harmful", "safety").value == 0.75
    assert results.metric("lookalike", "over_refusal").value is None
    assert [comparison.verdict for comparison in results.comparisons] == ["better", None]
    assert (results.model_comparisons, results.agreement, results.data, results.calibration) == ([], [], [], [])


def test_schema_2_is_read():
    results = read_results(OLD / "schema_2_quickstart")
    (comparison,) = results.model_comparisons
    assert (comparison.run, comparison.against, comparison.verdict) == ("bfpo", "base", "dominates")
    assert (comparison.safety.difference, comparison.tests) == (0.615, 2)
    results = read_results(OLD / "schema_2_judges")
    assert results.data[0] == TaskData(
        name="xstest/xstest_safe",
        license="CC-BY-4.0",
        hash="13e8dbde03068a48",
        prompts=83,
        source="xstest",
        origin="prompts.csv",
        published=83,
    )
    assert isinstance(results.calibration[1], CalibrationResult)
    assert (results.calibration[1].labeled, results.calibration[1].answers) == ("calibration.csv", 150)
    assert [agreement.question for agreement in results.agreement] == ["safe", "refusal"]


@pytest.mark.parametrize("name", sorted(folder.name for folder in OLD.iterdir()))
def test_old_results_are_written_in_the_current_schema_and_shown(name, tmp_path):
    results = read_results(OLD / name)
    results.write(tmp_path)
    assert read_results(tmp_path) == results
    content = json.loads((tmp_path / "results.json").read_text())
    old = json.loads((OLD / name / "results.json").read_text())
    assert content["schema"] == 3
    assert content["model_comparisons"] == old.get("pairs", [])
    keys = {"licence": "license", "labelled": "labeled"}
    for part in ("data", "calibration"):
        assert content[part] == [{keys.get(key, key): row[key] for key in row} for row in old.get(part, [])]
    page = write_report(tmp_path / "page", [OLD / name]).read_text()
    assert results.run in page
    assert "## Safety and helpfulness" in card_section(OLD / name)


def test_an_evaluation_in_an_old_folder_resumes(toy):
    shutil.copytree(OLD / "schema_2_toy", "old")
    before = read_results(Path("old"))
    results = evaluate(toy.recipe("careless", out="old", run="careless", limit=10))
    assert (toy.engines["careless"].calls, toy.judges["one"].calls, toy.judges["two"].calls) == (0, 0, 0)
    # Older files don't have the number of prompts of a composite's smallest part.
    assert [replace(metric, smallest_part=None) for metric in results.metrics] == before.metrics
    assert {metric.smallest_part for metric in results.metrics} == {None, 10}
    assert results.data == before.data
    assert not list(Path("old").glob("*@*"))
    assert write_report(Path("page"), [Path("old")]).is_file()


def rounded(row):
    return {key: round(value, 8) if isinstance(value, float) else value for key, value in asdict(row).items()}


def test_an_old_folder_is_a_baseline(toy):
    expected = read_results(OLD / "schema_2_toy_compared")
    results = evaluate(toy.recipe("careful", base=str(OLD / "schema_2_toy")))
    # Versions of scipy differ in the tenth digit of quantiles.
    rows = [rounded(row) for row in results.comparisons if row.category is None]
    assert rows == [rounded(row) for row in expected.comparisons]
    assert results.model_comparisons == expected.model_comparisons
    assert toy.judges["one"].calls == 32
    assert write_report(Path("page"), [OLD / "schema_2_toy", Path("out/careful")]).is_file()


@pytest.mark.parametrize(
    ("part", "row", "message"),
    [
        ("data", {"name": "a", "hash": "b", "prompts": 3}, r"data\.0\.license: Field required"),
        ("data", {"name": "a", "license": None, "hash": "b", "prompts": "3"}, r"data\.0\.prompts: .*it holds '3'"),
        ("agreement", {"judges": ["a", "b"]}, r"agreement\.0\.question: Field required"),
        ("calibration", {"judge": "a"}, r"calibration\.0\.question: Field required"),
        ("calibration", 3, r"calibration\.0: "),
    ],
)
def test_malformed_rows_are_named(part, row, message, tmp_path):
    content = json.loads((OLD / "schema_2_quickstart" / "results.json").read_text())
    (tmp_path / "results.json").write_text(json.dumps(content | {part: [row]}))
    with pytest.raises(DataError, match=message):
        read_results(tmp_path)
