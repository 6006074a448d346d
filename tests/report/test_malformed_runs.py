"""Runs that a report refuses, with the file and the place in the error."""

import re

import pytest

from bfpo.errors import DataError
from bfpo.report.html import write_report

from .fake_runs import change_results, read_content


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("evaluation/results.json", "{", "not JSON"),
        ("evaluation/results.json", '{"schema": 7}', "schema is 7"),
        ("run.json", "[1]", "list; expected the object"),
        ("run.json", "{", "not JSON"),
        ("metrics.jsonl", '{"step": 1}\n{"ste', "row 2: not JSON"),
        ("metrics.jsonl", '{"loss": 1}\n', "no step"),
        ("metrics.jsonl", '{"step": 1, "loss": "x"}\n', "loss is 'x'"),
        ("evaluation/prompts.jsonl", "{}\n", "row 1"),
        ("evaluation/completions.jsonl", '{"prompt_id": "x"}\n', "row 1"),
    ],
)
def test_malformed_files_are_named(tmp_path, small_runs, file, text, message):
    (small_runs[1] / file).write_text(text)
    with pytest.raises(DataError, match=re.escape(message)) as error:
        write_report(tmp_path / "out", small_runs[1:])
    assert file.rpartition("/")[2] in str(error.value)
    assert not (tmp_path / "out" / "report.html").exists()


def test_runs_that_are_not_comparable_are_refused(tmp_path, small_runs):
    change_results(small_runs[1], template_policy="another")
    with pytest.raises(DataError, match="comparable only under one policy"):
        write_report(tmp_path / "out", small_runs)
    with pytest.raises(DataError, match="evaluate the run first"):
        write_report(tmp_path / "out", [tmp_path])
    with pytest.raises(DataError, match="at least one run"):
        write_report(tmp_path / "out", [])


def test_prompts_and_verdicts_must_belong_together(tmp_path, small_runs):
    path = small_runs[1] / "evaluation" / "verdicts.jsonl"
    original = path.read_text()
    path.write_text("".join(original.splitlines(keepends=True)[1:]))
    with pytest.raises(DataError, match=r"verdict on 'harmful-000' is missing; judge"):
        write_report(tmp_path / "out", small_runs)
    path.write_text(re.sub(r'"text_hash": "\w+"', '"text_hash": "other"', original, count=1))
    with pytest.raises(DataError, match="another text; judge"):
        write_report(tmp_path / "out", small_runs)
    path.write_text(original)
    prompts = small_runs[1] / "evaluation" / "prompts.jsonl"
    prompts.write_text(prompts.read_text().replace("number 7 ?", "number 8 ?"))
    with pytest.raises(DataError, match="differs from the prompt with that id"):
        write_report(tmp_path / "out", small_runs)


def test_a_value_that_is_not_a_number_is_refused(tmp_path, small_runs):
    metrics = read_content(small_runs[1])["metrics"]
    metrics[0]["value"] = "0.9"
    change_results(small_runs[1], metrics=metrics)
    with pytest.raises(DataError, match=r"results.json: metrics.0.value: .*number .it holds '0.9'"):
        write_report(tmp_path / "out", small_runs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metrics": 3}, "metrics: Input should be a valid"),
        ({"run": None}, "run: Input should be a valid string"),
        ({"judges": ["x"]}, "judges.0: Input should be"),
        ({"warnings": [1]}, "warnings.0: Input should be a valid string"),
        ({"comparisons": [{"against": "x"}]}, "comparisons.0.suite: Field required"),
        ({"agreement": [{"judges": 3, "question": []}]}, "agreement.0.judges: Input should be"),
        ({"data": [{"name": 1}]}, "data.0.name: Input should be a valid string"),
    ],
)
def test_results_of_wrong_types_are_refused_with_their_key(tmp_path, small_runs, changes, message):
    change_results(small_runs[1], **changes)
    with pytest.raises(DataError, match=re.escape(message)):
        write_report(tmp_path / "out", small_runs)


@pytest.mark.parametrize("name", ["report.html", "report.md", "pareto.svg", "metrics.csv", "comparisons.csv"])
def test_files_of_others_are_neither_overwritten_nor_removed(tmp_path, small_runs, name):
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text("mine")
    with pytest.raises(DataError, match=f"{name} was not written by bfpo report; choose another folder"):
        write_report(out, small_runs)
    assert [(path.name, path.read_text()) for path in out.iterdir()] == [(name, "mine")]
