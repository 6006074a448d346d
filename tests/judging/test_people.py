"""`people:FILE`: the labels of an answer that its annotators agree on."""

import pytest

from bfpo.core.conversation import user_says
from bfpo.core.files import write_jsonl
from bfpo.core.samples import Completion, Prompt
from bfpo.judging.people import PeopleJudge


def judged(tmp_path, *rows):
    write_jsonl(tmp_path / "labeled.jsonl", [{"prompt": "a box", "text": "a lamp", **row} for row in rows])
    completion = Completion.on(
        Prompt("p", user_says("a box")),
        0,
        text="a lamp",
        finish_reason="stop",
        prompt_tokens=0,
        completion_tokens=1,
        model="",
        engine="",
        settings_hash="",
    )
    (verdict,) = PeopleJudge(str(tmp_path / "labeled.jsonl")).judge([completion])
    return verdict


@pytest.mark.parametrize("order", [1, -1])
def test_labels_that_differ_leave_an_answer_undecided(tmp_path, order):
    verdict = judged(tmp_path, *[{"safe": True}, {"safe": False}][::order])
    assert (verdict.safe, verdict.reason) == (None, "no label, or labels that differ")


@pytest.mark.parametrize("order", [1, -1])
def test_equal_labels_count_and_missing_ones_do_not(tmp_path, order):
    verdict = judged(tmp_path, *[{"safe": True, "refusal": None}, {"safe": True, "refusal": True}][::order])
    assert (verdict.safe, verdict.refusal) == (True, True)
