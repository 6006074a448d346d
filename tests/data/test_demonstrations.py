"""Demonstrations from pairs: which answers are imitated."""

import pytest

from bfpo.config.recipes import Source
from bfpo.core.files import write_jsonl
from bfpo.data.demonstrations import load_demonstrations

ROW = {
    "prompt": "a box",
    "chosen": "lamp one",
    "rejected": "door two",
    "is_chosen_safe": True,
    "is_rejected_safe": True,
}


@pytest.mark.parametrize(
    ("use", "cut", "imitated"),
    [
        ("safer", {}, ["lamp one"]),
        ("both", {}, ["lamp one", "door two"]),
        ("safer", {"is_chosen_cut": True}, []),
        ("both", {"is_chosen_cut": True}, ["door two"]),
        ("rejected", {"is_chosen_cut": True}, ["door two"]),
    ],
)
def test_an_answer_that_was_cut_is_not_imitated_and_counted(use, cut, imitated, tmp_path):
    write_jsonl(tmp_path / "p.jsonl", [ROW | cut, ROW | {"prompt": "a wall"}])
    report, demonstrations = load_demonstrations(Source(path=str(tmp_path / "p.jsonl"), use=use))
    texts = [
        demonstration.completion for demonstration in demonstrations if demonstration.prompt[0].content == "a box"
    ]
    assert texts == imitated
    removed = {reason.text: count for reason, count in report.removed.items()}
    assert removed == ({"answer cut": 1} if use != "rejected" and cut else {})
