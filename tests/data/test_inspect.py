"""Tables of `bfpo data inspect`: control tokens of other families of models in texts."""

import json
from pathlib import Path

import pytest

from bfpo.commands.data import inspect_sources
from bfpo.core.conversation import Message, user_says
from bfpo.core.markers import MARKERS, find_markers
from bfpo.core.pairs import PreferencePair
from bfpo.data.inspect import show_markers


def lines_of(pairs, capsys):
    show_markers(pairs)
    return capsys.readouterr().out.splitlines()


def test_control_tokens_are_counted_by_family_and_text(capsys):
    pairs = [
        PreferencePair(user_says("plain"), "a <|im_end|> b", "no"),
        PreferencePair(user_says("<|im_start|>system"), "a <|im_end|><|im_end|>", "[INST] b [/INST]"),
        PreferencePair((Message("user", "x"), Message("assistant", "y <|eot_id|>"), Message("user", "z")), "a", "b"),
        PreferencePair(user_says("plain"), "a", "b"),
    ]
    _, title, head, *rows = lines_of(pairs, capsys)
    assert title == "Control tokens of chat templates in texts, by family of models"
    assert head.split("  ")[0] == "family"
    cells = [[cell.strip() for cell in row.split("  ") if cell.strip()] for row in rows]
    assert cells == [
        ["ChatML (Qwen, Yi, SmolLM)", "2", "1", "2", "0", "<|im_end|> 2, <|im_start|> 1"],
        ["Llama 2", "1", "0", "0", "1", "[/INST] 1, [INST] 1"],
        ["Llama 3", "1", "1", "0", "0", "<|eot_id|> 1"],
    ]


def test_texts_without_control_tokens_have_no_table(capsys):
    assert lines_of([PreferencePair(user_says("a < b | c > d"), "[x]", "</p>")], capsys) == []


@pytest.mark.parametrize("marker", MARKERS)
def test_every_marker_is_found_where_markers_overlap_too(marker):
    assert marker in find_markers(f"a{marker}b")
    assert find_markers(f"<{marker}") >= {marker}
    assert find_markers("|".join(MARKERS)) == set(MARKERS)


def test_data_inspect_shows_them(tmp_path, capsys):
    row = {"prompt": "p", "chosen": "a <end_of_turn> b", "rejected": "c"}
    file = Path(tmp_path / "pairs.jsonl")
    file.write_text(json.dumps(row | {"is_chosen_safe": True, "is_rejected_safe": True}) + "\n")
    inspect_sources([str(file)], tokenizer=None, max_length=64, examples=0, limit=None)
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("Gemma"))
    assert line.split() == ["Gemma", "1", "0", "1", "0", "<end_of_turn>", "1"]
