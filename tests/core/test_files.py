"""JSON that is nested deeply: refused with its place, far from the depth at which Python stops to recurse."""

import json

import pytest

from bfpo.config.recipes import Source
from bfpo.core.files import MAX_DEPTH, parse_json, read_repaired_jsonl
from bfpo.data.rows import read_rows
from bfpo.errors import DataError


def nested(depth, opening, closing):
    return opening * depth + "1" + closing * depth


@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a": ', "}"), ('[{"a": ', "}]")])
def test_deeply_nested_json_is_refused(opening, closing):
    levels = opening.count("[") + opening.count("{")
    allowed = nested(MAX_DEPTH // levels, opening, closing)
    assert json.dumps(parse_json(allowed)) == allowed
    for depth in (MAX_DEPTH // levels + 1, 700 // levels, 990 // levels, 100_000):
        for text in (nested(depth, opening, closing), nested(depth, opening, closing).encode()):
            with pytest.raises(ValueError, match=r"nested more than 200 levels deep|nested too deeply"):
                parse_json(text)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("my notes line 1\nmy only last line", r"row 1: not JSON .*; name another file, or remove"),
        ("one line of text", "is no file of JSON objects; name another file"),
        ('{"a": 1}\n[2]\n{"b"', r"row 2: not JSON \(list, not an object\)"),
        ('{\n  "a": 1\n}', "row 1: not JSON"),
    ],
)
def test_a_file_of_another_kind_stays_as_it_is(tmp_path, content, message):
    path = tmp_path / "notes.txt"
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        read_repaired_jsonl(path)
    assert path.read_text() == content


@pytest.mark.parametrize(
    ("content", "rows", "repaired"),
    [
        ('{"a": 1}\n{"b": ', [{"a": 1}], '{"a": 1}\n'),
        ('{"a": 1}\n{"b": 2}', [{"a": 1}, {"b": 2}], '{"a": 1}\n{"b": 2}\n'),
        ('{"a"', [], ""),
        ("", [], ""),
    ],
)
def test_what_an_interrupted_write_left_is_cut_off(tmp_path, content, rows, repaired):
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    assert read_repaired_jsonl(path) == rows
    assert path.read_text() == repaired


def test_many_brackets_are_no_depth():
    rows = [[{"a": "[{" * 500}] for _ in range(500)]
    assert parse_json(json.dumps(rows)) == rows


@pytest.mark.parametrize("depth", [300, 700, 985, 5000])
def test_a_deeply_nested_row_is_refused_with_its_place(tmp_path, depth):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": ' + nested(depth, "[", "]") + "}\n")
    with pytest.raises(DataError, match=r"rows\.jsonl row 2: not JSON \(nested"):
        list(read_rows(Source(path=str(path))))
    with pytest.raises(DataError, match=r"rows\.jsonl.*nested"):
        read_repaired_jsonl(path)
