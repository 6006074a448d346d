"""One name for the file of a judge, and files under the names of earlier versions."""

import json

import pytest

from bfpo.data.verdict_files import judge_file, judge_files


def row(name="linear", revision="abcdef123456"):
    return json.dumps({"judge": name, "revision": revision}) + "\n"


def test_name_and_revision_name_the_file(tmp_path):
    path = judge_file(tmp_path, "verdicts", "linear+org/wild guard", "abc")
    assert path == tmp_path / "verdicts-linear+org-wild-guard@abc.jsonl"


@pytest.mark.parametrize("ending", ["", ".unfinished"])
@pytest.mark.parametrize(
    "old",
    [
        "verdicts.jsonl",
        "helpfulness.jsonl",
        "verdicts-linear.jsonl",
        "verdicts-linear-abcdef12.jsonl",
        "verdicts-linear-abcdef123456.jsonl",
        "linear@abcdef123456.jsonl",
    ],
)
def test_files_of_earlier_versions_are_found(tmp_path, old, ending):
    (tmp_path / (old + ending)).write_text(row())
    assert judge_file(tmp_path, "verdicts", "linear", "abcdef123456") == tmp_path / old
    assert judge_file(tmp_path, "verdicts", "linear", "0ther") == tmp_path / "verdicts-linear@0ther.jsonl"


def test_a_file_of_the_current_name_goes_before(tmp_path):
    (tmp_path / "verdicts.jsonl").write_text(row())
    current = tmp_path / "verdicts-linear@abcdef123456.jsonl"
    current.write_text(row())
    assert judge_file(tmp_path, "verdicts", "linear", "abcdef123456") == current
    assert judge_files(tmp_path, "verdicts") == [current, tmp_path / "verdicts.jsonl"]


@pytest.mark.parametrize("text", ["", "[]\n", "{\n", "{}\n"])
def test_a_damaged_file_is_no_judge_s(tmp_path, text):
    (tmp_path / "verdicts.jsonl").write_text(text)
    assert judge_file(tmp_path, "verdicts", "linear", "r") == tmp_path / "verdicts-linear@r.jsonl"
