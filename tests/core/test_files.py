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
