"""Files of judges that earlier versions wrote give the same verdicts."""

import json
from pathlib import Path

from bfpo.core.samples import Completion
from bfpo.judging.linear import lacks_likeness, load_judge, save_judge

GOLDEN = Path(__file__).parent / "golden"


def test_a_file_of_format_2_gives_the_verdicts_that_it_gave_then():
    content = json.loads((GOLDEN / "linear-format-2.json").read_text())
    judge = load_judge(GOLDEN / "linear-format-2.npz")
    verdicts = judge.judge([Completion.from_row(row) for row in content["completions"]])
    # Bit by bit, the revision included: files of verdicts are found by it.
    assert [verdict.to_row() for verdict in verdicts] == content["verdicts"]
    assert judge.likeness is None
    assert lacks_likeness(GOLDEN / "linear-format-2.npz")


def test_a_judge_of_refusals_needs_no_rule_for_unlike_answers(tmp_path):
    old = load_judge(GOLDEN / "linear-format-2.npz")
    save_judge({"refusal": old.heads["refusal"]}, tmp_path / "refusal.npz")
    save_judge({"safe": old.heads["safe"]}, tmp_path / "safe.npz")
    assert not lacks_likeness(tmp_path / "refusal.npz")
    assert lacks_likeness(tmp_path / "safe.npz")
