"""JSON files of one typed value: what is read, and what is said of damaged ones."""

import json
from dataclasses import asdict, dataclass

import pytest

from bfpo.core.typed_json import read_if_written, read_versioned
from bfpo.errors import DataError


@dataclass(frozen=True)
class Box:
    width: int
    schema: int = 2


def test_a_value_is_read_and_a_missing_file_is_none(tmp_path):
    path = tmp_path / "box.json"
    assert read_if_written(path, Box, remedy="make it again") is None
    path.write_text(json.dumps(asdict(Box(3))))
    assert read_if_written(path, Box, remedy="make it again") == Box(3)
    assert read_versioned(path, Box, schema=2, remedy="make it again") == Box(3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"width": "wide", "schema": 2}', r"box.json: width: Input should be a valid integer.*; make it again$"),
        ('{"width": 3, "schema": 1}', "schema is 1; this version reads schema 2: make it again$"),
        ("[]", "schema is 'list'; this version reads schema 2: make it again$"),
        ("{", r"not JSON \(.*\); make it again$"),
    ],
)
def test_a_damaged_file_is_refused_with_what_to_do(tmp_path, text, message):
    path = tmp_path / "box.json"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        read_versioned(path, Box, schema=2, remedy="make it again")


def test_a_file_that_a_stage_wrote_is_refused_with_what_to_do(tmp_path):
    path = tmp_path / "box.json"
    for text, where in (("{", "the file"), ("{}", "width")):
        path.write_text(text)
        with pytest.raises(DataError, match=rf"box.json: {where}: .*; make it again$"):
            read_if_written(path, Box, remedy="make it again")


def test_whoever_asks_for_a_versioned_file_says_who_writes_it(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_versioned(tmp_path / "box.json", Box, schema=2, remedy="make it again")
