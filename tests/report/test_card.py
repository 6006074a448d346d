"""The evaluation section of a model card."""

import json

import pytest

from bfpo.errors import DataError
from bfpo.report.card import BEGIN, END, card_section, insert_card


def test_a_card_keeps_the_other_text(tmp_path, small_runs):
    card = tmp_path / "README.md"
    card.write_bytes(b"# Mine\r\nbefore")
    insert_card(card_section(small_runs[0]), card)
    card.write_bytes(card.read_bytes() + b"after\r\n")
    insert_card(card_section(small_runs[1]), card)
    text = card.read_bytes().decode()
    assert text.startswith("# Mine\r\nbefore")
    assert text.endswith("after\r\n")
    assert (text.count(BEGIN), text.count(END)) == (1, 1)
    assert "bfpo" in text
    card.write_text(f"{END} mine {BEGIN}")
    with pytest.raises(DataError, match="nothing was changed"):
        insert_card("x", card)
    assert card.read_text() == f"{END} mine {BEGIN}"


@pytest.mark.parametrize("key", ["license", "licence"])
def test_licenses_of_old_and_new_data_manifests_are_shown(small_runs, key):
    source = {"name": "some pairs", key: "CC-BY-4.0", "pairs_taken": 7}
    manifest = {"label_sources": {"human": 7}, "sources": [source, {"name": "others", key: ""}]}
    (small_runs[1] / "data_manifest.json").write_text(json.dumps(manifest))
    section = card_section(small_runs[1])
    assert "| some pairs | CC-BY-4.0 | 7 |" in section
    assert "| others | unknown | – |" in section
    assert "Safety labels by: human." in section


@pytest.mark.parametrize("text", ["{", "[1]", '{"sources": [1]}', '{"sources": [{}]}'])
def test_a_malformed_data_manifest_is_named(small_runs, text):
    (small_runs[1] / "data_manifest.json").write_text(text)
    with pytest.raises(DataError, match=r"data_manifest\.json: not the JSON object that training writes"):
        card_section(small_runs[1])
